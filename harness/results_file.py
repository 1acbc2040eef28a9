"""Write results.json of a finished run."""

from collections import defaultdict
from dataclasses import asdict

import torch

import metrics
from harness import identity
from harness.arguments import NOT_IDENTITY, comparable, recorded_args
from inputs import formats
from inputs.files import write_json
from registry import variant_of


def parameter_counts(run):
    trainable = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    stored = sum(tensor.numel() for tensor in run.method.state_dict().values())
    return {"trainable": trainable, "stored": stored, "active": run.method.active_parameters(),
            "total": run.method.base_parameters}


def matrix_metrics(run):
    """Return {name: value} of Appendix G.5's metrics, from the scores after each trained stage.

    Forward is None: it needs single-task runs, which a report joins. The released scripts' versions
    of Forget Rate and Backward are `forget_rate_paper` and `backward_paper`.
    """
    order = run.setup.order
    matrix = [row["best"] for row in run.progress.rows[run.args.eval_before:]]
    if run.args.setting == "single":  # row i scores task i alone
        alone = [row[i] for i, row in enumerate(matrix)]
        return {"rouge": metrics.mean(alone), "forward": None, "forget_rate": None,
                "backward": None}
    return metrics.continual_metrics(matrix, order, None) | metrics.paper_metrics(matrix, order)


def measured_losses(run):
    """Return the losses of results.json and their metrics; nothing without --eval_loss."""
    args, order, rows = run.args, run.setup.order, [row["loss"] for row in run.progress.rows]
    if not args.eval_loss:
        return {}
    matrix = rows[args.eval_before:]
    if args.setting == "single":
        over_tasks = {"loss": metrics.mean(row[i] for i, row in enumerate(matrix))}
    else:
        over_tasks = metrics.loss_metrics(matrix, order, None)
    return {"losses": rows, "loss_metrics": over_tasks}


def write_results(run, argv):
    """Write results.json; what differs between equal runs is under its key `run`."""
    args, accelerator, setup, rows = run.args, run.accelerator, run.setup, run.progress.rows
    seconds = run.progress.seconds.so_far()
    if "train" in seconds:  # the parts are disjoint
        seconds["train"] -= seconds["regroup"]
    results = {
        "args": recorded_args(args),
        "variant": variant_of(run.method.name, run.method.settings),
        "comparable": comparable(args, bool(setup.stages)),
        **setup.provenance,
        **run.progress.hashes,
        "allowed_differences": sorted(run.progress.allowed_differences),
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
        "scores": {key: [row[key] for row in rows] for key in ("best", "first")},
        "metrics": matrix_metrics(run),
        **measured_losses(run),
        "regroupings": summarise_regroupings(args.output_dir / "regroup.jsonl"),
        "run": {"argv": argv, "device": identity.device_name(accelerator),
                "threads": torch.get_num_threads(),
                **{flag: getattr(args, flag) for flag in NOT_IDENTITY},
                "output_dir": str(args.output_dir),
                "seconds": seconds},
    }
    if accelerator.device.type == "cuda":
        results["run"]["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if accelerator.is_main_process:
        write_json(args.output_dir / "results.json", results)
    return results


def went_on_from(run):
    """Return the adapter that this run trained further, or None."""
    if run.args.adapter is None or not run.setup.stages:
        return None
    return {"adapter": run.args.adapter, "sha256": run.setup.provenance["read_files"]["adapter"]}


def summarise_regroupings(path):
    """Return the means over layers of regroup.jsonl, one entry per regrouping."""
    events = defaultdict(list)
    for line in formats.read_lines(path, dict) if path.exists() else ():
        events[line["stage"], line["step"]].append(line)
    keys = ("inter_before", "intra_before", "inter_after", "intra_after", "objective_before",
            "objective_after", "moved", "rounds", "regroup_drift", "alpha_entropy", "alpha_max")
    return [{"stage": stage, "step": step, "grouping": layers[0]["grouping"],
             "skipped": sum(layer["skipped"] is not None for layer in layers),
             **{key: metrics.mean(layer[key] for layer in layers) for key in keys}}
            for (stage, step), layers in events.items() if "grouping" in layers[0]]

