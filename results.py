"""What a run leaves in results.json, and the table that it prints.

`run` is train.Run: its flags, accelerator, data and method.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import gather_object

import metrics
from arguments import RUN_FLAGS, as_argv
from errors import InputError
from method import WEIGHTS_FILE
from utils import read_text, sha256_file, write_json

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scipy", "rouge_score",
            "safetensors")
# What identifies the base model in results.json and in checkpoints, in words.
MODEL_HASHES = {"base_sha256": "weights", "config_sha256": "a configuration or tokenizer"}
# Beside its arguments, what a run with --setting single must share with the run that it is for.
SAME_FOR_SINGLE = ("global_batch_size", "precision", "compiler", "code_sha256")


def parameter_counts(run):
    trainable = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    stored = sum(tensor.numel() for tensor in run.method.state_dict().values())
    return {"trainable": trainable, "stored": stored, "active": run.method.active_parameters(),
            "total": run.base_parameters}


def matrix_metrics(run, rows, reference):
    """Appendix G.5 over the rows of trained stages, against best or first reference."""
    matrix = [row[reference] for row in rows[run.args.eval_before:]]  # row 0 is the base model
    single = run.single_task_scores and run.single_task_scores[reference]
    if run.args.setting == "single":  # row i has task i alone: no score after all tasks
        alone = [row[i] for i, row in enumerate(matrix)]
        return {"rouge": metrics.mean(alone), "forward": None, "forget_rate": None,
                "backward": None}
    values = metrics.continual_metrics(matrix, run.order, single)
    if run.args.paper_metrics:
        values |= metrics.paper_metrics(matrix, run.order)
    return values


def read_single_task_results(run):
    """Read --single_task_results: a run of the same method, model, data and settings.

    Sets run.single_task_scores to {reference: {task: score}}, if the flag is given. Raises
    InputError for a file that is none, of another run, or without the score of one of the tasks.
    """
    path = run.args.single_task_results
    if path is None:
        return
    try:
        single = json.loads(read_text(path))
        theirs = dict(single["args"])
        theirs |= {key: single[key] for key in SAME_FOR_SINGLE}
        hashes = {name: task["sha256"] for name, task in dict(single["tasks"]).items()}
        run.single_base_sha256 = single["base_sha256"]
        # Row i of a single run has the score of the i-th task alone, after an optional row 0.
        scores = {reference: {task: float(matrix[i - len(single["task_order"])][i])
                              for i, task in enumerate(single["task_order"])}
                  for reference, matrix in dict(single["scores"]).items()}
        if not all(0 <= score <= 100 for row in scores.values() for score in row.values()):
            raise ValueError("a score is not from 0 to 100")
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError,
            RecursionError) as error:
        raise InputError(f"--single_task_results {path} is no results.json of a finished run with "
                         f"--setting single ({type(error).__name__}: {error})") from None
    free = {"setting", "suite", "data_dir", "tasks", "task_order", "eval_tasks", "eval_before",
            "eval_batch_size", "batch_size", "gradient_accumulation_steps", "paper_metrics",
            "single_task_results"}
    mine = recorded_args(run) | {"global_batch_size": run.global_batch,
                                 "precision": run.accelerator.mixed_precision,
                                 "compiler": compiler(run),
                                 "code_sha256": run.provenance["code_sha256"]}
    different = sorted(key for key in mine.keys() - free if theirs.get(key) != mine[key])
    different += [f"data of {task}" for task in run.order
                  if hashes.get(task) != task_sha256(run, task)]
    scored = set(scores.get("best", ())) & set(scores.get("first", ()))
    missing = sorted(set(run.order) - scored)
    if theirs.get("setting") != "single" or different or missing:
        raise InputError(f"--single_task_results {path} does not belong to this run: setting "
                         f"{theirs.get('setting')!r}, other values of {different}, "
                         f"no score of {missing}")
    run.single_task_scores = {reference: {task: scores[reference][task] for task in run.order}
                              for reference in ("best", "first")}


def task_sha256(run, name):
    """SHA-256 of what a task's score depends on: its text as it is used."""
    task = run.tasks[name]
    content = [task.definition, task.metric, task.train, task.test]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def recorded_args(run):
    """Every argument but those that may differ between equal runs."""
    return {key: value for key, value in sorted(vars(run.args).items()) if key not in RUN_FLAGS}


