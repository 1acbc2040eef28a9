"""What a finished run leaves in results.json, and the single-task scores that it may need."""

import os
import resource
import shlex
from collections import defaultdict
from dataclasses import asdict
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

import metrics
from harness import identity
from harness.arguments import (
    ALL_FLAGS,
    RUN_FLAGS,
    as_argv,
    comparable,
    names,
    recorded_args,
)
from harness.processes import launcher
from inputs import formats
from inputs.errors import InputError
from inputs.files import write_json
from registry import variant_of


class SingleTaskScores(NamedTuple):
    """Scores of the same method trained on each task alone."""

    scores: dict  # {reference: {task: score}}
    base_sha256: str


def read_single_task_results(args, accelerator, order, tasks, made, global_batch):
    """The SingleTaskScores of --single_task_results, or None where the flag is not given.

    Raises InputError for a file that is none, of another run, or without the score of a task.
    """
    path = args.single_task_results
    if path is None:
        return None
    _, single = formats.read(path, formats.Results)
    theirs = single.args | {key: getattr(single, key) for key in (
        "global_batch_size", "precision", "compiler", "code_sha256")}
    mine = recorded_args(args) | {"global_batch_size": global_batch,
                                  "precision": accelerator.mixed_precision,
                                  "compiler": identity.compiler(accelerator),
                                  "code_sha256": made["code_sha256"]}
    free = ALL_FLAGS.keys() - names(alone="equal")
    different = sorted(key for key in mine.keys() - free if theirs.get(key) != mine[key])
    different += [f"data of {task}" for task in order if task not in single.tasks
                  or single.tasks[task].sha256 != identity.task_sha256(tasks[task])]
    alone = theirs.get("setting") == "single"
    scores = {reference: scores_alone(single, reference) if alone else {}
              for reference in ("best", "first")}
    missing = sorted(task for task in order
                     if any(each.get(task) is None for each in scores.values()))
    if not alone or different or missing:
        raise InputError(f"--single_task_results {path} does not belong to this run: setting "
                         f"{theirs.get('setting')!r}, other values of {different}, "
                         f"no score of {missing}")
    return SingleTaskScores({reference: {task: each[task] for task in order}
                             for reference, each in scores.items()}, single.base_sha256)


def scores_alone(single, reference):
    """{task: score} of Results with --setting single: row i has the score of task i alone."""
    order, rows = single.task_order, single.scores.get(reference, [])[-len(single.task_order):]
    if len(rows) != len(order) or any(len(row) != len(order) for row in rows):
        return {}
    return {task: rows[i][i] for i, task in enumerate(order)}


def parameter_counts(run):
    trainable = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    stored = sum(tensor.numel() for tensor in run.method.state_dict().values())
    return {"trainable": trainable, "stored": stored, "active": run.method.active_parameters(),
            "total": run.method.base_parameters}


def matrix_metrics(run, reference):
    """Appendix G.5 over the rows of trained stages, against best or first reference."""
    args, setup = run.args, run.setup
    # Row 0 may be the base model.
    matrix = [row[reference] for row in run.progress.rows[args.eval_before:]]
    if args.setting == "single":  # row i has task i alone: no score after all tasks
        alone = [row[i] for i, row in enumerate(matrix)]
        return {"rouge": metrics.mean(alone), "forward": None, "forget_rate": None,
                "backward": None}
    single = setup.single and setup.single.scores[reference]
    values = metrics.continual_metrics(matrix, setup.order, single)
    if args.paper_metrics:
        values |= metrics.paper_metrics(matrix, setup.order)
        if run.accelerator.is_main_process:  # which has written the predictions
            values |= {"rouge_paper": paper_score(run, reference)}
    return values


def measured_losses(run):
    """The losses of results.json, and the metrics over them; nothing where none was measured."""
    args, order, rows = run.args, run.setup.order, [row["loss"] for row in run.progress.rows]
    if not args.eval_loss:
        return {}
    matrix = rows[args.eval_before:]
    if args.setting == "single":
        over_tasks = {"loss": metrics.mean(row[i] for i, row in enumerate(matrix))}
    else:
        over_tasks = metrics.loss_metrics(matrix, order, None)
    return {"losses": rows, "loss_metrics": over_tasks}


