"""Read and write safetensors files."""

import errno

import safetensors
import safetensors.torch

from inputs.errors import InputError
from inputs.files import open_file


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
        open_file(path).close()  # no pipe, which safetensors would wait for
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
