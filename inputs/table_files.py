"""The rows of a file that others wrote: JSON, JSON lines, CSV or Parquet, as plain values."""

import tempfile
from typing import Any

from inputs import formats
from inputs.errors import InputError, one_line

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def read(path):
    """(what a file says of all its rows {key: value}, its rows, each {column: value}).

    The first is empty but for a JSON object with Instances. Raises InputError naming file and row.
    """
    if path.suffix == ".json":
        content, _ = formats.read(path, Any)
        head = content if isinstance(content, dict) else {}
        rows = head.pop("Instances", None) if head else content
        if not isinstance(rows, list):
            raise InputError(f"{path} is neither a list of rows nor an object with a list of "
                             "Instances")
    elif path.suffix == ".jsonl":  # not by datasets: it would take "2020-01-31" for a time
        head, rows = {}, formats.read_lines(path, Any)
    elif path.suffix in SUFFIXES:
        head, rows = {}, _by_datasets(path)
    else:
        raise InputError(f"{path} is of no known kind: allowed are {', '.join(SUFFIXES)}")
    if not rows:
        raise InputError(f"{path} holds no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number} has no named columns: {str(row)!r:.60}")
    return head, rows


def _by_datasets(path):
    """The rows of a CSV or Parquet file. All of a CSV file is text: 007 and NA stay as they are."""
    import datasets  # seconds, which no other command needs
    import pandas

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what is raised
    options = {}
    try:
        if path.suffix == ".csv":
            columns = pandas.read_csv(path, nrows=0).columns
            text = datasets.Value("string")
            options = {"features": datasets.Features(dict.fromkeys(columns, text)),
                       "keep_default_na": False}
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(path.suffix[1:], data_files=[str(path)], split="train",
                                         cache_dir=cache, **options).to_list()
    except Exception as error:  # noqa: BLE001 (the libraries raise anything on a damaged file)
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"cannot read {path}: {one_line(reason):.300}") from None
