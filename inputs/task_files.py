"""Task folders in the natural-instructions layout: read once, refused in one line."""

import re
from typing import NamedTuple

from msgspec import UNSET

from inputs import formats
from inputs.errors import InputError
from inputs.suites import SUPERNI

SPLITS = ("train", "test")
METRICS = ("rouge_l", "accuracy")
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
    """Names of the task folders in a suite's folder, sorted. Raises InputError for odd ones."""
    names = sorted(path.name for path in folder.iterdir()
                   if path.is_dir() and not path.name.startswith((".", "_")))
    if not names:
        raise InputError(f"{folder} holds no task folders")
    for name in names:  # files of a run bear these names
        if not re.fullmatch(r"[\w.-]{1,200}", name, flags=re.ASCII):
            raise InputError(f"{folder}: a task folder's name may hold up to 200 letters, digits, "
                             f"'_', '-' and '.', not {name!r}")
    return names


def resolve_names(names, allowed):
    """Folder names from folder names or T-numbers (T363, 363), each at most once."""
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
    """Some names in a line."""
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def read_task(folder, about=None):
    """The Task in one folder, of the (category, metric) that its suite may know.

    Raises InputError naming file and instance.
    """
    heads, instances = {}, {}
    for split in SPLITS:
        heads[split], instances[split] = _read_split(folder / f"{split}.json")
    head, file = heads["train"], folder / "train.json"
    for key in ("Definition", "Category", "Metric"):
        if getattr(heads["test"], key) != getattr(head, key):
            raise InputError(f"{folder / 'test.json'}: {key} differs from that of {file}")
    definition = head.Definition
    definition = definition if isinstance(definition, str) else "\n".join(definition)
    _check_length(definition, "Definition", f"{file}: Definition")
    category, metric = about or SUPERNI.get(folder.name, (head.Category, head.Metric))
    _check_length(category, "Definition", f"{file}: Category")
    if metric not in METRICS:
        raise InputError(f"{file}: Metric {metric!r} is unknown; allowed: {', '.join(METRICS)}")
    return Task(folder.name, definition.strip(), category, metric, **instances)


def _read_split(file):
    """(the TaskHead of a task file, its instances)."""
    content = formats.load(file)
    rows = content.pop("Instances", None) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file} is no object with Definition and a list of Instances")
    return formats.convert(content, formats.TaskHead, file, verdict=""), _instances(rows, file)


def _instances(rows, file):
    """{"id", "input", "outputs"} of every row; an id that lacks is made of the row's index."""
    found, seen = [], set()
    for index, row in enumerate(rows):
        named = f" (id {row['id']!r:.60})" if isinstance(row, dict) and "id" in row else ""
        where = f"{file}, instance {index}{named}"
        instance = formats.convert(row, formats.Instance, where, verdict="")
        name = instance.id
        if name is UNSET:
            name = f"{file.parent.name}-{file.stem}-{index}"
        outputs = [instance.output] if isinstance(instance.output, str) else instance.output
        if name in seen:
            raise InputError(f"{where}: the id stands twice in this file")
        seen.add(name)
        for key, text in (("input", name), ("input", instance.input),
                          *(("output", output) for output in outputs)):
            _check_length(text, key, where)
        found.append({"id": name, "input": instance.input, "outputs": outputs})
    return found


def _check_length(text, key, where):
    if len(text) > LONGEST[key]:
        raise InputError(f"{where}: a text of {len(text):,} characters; at most {LONGEST[key]:,} "
                         "are taken")