def read_files(run):
    """SHA-256 by flag of the files that a run reads beside its model and its data."""
    args = run.args
    files = {"single_task_results": args.single_task_results,
             "adapter": args.adapter and Path(args.adapter) / WEIGHTS_FILE}
    return {flag: sha256_file(path) for flag, path in files.items() if path is not None}


def provenance():
    """What a run is made with; asked at its start, as files may change while it lasts."""
    return {"code_sha256": code_sha256(), "git_commit": git_commit(), "versions": versions()}


def versions():
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()}


def identity(run):
    """What must be equal for runs to be equal, by the names that a user knows."""
    made = run.provenance
    return _identity(
        recorded_args(run), {name: task_sha256(run, name) for name in run.tasks},
        made["read_files"], code=made["code_sha256"], versions=made["versions"],
        threads=torch.get_num_threads(),
        device=device_name(run), precision=run.accelerator.mixed_precision,
        processes=run.accelerator.num_processes, compiler=compiler(run))


def recorded_identity(results):
    """`identity` of the run that wrote these results."""
    try:
        if not isinstance(results["overruled"], list):
            raise TypeError("overruled is no list")
        return _identity(
            results["args"], {name: task["sha256"] for name, task in results["tasks"].items()},
            results["read_files"], code=results["code_sha256"], versions=results["versions"],
            threads=results["run"]["threads"], device=results["run"]["device"],
            precision=results["precision"], processes=results["processes"],
            compiler=results["compiler"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError("the results.json of another version of this program "
                         f"({type(error).__name__}: {error})") from None


def _identity(args, data, files, **rest):
    return ({f"--{name}": value for name, value in args.items()}
            | {f"data of {name}": sha256 for name, sha256 in data.items()}
            | {f"file of --{name}": sha256 for name, sha256 in files.items()} | rest)


def write_results(run, rows, argv):
    """Write results.json; all that differs between equal runs stands under its key `run`."""
    args = run.args
    values = matrix_metrics(run, rows, "best")
    results = {
        "args": recorded_args(run),
        **run.provenance,
        **run.hashes,
        "overruled": sorted(run.overruled),
        "precision": run.accelerator.mixed_precision,
        "processes": run.accelerator.num_processes,
        "compiler": compiler(run),
        "global_batch_size": run.global_batch,
        "task_order": run.order,
        "tasks": {name: {"category": task.category, "metric": task.metric,
                         "train": len(run.encoded.train[name]), "test": len(task.test),
                         "sha256": task_sha256(run, name)}
                  for name, task in run.tasks.items()},
        "shortened": run.encoded.shortened,
        "left_out": run.encoded.left_out,
        "settings": run.method.settings,
        "parameters": parameter_counts(run),
        "rows": [row["name"] for row in rows],
        "score_matrix": [row["best"] for row in rows],
        "scores": {key: [row[key] for row in rows] for key in ("best", "first")},
        "metrics": values,
        "metrics_first_reference": matrix_metrics(run, rows, "first"),
        "regroupings": summarise_regroupings(run.regroupings),
        "run": {"output_dir": str(args.output_dir), "argv": argv,
                "pids": gather_object([os.getpid()]),
                "device": device_name(run), "threads": torch.get_num_threads(),
                "peak_memory_gib": peak_memory(run),
                **{flag: getattr(args, flag) for flag in RUN_FLAGS if flag != "output_dir"},
                "seconds": disjoint_seconds(run)},
    }
    if values["forward"] is None and args.setting != "single" and run.trains:
        results["forward_needs"] = single_task_command(run)
    if run.accelerator.is_main_process:
        write_json(args.output_dir / "results.json", results)
    return results


def single_task_command(run):
    """The command whose results.json --single_task_results takes."""
    dropped = {"setting", "task_order", "eval_tasks", "eval_before", "paper_metrics",
               "single_task_results"}
    kept = {key: value for key, value in recorded_args(run).items() if key not in dropped}
    words = as_argv(kept | {"setting": "single"})
    return f"{launcher()} train.py {shlex.join(words)}"


def launcher():
    """How this process was started: by python, or by accelerate launch with these settings."""
    processes = os.environ.get("WORLD_SIZE", "1")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if (processes, precision, backend) == ("1", "no", "no"):
        return "python"
    several = ["--multi_gpu"] if processes != "1" else []
    return shlex.join(["accelerate", "launch", *several, "--num_processes", processes,
                       "--mixed_precision", precision, "--dynamo_backend", backend])


def summarise_regroupings(records):
    """Means over layers of what regroup.jsonl has per layer, one entry per regrouping."""
    events = defaultdict(list)
    for record in records:
        events[record["stage"], record["step"]].append(record)
    keys = ("inter_before", "intra_before", "inter_after", "intra_after", "objective_before",
            "objective_after", "moved", "rounds", "regroup_drift", "alpha_entropy", "alpha_max")
    return [{"stage": stage, "step": step, "grouping": layers[0]["grouping"],
             "skipped": sum(layer["skipped"] is not None for layer in layers),
             **{key: metrics.mean(layer[key] for layer in layers) for key in keys}}
            for (stage, step), layers in events.items() if "grouping" in layers[0]]


def disjoint_seconds(run):
    """Seconds by part: load, decompose, train, regroup, evaluate; `train` is without `regroup`."""
    seconds = dict(run.seconds)
    if "train" in seconds:
        seconds["train"] -= seconds["regroup"]
    return seconds


def code_sha256():
    """SHA-256 over the project's Python files, names and contents."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted([*root.glob("*.py"), *root.glob("baselines/*.py")]):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def git_commit():
    """The commit of this code, or None where it is no git checkout or git is not installed."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent,
                            capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def compiler(run):
    """The backend of torch.compile that the launcher asks for, "no" for none."""
    return run.accelerator.state.dynamo_plugin.backend.value.lower()


def device_name(run):
    device = run.accelerator.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.backends.cpu.get_cpu_capability()})"  # which decides the kernels


