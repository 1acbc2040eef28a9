"""Checkpoint folders that others wrote: read with suspicion, refused in one line."""

import contextlib
import json
import logging

import torch
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from inputs.errors import InputError, library_errors
from inputs.files import open_file, read_text

# Largest sizes of a model that is built at all: more is a damaged file, and would take for ever.
SIZES = {"num_hidden_layers": 1000, "hidden_size": 10**6, "intermediate_size": 10**7,
         "vocab_size": 10**8, "num_attention_heads": 10**5, "head_dim": 10**5}
LFS_POINTER = b"version https://git-lfs"
ATTENTION = (None, "eager", "sdpa")  # others may be fetched from a hub, as code


@contextlib.contextmanager
def one_line_errors(what, advice):
    """Say in one line what to do about a checkpoint that is gated, unreachable or damaged."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)  # what matters is raised, and said below
    try:
        with library_errors(what, f"; {advice}"):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)


def check_folder(folder):
    """Raise ValueError where the libraries would wait for a pipe, or read more than the folder."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.name} is no file")
    for path in folder.glob("*.safetensors"):
        with open_file(path) as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path.name} is a git-lfs pointer, not the weights: run `git lfs "
                                 "pull` in that folder")
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapter_config.json makes it an adapter for another model, not a base; "
                         "merge the adapter into the weights, or delete the file")
    for index in folder.glob("*.index.json"):
        for name in set(json.loads(read_text(index))["weight_map"].values()):
            if name != (folder / name).name:
                raise ValueError(f"{index.name} names {name!r}, which is no file of this folder")


def check_token_ids(file):
    """Raise ValueError for token ids that no model has: memory is taken for all below them."""
    if not file.is_file():
        return
    content = json.loads(read_text(file))
    vocabulary = content["model"].get("vocab")
    ids = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    ids += [(token["content"], token["id"]) for token in content.get("added_tokens") or []]
    for token, number in ids:
        if not (isinstance(number, int) and 0 <= number <= SIZES["vocab_size"]):
            raise ValueError(f"the token {token!r:.60} has the id {number!r:.60}, which is not "
                             f"from 0 to {SIZES['vocab_size']}")


def read_config(source):
    """A checkpoint's configuration. Raises ValueError for one that no causal model has."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    for name, largest in SIZES.items():
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, int) and 1 <= value <= largest):
            raise ValueError(f"{name} is {value!r}, which is not from 1 to {largest}")
    for name, allowed in (("_attn_implementation", ATTENTION), ("is_encoder_decoder", (False,)),
                          ("return_dict", (True,))):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name.lstrip('_')} is {value!r}; allowed: "
                             f"{', '.join(map(str, allowed))}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("it is stored quantised (quantization_config in config.json): give the "
                         "unquantised checkpoint, and --base nf4 or int8")
    for name, value in vars(config).items():
        if "drop" in name and type(value) in (int, float) and not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}, which is not from 0 to below 1")
    return config


def check_causal(model):
    """Raise ValueError for a model that sees the tokens that it is to predict."""
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise ValueError(f"{type(model).__name__} sees the tokens that it is to predict: its "
                         "attention is not causal")


def check_loaded(name, model, report):
    """Raise InputError where checkpoint and configuration do not fit, or a weight is not finite."""
    if report["missing_keys"]:
        raise InputError(f"model {name}: the checkpoint lacks "
                         f"{', '.join(sorted(report['missing_keys'])[:3])}")
    if report["unexpected_keys"]:  # without the buffers that the architecture is known to drop
        raise InputError(f"model {name}: its configuration has no place for the weights "
                         f"{', '.join(sorted(report['unexpected_keys'])[:3])}")
    for key, weight in model.named_parameters():
        if not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise InputError(f"model {name}: the weight {key} holds a non-finite number")


def stop_tokens(name, model):
    """The token ids that end an answer by the model's own configuration. Raises InputError."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    for stop in stops:
        if stop is not None and not (isinstance(stop, int) and 0 <= stop < 2**31):
            raise InputError(f"model {name}: eos_token_id {stop!r} is no token")
    return set(stops) - {None}
