"""Read the rows of files that others wrote: JSON, JSON lines, CSV, TSV and Parquet."""

import csv
import io
from typing import Any

from inputs import formats
from inputs.errors import InputError, library_errors

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
LARGEST_CELL = 2**30  # characters; the csv module allows 131,072 by default
# As in OpenAI's and ShareGPT's chats; a chat with other roles is left out.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}


def read(source, notes):
    """Return (the keys beside Instances, the rows {column: value}) of a path or datasets.Dataset.

    Only a JSON object with Instances has such keys. Raises InputError naming file and row.
    """
    head = {}
    suffix = getattr(source, "suffix", None)
    if suffix == ".json":
        head, rows = _read_json(source)
    elif suffix == ".jsonl":
        rows = formats.read_lines(source, Any)
    elif suffix in (".csv", ".tsv"):
        rows = _read_csv(source, notes)
    elif suffix == ".parquet":
        import datasets  # here, because it takes seconds
        import pyarrow.parquet

        with library_errors(f"cannot read {source}"):
            rows = _named_rows(datasets.Dataset(pyarrow.parquet.read_table(source)))
    elif suffix is None:
        rows = _named_rows(source)
    else:
        raise InputError(f"{source}: unknown format; allowed are {', '.join(SUFFIXES)}")
    if not rows:
        raise InputError(f"{source} holds no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{source}, row {number} has no named columns: {str(row)!r:.60}")
    return head, rows


def _read_json(path):
    first, _, rest = formats.text(path).strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        return {}, formats.read_lines(path, Any)  # JSON lines in a .json file
    content, _ = formats.read(path, Any)
    head = content if isinstance(content, dict) else {}
    rows = head.pop("Instances", None) if head else content
    if not isinstance(rows, list):
        raise InputError(f"{path} is neither a list of rows nor an object with a list of Instances")
    return head, rows


def _read_csv(path, notes):
    """Return the rows of a CSV or TSV file, whose values all stay text: 007, NA, 2020-01-31."""
    text = formats.text(path)
    header = text.partition("\n")[0]
    separator = max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), ())))
    if separator != ",":
        notes.say(f"columns separated by {separator!r}", path.name)
    csv.field_size_limit(LARGEST_CELL)
    rows, reader = [], csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = next(reader, ())
        if len(set(columns)) < len(columns):
            raise InputError(f"{path}: two columns have the same name: {columns}")
        for values in filter(None, reader):
            if len(values) != len(columns):
                raise InputError(f"{path}, line {reader.line_num} has {len(values)} values, the "
                                 f"first line names {len(columns)} columns")
            rows.append(dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _named_rows(dataset):
    """Return the rows of a datasets.Dataset, with the names of its class labels as values."""
    return [{column: _name(dataset.features[column], value) for column, value in row.items()}
            for row in dataset.to_list()]


def _name(feature, value):
    """Return the name of a class label, None for no class (-1 by convention); else the value."""
    if hasattr(feature, "names"):
        return feature.names[value] if value in range(len(feature.names)) else None
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_name(feature.feature, each) for each in value]
    return value


def single_turn(row):
    """Return (a row whose chat has become columns, what was done with the chat or "").

    The columns are system, input and output. The row is None where the chat has no first exchange
    of user and assistant, or where a history of other turns belongs to it.
    """
    if row.get("history"):
        return None, "left out: a history of other turns belongs to them"
    parts = [row.get(name) for name in ("prompt", "completion")]
    key = "messages" if "messages" in row else "conversations"
    turns = parts[0] + parts[1] if all(isinstance(part, list) for part in parts) else row.get(key)
    if not isinstance(turns, list):
        return row, ""
    said = [(ROLES.get(str(turn.get("role", turn.get("from")))),
             turn.get("content", turn.get("value"))) for turn in turns if isinstance(turn, dict)]
    start = 1 if said and said[0][0] == "system" else 0
    roles = [role for role, _ in said[start:start + 2]]
    system, *exchange = (row.get("system") or "", *(text for _, text in said[:start + 2]))
    if roles != ["user", "assistant"] or not all(
            isinstance(text, str) for text in (system, *exchange)):
        return None, "left out: they do not begin with a text of the user and one of the assistant"
    system = "\n\n".join(filter(None, (system, *exchange[:start])))
    rest = {name: value for name, value in row.items()
            if name not in ("prompt", "completion", key)}
    row = rest | {"system": system, "input": exchange[start], "output": exchange[start + 1]}
    return row, "cut to their first exchange" if len(turns) > start + 2 else ""
