"""Finished runs as a report reads them: which belong together, and which are named and left out.

A record is a run's --output_dir, or what `export` keeps of it: no weights and no texts.
"""

import functools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import metrics
from arguments import RUN_FLAGS, build_parser, parse_values
from baselines import METHODS
from errors import InputError
from utils import atomic_path, read_json_lines, read_text, write_json

ITEMS_FILE = "items.json"  # per-item scores of an exported record
RUN_SIGNS = ("results.json", "log.jsonl", "checkpoints")  # what a folder with a run has one of
LARGEST = 1e100  # of any number in a record: sums and squares of such are finite
RESULT_KEYS = {"args", "base_sha256", "code_sha256", "compiler", "global_batch_size", "metrics",
               "parameters", "precision", "processes", "regroupings", "rows", "run", "scores",
               "settings", "task_order", "tasks", "versions"}
# What a method's flags do not say about it: the same for all, or part of the schedule.
SHARED_FLAGS = {"seed", "target_modules", "dropout", "regroup_every", "svd"}
EVALUATION_ARGS = ("max_eval_per_task", "max_length", "max_new_tokens", "chat_template")
TRAINING_ARGS = ("epochs", "learning_rate", "warmup_ratio", "max_grad_norm", "max_train_per_task",
                 "target_modules", "dropout")


class Record(NamedTuple):
    """One run."""

    folder: Path
    results: dict  # results.json
    log: list  # of log.jsonl; empty where nothing was trained
    items: dict  # of the last row: {task: {item id: {metric: {"best": score, "first": score}}}}
    variant: str  # the method and those of its flags that have another value than by default
    model: str
    setting: str  # mixed, sequential, single, or eval
    seed: int

    @property
    def order(self):
        return self.results["task_order"]

    def matrix(self, reference):
        """The rows a[j] of trained stages (of an untrained model: the only row), as lists."""
        return self.results["scores"][reference][self.results["args"]["eval_before"]:]

    def final(self, reference):
        """{task: score after all training}, None where not evaluated; of a single run: its own."""
        matrix = self.matrix(reference)
        rows = [matrix[i] if self.setting == "single" else matrix[-1]
                for i in range(len(self.order))]
        return {task: row[i] for i, (task, row) in enumerate(zip(self.order, rows, strict=True))}


# --- reading ------------------------------------------------------------------------------------


@functools.cache
def default_args():
    return vars(build_parser().parse_args([]))


def variant_of(args):
    """The method and its flags with other values than by default, "badit --no_dog", from `args`."""
    method, defaults = METHODS[args["method"]], default_args()
    words = [method.name]
    for flag in sorted(set(method.reads) - SHARED_FLAGS):
        if args[flag] != defaults[flag]:
            value = args[flag]
            words.append(f"--{flag}")
            if value is not True:
                words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return " ".join(words)


def read(folder):
    """The Record in `folder`. Raises InputError, with the reason, where there is no whole one."""
    folder = Path(folder)
    results = _read_json(folder / "results.json")
    if not isinstance(results, dict) or not RESULT_KEYS <= results.keys():
        missing = sorted(RESULT_KEYS - set(results)) if isinstance(results, dict) else "all"
        raise InputError(f"its results.json is of another version of this program (without "
                         f"{missing})")
    try:
        args = results["args"]
        check_args(args)
        trained = METHODS[args["method"]].trains and not args["eval_only"]
        setting = args["setting"] if trained else "eval"
        record = Record(folder, results, _read_log(folder) if trained else [],
                        {} if setting == "single" else _read_items(folder), variant_of(args),
                        Path(args["model"]).name, setting, args["seed"])
        check(record)
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"it is damaged, or of another version of this program ({error!r})"
                         ) from None
    return record


