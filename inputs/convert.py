"""Task folders made of files in another layout: `python data.py convert SOURCE --to FOLDER`."""

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct
from tqdm import tqdm

from inputs import formats, table_files
from inputs.errors import InputError
from inputs.files import write_json
from inputs.numbers import PositiveInt, Seed, from_text, stable_seed
from inputs.task_files import METRICS, SPLITS, listed, read_task, resolve_names

KINDS = {
    "official": "natural-instructions, one file a task",
    "benchmark": "a benchmark of task folders, with Instances or with sentence and label",
    "trace": "task folders as TRACE has them, with prompt and answer",
    "table": "rows with named columns",
}
PAIRS = {  # columns of input and output; the first that a file has are read
    "official": [("input", "output")],
    "benchmark": [("input", "output"), ("sentence", "label")],
    "trace": [("prompt", "answer")],
    "table": [("input", "output"), ("prompt", "completion"), ("question", "answer"),
              ("prompt", "answer"), ("sentence", "label"), ("instruction", "output")],
}
COLUMNS = ("input", "output", "definition", "task", "id")
TEST_ITEMS, SEED = 100, 1  # of a split made here


class Files(NamedTuple):
    """Where a task stands, and what its place says of it."""

    train: Path
    test: Path | None = None
    category: str | None = None
    metric: str | None = None
    ignored: frozenset[str] = frozenset()  # names of other files there


class Head(Struct):
    """What a task file may say beside its Instances, as far as it is kept."""

    Definition: str | list[str] = ""
    Categories: list[str] = []
    Category: str | None = None
    Metric: str | None = None


class Notes:
    """What is to be said at the end."""

    def __init__(self):
        self.left_out = set()  # columns, keys and files
        self.drawn = False  # whether a test was drawn here
        self.about = {}  # names of tasks, by what is to be said of them

    def add(self, name, text):
        self.about.setdefault(text, []).append(name)

    def lines(self):
        for text, tasks in self.about.items():
            yield f"{text}: {listed(tasks)}"
        if self.left_out:
            yield f"left out: {', '.join(sorted(self.left_out))}"


