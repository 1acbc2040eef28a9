"""Read and write safetensors files."""

import errno

import safetensors
import safetensors.torch
import torch

from inputs.errors import InputError

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # each accepts the others


def write_tensors(path, tensors):
    """Write {name: tensor} as safetensors, in place. Raises OSError where that fails."""
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    try:
        # One metadata key only: safetensors writes several in random order.
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def read_tensors(path):
    """Return {name: tensor} of a safetensors file. Raises InputError where it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def check_tensors(state, expected, what):
    """Raise InputError unless `state` is finite with the keys, shapes and types of `expected`."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise InputError(f"{what} does not fit this model: {len(missing)} tensors are missing "
                         f"{missing[:2]}, {len(extra)} are unknown {extra[:2]}")
    for key, tensor in state.items():
        want = expected[key]
        types = FLOATS if want.is_floating_point() else {want.dtype}
        if tensor.shape != want.shape or tensor.dtype not in types:
            raise InputError(f"{what} does not fit this model: {key} is {tensor.dtype} "
                             f"{list(tensor.shape)}, expected {want.dtype} {list(want.shape)}")
        if not torch.isfinite(tensor.to(want.dtype)).all():
            raise InputError(f"{what} is damaged: {key} holds a non-finite number")
