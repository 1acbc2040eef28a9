"""Read finished runs, pack a study into one file, and select and group what can be compared.

A run is its --output_dir, or one line of a file of records (`write_records`), which keeps neither
weights nor texts.
"""

import gzip
import json
import math
import statistics
import zlib
from collections import Counter, defaultdict
from pathlib import Path, PurePath
from typing import NamedTuple

from tqdm import tqdm

import metrics
from inputs import formats
from inputs.errors import InputError
from inputs.files import atomic_path, write_json, write_text
from inputs.suites import SUPERNI
from registry import FORMER, METHODS, VARIANTS, present_variant

ITEMS_FILE = "items.json"  # scores per item of an unpacked record
RUN_SIGNS = ("results.json", "log.jsonl", "checkpoints")  # a folder with one of them holds a run
RATE, ROWS = "--learning_rate", "--max_train_per_task"
OFTEN = ("--regroup_every, mixed", "--regroup_every, sequential")
TUNED = (RATE, ROWS, *OFTEN)  # what differs between runs that look for a learning rate
SMALLEST = 1e-2  # nats per token: a smaller loss counts as this much in a mean of logarithms
# Hashes of early versions of number_word_question, whose test rows ask for facts that no training
# row holds. Its loss made up half of a suite's mean, so reports do not count it.
UNLEARNABLE = {
    "55526f53cb00b2589a6615d7bd153ac242dc098df9334bb007aebe20c0f420bd",
    "8642ca60cc37d2d85972ac881f8fc3fabbd5f72ed0968a5a33c69a60ade4a69b",
    "c8c1939b81b0f9800151fd578c231fb325ad07f09639917f601376fc0ebef1bd"}  # with --validation 6
RECORDS = ".jsonl.gz"  # how the name of a file of records ends
FREE = ("code", "versions")  # what --allow_other may let differ
NEEDED = ("args", "base_sha256", "code_sha256", "comparable", "compiler", "global_batch_size",
          "metrics", "parameters", "precision", "processes", "regroupings", "rows", "run",
          "scores", "settings", "task_order", "tasks", "variant", "versions")
NEEDED_FLAGS = ("eval_before", "eval_only", "method", "model", "seed", "setting", "suite")


class Record(NamedTuple):
    """One run."""

    folder: Path  # or FILE/NAME for a line of a file of records
    name: str  # the folder's path within the study
    results: dict  # results.json
    log: list  # [{"loss": of an optimizer step}]; empty if nothing was trained
    items: dict  # after all training: {task: {item id: {metric: {"best": score, "first": score}}}};
    #              with --eval_loss each item also has "loss": (sum over tokens, tokens)

    @property
    def model(self):
        return Path(self.results["args"]["model"]).name

    @property
    def setting(self):
        """mixed, sequential, single, or eval if nothing was trained."""
        args = self.results["args"]
        trained = METHODS[args["method"]].trains and not args["eval_only"]
        return args["setting"] if trained else "eval"

    @property
    def variant(self):
        """The method and those of its settings that are not at their default."""
        return present_variant(self.results)

    @property
    def seed(self):
        return self.results["args"]["seed"]

    @property
    def rate(self):
        """The peak learning rate, or None if nothing was trained."""
        return self.results["comparable"].get(RATE)

    @property
    def steps(self):
        """Optimizer steps of training, divided by the number of tasks and rounded."""
        return round(len(self.log) / len(self.order))

    @property
    def title(self):
        return f"{self.variant}, {self.setting}, {self.model}, seed {self.seed}"

    @property
    def order(self):
        """All tasks in the order of training."""
        return self.results["task_order"]

    @property
    def without(self):
        """The tasks that no number of a report counts."""
        return [task for task, about in self.results["tasks"].items()
                if about["sha256"] in UNLEARNABLE]

    @property
    def tasks(self):
        """{task that counts: what results.json says of it}, in the order of training."""
        return {task: self.results["tasks"][task] for task in self.order
                if task not in self.without}

    @property
    def group(self):
        """What runs share that differ only in their seed."""
        return self.model, self.variant, self.setting

    def matrix(self, reference):
        """Return the score matrix of the trained stages (untrained: one row), as lists."""
        return self.results["scores"][reference][self.results["args"]["eval_before"]:]

    def losses(self):
        """Return the loss of the test answers as `matrix`, or None if it was not measured."""
        losses = self.results.get("losses")
        return losses and losses[self.results["args"]["eval_before"]:]

    def final(self, reference):
        """Return {task: score after all training; in a single run, after training on that task}."""
        return self._last(self.matrix(reference))

    def final_losses(self):
        """Return {task: loss} as `final` returns scores, {} if losses were not measured."""
        return self._last(self.losses()) if self.losses() else {}

    def _last(self, matrix):
        return {task: matrix[i if self.setting == "single" else -1][i]
                for i, task in enumerate(self.order) if task not in self.without}


