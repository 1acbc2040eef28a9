"""A frozen base that the processes share: each holds a part of every block, and all of the adapter.

PyTorch's `fully_shard` on the decoder blocks; what is trained stays whole on every process, under
DDP, so that Eq. 8, regroupings, checkpoints and predictions are what they are without. Accelerate
must not know: its own FSDP would shard the bank, or leave its gradients unreduced.
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

TIMEOUT = timedelta(hours=3)  # of a collective: in it the other processes of a node load the model
# What accelerate launch may ask of FSDP beside this, by its variable: the value, and what to do.
REFUSED = {
    "FSDP_VERSION": ("1", "version 1 of FSDP is not supported: give --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("true", "--fsdp_offload_params is not supported: a smaller base is "
                            "--base nf4 or int8 of train.py"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "--fsdp_activation_checkpointing is not supported: "
                                      "give --gradient_checkpointing to train.py"),
}


def take_over(args):
    """Let --use_fsdp of the launcher mean --shard_base, before Accelerate or transformers obey it.

    Raises InputError for what the launcher asks for beside it.
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
def turn(accelerator, sharded):
    """A context that the processes of a node enter one after the other, if the base is sharded.

    So the host's memory holds one whole model, and not one for each process.
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
    """The processes, as `shard` takes them; called by all at once."""
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard(model, mesh: DeviceMesh, device):
    """Share the blocks of a wrapped model, in place; no process waits for another here.

    The adapter and all that is outside the blocks stay whole, on `device`: methods read them
    outside the forward pass, and tied embeddings are one tensor.
    """
    blocks = find_blocks(model)
    shared = {tensor for block in blocks.values()
              for tensor in shared_tensors(block, model.adapted_by)}
    whole = {tensor for tensor in model.parameters() if tensor not in shared}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    for module in (*blocks.values(), model):  # the last manages nothing: it orders the blocks
        fully_shard(module, mesh=mesh, ignored_params=whole)
    model._is_fsdp_managed_module = True  # transformers: generate until all processes have ended


def shared_tensors(block, method):
    """What of a decoder block the processes share: all but the adapters in it."""
    kept = {tensor for layer in method.layers.values()
            for name, tensor in layer.named_parameters() if not of_base(layer, name)}
    return [tensor for tensor in block.parameters() if tensor not in kept]


def prepare(accelerator, model):
    """Accelerate's `prepare`, and for a sharded model what it would do: autocast and DDP."""
    sharded = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    if not sharded:
        return accelerator.prepare(model)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
    model._is_accelerate_prepared = False  # the next stage prepares it again
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    return DistributedDataParallel(model, **accelerator.ddp_handler.to_kwargs())
