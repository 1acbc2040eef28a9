"""Changes to the program in a forked process, made before train.main (see forked.py).

Each function takes the rank of its process; some break only the second one.
"""

import functools
import os
import resource
import signal
import time

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import data
import models
from harness import checkpoint, sharding
from harness.run import Recorder, Run
from inputs.errors import InputError
from method import find_blocks, of_base
from regrouping import Regrouper


def replace(owner, name):
    """Replace owner.name by the decorated function, which gets the original first."""
    def decorate(function):
        real = getattr(owner, name)
        setattr(owner, name, functools.wraps(real)(
            lambda *args, **more: function(real, *args, **more)))
    return decorate


def slow_steps(rank):
    """Slow every step, so that a second signal comes before the run answers the first."""
    @replace(Recorder, "add_step")
    def add_step(real, recorder, line):
        time.sleep(0.05)
        real(recorder, line)


def stop_while_loading(rank):
    """Send SIGTERM before the run has touched its folder."""
    @replace(models, "load")
    def load(real, *_, **__):
        os.kill(os.getpid(), signal.SIGTERM)


def small_files(rank):
    """Limit file sizes below that of a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def double_precision(rank):
    """Load the base model in float64, where the order of a sum matters little."""
    @replace(models, "load")
    def load(real, name, dtype=None, **more):
        return real(name, torch.float64, **more)


def slow_writing(rank):
    """Make a checkpoint take a second; each process leaves a file when it ends."""
    @replace(checkpoint, "write")
    def write(real, *args):
        time.sleep(1)
        real(*args)
        time.sleep(0.1)  # file times are coarse

    @replace(Run, "end_together")
    def end_together(real, run):
        try:
            real(run)
        finally:
            run.args.output_dir.with_name(f"left-{rank}").touch()


def nan_in_the_loss(rank):
    @replace(LlamaForCausalLM, "forward")
    def forward(real, model, *args, **more):
        output = real(model, *args, **more)
        if rank and model.training:
            output.loss = output.loss * torch.nan
        return output


def another_adapter(rank):
    @replace(Regrouper, "after_step")
    def after_step(real, regrouper, *args):
        lines = real(regrouper, *args)
        if rank and lines:
            next(iter(regrouper.layers.values())).lora_A.data[0, 0] += 1e-7
        return lines


def other_data(rank):
    @replace(data, "read_task")
    def read_task(real, folder):
        task = real(folder)
        if rank and task.name == "say_both":
            task.train[3]["outputs"][0] += " too"
        return task


def bad_input(rank):
    @replace(checkpoint, "save")
    def save(real, *args):
        if rank:
            raise InputError("mine alone")
        real(*args)


def bug(rank):
    @replace(Regrouper, "accumulate")
    def accumulate(real, regrouper):
        return 1 / (1 - rank) and real(regrouper)


def in_bf16(rank):
    """Set the variable of `accelerate launch --mixed_precision bf16`."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def by_fsdp(rank):
    """Set the variables of `accelerate launch --use_fsdp`; print those that a loader sees."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                   "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_OFFLOAD_PARAMS": "false",
                   "FSDP_ACTIVATION_CHECKPOINTING": "false", "ACCELERATE_MIXED_PRECISION": "bf16"}

    @replace(models, "load")
    def load(real, *args, **more):
        print("left:", [name for name in os.environ if "FSDP" in name], flush=True)
        return real(*args, **more)


def expecting_gpus(rank):
    """Unset the variable that makes Accelerate use the CPU."""
    del os.environ["ACCELERATE_USE_CPU"]


def count_bytes(rank):
    """Print the bytes of the model that a process holds, before and after sharding."""
    def held(model):
        return sum(weight.numel() * weight.element_size() for weight in (
            getattr(weight, "_local_tensor", weight) for weight in model.parameters()))

    @replace(sharding, "shard")
    def shard(real, model, *args):
        inside = {id(weight) for block in find_blocks(model).values()
                  for weight in block.parameters()}
        layers = model.adapted_by.layers.values()
        inside -= {id(weight) for layer in layers for name, weight in layer.named_parameters()
                   if not of_base(layer, name)}
        base = sum(weight.numel() * weight.element_size() for weight in model.parameters()
                   if id(weight) in inside)
        before = held(model)
        real(model, *args)
        assert not any(isinstance(tensor, DTensor)
                       for tensor in model.adapted_by.state_dict().values())
        print("bytes:", before, base, held(model), flush=True)
