"""Make task folders of files in another layout: `python data.py convert SOURCE --to FOLDER`."""

import csv
import io
import json
import math
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msgspec import Struct

from inputs import formats
from inputs.errors import InputError, library_errors
from inputs.files import atomic_folder, check_free, write_json
from inputs.numbers import PositiveInt, stable_seed
from inputs.settings import REQUIRED, Flag
from inputs.task_files import METRICS, SPLITS, joined, listed, read_task, resolve_names

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
LARGEST_CELL = 2**30  # characters; the csv module allows 131,072 by default
# Columns of input and output; the first pair that a file has is read.
PAIRS = (("input", "output"), ("prompt", "completion"), ("question", "answer"),
         ("prompt", "answer"), ("sentence", "label"), ("text", "label"), ("inputs", "targets"),
         ("context", "response"), ("instruction", "output"), ("instruction", "response"))
# As in OpenAI's and ShareGPT's chats; a chat with other roles is left out.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}
TEST_ITEMS = 100
# A task's name and split: reviews_train, test, train-00000-of-00001.
FILE_NAME = re.compile(r"(.*?)(?:(?:^|[\s._-])(train|test|dev|eval|val|valid|validation)"
                       r"(?:-\d+-of-\d+(?:-[0-9a-f]{16})?)?)?", re.DOTALL | re.IGNORECASE)
LEFT_OUT = "left out"  # keys, columns and files
SAVED = {"dataset_dict.json"}, {"dataset_info.json", "state.json"}  # what save_to_disk writes
PACKED = re.compile(r"(\.(jsonl?|[ct]sv|parquet|xlsx?|txt|gz|zip|zst|bz2|xz))+$", re.IGNORECASE)
FLAGS = (
    Flag("source", str, REQUIRED, "a file, a folder, or the name of a dataset on the Hugging Face "
         "hub: OWNER/NAME, or OWNER/NAME:CONFIGURATION", "SOURCE", positional=True),
    Flag("to", Path, REQUIRED, "new folder for the suite", "FOLDER"),
    Flag("tasks", tuple[str, ...] | None, None, "tasks to convert, by name or T-number such "
         "as T363 (default: all)", "TASK"),
    Flag("metric", Literal[METRICS] | None, None, "metric of all tasks (default: what the files "
         "say, accuracy beside a labels.json, otherwise rouge_l)"),
    Flag("test_items", PositiveInt | None, None, "number of test instances to draw where there is "
         f"no test file, at most half of a task (default: {TEST_ITEMS})", "N"),
    Flag("input_column", str | None, None, "column of a table to read as input (default: "
         f"{', '.join(dict.fromkeys(pair[0] for pair in PAIRS))})", "COLUMN"),
    Flag("output_column", str | None, None, "column of a table to read as output (default: "
         f"{', '.join(dict.fromkeys(pair[1] for pair in PAIRS))})", "COLUMN"),
)


class Files(NamedTuple):
    """Where a task's rows are: a path or a datasets.Dataset by split."""

    folder: Path
    splits: dict[str, Any]


class Head(Struct):
    """The keys of a task file beside Instances that are kept."""

    Definition: str | list[str] = ""
    Categories: str | list[str] = []
    Category: str | None = None
    Metric: str | None = None


class Notes(dict):
    """Lines to print at the end: {text: names of the tasks, columns or files it holds for}."""

    def add(self, text, *names):
        self.setdefault(text, {}).update(dict.fromkeys(names))

    def lines(self):
        return [text + ": " * bool(names) + listed(list(names)) for text, names in self.items()
                if names or text != LEFT_OUT]


def convert(args):
    """Write the suite --to from SOURCE, complete or not at all; return lines about it.

    Raises InputError naming what cannot be read, before anything is written to --to.
    """
    check_free(args.to, "to")
    notes, lines = Notes(), []
    files = _find_tasks(args.source, notes)
    with atomic_folder(args.to) as suite:
        for found in resolve_names(args.tasks, list(files)) if args.tasks else files:
            name = _folder_name(found, notes)
            if (suite / name).exists():
                raise InputError(f"two tasks would be named {name}")
            content = _make_task(name, files[found], args, notes)
            lines.append(_write_task(suite / name, content))
    return [*lines, *notes.lines(), f"{args.to} is written: python train.py --suite {args.to}"]


# --- finding ------------------------------------------------------------------------------------