# --- reading ------------------------------------------------------------------------------------


def read(folder, name=None):
    """Return the Record of the run in `folder`. Raises InputError if it is not finished."""
    folder = Path(folder)
    results = _read(folder / "results.json", dict)
    record = Record(folder, name or folder.resolve().name, results, [], {})
    check_keys(record)
    if None in record.final("first").values():
        raise InputError("it was not evaluated on all of its tasks at its end")
    if record.setting != "single":
        record = record._replace(items=_read_items(folder))
        missing = sorted(set(record.order) - set(record.items))
        if missing:
            raise InputError("incomplete: it has no scores per item (predictions/) of "
                             f"{', '.join(missing[:3])}")
    if record.setting != "eval":
        record = record._replace(log=_read(folder / "log.jsonl", formats.LogLine, lines=True))
    return record


def check_keys(record):
    """Raise InputError unless results.json has all keys that a report reads."""
    results = record.results
    missing = [key for key in NEEDED if key not in results] or [
        f"args.{flag}" for flag in NEEDED_FLAGS if flag not in results["args"]]
    if missing:
        raise InputError(f"its results.json has no {missing[0]!r}: it is damaged, or of another "
                         "version of this program")
    if results["args"]["method"] not in METHODS:
        raise InputError(f"its method {results['args']['method']!r} is unknown; allowed: "
                         f"{', '.join(METHODS)}")


def _read(path, shape, lines=False):
    """Return the content of a JSON (lines) file. Raises InputError that names it in its run."""
    if not path.exists():
        raise InputError(f"incomplete: it has no {path.name}")
    try:
        return (formats.read_lines(path, shape) if lines
                else formats.convert(formats.load(path), shape, path))
    except InputError as error:
        raise InputError(str(error).replace(str(path), f"its {path.name}")) from None


def _read_items(folder):
    """Return the scores per item after all training, from the last predictions or a record."""
    if (folder / ITEMS_FILE).exists():
        return _read(folder / ITEMS_FILE, dict)
    items = {}
    for line in read_answers(folder):
        loss = {"loss": line["loss"]} if "loss" in line else {}
        items.setdefault(line["task"], {})[line["id"]] = line["scores"] | loss
    return items


def read_answers(folder, single=False):
    """Return the predictions after all training as dicts, or [] if they are not kept.

    Those of a `single` run were made after training on each task.
    """
    paths = sorted((folder / "predictions").glob("[0-9]*.jsonl"),
                   key=lambda path: int(path.name.split("_")[0]))
    found = {}
    for path in paths if single else paths[-1:]:
        lines = defaultdict(list)
        for line in _read(path, formats.Prediction, lines=True):
            lines[line["task"]].append(line)
        found |= lines
    return [line for lines in found.values() for line in lines]


def find(folders):
    """Return {run folder: its path below one of `folders`}, finished or not, sorted.

    Raises InputError for a folder that does not exist, or that holds no run.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            hint = ("is neither a folder nor a file of records (.jsonl.gz)" if folder.exists()
                    else "does not exist; no runs yet? Start one with `python train.py`")
            raise InputError(f"{folder} {hint}")
        for path in (path for name in RUN_SIGNS for path in folder.rglob(name)):
            name = path.parent.relative_to(folder).as_posix()
            found[path.parent] = folder.resolve().name if name == "." else name
    if not found:
        raise InputError(f"{' '.join(map(str, folders))}: no run in it; start one with train.py "
                         "or scripts/sweep.sh")
    return dict(sorted(found.items()))


# --- files of records ---------------------------------------------------------------------------


def is_records_file(path):
    return path.is_file() and path.name.endswith(RECORDS)


def write_records(records, path):
    """Write records to `path` (.jsonl.gz), a line a run; equal records give equal bytes.

    Raises InputError if two runs have one name.
    """
    (name, count), = Counter(record.name for record in records).most_common(1)
    if count > 1:
        raise InputError(f"two runs have the name {name!r}: export them to two files")
    lines = [{"name": record.name, "items": record.items, "results": record.results,
              "log": [{"loss": step["loss"]} for step in record.log]} for record in records]
    text = "".join(json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
                   + "\n" for line in lines)
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def read_records(path):
    """Return the Records in a file of records. Raises InputError if it is damaged."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            records = [Record(path / run["name"], **run) for run in map(json.loads, file)]
        for record in records:
            check_keys(record)
    except InputError as error:
        raise InputError(f"{record.folder}: {error}") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a readable file of records: {error!r}") from None
    return records


