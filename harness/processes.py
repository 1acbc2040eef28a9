"""Checks that the processes of one run agree, and how they were launched."""

import os
import shlex

import torch
from accelerate.utils import gather_object, parse_flag_from_env

from inputs.errors import InputError


def check_equal(accelerator, state, step):
    """Raise InputError unless all processes hold the same {name: tensor}, to the bit."""
    if accelerator.num_processes == 1:
        return
    sums = torch.stack([bit_sum(tensor) for tensor in state.values()])  # (tensors,)
    everywhere = accelerator.gather(sums[None])  # (processes, tensors)
    different = (everywhere != everywhere[0]).any(0).tolist()
    names = [name for name, differs in zip(state, different, strict=True) if differs]
    if names:
        raise InputError(f"the processes hold different adapters at step {step} ({len(names)} "
                         f"tensors, such as {names[0]}): do they all have the same hardware and "
                         "libraries?")


def check_same(values):
    """Raise InputError unless all processes have the same {name: value}."""
    everywhere = gather_object([values])
    different = sorted({name for each in everywhere for name in each.keys() | values.keys()
                        if each.get(name) != everywhere[0].get(name)})
    if different:
        raise InputError("the processes have different flags, data or libraries: "
                         f"{', '.join(different)}; do they all see the same files?")


def bit_sum(tensor):
    """Return a checksum of a tensor's bytes, an int64 scalar, computed on its device."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).to(torch.int64)
    return (data * torch.arange(1, len(data) + 1, device=data.device)).sum()


def launcher():
    """Return the words that started this process: python, or accelerate launch with its options.

    Environment variables that the resumed run needs come first. `accelerate launch --cpu`, which
    allows one process, sets ACCELERATE_USE_CPU itself. Of several machines nothing is known but
    that each has a command of its own.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        return "(on each machine, its launcher as before)"
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    on_cpu, threads = parse_flag_from_env("ACCELERATE_USE_CPU"), os.environ.get("OMP_NUM_THREADS")
    words = ["python"]
    if (processes, precision, backend) != ("1", "no", "no"):
        kind = ["--multi_gpu"] if processes != "1" else ["--cpu"] * on_cpu
        words = ["accelerate", "launch", *kind, "--num_processes", processes, "--mixed_precision",
                 precision, "--dynamo_backend", backend]
    before = [f"OMP_NUM_THREADS={shlex.quote(threads)}"] if threads else []
    before += ["ACCELERATE_USE_CPU=true"] * (on_cpu and "--cpu" not in words)
    return " ".join([*before, shlex.join(words)])
