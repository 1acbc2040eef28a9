"""Identify a run: record what it is made with, and refuse to continue another one."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from data import SPLITS
from harness.adapter_config import WEIGHTS_FILE
from harness.arguments import OVERRIDABLE, PATH_FLAGS, recorded_args
from inputs.errors import InputError
from inputs.files import sha256_file
from registry import ADDED

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scipy", "rouge_score", "regex",
            "safetensors")
# The files that can change a result: method, data and training loop, not reports.
TRAINS = ("badit.py", "energy.py", "quantized.py", "decomposition.py", "experts.py", "grouping.py",
          "regrouping.py", "protection.py", "subspaces.py", "method.py", "registry.py", "train.py",
          "data.py", "models.py", "evaluation.py", "metrics.py", "adapter.py", "baselines/*.py",
          "inputs/*.py", "harness/*.py")
RECORDED = ("args", "tasks", "read_files", "code_sha256", "versions", "run", "precision",
            "processes", "compiler")  # what `recorded_identity` reads of results.json


def provenance(args):
    """Return what a run is made with. Called at its start: files may change while it runs."""
    return {"code_sha256": code_sha256(), "git_commit": git_commit(), "versions": versions(),
            "read_files": read_files(args)}


def code_sha256(root=ROOT):
    """Return the SHA-256 of the names and contents of the Python files of TRAINS."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in TRAINS for file in root.glob(pattern)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def git_commit():
    """Return the commit of this code, or None outside a git checkout or without git."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def versions():
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()}


def read_files(args):
    """Return the SHA-256 by flag of the files that a run reads beside its model and data.

    Raises InputError for one that cannot be read.
    """
    if args.adapter is None:
        return {}
    path = Path(args.adapter) / WEIGHTS_FILE
    try:
        return {"adapter": sha256_file(path)}
    except OSError as error:
        raise InputError(f"--adapter: cannot read {path}: {error.strerror}") from None


def task_sha256(task):
    """Return the SHA-256 of a task's text as it is used, which its score depends on."""
    content = [task.definition, task.metric, task.train, task.test]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def encoded_sha256(encoded):
    """Return the SHA-256 of an encoded suite's rows by task and split."""
    return {f"{split} rows of {task}": hashlib.sha256(json.dumps(rows).encode()).hexdigest()
            for split in SPLITS for task, rows in getattr(encoded, split).items()}


def compiler(accelerator):
    """Return the backend of torch.compile that the launcher asks for, or "no"."""
    return accelerator.state.dynamo_plugin.backend.value.lower()


def device_name(accelerator):
    """Return the GPU's name, or the instruction sets that choose a CPU's kernels and rounding."""
    device = accelerator.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    sets = [torch.backends.cpu.get_cpu_capability()]
    sets += ["BF16"] * torch.cpu._is_avx512_bf16_supported()
    sets += ["AMX"] * torch.cpu._is_amx_tile_supported()
    return f"{device} ({', '.join(sets)})"


def identity(args, accelerator, tasks, made):
    """Return {name that a user knows: value} of all that equal runs share."""
    return _identity(
        recorded_args(args), {name: task_sha256(task) for name, task in tasks.items()},
        made["read_files"], code=made["code_sha256"], versions=made["versions"],
        threads=torch.get_num_threads(), device=device_name(accelerator),
        precision=accelerator.mixed_precision, processes=accelerator.num_processes,
        compiler=compiler(accelerator))


def recorded_identity(results):
    """Return the `identity` of the run that wrote this results.json."""
    run = results["run"]
    return _identity(
        results["args"], {name: task["sha256"] for name, task in results["tasks"].items()},
        results["read_files"], code=results["code_sha256"], threads=run["threads"],
        device=run["device"],
        **{name: results[name] for name in ("versions", "precision", "processes", "compiler")})


def _identity(args, data, files, **rest):
    return ({f"--{name}": value for name, value in args.items()}
            | {f"data of {name}": sha256 for name, sha256 in data.items()}
            | {f"file of --{name}": sha256 for name, sha256 in files.items()} | rest)


def refuse_another_run(setup, recorded, source):
    """Raise InputError unless this run equals the `recorded` one, but for --allow_other.

    Returns the allowed differences that may change the result's last digits.
    """
    mine, free = setup.identity, set(setup.args.allow_other)
    recorded = {f"--{name}": value for name, value in ADDED.items()} | recorded
    paths = {f"--{name}" for name in PATH_FLAGS}
    different = [name for name in sorted(mine.keys() | recorded.keys())
                 if mine.get(name) != recorded.get(name)]
    overridable = {name: "paths" if name in paths else name for name in different}
    refused = [f"{name} (then {recorded.get(name)!r:.60}, now {mine.get(name)!r:.60})"
               for name in different if overridable[name] not in free]
    if refused:
        raise InputError(f"{source} is of another run: {'; '.join(refused)}. --allow_other takes "
                         f"{', '.join(OVERRIDABLE)}")
    return set(overridable.values()) - {"paths"}  # paths change no digit
