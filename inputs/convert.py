"""Make task folders of files in another layout: `python data.py convert SOURCE --to FOLDER`."""

import json
import math
import os
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from msgspec import Struct

from inputs import formats, table_files
from inputs.errors import InputError, library_errors
from inputs.files import write_json
from inputs.numbers import PositiveInt, stable_seed
from inputs.settings import REQUIRED, Flag
from inputs.task_files import METRICS, SPLITS, listed, read_task, resolve_names

# Columns of input and output; the first pair that a file has is read.
PAIRS = (("input", "output"), ("prompt", "completion"), ("question", "answer"),
         ("prompt", "answer"), ("sentence", "label"), ("text", "label"), ("inputs", "targets"),
         ("context", "response"), ("instruction", "output"), ("instruction", "response"))
TEST_ITEMS = 100
FILE_NAME = re.compile(r"(.*?)[._-]?(train|test|dev|eval|valid|validation)?(?:-\d+-of-\d+)?")
LEFT_OUT = "left out"  # keys, columns and files
FLAGS = (
    Flag("source", str, REQUIRED, "a file, a folder, or the name of a dataset on the Hugging Face "
         "hub: OWNER/NAME, or OWNER/NAME:CONFIGURATION", "SOURCE", positional=True),
    Flag("to", Path, REQUIRED, "the new suite", "FOLDER"),
    Flag("tasks", tuple[str, ...] | None, None, "only these, by name or T-number (T363)", "TASK"),
    Flag("metric", Literal[METRICS] | None, None, "of all tasks (default: what the files say, "
         "accuracy beside a labels.json, otherwise rouge_l)"),
    Flag("test_items", PositiveInt | None, None, "number of test instances to draw where there is "
         f"no test file, at most half of a task (default: {TEST_ITEMS})", "N"),
    Flag("input_column", str | None, None, "column of a table to read as input (default: "
         f"{', '.join(dict.fromkeys(pair[0] for pair in PAIRS))})", "COLUMN"),
    Flag("output_column", str | None, None, "column of a table to read as output (default: "
         f"{', '.join(dict.fromkeys(pair[1] for pair in PAIRS))})", "COLUMN"),
    Flag("task_column", str | None, None, "column whose values each become a task (default: a file "
         "is a task)", "COLUMN"),
)


class Files(NamedTuple):
    """Where a task's rows are: paths, or datasets.Dataset, by split."""

    folder: Path
    splits: dict[str, list]


class Head(Struct):
    """What is kept of what a task file says beside its Instances."""

    Definition: str | list[str] = ""
    Categories: list[str] = []
    Category: str | None = None
    Metric: str | None = None


class Notes:
    """Lines to print at the end: each a text, with names where it is true of several."""

    def __init__(self):
        self.names = {}

    def say(self, text, *names):
        self.names.setdefault(text, {}).update(dict.fromkeys(names))

    def lines(self):
        return [text + ": " * bool(names) + listed(list(names))
                for text, names in self.names.items() if names or text != LEFT_OUT]


def convert(args):
    """Write the suite --to from SOURCE, whole or not at all; return lines about it.

    Raises InputError naming what cannot be read, before anything is written to --to.
    """
    if args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
        raise InputError(f"--to {args.to} is in use: name a new folder, or an empty one")
    notes, lines, to = Notes(), [], args.to.absolute()
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
        suite = Path(temporary) / to.name
        for name, content in _read_tasks(args, notes):
            lines.append(_write_task(suite / name, content, notes))
        os.replace(suite, to)
    return [*lines, *notes.lines(), f"{args.to} is written: python train.py --suite {args.to}"]


# --- finding ------------------------------------------------------------------------------------


def _find_tasks(source, notes):
    """Return {task: Files} of a file, a folder or a dataset of the hub. Raises InputError."""
    place, found = Path(source), {}
    if not place.exists() or (place / "dataset_dict.json").exists():
        return _find_by_datasets(source, place, notes)
    if place.is_file():
        return {place.stem: Files(place.parent, {"train": [place]})}
    files = {path: FILE_NAME.fullmatch(path.stem).groups() for path in sorted(place.rglob("*"))
             if path.suffix in table_files.SUFFIXES and path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(place).parts)}
    by_folder = any((name, split) == ("", "train") for name, split in files.values())
    for path, (name, split) in files.items():
        folder = path.parent.parent if path.parent.name == "data" else path.parent
        if by_folder and name or split not in (None, *SPLITS):
            notes.say(LEFT_OUT, *{path.name} - {"labels.json"})
            continue
        name, split = name or folder.absolute().name, split or "train"
        paths = found.setdefault(name, Files(folder, {})).splits.setdefault(split, [])
        if found[name].folder != folder or paths and "-of-" not in path.name:
            raise InputError(f"two files of task {name}, {split}: {path} and "
                             f"{paths[0] if paths else found[name].folder}")
        paths.append(path)
    if not found:
        raise InputError(f"{source} holds no file of {', '.join(table_files.SUFFIXES)} to convert")
    for files in found.values():
        if "train" not in files.splits:
            raise InputError(f"{files.splits['test'][0]}: there is no train file beside it")
    return found