def unpack(records, out):
    """Write each record to a folder of its name in `out`, from which a study can go on.

    Raises InputError, before anything is written, if such a folder exists already.
    """
    folders = [out / record.name for record in records]
    for folder, record in zip(folders, records, strict=True):
        name = PurePath(record.name)
        if ".." in name.parts or name.is_absolute():
            raise InputError(f"the name {record.name!r} leads out of {out}")
        if folders.count(folder) > 1:
            raise InputError(f"--unpack: two runs have the name {record.name!r}")
        if folder.exists():
            raise InputError(f"--unpack would overwrite {folder}")
    for record, folder in zip(records, folders, strict=True):
        write_json(folder / ITEMS_FILE, record.items)
        if record.log:
            write_text(folder / "log.jsonl",
                       "".join(f"{json.dumps(line)}\n" for line in record.log))
        write_json(folder / "results.json", record.results)  # last: it says that all is there


# --- what belongs together ----------------------------------------------------------------------


def protocol(record, free=()):
    """Return {name: value} of everything that must be equal in runs of one table.

    The model, the method, the seed and the setting are its rows and columns. Each variant of a
    method may have its own learning rate. Parts named in `free`, from FREE and TUNED, may differ;
    with ROWS in it the training rows may differ too, but not the test rows.
    """
    results = record.results
    values = results["comparable"] | {"precision": results["precision"],
                                      "code": results["code_sha256"],
                                      "versions": results["versions"],
                                      f"weights of {record.model}": results["base_sha256"]}
    if RATE in values and RATE not in free:
        values[f"{RATE}, {record.variant}"] = values.pop(RATE)
    if results["settings"].get("no_dog"):  # then it says only when angles are logged
        values = {name: value for name, value in values.items()
                  if not name.startswith("--regroup_every")}
    values |= {f"metric of {task}": about["metric"] for task, about in results["tasks"].items()}
    if record.setting != "single":
        values["tasks"] = sorted(results["tasks"])
        values |= {f"test items of {task}": sorted(items) for task, items in record.items.items()}
    if record.setting != "eval":
        values |= {"global batch": results["global_batch_size"], "compiler": results["compiler"]}
        if ROWS not in free:
            values |= {f"data of {task}": about["sha256"]
                       for task, about in results["tasks"].items()}
    return {name: value for name, value in values.items() if name not in free}


def select(records, free=()):
    """Return (records of one protocol, [(folder, reason)] of the others).

    Each part of the protocol is what most records have, the first among equals.
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
        key = (*record.group, record.seed, alone,
               *([record.rate, record.steps] if RATE in free else []))
        if other:
            shown = "; ".join(f"{name} {_brief(mine[name])}, most have "
                              f"{_brief(json.loads(usual[name]))}" for name in other[:3])
            left_out.append((record.folder, f"mixed settings: {shown}"))
        elif key in seen:
            left_out.append((record.folder, f"same model, method, setting and seed as {seen[key]}"))
        else:
            seen[key] = record.folder
            kept.append(record)
    return kept, left_out


def _brief(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def collect(paths, free=()):
    """Return (records that can be compared, [(folder, reason)] of the others).

    `paths` are folders with runs below them, or files of records. Raises InputError if no run is
    left.
    """
    paths, left_out = list(map(Path, paths)), []
    files = list(filter(is_records_file, paths))
    records = [record for file in files for record in read_records(file)]
    folders = [path for path in paths if path not in files]
    found = find(folders) if folders else {}
    for folder, name in tqdm(found.items(), desc="read runs", unit="run", delay=2, leave=False):
        try:
            records.append(read(folder, name))
        except InputError as error:
            left_out.append((folder, str(error)))
    kept, others = select(records, free)
    if not kept:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in left_out[:3])
        raise InputError(f"no finished run in {' '.join(map(str, paths))} ({reasons})")
    return kept, left_out + others


# --- groups of runs, and what is computed of one run --------------------------------------------


def group_runs(records):
    """Return {(model, variant, setting): records by seed} without single runs, in fixed order."""
    known = [*VARIANTS.values(), *FORMER.values()]
    found = defaultdict(list)
    for record in sorted(records, key=lambda record: (
            record.model, known.index(record.variant) if record.variant in known else len(known),
            record.variant, record.setting, record.seed)):
        if record.setting != "single":
            found[record.group].append(record)
    return dict(found)


def label(variant):
    """Return a variant's short name for tables and figures, or the variant if it has none."""
    names = {words: name for name, words in (VARIANTS | FORMER).items()}
    return "zero-shot" if variant == "zero_shot" else names.get(variant, variant)


