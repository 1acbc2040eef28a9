"""Load language models: the paper's six from the hub, any checkpoint, and a small embedded one."""

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from inputs.embedded import embedded_folder
from inputs.errors import InputError
from inputs.model_folders import (
    TEXT_MODEL,
    check_folder,
    check_forward,
    check_loaded,
    check_signature,
    one_line_errors,
    read_config,
)
from inputs.settings import did_you_mean
from registry import EMBEDDED, MODELS

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load(name_or_path, dtype=torch.float32, padded=True):
    """Load (model, tokenizer) by a name in MODELS, from a local folder, or by a hub id.

    A multimodal checkpoint gives its text model. The tokenizer has a pad token (its own, or EOS).
    The model's generation config holds special tokens only, so generation is greedy by default.
    `padded`: whether the caller pads rows. Raises InputError for a model that cannot be loaded or
    trained.
    """
    avoid_cudnn_attention()
    tokenizer = load_tokenizer(name_or_path)
    source = locate(name_or_path)
    with reading(name_or_path, source):
        config, multimodal = read_config(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, key_mapping=TEXT_MODEL if multimodal else None, dtype=dtype,
            output_loading_info=True, trust_remote_code=False)
        check_loaded(name_or_path, model, report, multimodal)
        check_signature(model)
        check_forward(name_or_path, model, tokenizer, padded)
        stops = model.generation_config.eos_token_id
        stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
        if not all(isinstance(stop, int) and 0 <= stop < 2**31 for stop in stops):
            raise ValueError(f"eos_token_id is {model.generation_config.eos_token_id!r}")
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(stops) or None)
    return model, tokenizer


def avoid_cudnn_attention():
    """Switch off cuDNN's attention on GPUs.

    On a Hopper GPU PyTorch 2.11 to 2.13 prefer it in bf16, and its backward pass gives NaN for
    masked rows of some lengths (pytorch/pytorch#196678): a run that meets one diverges.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_tokenizer(name_or_path):
    """Load the tokenizer alone; EOS becomes its pad token if it has none. Raises InputError."""
    source = locate(name_or_path)
    with reading(name_or_path, source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: there is no "
                             "tokenizer.json")
        unknown = tokenizer.unk_token
        if unknown is not None and tokenizer.backend_tokenizer.token_to_id(unknown) is None:
            raise ValueError(f"unk_token {unknown!r} is not in its vocabulary")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(name_or_path, device="meta", dtype=None, layers=None):
    """Build the model without loading weights, by default on the meta device.

    Under a FakeTensorMode the device may be another. `layers` keeps only the first ones.
    """
    source = locate(name_or_path)
    with reading(name_or_path, source):
        config, _ = read_config(source)
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        check_signature(model)
    return model


def is_multimodal(name_or_path):
    """Return whether a checkpoint holds more than a text model."""
    source = locate(name_or_path)
    with reading(name_or_path, source):
        return read_config(source)[1]


def config_sha256(model, tokenizer):
    """Hash what decides a model's answers beside its weights: configuration, tokenizer, template.
    """
    config = model.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version"):  # may differ for the same model
        config.pop(key, None)
    content = [config, model.generation_config.eos_token_id, tokenizer.backend_tokenizer.to_str(),
               tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def locate(name_or_path):
    """Return the local folder or the hub id of a model. Raises InputError for an unknown one."""
    if name_or_path == EMBEDDED:
        return embedded_folder(EMBEDDED)
    if name_or_path in MODELS:
        check_hub(name_or_path, MODELS[name_or_path])
        return MODELS[name_or_path]
    if name_or_path and Path(name_or_path).is_dir():
        with reading(name_or_path, name_or_path):
            check_folder(Path(name_or_path))
        return str(name_or_path)
    if HUB_ID.fullmatch(str(name_or_path)) and not Path(name_or_path).exists():
        check_hub(name_or_path, name_or_path)
        return name_or_path
    raise InputError(f"model {str(name_or_path)!r} is unknown: allowed are {', '.join(MODELS)}, "
                     "the path of a folder with a checkpoint, and a hub id such as Qwen/Qwen3-0.6B"
                     f"{did_you_mean(name_or_path, MODELS)}")


def check_hub(name, repository):
    """Raise InputError at once, without retries, where the hub is unreachable or denies access."""
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, "config.json"), str):
        return
    with reading(name, repository):
        huggingface_hub.auth_check(repository)


def reading(name, source):
    """Return a context that turns any error about a checkpoint into one line with advice."""
    advice = "the folder must hold config.json, tokenizer and safetensors"
    if name == EMBEDDED:
        advice = f"delete {source} and run again: it is made anew"
    elif HUB_ID.fullmatch(str(source)) and not Path(source).exists():
        advice = (f"if it is gated, accept its licence at https://huggingface.co/{source} and run "
                  "`hf auth login`; offline, pass --model the path of a folder that holds it"
                  + ("" if name in MODELS else f"; there is no folder {name} here"))
    return one_line_errors(f"cannot load model {name} from {source}", advice)