def _find_by_datasets(source, place, notes):
    """Return {task: Files} of a folder that save_to_disk wrote, or of a dataset on the hub."""
    if not place.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise InputError(f"{source} does not exist")
    import datasets  # here, because it takes seconds

    with library_errors(f"cannot read {source}" if place.exists() else
                        f"{source} does not exist here, and cannot be read from the hub"):
        read = (datasets.load_from_disk(place) if place.exists()
                else datasets.load_dataset(*source.split(":")))
        splits = {"train": [read["train"]]} | (
            {"test": [read["test"]]} if "test" in read else {})
    notes.say(LEFT_OUT, *sorted(read.keys() - splits.keys()))
    return {re.split("[/:]", source)[-1]: Files(place, splits)}


# --- reading ------------------------------------------------------------------------------------


def _read_tasks(args, notes):
    """Yield (name, {"train", "test": content of its file}) of every task."""
    files, done = _find_tasks(args.source, notes), set()
    by_column = bool(args.task_column)
    chosen = args.tasks and not by_column
    for place in resolve_names(args.tasks, list(files)) if chosen else files:
        head, groups = _read_files(files[place], args, notes)
        chosen = args.tasks and by_column
        for found in resolve_names(args.tasks, list(groups)) if chosen else groups:
            name = _folder_name(found if by_column else place, notes)
            if name in done:
                raise InputError(f"two tasks would be named {name}")
            done.add(name)
            yield name, _finish(name, files[place], head, groups[found], args, notes)


def _read_files(files, args, notes):
    """Return (Head of a task's files, {value of the task column: {split: instances}})."""
    head, declared, read = None, False, {}
    for split in SPLITS:
        for source in files.splits.get(split, ()):
            said, rows = table_files.read(source, notes)
            declared |= bool(said)
            notes.say(LEFT_OUT, *sorted(said.keys() - set(Head.__struct_fields__)))
            said = formats.convert(said, Head, source, verdict="")
            if head is not None and said != head:
                raise InputError(f"{source} has another Definition, Category or Metric than "
                                 f"{files.splits['train'][0]}")
            head = said
            where = source if isinstance(source, Path) else f"{args.source}, split {split}"
            read.setdefault(split, []).extend(
                (row, f"{where}, row {number}") for number, row in enumerate(rows, start=1))
    read = {split: _without_chats(rows, notes) for split, rows in read.items()}
    there = dict.fromkeys(column for rows in read.values() for row, _ in rows for column in row)
    columns = _choose_columns(list(there), args, files.splits["train"][0])
    notes.say(LEFT_OUT, *sorted(there.keys() - set(columns.values())))
    groups = {}
    for split, rows in read.items():
        # In a file with Instances an empty output may be meant; in a table it is an empty cell.
        missing = [where for row, where in rows
                   if _is_missing(row.get(columns["output"]), declared)]
        if split == "test" and len(missing) == len(rows):
            notes.say(f"not used, because no row has a {columns['output']}",
                      *{where.rpartition(", row")[0]: None for where in missing})
            continue
        if missing:
            more = f", nor have {len(missing) - 1} other rows" if len(missing) > 1 else ""
            raise InputError(f"{missing[0]} has no {columns['output']}{more}")
        for row, where in rows:
            task, instance = _read_row(row, columns, head, where)
            groups.setdefault(task, {}).setdefault(split, []).append(instance)
    for task, splits in groups.items():
        if len(splits) < max(map(len, groups.values())) or "train" not in splits:
            raise InputError(f"task {task!r} is in only one of the train and test files of "
                             f"{args.source}")
    return head, groups


def _without_chats(rows, notes):
    """Return the rows with the first exchange of a chat as columns, and say what was left out."""
    kept, counts = [], Counter()
    for row, where in rows:
        row, done = table_files.single_turn(row)
        counts[done] += 1
        if row is not None:
            kept.append((row, where))
    del counts[""]
    file = rows[0][1].rpartition(", row")[0]
    for done, count in counts.items():
        notes.say(f"{file}: {count} of {len(rows)} chats {done}")
    if not kept:
        raise InputError(f"{file}: all {len(rows)} chats {done}")
    return kept


