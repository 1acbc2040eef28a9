"""Read task folders in the natural-instructions layout, or refuse them in one line."""

import contextlib
import re
from typing import NamedTuple

from msgspec import UNSET

from inputs import formats
from inputs.errors import InputError
from inputs.suites import SUPERNI

SPLITS = ("train", "test")
METRICS = ("rouge_l", "accuracy")
HEAD_KEYS = ("Definition", "Category", "Categories", "Metric")
# Shown below an error about a file of another layout.
LAYOUT = (
    "a suite is a folder of tasks: SUITE/TASK/train.json and SUITE/TASK/test.json, each with",
    '{"Definition": "what to do", "Metric": "rouge_l or accuracy", "Instances": [{"input": "text", '
    '"output": "answer"}, ...]}',
    'or train.jsonl and test.jsonl, each with lines {"instruction": "what to do", "input": "text", '
    '"output": "answer"}; other layouts: `python data.py convert --help`',
)
LONGEST = {"Definition": 10**5, "input": 10**6, "output": 10**6}  # characters; more takes minutes


class Task(NamedTuple):
    """One task; `train` and `test` are lists of {"id", "input", "outputs"}."""

    name: str
    definition: str
    category: str
    metric: str
    train: list
    test: list


def task_folders(folder):
    """Return the sorted names of a suite's task folders. Raises InputError for unusable ones."""
    names = sorted(path.name for path in folder.iterdir()
                   if path.is_dir() and not path.name.startswith((".", "_")))
    with showing_layout():
        if not any(_find(folder / name, split).exists() for name in names for split in SPLITS):
            raise InputError(f"{folder} holds no task folders")
    for name in names:  # a run names files after them
        if not re.fullmatch(r"[\w.-]{1,200}", name, flags=re.ASCII):
            raise InputError(f"{folder}: a task folder's name may hold up to 200 letters, digits, "
                             f"'_', '-' and '.', not {name!r}")
    return names


def resolve_names(names, allowed):
    """Return folder names for folder names or T-numbers (T363, 363). Raises InputError."""
    resolved = []
    for name in names:
        number = re.fullmatch(r"[Tt]?0*(\d+)", name)
        numbered = [task for task in allowed
                    if number and re.match(rf"task0*{number[1]}_", task)]
        if name not in allowed and len(numbered) != 1:
            raise InputError(f"task {name!r} is {'ambiguous' if numbered else 'unknown'}; "
                             f"this suite has {listed(allowed)}")
        found = name if name in allowed else numbered[0]
        if found in resolved:
            raise InputError(f"task {name!r} is named twice")
        resolved.append(found)
    return resolved


def listed(names):
    """Return up to 20 names as one line, and how many more there are."""
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def read_task(folder, about=None):
    """Return the Task in one folder; `about` is the (category, metric) that its suite knows.

    Metric and Category in its files win; without them and `about`, SUPERNI's own tasks are known.
    Raises InputError naming file and instance.
    """
    files = {split: _find(folder, split) for split in SPLITS}
    heads, instances = {}, {}
    for split, file in files.items():
        heads[split], instances[split] = _read_split(file)
        heads[split].Definition = joined(heads[split].Definition)
    head, file = heads["train"], files["train"]
    for key in HEAD_KEYS:
        if getattr(heads["test"], key) != getattr(head, key):
            raise InputError(f"{files['test']}: {key} is not the same as in {file}")
    _check_length(head.Definition, "Definition", f"{file}: Definition")
    categories = [head.Categories] if isinstance(head.Categories, str) else head.Categories
    fallback = ("other" if categories is UNSET else categories[0], METRICS[0])
    category, metric = (said if known is UNSET else known for known, said in zip(
        (head.Category, head.Metric), about or SUPERNI.get(folder.name, fallback), strict=True))
    _check_length(category, "Definition", f"{file}: Category")
    if metric not in METRICS:
        raise InputError(f"{file}: Metric {metric!r} is unknown; allowed: {', '.join(METRICS)}")
    return Task(folder.name, head.Definition.strip(), category, metric, **instances)


def joined(definition):
    """Return a Definition, a text or a list of lines, as a text."""
    return definition if isinstance(definition, str) else "\n".join(definition)


def unread_files(folder):
    """Return the names of a task folder's data files that no run reads, such as dev.json."""
    read = {_find(folder, split) for split in SPLITS}
    return sorted(path.name for path in folder.iterdir()
                  if path.suffix in (".json", ".jsonl") and path not in read)


def _find(folder, split):
    """Return the file of a split: JSON, or JSON lines where there is no JSON."""
    file, lines = folder / f"{split}.json", folder / f"{split}.jsonl"
    return lines if lines.exists() and not file.exists() else file


def _read_split(file):
    """Return (TaskHead, instances) of a task file. Raises InputError."""
    if file.suffix == ".jsonl":
        return _read_lines(file)
    with showing_layout():
        content = formats.load(file)
        rows = content.pop("Instances", None) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{file} is not an object with Definition and a list of Instances")
        for key in content:
            if key.capitalize() in set(HEAD_KEYS) - content.keys():
                raise InputError(f"{file}: the key {key!r} must be {key.capitalize()!r}")
        head = formats.convert(content, formats.TaskHead, file, verdict="")
        return head, _instances(rows, file)


def _read_lines(file):
    """Return (TaskHead, instances) of a file of JSON lines, which share one instruction."""
    with showing_layout():
        rows = formats.read_lines(file, formats.TaskLine)
        if not rows:
            raise InputError(f"{file} is empty")
        for key in ("Definition", "Metric"):
            if any(key in row or row.get(key.lower()) in METRICS for row in rows):
                raise InputError(f"{file}: a line holds instruction, input, output and id; {key} "
                                 f"belongs in {file.stem}.json")
        instructions = {row.get("instruction", "") for row in rows}
        if len(instructions) > 1:
            raise InputError(f"{file}: its lines have {len(instructions)} different instructions, "
                             f"a task has one; `python data.py convert {file.parent} --to FOLDER` "
                             "puts each before its input")
        return formats.TaskHead(*instructions), _instances(rows, file)


@contextlib.contextmanager
def showing_layout():
    """Show the right layout below every InputError raised in this context."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error), LAYOUT) from None


def _instances(rows, file):
    """Return {"id", "input", "outputs"} of every row; a missing or null id is made of its index."""
    found, seen = [], set()
    for index, row in enumerate(rows):
        given = row.get("id") if isinstance(row, dict) else None
        named = "" if given is None else f" (id {given!r:.60})"
        where = f"{file}, instance {index}{named}"
        instance = formats.convert(row, formats.Instance, where, verdict="")
        name = str(instance.id)
        if instance.id is None:
            name = f"{file.parent.name}-{file.stem}-{index}"
        outputs = [instance.output] if isinstance(instance.output, str) else instance.output
        if name in seen:
            raise InputError(f"{where}: another instance of this file has the same id")
        seen.add(name)
        for key, text in (("input", name), ("input", instance.input),
                          *(("output", output) for output in outputs)):
            _check_length(text, key, where)
        found.append({"id": name, "input": instance.input, "outputs": outputs})
    return found


def _check_length(text, key, where):
    if len(text) > LONGEST[key]:
        raise InputError(f"{where}: a text of {len(text):,} characters; the limit is "
                         f"{LONGEST[key]:,}")