def peak_memory(run):
    """Peak GiB of the GPU where there is one, else of this process."""
    if run.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_table(run, results):
    """Print `table`. Raises InputError where the results, read from a file, are damaged."""
    try:
        lines = list(table(results))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError,
            OverflowError) as error:
        raise InputError(f"{run.args.output_dir / 'results.json'} is damaged ({error!r})") from None
    run.print("\n".join(lines))


def table(results):
    """Lines: scores per task, before (if evaluated) and after training, then the metrics."""
    args, order, matrix = results["args"], results["task_order"], results["scores"]["best"]
    before = matrix[0] if args["eval_before"] else None
    last = matrix[-1]
    if args["setting"] == "single":
        last = [row[i] for i, row in enumerate(matrix[-len(order):])]
    width = max(map(len, order))
    yield f"\n{'task':{width}}  {'metric':8}  {'before':>7}  {'after':>7}"
    for i, task in enumerate(order):
        cells = [before and before[i], last[i]]
        yield (f"{task:{width}}  {results['tasks'][task]['metric']:8}  "
               + "  ".join(f"{'' if cell is None else f'{cell:.2f}':>7}" for cell in cells))
    means = [before and metrics.mean(before), metrics.mean(last)]
    yield (f"{'mean':{width}}  {'':8}  "
           + "  ".join(f"{'' if cell is None else f'{cell:.2f}':>7}" for cell in means))
    for name, value in results["metrics"].items():
        yield f"{name}: {'not measured' if value is None else f'{value:.2f}'}"
    if "forward_needs" in results:
        yield f"forward needs the single-task scores: {results['forward_needs']}"
        yield "and then --single_task_results with its results.json"
