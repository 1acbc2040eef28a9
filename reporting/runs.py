"""Finished runs as a report reads them: which belong together, and which are named and left out.

A record is a run's --output_dir, or what `export` keeps of it: no weights and no texts.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import metrics
from inputs import formats
from inputs.bars import Bar
from inputs.errors import InputError
from inputs.files import atomic_path, write_json
from inputs.settings import Settings
from registry import METHODS, variant_of

ITEMS_FILE = "items.json"  # per-item scores of an exported record
RUN_SIGNS = ("results.json", "log.jsonl", "checkpoints")  # what a folder with a run has one of
RATE = "--learning_rate"
FREE = ("code", "versions")  # what of a protocol may differ, where it is asked for


class Record(NamedTuple):
    """One run."""

    folder: Path
    results: dict  # results.json
    settings: Settings  # of its method
    log: list  # of log.jsonl; empty where nothing was trained
    items: dict  # of the last row: {task: {item id: {metric: {"best": score, "first": score}}}},
    #              and with --eval_loss of each item "loss": (its sum, tokens)
    model: str
    setting: str  # mixed, sequential, single, or eval

    @property
    def variant(self):
        """The method and those of its settings that have other values than by default."""
        return self.results["variant"]

    @property
    def seed(self):
        return self.results["args"]["seed"]

    @property
    def rate(self):
        """The peak learning rate, or None where nothing was trained."""
        return self.results["comparable"].get(RATE)

    @property
    def order(self):
        return self.results["task_order"]

    @property
    def cell(self):
        """What the seeds of one cell of a table share."""
        return self.model, self.variant, self.setting

    def matrix(self, reference):
        """The rows a[j] of trained stages (of an untrained model: the only row), as lists."""
        return self.results["scores"][reference][self.results["args"]["eval_before"]:]

    def losses(self):
        """The losses of the test answers by trained stage, as `matrix`, or None: not measured."""
        losses = self.results.get("losses")
        return losses and losses[self.results["args"]["eval_before"]:]

    def final(self, reference):
        """{task: score after all training}, None where not evaluated; of a single run: its own."""
        matrix = self.matrix(reference)
        rows = [matrix[i] if self.setting == "single" else matrix[-1]
                for i in range(len(self.order))]
        return {task: row[i] for i, (task, row) in enumerate(zip(self.order, rows, strict=True))}


# --- reading ------------------------------------------------------------------------------------


def read(folder):
    """The Record in `folder`. Raises InputError, with the reason, where there is no whole one."""
    folder = Path(folder)
    content, results = _read(formats.read, folder / "results.json", formats.ReportedResults)
    args = results.args
    if args.method not in METHODS:
        raise InputError(f"its method {args.method!r} is unknown; allowed: {', '.join(METHODS)}")
    method = METHODS[args.method]
    settings = method.settings.from_values(results.settings, "its results.json")
    trained = method.trains and not args.eval_only
    setting = args.setting if trained else "eval"
    record = Record(folder, content, settings, _read_log(folder) if trained else [],
                    {} if setting == "single" else _read_items(folder), Path(args.model).name,
                    setting)
    check_names(record)
    check_scores(record)
    if setting != "single":
        check_items(record)
    return record


def check_names(record):
    """Raise InputError unless what a report compares are the flags and the settings of the run."""
    results, args = record.results, record.results["args"]
    if results["variant"] != variant_of(args["method"], record.settings):
        raise InputError(f"it is damaged, or of another version of this program: its settings do "
                         f"not make it {results['variant']!r}")
    for name, value in results["comparable"].items():
        flag = name.removeprefix("--").partition(",")[0]
        if args.get(flag) != value:
            raise InputError(f"it is damaged: its {name} is {value!r:.60}, among its flags "
                             f"{args.get(flag)!r:.60}")
    if results["regroupings"] and "num_experts" not in record.settings.names():
        raise InputError(f"it is damaged: {results['variant']} has no experts to regroup")


def check_scores(record):
    """Raise InputError unless the score matrices fit the tasks, which all have a last score."""
    results, order = record.results, record.order
    if sorted(results["tasks"]) != sorted(order):
        raise InputError("it is damaged: its tasks do not fit their order")
    stages = len(order) if record.setting in ("sequential", "single") else 1
    rows = stages + results["args"]["eval_before"]
    for reference in ("best", "first"):
        matrix = results["scores"].get(reference, ())
        if not len(matrix) == len(results["rows"]) == rows or any(
                len(row) != len(order) for row in matrix):
            raise InputError("its score matrix does not fit its tasks")
        if results.get("losses") is not None and [len(row) for row in results["losses"]] != [
                len(row) for row in matrix]:
            raise InputError("its losses do not fit its tasks")
        if None in record.final(reference).values():
            raise InputError("it was not evaluated on all of its tasks at its end")


def check_items(record):
    """Raise InputError unless the scores per item give the scores per task."""
    if set(record.items) != set(record.order):
        raise InputError("incomplete: it has no scores per item (predictions/ or items.json) of "
                         f"{sorted(set(record.order) - set(record.items))[:3]}")
    for task, items in record.items.items():
        metric = record.results["tasks"][task]["metric"]
        for reference in ("best", "first"):
            mean = metrics.mean(item[metric][reference] for item in items.values())
            score = record.final(reference)[task]
            if mean is None or not math.isclose(mean, score, abs_tol=1e-6):
                raise InputError(f"it is damaged: the items of {task} score {mean or 0:.2f} on "
                                 f"average, results.json says {score:.2f}")
        if record.losses():
            check_losses(record, task, items)


def check_losses(record, task, items):
    """Raise InputError unless the losses per item give the loss of a task."""
    if any("loss" not in item for item in items.values()):
        raise InputError(f"it is damaged: items of {task} have no loss, though it was measured")
    total, tokens = map(sum, zip(*(item["loss"] for item in items.values()), strict=True))
    said = record.losses()[-1][record.order.index(task)]
    if said is None or not math.isclose(total / tokens, said, rel_tol=1e-5, abs_tol=1e-7):
        raise InputError(f"it is damaged: the items of {task} have a loss of "
                         f"{total / tokens:.4f} on average, results.json says {said}")


def _read(reader, path, kind):
    """What `reader` of inputs/formats.py gives; an InputError names the file within its run."""
    if not path.exists():
        raise InputError(f"incomplete: it has no {path.name}")
    try:
        return reader(path, kind)
    except InputError as error:
        raise InputError(str(error).replace(str(path), f"its {path.name}")) from None


def _read_log(folder):
    log = _read(formats.read_lines, folder / "log.jsonl", formats.LogLine)
    if not log:
        raise InputError("its log.jsonl is empty")
    return log


def _read_items(folder):
    """Scores per item after all training: from an export, or from the last predictions."""
    if (folder / ITEMS_FILE).exists():
        kind = dict[str, dict[str, formats.ItemScores]]
        return _read(formats.read, folder / ITEMS_FILE, kind)[0]
    items = {}
    for line in read_answers(folder):
        loss = {"loss": line["loss"]} if "loss" in line else {}
        items.setdefault(line["task"], {})[line["id"]] = line["scores"] | loss
    return items


def read_answers(folder):
    """The predictions after all training, as dicts, or [] where they are not kept."""
    paths = sorted((folder / "predictions").glob("[0-9]*.jsonl"))
    return _read(formats.read_lines, paths[-1], formats.Prediction) if paths else []


def read_regroupings(folder):
    """What every layer's regroupings left in regroup.jsonl, as dicts, or [] without one."""
    path = folder / "regroup.jsonl"
    return _read(formats.read_lines, path, formats.RegroupLine) if path.exists() else []


