"""Checkpoints: all that a run needs to go on as if it had never been stopped, and nothing else.

A checkpoint is a folder `checkpoints/000007` with `tensors.safetensors`, `state.json` and their
`SHA256SUMS`. It is written under a temporary name and renamed when it is on the disk, so that it is
whole or absent. The frozen base model is not in it. Nothing is unpickled.
"""

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from adapter import check_tensors
from harness.arguments import OVERRIDABLE
from harness.identity import MODEL_HASHES
from harness.run import say
from inputs import formats
from inputs.errors import InputError
from inputs.files import fsync, open_file, read_text, sha256_file
from inputs.tensors import read_tensors, write_tensors

FOLDER, KEPT = "checkpoints", 2
TENSORS_FILE, STATE_FILE, SUMS_FILE = "tensors.safetensors", "state.json", "SHA256SUMS"
LOGS = ("log.jsonl", "regroup.jsonl")


class Checkpoint(NamedTuple):
    """A whole checkpoint that was read; `tensors` by name, `state` as in state.json."""

    name: str
    tensors: dict
    state: dict


# --- writing ------------------------------------------------------------------------------------


def save(run, optimizer=None):
    """Write a checkpoint of the run as it is now; the optimizer only in the middle of a stage.

    Called by all processes; the main one writes. The older checkpoints but one are deleted.
    """
    rng = gather_object([random_states()])  # one for each process
    if not run.accelerator.is_main_process:
        return
    tensors = {f"adapter.{key}": tensor for key, tensor in run.method.state_dict().items()}
    progress = run.progress
    state = {"position": progress.position, "rows": progress.rows,
             "files": progress.files | log_hashes(run), "identity": run.setup.identity,
             "hashes": progress.hashes, "overruled": sorted(progress.overruled),
             "seconds": progress.seconds.so_far(), "rng": rng}
    if optimizer is not None:
        tensors |= {f"method.{key}": value for key, value in run.method.training_state().items()}
        tensors |= {f"optimizer.{key}": tensor
                    for key, tensor in optimizer_state(run.model, optimizer).items()}
    folder = run.args.output_dir / FOLDER
    older = checkpoints_in(folder)
    path = folder / f"{max(map(number, older), default=0) + 1:06d}"
    try:
        write(path, tensors, state)
    except OSError as error:
        raise InputError(f"could not save a checkpoint in {folder} ({error}): nothing that was "
                         "saved before is lost; make room there, then --resume") from error
    for old in older[:1 - KEPT]:
        remove(old)


def write(path, tensors, state):
    """Write the folder `path` so that it is whole or absent, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        write_tensors(temporary / TENSORS_FILE, tensors)
        text = json.dumps(state, allow_nan=False, ensure_ascii=False)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        sums = [f"{sha256_file(temporary / name)}  {name}\n" for name in (TENSORS_FILE, STATE_FILE)]
        (temporary / SUMS_FILE).write_text("".join(sums))
        for file in (*temporary.iterdir(), temporary):
            fsync(file)
        os.rename(temporary, path)
        fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def log_hashes(run):
    """Bytes and SHA-256 of the logs, which are on the disk when this returns."""
    hashes = {}
    for name in LOGS:
        path = run.args.output_dir / name
        if path.exists():
            fsync(path)
            hashes[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return hashes


def random_states():
    """The states of all random number generators of this process, as JSON values."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest],
            "torch": torch.get_rng_state().numpy().tobytes().hex(), "cuda": cuda}


def set_random_states(states):
    """Put back what `random_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def optimizer_state(model, optimizer):
    """The state of Adam by "parameter name/key"; the rest follows from flags and position."""
    names, state = [name for name, _ in trained(model)], optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, values in state.items()
            for key, value in values.items()}


def expected_moments(model):
    """Tensors like those that `optimizer_state` gives."""
    like = {"step": lambda _: torch.tensor(0.0), "exp_avg": lambda weight: weight,
            "exp_avg_sq": lambda weight: weight}
    return {f"{name}/{key}": make(weight) for name, weight in trained(model)
            for key, make in like.items()}


def restore_optimizer(resumed, model, optimizer):
    """Give the optimizer of the resumed stage the state that it had."""
    tensors, names = part(resumed, "optimizer"), [name for name, _ in trained(model)]
    state = {index: {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
             for index, name in enumerate(names)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def trained(model):
    """(name, weight) of what is trained, in the order in which the optimizer has it."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


# --- reading ------------------------------------------------------------------------------------


def checkpoints_in(folder):
    """The checkpoint folders in `folder`, whole or not, the oldest first."""
    return sorted((path for path in folder.glob("*") if re.fullmatch(r"[0-9]{6,}", path.name)),
                  key=number)


def number(path):
    return int(path.name)


def newest(setup):
    """The newest whole Checkpoint in the run's folder, or None; damaged ones are named.

    The main process chooses, and all read the same one: the folder must be one that all see.
    """
    folder, chosen = setup.args.output_dir / FOLDER, [None]
    if setup.accelerator.is_main_process:
        for path in reversed(checkpoints_in(folder)):
            reason = damage(path)
            if reason is None:
                chosen = [path.name]
                break
            say(setup.accelerator, f"checkpoint {path} is damaged ({reason}): skipped")
    broadcast_object_list(chosen)
    return None if chosen[0] is None else read(folder / chosen[0])