def _find_tasks(source, notes):
    """Return {task: Files} of a file, a folder or a dataset of the hub. Raises InputError."""
    place, found = Path(source), {}
    if not place.exists() or place.is_dir() and any(
            names <= {path.name for path in place.iterdir()} for names in SAVED):
        return _find_dataset(source, place, notes)
    if place.is_file():
        return {place.stem: Files(place.parent, {"train": place})}
    files = {}  # {path: (name, split)}
    for path in sorted(place.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
        if not path.is_file() or hidden:
            continue
        if path.suffix.lower() in SUFFIXES:
            name, split = FILE_NAME.fullmatch(path.stem).groups()
            files[path] = name, split and split.lower()
        elif PACKED.search(path.name) and FILE_NAME.fullmatch(PACKED.sub("", path.name))[2]:
            notes.add(LEFT_OUT, path.name)
    by_folder = any((name, split) == ("", "train") for name, split in files.values())
    for path, (name, split) in files.items():
        if by_folder and name or split not in (None, *SPLITS):
            notes.add(LEFT_OUT, *{path.name} - {"labels.json"})
            continue
        name, split = name or path.parent.absolute().name, split or "train"
        task = found.setdefault(name, Files(path.parent, {}))
        if task.folder != path.parent or split in task.splits:
            raise InputError(f"two files of task {name}, {split}: {path} and "
                             f"{task.splits.get(split, task.folder)}")
        task.splits[split] = path
    if not found:
        others = f"; left out: {listed(list(notes[LEFT_OUT]))}" if LEFT_OUT in notes else ""
        raise InputError(f"{source} holds no file of {', '.join(SUFFIXES)} to convert{others}")
    lower = {name.lower(): name for name in found}
    for name, mine in lower.items():
        twin = lower.get(name.replace("test", "train"), mine)
        if twin != mine and found[mine].splits.keys() == found[twin].splits.keys() == {"train"}:
            raise InputError(f"{mine} and {twin} look like the two files of one task: name them "
                             "NAME_test and NAME_train")
    for files in found.values():
        if "train" not in files.splits:
            raise InputError(f"{files.splits['test']}: there is no train file beside it")
    return found


def _find_dataset(source, place, notes):
    """Return {task: Files} of a folder that save_to_disk wrote, or of a dataset on the hub."""
    if not place.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise InputError(f"{source} does not exist; `python data.py convert --help` lists the "
                         "forms of SOURCE")
    import datasets  # here, because it takes seconds

    with library_errors(f"cannot read {source}" if place.exists() else
                        f"{source} does not exist here, and cannot be read from the hub"):
        read = (datasets.load_from_disk(place) if place.exists()
                else datasets.load_dataset(*source.split(":")))
    if isinstance(read, datasets.Dataset):
        read = {"train": read}
    if "train" not in read:
        raise InputError(f"{source} has the splits {', '.join(read)}, but no train")
    splits = {split: read[split] for split in SPLITS if split in read}
    notes.add(LEFT_OUT, *sorted(read.keys() - splits.keys()))
    return {re.split("[/:]", source.rstrip("/"))[-1]: Files(place, splits)}


# --- reading ------------------------------------------------------------------------------------


def _read_rows(source, notes):
    """Return (the keys beside Instances, the rows {column: value}) of a path or datasets.Dataset.

    Only a JSON object with Instances has such keys. Raises InputError naming file and row.
    """
    head, suffix = {}, source.suffix.lower() if isinstance(source, Path) else None
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
            rows = _read_dataset(datasets.Dataset(pyarrow.parquet.read_table(source)))
    elif suffix is None:
        rows = _read_dataset(source)
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
    content = formats.convert(formats.load(path), Any, path)
    head = content if isinstance(content, dict) else {}
    rows = head.pop("Instances", None) if head else content
    if not isinstance(rows, list):
        raise InputError(f"{path} is neither a list of rows nor an object with a list of Instances")
    return head, rows


def _read_csv(path, notes):
    """Return the rows of a CSV or TSV file, in which every value stays text: 007, NA."""
    text = formats.text(path)
    header = next(io.StringIO(text, newline=None), "")  # a line may end with \r alone
    csv.field_size_limit(LARGEST_CELL)
    separator = max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), ())))
    if separator != ",":
        notes.add(f"columns separated by {separator!r}", path.name)
    rows, reader = [], csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = next(reader, ())
        if len(set(columns)) < len(columns):
            raise InputError(f"{path}: two columns have the same name: {columns}")
        for values in filter(None, reader):
            if len(values) != len(columns):
                raise InputError(f"{path}, line {reader.line_num} has {len(values)} values, the "
                                 f"first line names {len(columns)} columns")
            lines = "\t".join(values).split("\n")
            if separator == "\t" and len(lines) > 1 and all(
                    line.count("\t") == len(columns) - 1 for line in lines):
                raise InputError(f"{path}, line {reader.line_num} ends a text in quotation marks "
                                 "that holds whole rows: write a quotation mark within a text "
                                 "twice, and quote the text")
            rows.append(dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _read_dataset(dataset):
    """Return the rows of a datasets.Dataset, with the names of its class labels as values."""
    def name(feature, value):
        if hasattr(feature, "names"):  # -1 stands for no class
            return feature.names[value] if value in range(len(feature.names)) else None
        if isinstance(value, list) and hasattr(feature, "feature"):
            return [name(feature.feature, each) for each in value]
        return value

    return [{column: name(dataset.features[column], value) for column, value in row.items()}
            for row in dataset.to_list()]


def _first_exchange(row):
    """Turn the chat of a row into the columns system, input, output -> (row, what was done or "").

    The row is None, so left out, where the chat does not begin with an exchange of user and
    assistant, or continues an earlier conversation.
    """
    history = row.get("history")
    if history and (isinstance(history, list) or str(history).startswith(("[[", "[{"))):  # in a CSV
        return None, "left out: they continue an earlier conversation (column history)"
    parts = [row.get(name) for name in ("prompt", "completion")]
    key = "messages" if "messages" in row else "conversations"
    turns = parts[0] + parts[1] if all(isinstance(part, list) for part in parts) else row.get(key)
    if not isinstance(turns, list):
        return row, ""
    said = [(ROLES.get(str(turn.get("role", turn.get("from")))),
             turn.get("content", turn.get("value"))) for turn in turns if isinstance(turn, dict)]
    start = 1 if said and said[0][0] == "system" else 0
    roles = [role for role, _ in said[start:start + 2]]
    texts = [row.get("system") or "", *(text for _, text in said[:start + 2])]
    if roles != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        return None, "left out: they do not begin with a text of the user and one of the assistant"
    *system, question, answer = texts
    rest = {name: value for name, value in row.items()
            if name not in ("prompt", "completion", key)}
    row = rest | {"system": "\n\n".join(filter(None, system)), "input": question, "output": answer}
    return row, "cut to their first exchange" if len(turns) > start + 2 else ""


def _without_chats(rows, file, notes):
    """Return (number, row) of the rows, with the first exchange of a chat as columns."""
    kept, counts = [], Counter()
    for number, row in enumerate(rows, start=1):
        row, done = _first_exchange(row)
        counts[done] += bool(done)
        if row is not None:
            kept.append((number, row))
    for done, count in (+counts).items():
        notes.add(f"{file}: {count} of {len(rows)} chats {done}")
    if not kept:
        raise InputError(f"{file}: all {len(rows)} chats {done}")
    return kept


def _choose_columns(existing, args, path):
    """Return {role: column, or "" for none}. Raises InputError naming the existing columns."""
    names = f"{path} has the columns {', '.join(map(repr, existing))}"
    for flag in ("input_column", "output_column"):
        column = getattr(args, flag)
        if column is not None and column not in existing:
            raise InputError(f"{names}, not --{flag} {column!r}")
    pairs = [(args.input_column or first, args.output_column or second) for first, second in PAIRS]
    pair = next((pair for pair in pairs
                 if set(pair) <= set(existing) and pair[0] != pair[1]), None)
    if pair is None:
        raise InputError(f"{names}: name those to read with --input_column and --output_column")
    return {"input": pair[0], "output": pair[1]} | {
        name: name if name in existing and name not in pair else ""
        for name in ("instruction", "system", "id")}


def _is_missing(value, may_be_empty):
    """Return whether a value holds no answer: null, NaN, an empty list, or an empty text."""
    values = value if isinstance(value, list) else [value]
    return not values or any(each is None or each != each
                             or not may_be_empty and isinstance(each, str) and not each.strip()
                             for each in values)


def _as_text(value, where):
    """Return a value as text, "" for null or NaN. Raises InputError for a list or an object."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    raise InputError(f"{where}: {str(value)!r:.60} is neither a text nor a number")


# --- writing ------------------------------------------------------------------------------------


def _folder_name(text, notes):
    """Return a task's name with the characters that a folder may have. Raises InputError."""
    name = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._")[:200]
    if not name:
        raise InputError(f"no folder can be named after the task {text!r}: allowed are letters, "
                         "digits, '_', '-' and '.'")
    if name != text:
        notes.add(f"named after {text!r}", name)
    return name


def _make_task(name, files, args, notes):
    """Return the content of a task's two files, by split. Raises InputError."""
    head, tables, instances, declared = None, {}, {}, False
    for split, source in sorted(files.splits.items(), reverse=True):  # train first
        said, rows = _read_rows(source, notes)
        declared |= bool(said)
        notes.add(LEFT_OUT, *sorted(said.keys() - set(Head.__struct_fields__)))
        said = formats.convert(said, Head, source, verdict="")
        said.Definition = joined(said.Definition)
        if head is not None and said != head:
            raise InputError(f"{source} has another Definition, Category or Metric than "
                             f"{files.splits['train']}")
        head, file = said, source if isinstance(source, Path) else f"{args.source}, split {split}"
        tables[split] = file, _without_chats(rows, file, notes)
    existing = list(dict.fromkeys(column for _, rows in tables.values() for _, row in rows
                                  for column in row))
    columns = _choose_columns(existing, args, files.splits["train"])
    notes.add(LEFT_OUT, *sorted(set(existing) - set(columns.values())))
    for split, (file, rows) in tables.items():
        # In a file with Instances an empty output may be meant; in a table it is an empty cell.
        missing = [number for number, row in rows
                   if _is_missing(row.get(columns["output"]), declared)]
        if split == "test" and len(missing) == len(rows):
            notes.add(f"not used, because no row has a {columns['output']}", str(file))
            continue
        if missing:
            more = f", nor have {len(missing) - 1} other rows" if len(missing) > 1 else ""
            raise InputError(f"{file}, row {missing[0]} has no {columns['output']}{more}")
        instances[split] = [_make_instance(row, columns, head, f"{file}, row {number}")
                            for number, row in rows]
    return _finish(name, files, head, instances, args, notes)


def _make_instance(row, columns, head, where):
    """Return {"id", "input", "output", "definition"} of a row. Raises InputError."""
    text = {name: _as_text(row.get(column), f"{where}, {column}") if column else ""
            for name, column in columns.items() if name != "output"}
    definition = "\n\n".join(filter(None, (text["system"], text["instruction"])))
    if not (text["input"] or definition or head.Definition):
        raise InputError(f"{where} is empty: there is nothing to answer")
    output = row[columns["output"]]
    output = [_as_text(value, f"{where}, {columns['output']}")
              for value in (output if isinstance(output, list) else [output])]
    return {"id": text["id"], "input": text["input"], "output": output, "definition": definition}


def _finish(name, files, head, splits, args, notes):
    """Return the content of a task's two files: with definition, ids and test instances."""
    instances = [instance for split in splits.values() for instance in split]
    definitions = {instance["definition"] for instance in instances}
    definition = head.Definition
    if len(definitions) == 1 and not definition:
        (definition,) = definitions
    elif definitions != {""}:
        notes.add("instructions differ between rows and are put before the inputs", name)
        for instance in instances:
            instance["input"] = "\n\n".join(filter(None, (instance["definition"],
                                                          instance["input"])))
    if not definition:
        notes.add("Definition is empty", name)
    for split, rows in splits.items():
        _name_instances(rows, name if len(splits) == 1 else f"{name}-{split}", name, notes)
    if "test" not in splits:
        splits = _draw_test(name, instances, args.test_items or TEST_ITEMS)
        notes.add("test instances drawn from the training file (--test_items)", name)
    elif args.test_items:
        raise InputError(f"--test_items has no effect: {name} has a test file")
    group = files.folder.parent  # a folder between a task's folder and SOURCE is its category
    categories = [head.Categories] if isinstance(head.Categories, str) else head.Categories
    category = head.Category or ", ".join(categories) or (
        group.name if Path(args.source) in group.parents else None)
    metric = args.metric or head.Metric or (
        "accuracy" if (files.folder / "labels.json").exists() else None)
    about = {"Definition": definition} | ({"Category": category} if category else {}) | (
        {"Metric": metric} if metric else {})
    return {split: about | {"Instances": [{key: instance[key] for key in ("id", "input", "output")}
                                          for instance in rows]}
            for split, rows in splits.items()}


def _name_instances(instances, stem, task, notes):
    """Number the instances, unless each has an id of its own."""
    ids = {instance["id"] for instance in instances}
    if len(ids) == len(instances) and "" not in ids:
        return
    if ids != {""}:
        notes.add("rows were numbered, because ids are missing or repeated", task)
    for index, instance in enumerate(instances):
        instance["id"] = f"{stem}-{index}"


def _draw_test(name, instances, count):
    """Return {"train", "test"}: `count` instances for the test, at most half.

    The draw is by instance id: the same whatever the order of the rows.
    """
    count = min(count, len(instances) // 2)
    if not count:
        raise InputError(f"{name} has one instance: none is left for a test")
    ranked = sorted(instance["id"] for instance in instances)
    drawn = set(random.Random(stable_seed("test", name)).sample(ranked, count))
    return {split: [instance for instance in instances
                    if (instance["id"] in drawn) == (split == "test")] for split in SPLITS}


def _write_task(folder, content):
    """Write a task's files, read them as a run does, and return a line about the task."""
    for split in SPLITS:
        write_json(folder / f"{split}.json", content[split])
    try:
        task = read_task(folder)
    except InputError as error:
        raise InputError(str(error).replace(f"{folder.parent}{os.sep}", "made of it: ")) from None
    return (f"{task.name}: {len(task.train)} training and {len(task.test)} test instances, "
            f"{task.metric}, {task.category}")
