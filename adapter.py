"""Save and load adapters: folders with adapter_model.safetensors and adapter_config.json."""

from dataclasses import asdict
from pathlib import Path

from harness.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_FORMATS,
    NOT_OF_PEFT,
    WEIGHTS_FILE,
    read_adapter_config,
)
from inputs.errors import InputError
from inputs.files import atomic_path, write_json
from inputs.tensors import check_tensors, read_tensors, write_tensors
from method import fingerprint, method_of
from quantized import quantise
from registry import method_class


def save(model, path):
    """Write the adapter of a wrapped model into folder `path`; equal adapters give equal bytes."""
    method, path = method_of(model), Path(path)
    with atomic_path(path / WEIGHTS_FILE) as temporary:
        write_tensors(temporary, method.state_dict())
    write_json(path / ADAPTER_CONFIG, {
        "format": ADAPTER_FORMATS[-1], "peft_type": NOT_OF_PEFT, "method": method.name,
        "settings": asdict(method.settings), "base_sha256": method.base_sha256,
        "model": method.base_name, "model_type": model.config.model_type, "base": method.base,
        "trained_on": method.trained_on,
        "chat_template": method.chat_template})


def load(model, path, settings=None, device=None):
    """Wrap the bare base `model` with the adapter saved in `path` and return it.

    The saved initial bank gives the residual, without a decomposition. The base is quantised as the
    adapter's was. `settings` replace the saved ones, to train further with another seed. The
    adapter and quantised weights are moved to `device` (default: the model's). Raises InputError
    for a damaged adapter, and for any base model but the one it was made on.
    """
    if hasattr(model, "adapted_by"):
        raise InputError("this model has an adapter already: load its base anew")
    path = Path(path)
    config, saved = read_adapter_config(path)
    state = read_tensors(path / WEIGHTS_FILE)
    sha256 = fingerprint(model)
    if sha256 != config.base_sha256:
        named = f" ({config.model})" if config.model else ""
        raise InputError(f"{path} was made on another base model{named}, or on one loaded in "
                         f"another precision: its SHA-256 is {config.base_sha256[:12]}…, this "
                         f"one's is {sha256[:12]}…")
    method = method_class(config.method)(settings or saved)
    method.base_sha256, method.base_name = sha256, config.model
    method.trained_on = config.trained_on
    method.chat_template, method.device = config.chat_template, device
    method.wrap(model, fresh=False)
    restore(method, state)
    quantise(model, config.base, device)
    return model


def restore(method, state):
    """Load the tensors of an adapter into a wrapped model. Raises InputError unless they fit."""
    method.grow(state)
    check_tensors(state, method.state_dict(), "the adapter")
    method.load_state_dict(state)