def damage(path):
    """What is missing or broken in the checkpoint `path`, or None.

    Raises InputError for a whole one of another version, OSError for one that cannot be read now.
    """
    try:
        lines = read_text(path / SUMS_FILE).splitlines()
        sums = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
        for name in (TENSORS_FILE, STATE_FILE):
            if sums.get(name) != sha256_file(path / name):
                return f"{name} does not have its checksum"
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    formats.read(path / STATE_FILE, formats.CheckpointState)
    return None


def check_state(setup, state):
    """Raise InputError unless the parts of a state fit each other and the run."""
    stage, step = state["position"]
    stages, first = setup.stages, 0 if setup.args.eval_before else 1
    names = ["before"][first:] + [each.name for each in stages[:stage]]
    scores = [row[reference] for row in state["rows"]
              for reference in ("best", "first", "loss")]
    predicted = {f"predictions/{number:02d}_{row['name']}.jsonl"
                 for number, row in enumerate(state["rows"], start=first)
                 if any(score is not None for score in row["best"])}
    whole = {name for name in state["files"] if name.startswith("predictions/")}
    if not (stage <= len(stages) and step <= [*(each.steps for each in stages), 0][stage]
            and [row["name"] for row in state["rows"]] == names and whole == predicted
            and all(len(row) == len(setup.order) for row in scores)
            and state["hashes"].keys() == MODEL_HASHES.keys()
            and set(state["overruled"]) <= set(OVERRIDABLE)
            and len(state["rng"]) == setup.accelerator.num_processes):
        raise InputError(f"{STATE_FILE} of the checkpoint is damaged: its position, rows and files "
                         "do not belong together")
    try:
        set_random_states(state["rng"][setup.accelerator.process_index])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{STATE_FILE} of the checkpoint is damaged ({error!r:.200})") from None


def restore(run, resumed):
    """Put the method back as it was, after its adapter. Raises InputError where that fails."""
    (stage, step), stages = run.progress.position, run.setup.stages
    if stage < len(stages) and 0 < step < stages[stage].steps:
        state = part(resumed, "method")
        try:
            run.method.resume_stage(stages[stage], state)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"the checkpoint does not fit this model: {error!r:.200}") from None
        check_tensors(state, run.method.training_state(), "the checkpoint")
        check_tensors(part(resumed, "optimizer"), expected_moments(run.model),
                      "the checkpoint's optimizer")


def read(path):
    return Checkpoint(path.name, read_tensors(path / TENSORS_FILE),
                      json.loads(read_text(path / STATE_FILE)))


def part(checkpoint, name):
    """The tensors of one part of a checkpoint: "adapter", "method" or "optimizer"."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in checkpoint.tensors.items()
            if key.startswith(prefix)}


def restore_random_states(resumed, accelerator):
    set_random_states(resumed.state["rng"][accelerator.process_index])


def restore_files(folder, resumed):
    """Cut the logs back to the checkpoint; refuse to go on where a finished file was changed."""
    state = resumed.state
    for name, known in state["files"].items():
        path = folder / name
        grown = name not in LOGS and path.is_file() and path.stat().st_size != known["bytes"]
        if grown or not path.is_file() or sha256_start(path, known["bytes"]) != known["sha256"]:
            raise InputError(f"{path} is not as it was at the checkpoint: the run cannot go on "
                             "exactly; start it anew in another --output_dir")
    drop_leftovers(folder, int(resumed.name))
    for name in LOGS:
        if (folder / name).exists():
            os.truncate(folder / name, state["files"].get(name, {"bytes": 0})["bytes"])


def sha256_start(path, size):
    """SHA-256 of the first `size` bytes of a file, None where it has fewer."""
    with open_file(path) as file:
        if size > os.fstat(file.fileno()).st_size:
            return None
        return hashlib.sha256(file.read(size)).hexdigest()


def drop_leftovers(output_dir, newer_than=0):
    """Delete what killed saves left, and checkpoints above a number, which are damaged."""
    folder = output_dir / FOLDER
    killed = [path for path in folder.glob(".*.tmp")
              if re.fullmatch(r"\.[0-9]{6,}\.\w+\.tmp", path.name)]
    for path in (*killed, *(path for path in checkpoints_in(folder) if number(path) > newer_than)):
        remove(path)


def remove(path):
    """Delete a checkpoint, first its seal, and nothing else in it; or what a killed save left."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    elif path.name.startswith("."):
        shutil.rmtree(path)
    else:
        for name in (SUMS_FILE, STATE_FILE, TENSORS_FILE):
            (path / name).unlink(missing_ok=True)
        remove_empty(path)


def remove_empty(folder):
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def discard(run):
    """Delete all checkpoints: the run is finished."""
    drop_leftovers(run.args.output_dir)
    remove_empty(run.args.output_dir / FOLDER)
