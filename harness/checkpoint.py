"""Checkpoints: save all that a run needs to continue exactly, and continue from them.

A checkpoint is a folder `checkpoints/000007` with `tensors.safetensors` and `state.json`. It is
written under a temporary name, synced and renamed, so it is complete or absent. The frozen base
model is not in it. Nothing is unpickled.
"""

import json
import os
import random
import re
import shutil
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from harness import identity, output_folder
from harness.run import Position, Progress, print_main
from inputs import formats
from inputs.errors import InputError
from inputs.files import atomic_folder, fsync
from inputs.tensors import check_tensors, read_tensors, write_tensors

FOLDER, KEPT = "checkpoints", 2
TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam
STATE = ("position", "rows", "files", "log_bytes", "identity", "hashes", "seconds", "rng",
         "allowed_differences")
RESULTS = (*identity.RECORDED, "rows", "task_order", "scores", "metrics")  # that --resume reads


class Checkpoint(NamedTuple):
    """A checkpoint that was read: tensors by name, and the content of state.json."""

    name: str
    tensors: dict
    state: dict


# --- writing ------------------------------------------------------------------------------------


def save(run, optimizer=None):
    """Write a checkpoint of the run; `optimizer` is given in the middle of a stage only.

    Called by all processes; the main one writes, and deletes all older checkpoints but one.
    """
    rng = gather_object([random_states()])  # one for each process
    if not run.accelerator.is_main_process:
        return
    tensors = {f"adapter.{key}": tensor for key, tensor in run.method.state_dict().items()}
    progress = run.progress
    state = {"position": progress.position, "rows": progress.rows, "files": progress.files,
             "log_bytes": log_bytes(run.args.output_dir), "identity": run.setup.identity,
             "hashes": progress.hashes, "seconds": progress.seconds.so_far(), "rng": rng,
             "allowed_differences": sorted(progress.allowed_differences)}
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
                         "saved before is lost; when the disk can be written again, give "
                         "--resume") from error
    for old in older[:1 - KEPT]:
        shutil.rmtree(old)


def write(path, tensors, state):
    """Write the folder `path` so that it is complete or absent, whatever happens meanwhile."""
    with atomic_folder(path) as folder:
        write_tensors(folder / TENSORS_FILE, tensors)
        text = json.dumps(state, allow_nan=False, ensure_ascii=False)
        (folder / STATE_FILE).write_text(text, encoding="utf-8")


def log_bytes(folder):
    """Return the sizes of the logs by name, after syncing them to the disk."""
    sizes = {}
    for path in (folder / name for name in output_folder.LOGS):
        if path.exists():
            fsync(path)
            sizes[path.name] = path.stat().st_size
    return sizes


def random_states():
    """Return the states of all random number generators of this process, as JSON values."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest],
            "torch": torch.get_rng_state().numpy().tobytes().hex(), "cuda": cuda}


def restore_random_states(resumed, accelerator):
    """Restore what `random_states` returned."""
    states = resumed.state["rng"][accelerator.process_index]
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def optimizer_state(model, optimizer):
    """Return Adam's state by "parameter name/key"; the rest follows from flags and position."""
    names, state = [name for name, _ in trained(model)], optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, values in state.items()
            for key, value in values.items()}


def expected_moments(model):
    """Return tensors of the shapes and types that `optimizer_state` gives."""
    return {f"{name}/{key}": torch.tensor(0.0) if key == "step" else weight
            for name, weight in trained(model) for key in MOMENTS}