def find(folders):
    """Run folders in `folders`, sorted: those with a results.json, and those without it yet.

    Raises InputError for a folder that does not exist, or that holds no run.
    """
    found = set()
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is no folder")
        for name in RUN_SIGNS:
            found |= {path.parent for path in Path(folder).rglob(name)}
    if not found:
        raise InputError(f"{' '.join(map(str, folders))}: no run in it; start one with train.py "
                         "or scripts/sweep.sh")
    return sorted(found)


# --- exporting ----------------------------------------------------------------------------------


def export(records, out, folders):
    """Copy the small part of each run that is in `folders` into a folder of its name in `out`.

    Raises InputError, before anything is written, where another run would be overwritten.
    """
    taken = {path.resolve() for path in find(folders)}
    destinations = [(out / record.folder.resolve().name).resolve() for record in records]
    for destination in destinations:
        other = not (destination / ITEMS_FILE).exists() and any(
            (destination / name).exists() for name in RUN_SIGNS)
        if destination in taken or other:
            raise InputError(f"--export would overwrite {destination}, or write it twice")
        taken.add(destination)
    for record, destination in zip(records, destinations, strict=True):
        # No results.json until all is there: a part is not taken for the whole.
        (destination / "results.json").unlink(missing_ok=True)
        write_json(destination / ITEMS_FILE, record.items)
        for name in ("log.jsonl", "results.json") if record.log else ("results.json",):
            with atomic_path(destination / name) as temporary:
                shutil.copyfile(record.folder / name, temporary)