def check_args(args):
    """Raise InputError unless `args` are values of all flags, as this program has them."""
    wanted = set(default_args()) - set(RUN_FLAGS)
    if set(args) != wanted:
        raise InputError("it is of another version of this program, with other flags: "
                         f"{sorted(wanted ^ set(args))[:5]}")
    parse_values({name: value for name, value in args.items()}, "results.json")
    if args["method"] not in METHODS:
        raise InputError(f"its method {args['method']!r} is unknown; allowed: {', '.join(METHODS)}")


def number(value, low=-LARGEST, high=LARGEST):
    """`value`, if it is a number in [low, high]. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"it is damaged: {value!r:.40} is no number from {low:g} to {high:g}")
    return value


def check(record):
    """Raise InputError unless everything that a report reads is there, of its type, and fits."""
    results, order = record.results, record.order
    if sorted(results["tasks"]) != sorted(order) or not order or not results["rows"]:
        raise InputError("it is damaged: its tasks do not fit their order")
    for about in results["tasks"].values():
        if about["metric"] not in metrics.SCORERS or not all(
                isinstance(about[key], str) for key in ("category", "sha256")):
            raise InputError(f"it is damaged: no metric, category and sha256 in {about!r:.60}")
    if not isinstance(results["run"]["device"], str):
        raise InputError(f"it is damaged: {results['run']['device']!r:.60} is no device")
    for reference in ("best", "first"):
        matrix = record.matrix(reference)
        stages = len(order) if record.setting in ("sequential", "single") else 1
        if len(matrix) != stages or not all(len(row) == len(order) for row in matrix):
            raise InputError("its score matrix does not fit its tasks")
        for score in (score for row in matrix for score in row if score is not None):
            number(score, 0, 100)
        if None in record.final(reference).values():
            raise InputError("it was not evaluated on all of its tasks at its end")
    for value in (results["parameters"]["trainable"], results["parameters"]["stored"],
                  *results["run"]["seconds"].values(), results["run"]["threads"],
                  results["processes"], *(line["loss"] for line in record.log)):
        number(value)
    for event in results["regroupings"]:
        for key in ("inter_after", "intra_after", "alpha_entropy", "alpha_max"):
            if event[key] is not None:
                number(event[key])
    if record.setting != "single":
        check_items(record)


def check_items(record):
    """Raise InputError unless the scores per item give the scores per task."""
    if set(record.items) != set(record.order):
        raise InputError("incomplete: it has no scores per item (predictions/ or items.json) of "
                         f"{sorted(set(record.order) - set(record.items))[:3]}")
    for task, items in record.items.items():
        for item in items.values():
            for metric in metrics.SCORERS:
                for reference in ("best", "first"):
                    number(item[metric][reference], 0, 100)
        for reference in ("best", "first"):
            metric = record.results["tasks"][task]["metric"]
            mean = metrics.mean(item[metric][reference] for item in items.values())
            if not math.isclose(mean, record.final(reference)[task], abs_tol=1e-6):
                raise InputError(f"it is damaged: the items of {task} score {mean:.2f} on average, "
                                 f"results.json says {record.final(reference)[task]:.2f}")


def _encodable(value):
    """`value`, if it can be written as UTF-8: JSON's escapes may stand for half a character."""
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _read_json(path):
    try:
        return _encodable(json.loads(read_text(path)))
    except FileNotFoundError:
        raise InputError(f"incomplete: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"its {path.name} cannot be read: {error}") from None


def read_lines(path):
    """The values in a file of JSON lines. Raises InputError."""
    try:
        return _encodable(read_json_lines(path))
    except FileNotFoundError:
        raise InputError(f"incomplete: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"its {path.name} cannot be read: {error}") from None


def _read_log(folder):
    log = read_lines(folder / "log.jsonl")
    if not log:
        raise InputError("its log.jsonl is empty")
    return log


def _read_items(folder):
    """Scores per item after all training: from an export, or from the last predictions."""
    if (folder / ITEMS_FILE).exists():
        return _read_json(folder / ITEMS_FILE)
    items = {}
    for path in sorted((folder / "predictions").glob("[0-9]*.jsonl"))[-1:]:
        for line in read_lines(path):
            items.setdefault(line["task"], {})[line["id"]] = line["scores"]
    return items


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


def is_other_run(folder):
    """Whether `folder` holds a run, finished or not, that `export` has not written there."""
    return not (folder / ITEMS_FILE).exists() and any(
        (folder / name).exists() for name in RUN_SIGNS)


def export(record, destination):
    """Write the small part of a record, which a report needs, to the folder `destination`.

    Without a results.json until all of it is there, so that a part is not taken for the whole.
    """
    (destination / "results.json").unlink(missing_ok=True)
    write_json(destination / ITEMS_FILE, record.items)
    for name in ("log.jsonl", "results.json") if record.log else ("results.json",):
        with atomic_path(destination / name) as temporary:
            shutil.copyfile(record.folder / name, temporary)


# --- what belongs together ----------------------------------------------------------------------


def protocol(record, free=()):
    """{name: value} of all that must be equal in runs that stand in one table.

    Beside the model, the method, the seed and the setting, which are its rows and columns. `free`
    leaves out "code" or "versions".
    """
    results, args = record.results, record.results["args"]
    values = {f"--{name}": args[name] for name in EVALUATION_ARGS}
    values |= {"precision": results["precision"], "code": results["code_sha256"],
               "versions": results["versions"]}
    values[f"weights of {record.model}"] = results["base_sha256"]
    values |= {f"metric of {task}": about["metric"] for task, about in results["tasks"].items()}
    if record.setting != "single":
        values["tasks"] = sorted(results["tasks"])
        values |= {f"test items of {task}": sorted(items) for task, items in record.items.items()}
    if record.setting == "sequential":
        values["--task_order"] = args["task_order"]
    if record.setting != "eval":
        values |= {f"--{name}": args[name] for name in TRAINING_ARGS}
        values |= {"global batch": results["global_batch_size"], "compiler": results["compiler"]}
        values |= {f"data of {task}": about["sha256"] for task, about in results["tasks"].items()}
        reads = METHODS[args["method"]].reads
        if "regroup_every" in reads:
            values[f"--regroup_every, {record.setting}"] = args["regroup_every"]
        if "svd" in reads:
            values["--svd"] = args["svd"]
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
        key = (*cell(record), record.seed, alone)
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
    for folder in tqdm(find(folders), desc="read runs", unit="run", delay=2, leave=False):
        try:
            records.append(read(folder))
        except InputError as error:
            left_out.append((folder, str(error)))
    kept, others = select(records, free)
    if not kept:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in left_out[:3])
        raise InputError(f"no finished run in {' '.join(map(str, folders))} ({reasons})")
    return kept, left_out + others


def cell(record):
    """What the seeds of one cell of a table share."""
    return record.model, record.variant, record.setting


# --- scores -------------------------------------------------------------------------------------


def single_task_scores(record, records, reference):
    """{task: score of the same method, model and seed trained on it alone}, of what there is."""
    scores = {}
    for other in records:
        if other.setting == "single" and _alike(other) == _alike(record):
            scores |= other.final(reference)
    return {task: scores[task] for task in record.order if task in scores}


def _alike(record):
    """What a run on one task alone shares with the run that it is for, beside the protocol."""
    return record.model, record.variant, record.seed, record.results["args"]["regroup_every"]


def scores_of(record, records, reference):
    """The metrics of Appendix G.5 of one run, {name: points}, None where something is missing.

    `records` hold the single-task runs that Forward needs.
    """
    if record.setting in ("single", "eval"):
        final = record.final(reference)
        return {"rouge": metrics.mean(final.values()), "forward": None, "forget_rate": None,
                "backward": None}
    single = single_task_scores(record, records, reference)
    return metrics.continual_metrics(record.matrix(reference), record.order, single)