def short(task):
    """Return T363 for a SuperNI task, the whole name for any other."""
    return task.split("_")[0].replace("task", "T") if task in SUPERNI else task


def scores_of(record, records):
    """Return the metrics of Appendix G.5 against the first reference, None if not measured.

    `records` hold the single-task runs that Forward needs.
    """
    single = on_one_task(record, records, lambda run: run.final("first"))
    return metrics.continual_metrics(record.matrix("first"), record.order, single, record.without)


def values_of(group, metric, records):
    """Return one metric of each run, without those for which it is missing."""
    values = [scores_of(run, records)[metric] for run in group]
    return tuple(value for value in values if value is not None)


def losses_of(record, records):
    """Return the metrics of losses, {} if not measured: loss, forward, forget_rate, backward.

    Beside them relative and median: the mean and the median over tasks of ln(loss / zero-shot
    loss), None without a zero-shot run of the model. No task can make up most of such a mean; a
    loss below SMALLEST counts as SMALLEST.
    """
    if record.losses() is None:
        return {}
    single = on_one_task(record, records, Record.final_losses)
    found = metrics.loss_metrics(record.losses(), record.order, single, record.without)
    bare = next((other.final_losses() for other in records if other.variant == "zero_shot"
                 and other.losses() and other.model == record.model), None)
    ratios = bare and [math.log(max(loss, SMALLEST) / max(bare[task], SMALLEST))
                       for task, loss in record.final_losses().items()]
    return found | {"relative": ratios and metrics.mean(ratios),
                    "median": ratios and statistics.median(ratios)}


def forgets(run):
    """Return whether a run trained tasks after others, so that something can be forgotten."""
    return run.setting == "sequential" and any(task in run.tasks for task in run.order[:-1])


def on_one_task(record, records, measure):
    """Return {task: `measure` of the single-task run with the same method, model and seed}."""
    def alike(run):  # beside the protocol
        schedule = run.results["comparable"].get(f"--regroup_every, {run.setting}")
        return run.model, run.variant, run.seed, schedule

    found, mine = {}, alike(record)
    for other in records:
        if other.setting == "single" and alike(other) == mine:
            found |= measure(other)
    return {task: found[task] for task in record.order if task in found}


def with_forward(record, others):
    """Return `record` with the Forward that the single-task runs `others` give.

    Other runs are not read. Raises InputError naming the tasks without such a run.
    """
    kept, left_out = select([record, *(run for run in others if run.setting == "single")])
    for folder, reason in left_out:
        raise InputError(f"{folder}: {reason}")
    single = on_one_task(record, kept, lambda run: run.final("best"))
    missing = [task for task in record.tasks if task not in single]
    if missing:
        raise InputError("Forward needs runs with --setting single of the same method, model, "
                         f"seed and --regroup_every; there is none on {', '.join(missing)} (for a "
                         "report of several runs, give --out DIR)")
    forward = metrics.continual_metrics(record.matrix("best"), record.order, single,
                                        record.without)["forward"]
    changed = {"metrics": record.results["metrics"] | {"forward": forward}}
    if record.losses():
        alone = on_one_task(record, kept, Record.final_losses)
        changed["loss_metrics"] = metrics.loss_metrics(record.losses(), record.order, alone,
                                                       record.without)
    return record._replace(results=record.results | changed)