def _choose_columns(there, args, path):
    """Return {what: column, or "" for none}. Raises InputError naming the columns there are."""
    names = f"{path} has the columns {', '.join(map(repr, there))}"
    for flag in ("input_column", "output_column", "task_column"):
        column = getattr(args, flag)
        if column is not None and column not in there:
            raise InputError(f"{names}, not --{flag} {column!r}")
    pairs = [(args.input_column or first, args.output_column or second) for first, second in PAIRS]
    pair = next((pair for pair in pairs if set(pair) <= set(there)), None)
    if pair is None:
        raise InputError(f"{names}: name those to read with --input_column and --output_column")
    usual = {name: name if name in there and name not in pair else ""
             for name in ("instruction", "system", "id")}
    return usual | {"input": pair[0], "output": pair[1], "task": args.task_column or ""}


def _is_missing(value, may_be_empty):
    """Return whether a value is no answer: null, NaN, an empty list, or an empty text."""
    values = value if isinstance(value, list) else [value]
    return not values or any(each is None or each != each
                             or not may_be_empty and isinstance(each, str) and not each.strip()
                             for each in values)


def _read_row(row, columns, head, where):
    """Return (the row's task or None, {"where", "id", "input", "output", "definition"})."""
    text = {name: _as_text(row.get(column), f"{where}, {column}") if column else ""
            for name, column in columns.items() if name != "output"}
    definition = "\n\n".join(filter(None, (text["system"], text["instruction"])))
    if not (text["input"] or definition or head.Definition):
        raise InputError(f"{where} is empty: there is nothing to answer")
    if columns["task"] and not text["task"]:
        raise InputError(f"{where} has no {columns['task']}")
    output = row[columns["output"]]
    output = [_as_text(value, f"{where}, {columns['output']}")
              for value in (output if isinstance(output, list) else [output])]
    return text["task"] or None, {"where": where, "id": text["id"], "input": text["input"],
                                  "output": output, "definition": definition}


def _as_text(value, where):
    """Return a value as text, "" for null or NaN. Raises InputError for neither text nor number."""
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
        notes.say(f"named after {text!r}", name)
    return name


def _finish(name, files, head, splits, args, notes):
    """Return the content of a task's two files, from its instances by split."""
    instances = [instance for split in splits.values() for instance in split]
    definitions = {instance["definition"] for instance in instances}
    definition = head.Definition
    if len(definitions) == 1 and not definition:
        (definition,) = definitions
    elif definitions != {""}:
        notes.say("instructions differ between rows and are put before the inputs", name)
        for instance in instances:
            instance["input"] = "\n\n".join(filter(None, (instance["definition"],
                                                          instance["input"])))
    if not definition:
        notes.say("Definition is empty", name)
    for split, rows in splits.items():
        _name_instances(rows, name if len(splits) == 1 else f"{name}-{split}", name, notes)
    if "test" not in splits:
        splits = _draw_test(name, instances, args.test_items or TEST_ITEMS)
        notes.say("test instances drawn from the training file (--test_items)", name)
    elif args.test_items:
        raise InputError(f"--test_items has no effect: {name} has a test file")
    group = files.folder.parent  # a folder between a task's folder and SOURCE is its category
    category = head.Category or ", ".join(head.Categories) or (
        group.name if Path(args.source) in group.parents else None)
    metric = args.metric or head.Metric or (
        "accuracy" if (files.folder / "labels.json").exists() else None)
    about = {"Definition": definition} | ({"Category": category} if category else {}) | (
        {"Metric": metric} if metric else {})
    return {split: about | {"Instances": [{key: instance[key] for key in ("id", "input", "output")}
                                          for instance in rows]}
            for split, rows in splits.items()}


def _name_instances(instances, stem, task, notes):
    """Give ids to instances: those of the rows where each has one of its own, or their numbers."""
    ids = {instance["id"] for instance in instances}
    if len(ids) == len(instances) and "" not in ids:
        return
    if ids != {""}:
        notes.say("rows numbered, because ids are missing or stand twice", task)
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


def _write_task(folder, content, notes):
    """Write a task's files, read them as a run does, and return a line about the task."""
    for split in SPLITS:
        write_json(folder / f"{split}.json", content[split])
    try:
        task = read_task(folder)
    except InputError as error:
        raise InputError(str(error).replace(f"{folder.parent}{os.sep}", "made of it: ")) from None
    if content["train"].get("Metric", task.metric) != task.metric:
        notes.say(f"metric {task.metric} by the name, as in superni", task.name)
    longest = {key: max(len(text) for row in task.train + task.test for text in texts(row))
               for key, texts in (("input", lambda row: [row["input"]]),
                                  ("output", lambda row: row["outputs"]))}
    return (f"{task.name}: {len(task.train)} training and {len(task.test)} test instances, "
            f"{task.metric}, {task.category}; longest input {longest['input']:,} and output "
            f"{longest['output']:,} characters")