def add_flags(parser):
    """Declare the flags of `convert`."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder or file")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="the new suite")
    parser.add_argument("--kind", choices=KINDS, help="how to read SOURCE (default: by what is "
                        "there): " + "; ".join(f"{kind}: {text}" for kind, text in KINDS.items()))
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these, by name or "
                        "T-number (T363)")
    parser.add_argument("--metric", choices=METRICS, help="of all tasks (default: what the files "
                        "say, accuracy beside a labels.json, otherwise rouge_l)")
    parser.add_argument("--test_items", type=from_text(PositiveInt), metavar="N", help="to draw "
                        "for the test where there is no test file, at most half of a task "
                        f"(default: {TEST_ITEMS})")
    parser.add_argument("--seed", type=from_text(Seed), help="of that draw, by instance id "
                        f"(default: {SEED})")
    for name, default in (("input", "input, prompt or question"),
                          ("output", "output, completion or answer"),
                          ("definition", "instruction, where there is one"),
                          ("task", "none: a file is a task"), ("id", "id, where there is one")):
        parser.add_argument(f"--{name}_column", metavar="COLUMN",
                            help=f"of a table (default: {default})")


def convert(args):
    """Write the suite --to from SOURCE, whole or not at all; yield lines about it.

    Raises InputError naming what cannot be read, before anything stands at --to.
    """
    if args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
        raise InputError(f"--to {args.to} is in use: name a new folder, or an empty one")
    kind = args.kind or find_kind(args.source)
    for name in COLUMNS:
        if getattr(args, f"{name}_column") is not None and kind != "table":
            raise InputError(f"--{name}_column is not read with --kind {kind}, only with table")
    files = find_tasks(kind, args.source)
    yield f"{args.source}: {KINDS[kind]} (--kind {kind})"
    notes, rows, to = Notes(), [], args.to.absolute()
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
        suite = Path(temporary) / to.name
        suite.mkdir()
        for source, name, content in read_tasks(kind, files, args, notes):
            rows.append(write_task(suite / name, content, source, notes))
        for name in ("test_items", "seed"):
            if getattr(args, name) is not None and not notes.drawn:
                raise InputError(f"--{name} is not read where every task has a test file")
        os.replace(suite, to)
    yield from aligned([("task", *SPLITS, "metric", "category", "input mean / max",
                         "output mean / max"), *rows])
    yield from notes.lines()
    yield ("lengths in characters; metric: --metric, or what the files say, accuracy beside a "
           "labels.json, otherwise rouge_l")
    yield f"{args.to} is written: python train.py --suite {args.to}"


# --- finding ------------------------------------------------------------------------------------


def find_kind(source):
    """The kind of what stands at `source`. Raises InputError for none."""
    if not source.exists():
        raise InputError(f"{source} is not there")
    if source.is_file():
        head, _ = table_files.read(source)
        return "official" if head else "table"
    for folder in task_folders(source)[:1]:
        head, rows = table_files.read(split_file(folder, "train"))
        if head or {"sentence", "label"} <= rows[0].keys():
            return "benchmark"
        return "trace" if {"prompt", "answer"} <= rows[0].keys() else "table"
    if official_files(source):
        return "official"
    raise InputError(f"{source} holds nothing to convert: neither tasks/task*.json, nor train.json "
                     "in a folder for each task, nor is it a file of "
                     f"{', '.join(table_files.SUFFIXES)}")


def find_tasks(kind, source):
    """{task: Files}. Raises InputError where there are none of this kind."""
    if kind == "official":
        found = {file.stem: Files(file) for file in official_files(source)}
    elif source.is_file():
        found = {source.stem: Files(source)}
    else:
        found = {}
        for folder in task_folders(source):
            name = folder.absolute().name
            if name in found:
                raise InputError(f"{source} holds two tasks {name}: {found[name].train.parent} "
                                 f"and {folder}")
            found[name] = files_in(folder, source)
    if not found:
        raise InputError(f"{source} holds nothing of --kind {kind}: {KINDS[kind]}")
    return found


def files_in(folder, source):
    """The Files of a task folder; a folder between it and `source` is its category."""
    train, test = (split_file(folder, split) for split in SPLITS)
    labels = folder / "labels.json"
    there = {path for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    group = folder.parent.name if folder not in (source, source / folder.name) else None
    return Files(train, test, group, "accuracy" if labels in there else None,
                 frozenset(path.name for path in there - {train, test, labels}))


def official_files(source):
    """The task files of the repository, of its folder tasks, or a single one."""
    if source.is_file():
        return [source]
    return sorted(source.glob("tasks/task*.json")) or sorted(source.glob("task*.json"))


def task_folders(source):
    """The folders with a training file: `source`, or those in it, perhaps in groups."""
    if source.is_dir() and split_file(source, "train"):
        return [source]
    folders = (path for pattern in ("*", "*/*") for path in source.glob(pattern)
               if path.is_dir() and not path.name.startswith("."))
    return sorted(folder for folder in folders if split_file(folder, "train"))


def split_file(folder, split):
    """The file of a split, None where there is none. Raises InputError for two."""
    found = [folder / f"{split}{suffix}" for suffix in table_files.SUFFIXES
             if (folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} are both there: keep one")
    return found[0] if found else None


# --- reading ------------------------------------------------------------------------------------


def read_tasks(kind, files, args, notes):
    """Yield every task -> (its source, its name, {"train", "test": the content of its file})."""
    by_column = bool(args.task_column)
    chosen = resolve_names(args.tasks, list(files)) if args.tasks and not by_column else files
    done = set()
    for place in tqdm(chosen, desc="convert", unit="task", delay=2, leave=False):
        head, groups = read_files(kind, files[place], args, notes)
        names = resolve_names(args.tasks, list(groups)) if args.tasks and by_column else groups
        for found in names:
            name = folder_name(found if by_column else place, notes)
            if name in done:
                raise InputError(f"two tasks would be named {name}")
            done.add(name)
            content = finish(name, files[place], head, groups[found], args, notes)
            yield files[place].train, name, content


def read_files(kind, files, args, notes):
    """(Head of a task's files, {value of the task column: {split: instances}})."""
    head, read = None, {}
    for path in filter(None, (files.train, files.test)):
        said, read[path] = table_files.read(path)
        notes.left_out |= said.keys() - set(Head.__struct_fields__)
        said = formats.convert(said, Head, path, verdict="")
        if head is not None and said != head:
            raise InputError(f"{path} says another Definition, Category or Metric than "
                             f"{files.train}")
        head = said
    notes.left_out |= files.ignored
    there = dict.fromkeys(column for rows in read.values() for row in rows for column in row)
    columns = choose_columns(kind, list(there), args, files.train)
    notes.left_out |= there.keys() - set(columns.values())
    groups = {}
    for split, (path, rows) in zip(SPLITS, read.items(), strict=False):
        for number, row in enumerate(rows, start=1):
            task, instance = read_row(row, columns, head, f"{path}, row {number}")
            groups.setdefault(task, {}).setdefault(split, []).append(instance)
    for task, splits in groups.items():
        if splits.keys() != set(SPLITS[:len(read)]):
            raise InputError(f"task {task!r} stands in only one of {files.train} and {files.test}")
    return head, groups


def choose_columns(kind, there, args, path):
    """{what: column} of COLUMNS, "" for none. Raises InputError naming the columns there are."""
    chosen = {name: getattr(args, f"{name}_column") for name in COLUMNS}
    names = f"{path} has the columns {', '.join(map(repr, there))}"
    for name, column in chosen.items():
        if column and column not in there:
            raise InputError(f"{names}, not --{name}_column {column!r}")
    pairs = [(chosen["input"] or first, chosen["output"] or second)
             for first, second in PAIRS[kind]]
    pair = next((pair for pair in pairs if set(pair) <= set(there)), None)
    if pair is None:
        wanted = " or ".join(" and ".join(pair) for pair in pairs)
        raise InputError(f"{names}, not {wanted}" + (
            ": name those to read with --input_column and --output_column" if kind == "table"
            else f" as --kind {kind} has"))
    chosen["input"], chosen["output"] = pair
    for name, usual in (("definition", "instruction"), ("id", "id")):
        if chosen[name] is None:
            chosen[name] = usual if usual in there and usual not in pair else ""
    return chosen


def read_row(row, columns, head, where):
    """(the task that a row names or None, {"id", "input", "output", "definition"})."""
    said = {name: row.get(column) if column else None for name, column in columns.items()}
    text = {name: as_text(said[name], f"{where}, {columns[name]}")
            for name in ("input", "definition", "task", "id")}
    output = said["output"] if isinstance(said["output"], list) else [said["output"]]
    if not output or None in output:
        raise InputError(f"{where} has no {columns['output']}")
    if not (text["input"] or text["definition"] or head.Definition):
        raise InputError(f"{where} is empty: there is nothing to answer")
    if columns["task"] and not text["task"]:
        raise InputError(f"{where} has no {columns['task']}")
    output = [as_text(value, f"{where}, {columns['output']}") for value in output]
    return text["task"], {"id": text["id"], "input": text["input"], "output": output,
                          "definition": text["definition"], "where": where}


def as_text(value, where):
    """A value as text, nothing as "". Raises InputError for what is neither text nor number."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) or isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    raise InputError(f"{where}: {str(value)!r:.60} is neither a text nor a number")


# --- writing ------------------------------------------------------------------------------------


def folder_name(text, notes):
    """A task's name as a folder may bear it. Raises InputError where nothing is left of it."""
    name = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._")[:200]
    if not name:
        raise InputError(f"a task's folder cannot be named after {text!r}: letters, digits, '_', "
                         "'-' and '.' are allowed")
    if name != text:
        notes.add(name, f"named after {text!r}")
    return name


def finish(name, files, head, splits, args, notes):
    """The content of the two files of a task, from its instances by split."""
    instances = [instance for split in splits.values() for instance in split]
    instructions = {instance["definition"] for instance in instances}
    definition = head.Definition
    if len(instructions) == 1 and not definition:
        (definition,) = instructions
    elif instructions != {""}:
        notes.add(name, "the rows' instructions differ and stand before their inputs")
        for instance in instances:
            instance["input"] = "\n\n".join(filter(None, (instance["definition"],
                                                          instance["input"])))
    if not definition:
        notes.add(name, "Definition is empty")
    for split, rows in splits.items():
        name_instances(rows, f"{name}-{split}" if "test" in splits else name)
    if "test" not in splits:
        notes.drawn = True
        seed = SEED if args.seed is None else args.seed
        notes.add(name, f"no test file, so instances were drawn (--test_items, --seed {seed})")
        splits = draw_test(name, splits["train"], args.test_items or TEST_ITEMS, seed)
    category = head.Category or ", ".join(head.Categories) or files.category
    metric = args.metric or head.Metric or files.metric
    about = {"Definition": definition} | ({"Category": category} if category else {}) | (
        {"Metric": metric} if metric else {})
    return {split: about | {"Instances": [{key: instance[key] for key in ("id", "input", "output")}
                                          for instance in rows]}
            for split, rows in splits.items()}


def name_instances(instances, stem):
    """Give an id to those that have none. Raises InputError for one that stands twice."""
    seen = set()
    for index, instance in enumerate(instances):
        instance["id"] = instance["id"] or f"{stem}-{index}"
        if instance["id"] in seen:
            raise InputError(f"{instance['where']}: the id {instance['id']!r:.60} stands twice "
                             "(of a table, --id_column '' numbers the rows instead)")
        seen.add(instance["id"])


def draw_test(name, instances, count, seed):
    """{"train", "test"}: `count` instances for the test, at most half; by id, in whatever order."""
    count = min(count, len(instances) // 2)
    if not count:
        raise InputError(f"{name} has one instance: none is left for a test")
    ranked = sorted(instances, key=lambda instance: stable_seed("test", seed, instance["id"]))
    drawn = {instance["id"] for instance in ranked[:count]}
    return {split: [instance for instance in instances
                    if (instance["id"] in drawn) == (split == "test")] for split in SPLITS}


def write_task(folder, content, source, notes):
    """Write a task's files, read them as a run would -> what the table says of the task."""
    for split in SPLITS:
        write_json(folder / f"{split}.json", content[split])
    try:
        task = read_task(folder)
    except InputError as error:
        reason = str(error).replace(f"{folder}{os.sep}", "")
        raise InputError(f"{source} makes no task: {reason}") from None
    if content["train"].get("Metric", task.metric) != task.metric:
        notes.add(task.name, f"metric {task.metric} by the name, as in superni")
    rows = task.train + task.test
    return (task.name, len(task.train), len(task.test), task.metric, task.category,
            lengths([row["input"] for row in rows]),
            lengths([output for row in rows for output in row["outputs"]]))


def lengths(texts):
    counts = list(map(len, texts))
    return f"{sum(counts) / len(counts):.1f} / {max(counts)}"


def aligned(rows):
    """Rows of values as lines with columns of equal width."""
    rows = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(value.ljust(width) for value, width in zip(row, widths,
                                                                   strict=True)).rstrip()