def restore_optimizer(resumed, model, optimizer):
    """Restore the optimizer's state in the resumed stage."""
    tensors, names = part(resumed, "optimizer"), [name for name, _ in trained(model)]
    state = {index: {key: tensors[f"{name}/{key}"] for key in MOMENTS}
             for index, name in enumerate(names)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def trained(model):
    """Return (name, weight) of the trained parameters, in the optimizer's order."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


# --- reading ------------------------------------------------------------------------------------


def checkpoints_in(folder):
    """Return the checkpoint folders in `folder`, the oldest first."""
    return sorted((path for path in folder.glob("*") if re.fullmatch(r"[0-9]{6,}", path.name)),
                  key=number)


def number(path):
    return int(path.name)


def find(setup, fresh):
    """Find where to continue -> (Progress, Checkpoint), or (`fresh`, None) without a checkpoint.

    Raises InputError for a checkpoint of another run.
    """
    folder = setup.args.output_dir
    found = newest(setup)
    if found is None:
        print_main(setup.accelerator, f"no checkpoint in {folder}: starting from the beginning")
        return fresh, None
    state = found.state
    differences = identity.refuse_another_run(setup, state["identity"],
                                              f"checkpoint {folder / FOLDER / found.name}")
    fresh.seconds.done |= state["seconds"]  # what came after the checkpoint is lost
    progress = Progress(Position(*state["position"]), state["rows"], state["files"],
                        state["hashes"], differences | set(state["allowed_differences"]),
                        fresh.seconds)
    return progress, found


def newest(setup):
    """Return the newest readable Checkpoint, or None; unreadable ones are named and skipped.

    The main process chooses, and all read the same one: they must all see the folder. Raises
    InputError where there are checkpoints and none is readable.
    """
    folder, chosen = setup.args.output_dir / FOLDER, [None]
    if setup.accelerator.is_main_process:
        paths = checkpoints_in(folder)
        while paths and chosen == [None]:
            path = paths.pop()
            try:
                read(path)
            except InputError as error:
                print_main(setup.accelerator, f"checkpoint {path} is skipped: {error}")
                if not paths:
                    raise InputError(
                        f"no checkpoint in {folder} can be read ({error}): to start again, give "
                        "--overwrite in place of --resume, or another --output_dir") from None
            else:
                chosen = [path.name]
    broadcast_object_list(chosen)
    return None if chosen[0] is None else read(folder / chosen[0])


def read(path):
    """Return the Checkpoint in the folder `path`. Raises InputError if it cannot be read."""
    return Checkpoint(path.name, read_tensors(path / TENSORS_FILE),
                      formats.load_keys(path / STATE_FILE, STATE))


def part(checkpoint, name):
    """Return the tensors of one part of a checkpoint: "adapter", "method" or "optimizer"."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in checkpoint.tensors.items()
            if key.startswith(prefix)}


def restore(run, resumed):
    """Restore the method in the middle of a stage. Raises InputError if the tensors do not fit."""
    (stage, step), stages = run.progress.position, run.setup.stages
    if stage < len(stages) and 0 < step < stages[stage].steps:
        state = part(resumed, "method")
        run.method.resume_stage(stages[stage], state)
        check_tensors(state, run.method.training_state(), "the checkpoint")
        check_tensors(part(resumed, "optimizer"), expected_moments(run.model),
                      "the checkpoint's optimizer")


def finished(setup):
    """Return the results.json of a run that is already finished, or None."""
    file = setup.args.output_dir / "results.json"
    if not file.exists():
        return None
    results = formats.load_keys(file, RESULTS)
    identity.refuse_another_run(setup, identity.recorded_identity(results), file)
    return results


def prepare_output_folder(run, resumed):
    """Empty the run's folder, or bring it back to the checkpoint that the run continues from."""
    folder = run.args.output_dir
    if run.accelerator.is_main_process:
        if resumed is None:
            output_folder.clear(folder)
        else:
            restore_files(folder, resumed)
    run.accelerator.wait_for_everyone()


def restore_files(folder, resumed):
    """Cut the logs back to the checkpoint, and delete what was written later.

    Raises InputError where a log or a finished file is not complete.
    """
    sizes, kept = resumed.state["log_bytes"], resumed.state["files"]
    for path in (folder / name for name in (*sizes, *kept)):
        if not path.is_file() or path.stat().st_size < sizes.get(path.name, 0):
            raise InputError(f"{path} is missing or shorter than at the checkpoint: the run cannot "
                             "continue exactly; start it again in another --output_dir")
    for path in checkpoints_in(folder / FOLDER):
        if number(path) > int(resumed.name):
            shutil.rmtree(path)
    for path in folder.glob("predictions/*"):
        if path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    for path in (folder / name for name in output_folder.LOGS):
        if path.exists():
            os.truncate(path, sizes.get(path.name, 0))
    output_folder.delete_temporary(folder)


def discard(run):
    """Delete all checkpoints: the run is finished."""
    shutil.rmtree(run.args.output_dir / FOLDER, ignore_errors=True)
