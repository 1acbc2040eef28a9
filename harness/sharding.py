"""Shard the frozen base: each process holds a part of every block, and the whole adapter.

PyTorch's `fully_shard` runs on the decoder blocks. Trained weights stay whole on every process,
under DDP, so Eq. 8, regroupings, checkpoints and predictions equal those without sharding.
Accelerate's own FSDP would shard the bank, or leave its gradients unreduced.
"""

import contextlib
import os
from datetime import timedelta

import torch
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from inputs.errors import InputError
from method import find_blocks, of_base

TIMEOUT = timedelta(hours=3)  # of a collective: some wait while others load the model
# FSDP options of accelerate launch that are refused: variable, value, what to do.
REFUSED = {
    "FSDP_VERSION": ("1", "version 1 of FSDP is not supported: give --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("true", "--fsdp_offload_params is not supported: a smaller base is "
                            "--base nf4 or int8 of train.py"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "--fsdp_activation_checkpointing is not supported: "
                                      "give --gradient_checkpointing to train.py"),
}


def take_over(args):
    """Turn the launcher's --use_fsdp into --shard_base, before Accelerate or transformers see it.

    Raises InputError for other FSDP options.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        for variable, (value, advice) in REFUSED.items():
            if os.environ.get(variable, "").lower() == value:
                raise InputError(f"{advice} ({variable} is {value})")
        args.shard_base = True
        for variable in [name for name in os.environ if name.startswith("FSDP_")]:
            del os.environ[variable]
        del os.environ["ACCELERATE_USE_FSDP"]
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if args.shard_base and backend != "no":
        raise InputError(f"--dynamo_backend {backend} is not supported with --shard_base")


@contextlib.contextmanager
def one_at_a_time(accelerator, sharded):
    """A context that the processes of a node enter one after another, if the base is sharded.

    Then the host's memory holds one whole model, not one for each process.
    """
    mine = last = 0
    if sharded:
        mine = accelerator.local_process_index
        last = int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())
    for _ in range(mine):
        accelerator.wait_for_everyone()
    yield
    for _ in range(mine, last):
        accelerator.wait_for_everyone()


def mesh_of(accelerator):
    """Return the mesh of all processes for `shard`; called by all of them."""
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard(model, mesh: DeviceMesh, device):
    """Shard the blocks of a wrapped model in place; no process waits for another here.

    The adapter and everything outside the blocks stay whole on `device`: methods read them outside
    the forward pass, and tied embeddings are one tensor.
    """
    blocks = find_blocks(model)
    shared = {tensor for block in blocks.values()
              for tensor in shared_tensors(block, model.adapted_by)}
    whole = {tensor for tensor in model.parameters() if tensor not in shared}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    for module in (*blocks.values(), model):  # the root shards nothing, it orders the blocks
        fully_shard(module, mesh=mesh, ignored_params=whole)
    model._is_fsdp_managed_module = True  # transformers: generate until all processes end


def shared_tensors(block, method):
    """Return the tensors of a decoder block that are sharded: all but its adapters."""
    kept = {tensor for layer in method.layers.values()
            for name, tensor in layer.named_parameters() if not of_base(layer, name)}
    return [tensor for tensor in block.parameters() if tensor not in kept]


def prepare(accelerator, model):
    """Prepare a model as Accelerate does; a sharded one gets the same autocast and DDP."""
    sharded = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    if not sharded:
        return accelerator.prepare(model)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
    model._is_accelerate_prepared = False  # the next stage prepares it again
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    return DistributedDataParallel(model, **accelerator.ddp_handler.to_kwargs())