# --- what belongs together ----------------------------------------------------------------------


def protocol(record, free=()):
    """{name: value} of all that must be equal in runs that stand in one table.

    Beside the model, the method, the seed and the setting, which are its rows and columns. Each
    variant of a method may have a learning rate of its own: they need different ones. `free`
    leaves out some of FREE, or RATE.
    """
    results = record.results
    values = results["comparable"] | {"precision": results["precision"],
                                      "code": results["code_sha256"],
                                      "versions": results["versions"],
                                      f"weights of {record.model}": results["base_sha256"]}
    if RATE in values and RATE not in free:
        values[f"{RATE}, {record.variant}"] = values.pop(RATE)
    values |= {f"metric of {task}": about["metric"] for task, about in results["tasks"].items()}
    if record.setting != "single":
        values["tasks"] = sorted(results["tasks"])
        values |= {f"test items of {task}": sorted(items) for task, items in record.items.items()}
    if record.setting != "eval":
        values |= {"global batch": results["global_batch_size"], "compiler": results["compiler"]}
        values |= {f"data of {task}": about["sha256"] for task, about in results["tasks"].items()}
    return {name: value for name, value in values.items() if name not in free}


def select(records, free=()):
    """(records that share a protocol, [(folder, reason)] of the others).

    Of each part of the protocol the value that most records have counts, the first among equals.
    """
    protocols = [protocol(record, free) for record in records]
    usual = {}
    for name in {name for each in protocols for name in each}:
        values = [json.dumps(each[name], sort_keys=True) for each in protocols if name in each]
        usual[name] = Counter(values).most_common(1)[0][0]
    kept, left_out, seen = [], [], {}
    for record, mine in zip(records, protocols, strict=True):
        other = sorted(name for name, value in mine.items()
                       if json.dumps(value, sort_keys=True) != usual[name])
        alone = tuple(record.order) if record.setting == "single" else ()
        key = (*record.cell, record.seed, alone, *([record.rate] if RATE in free else []))
        if other:
            shown = "; ".join(f"{name} {_brief(mine[name])}, most have "
                              f"{_brief(json.loads(usual[name]))}" for name in other[:3])
            left_out.append((record.folder, f"mixed settings: {shown}"))
        elif key in seen:
            left_out.append((record.folder, f"the same run as {seen[key]}"))
        else:
            seen[key] = record.folder
            kept.append(record)
    return kept, left_out


def _brief(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def collect(folders, free=()):
    """All runs in `folders` that may stand in one report -> (records, [(folder, reason)]).

    Raises InputError where none is left.
    """
    records, left_out = [], []
    for folder in Bar(find(folders), desc="read runs", unit="run", delay=2, leave=False):
        try:
            records.append(read(folder))
        except InputError as error:
            left_out.append((folder, str(error)))
    kept, others = select(records, free)
    if not kept:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in left_out[:3])
        raise InputError(f"no finished run in {' '.join(map(str, folders))} ({reasons})")
    return kept, left_out + others
