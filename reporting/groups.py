"""Runs in groups, one for each cell of a table: they differ in their seed alone; their scores."""

import metrics
from inputs.suites import SUPERNI
from registry import FORMER, VARIANTS


def cells(records):
    """{(model, variant, setting): records by seed} without single-task runs, in a fixed order."""
    known = [*VARIANTS.values(), *FORMER.values()]
    found = {}
    ordered = sorted(records, key=lambda record: (
        record.model, known.index(record.variant) if record.variant in known else len(known),
        record.variant, record.setting, record.seed))
    for record in ordered:
        if record.setting != "single":
            found.setdefault(record.group, []).append(record)
    return found


def label(variant):
    """The short name that `study.py --methods` takes, where there is one."""
    names = {words: name for name, words in (VARIANTS | FORMER).items()}
    return "zero-shot" if variant == "zero_shot" else names.get(variant, variant)


def short(task):
    """T363 for a SuperNI task, the whole name for any other."""
    return task.split("_")[0].replace("task", "T") if task in SUPERNI else task


def values_of(runs, metric, records):
    """One metric of each run, without those for which it is missing."""
    values = [scores_of(run, records)[metric] for run in runs]
    return tuple(value for value in values if value is not None)


def scores_of(record, records):
    """The metrics of Appendix G.5 against the first reference, of a run on more than one task.

    {name: points}, None where something is missing. `records` hold the single-task runs that
    Forward needs.
    """
    if record.setting == "eval":
        return {"rouge": metrics.mean(record.final("first").values()), "forward": None,
                "forget_rate": None, "backward": None}
    single = single_task_scores(record, records)
    return metrics.continual_metrics(record.matrix("first"), record.order, single)


def final_loss(run):
    """Of the test answers after all training, mean over tasks, of a run that measured losses."""
    return metrics.mean(run.losses()[-1])


def forgets(run):
    """Whether a run trained tasks after others, so that `forgetting` has a meaning."""
    return run.setting == "sequential" and len(run.order) > 1


def forgetting(run):
    """How far the loss of a task rises after it was trained, mean over all but the last task."""
    return -metrics.loss_metrics(run.losses(), run.order, None)["backward"]


def single_task_scores(record, records):
    """{task: score of the same method, model and seed trained on it alone}, of what there is."""
    scores = {}
    for other in records:
        if other.setting == "single" and _alike(other) == _alike(record):
            scores |= other.final("first")
    return {task: scores[task] for task in record.order if task in scores}


def _alike(record):
    """What a run on one task alone shares with the run that it is for, beside the protocol."""
    schedule = record.results["comparable"].get(f"--regroup_every, {record.setting}")
    return record.model, record.variant, record.seed, schedule