def paper_score(run, reference):
    """The mean score after all training by the rules of the released scripts."""
    number, name = len(run.progress.rows) - run.args.eval_before, run.progress.rows[-1]["name"]
    by_task = defaultdict(list)
    path = run.args.output_dir / "predictions" / f"{number:02d}_{name}.jsonl"
    for line in formats.read_lines(path, formats.Prediction):
        metric = run.setup.tasks[line["task"]].metric
        by_task[line["task"]].append(metrics.score(
            line["prediction"], line["references"], metric, metrics.PAPER_SCORERS)[reference])
    return metrics.mean(map(metrics.mean, by_task.values()))


def write_results(run, argv):
    """Write results.json; all that differs between equal runs stands under its key `run`."""
    args, accelerator, setup, rows = run.args, run.accelerator, run.setup, run.progress.rows
    values = matrix_metrics(run, "best")
    results = {
        "args": recorded_args(args),
        "variant": variant_of(run.method.name, run.method.settings),
        "comparable": comparable(args, bool(setup.stages)),
        **setup.provenance,
        **run.progress.hashes,
        "overruled": sorted(run.progress.overruled),
        "went_on_from": went_on_from(run),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "compiler": identity.compiler(accelerator),
        "global_batch_size": run.global_batch,
        "task_order": setup.order,
        "tasks": {name: {"category": task.category, "metric": task.metric,
                         "train": len(setup.encoded.train[name]), "test": len(task.test),
                         "sha256": identity.task_sha256(task)}
                  for name, task in setup.tasks.items()},
        "shortened": {split: sum(counts.values())
                      for split, counts in setup.encoded.shortened.items()},
        "left_out": setup.encoded.left_out,
        "settings": asdict(run.method.settings),
        "parameters": parameter_counts(run),
        "rows": [row["name"] for row in rows],
        "score_matrix": [row["best"] for row in rows],
        "scores": {key: [row[key] for row in rows] for key in ("best", "first")},
        "metrics": values,
        **measured_losses(run),
        "metrics_first_reference": matrix_metrics(run, "first"),
        "regroupings": summarise_regroupings(args.output_dir / "regroup.jsonl"),
        "run": {"output_dir": str(args.output_dir), "argv": argv,
                "pids": gather_object([os.getpid()]),
                "device": identity.device_name(accelerator), "threads": torch.get_num_threads(),
                "peak_memory_gib": peak_memory(accelerator),
                **{flag: getattr(args, flag) for flag in RUN_FLAGS if flag != "output_dir"},
                "seconds": disjoint_seconds(run.progress.seconds.so_far())},
    }
    if values["forward"] is None and args.setting != "single" and setup.stages:
        results["forward_needs"] = single_task_command(args)
    if accelerator.is_main_process:
        write_json(args.output_dir / "results.json", results)
    return results


def went_on_from(run):
    """The adapter whose training this run went on with, or None where it began anew."""
    if run.args.adapter is None or not run.setup.stages:
        return None
    return {"adapter": run.args.adapter, "sha256": run.setup.provenance["read_files"]["adapter"]}


def single_task_command(args):
    """The command whose results.json --single_task_results takes."""
    dropped = names(alone="nothing")
    kept = {key: value for key, value in recorded_args(args).items() if key not in dropped}
    words = as_argv(kept | {"setting": "single"})
    return f"{launcher()} train.py {shlex.join(words)}"


def summarise_regroupings(path):
    """Means over layers of what regroup.jsonl has per layer, one entry per regrouping."""
    events = defaultdict(list)
    for line in formats.read_lines(path, dict) if path.exists() else ():
        events[line["stage"], line["step"]].append(line)
    keys = ("inter_before", "intra_before", "inter_after", "intra_after", "objective_before",
            "objective_after", "moved", "rounds", "regroup_drift", "alpha_entropy", "alpha_max")
    return [{"stage": stage, "step": step, "grouping": layers[0]["grouping"],
             "skipped": sum(layer["skipped"] is not None for layer in layers),
             **{key: metrics.mean(layer[key] for layer in layers) for key in keys}}
            for (stage, step), layers in events.items() if "grouping" in layers[0]]


def disjoint_seconds(seconds):
    """Seconds by part: load, decompose, train, regroup, evaluate; `train` is without `regroup`."""
    if "train" in seconds:
        return seconds | {"train": seconds["train"] - seconds["regroup"]}
    return seconds


def peak_memory(accelerator):
    """Peak GiB of the GPU where there is one, else of this process."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
