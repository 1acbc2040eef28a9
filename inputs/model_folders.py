"""Check checkpoint folders that others wrote, and refuse in one line what cannot be trained."""

import contextlib
import inspect
import logging
import warnings

import torch
import torch.nn.functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import logging as hf_logging

from inputs.errors import InputError, library_errors

LFS_POINTER = b"version https://git-lfs"
ATTENTION = (None, "eager", "sdpa")  # other names may make transformers download and run code
# Names of a multimodal checkpoint's weights -> names in its text model.
TEXT_MODEL = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
LAYERS = 1000
PREFIX, OTHERS = 8, 24  # tokens of a row in check_forward
# Largest relative difference of logits that is rounding. Measured on tiny models of 130 types: at
# most 1e-6 and 6e-3 by rounding, at least 5e-2 where padding or later tokens count.
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 2e-2}


@contextlib.contextmanager
def one_line_errors(what, advice):
    """Turn any error of a library into an InputError: `what`, the reason, `advice`."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)  # what matters is raised
    try:
        with library_errors(what, f"; {advice}"), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)


def check_folder(folder):
    """Raise ValueError for a folder that holds an adapter, or git-lfs pointers as weights."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{path.name} is a git-lfs pointer, not the weights: run `git lfs "
                                 "pull` in that folder")
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapter_config.json makes it an adapter for another model, not a base; "
                         "merge the adapter into the weights, or delete the file")


def read_config(source):
    """Return (the configuration of a checkpoint's text model, whether it is multimodal).

    Raises ValueError for a checkpoint that has no causal language model, is stored quantised, or
    asks for an unknown attention implementation.
    """
    whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(whole, "text_config", None) or whole
    multimodal = config is not whole
    if multimodal:
        config.tie_word_embeddings = whole.tie_word_embeddings
        config.dtype = config.dtype or whole.dtype
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # Eq. (1) has no auxiliary loss, which sees padding
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        text = f"its text model {config.model_type} is" if multimodal else "it is"
        raise ValueError(f"model type {whole.model_type}: {text} not a causal language model of "
                         "transformers")
    if getattr(config, "num_hidden_layers", 1) > LAYERS:  # a damaged file would never be built
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, more than {LAYERS}")
    if config._attn_implementation not in ATTENTION:
        raise ValueError(f"attn_implementation is {config._attn_implementation!r}; allowed: "
                         f"{', '.join(map(str, ATTENTION))}")
    if getattr(whole, "quantization_config", None) is not None:
        raise ValueError("it is stored quantised (quantization_config in config.json): give the "
                         "unquantised checkpoint, and --base nf4 or int8")
    return config, multimodal


def check_signature(model):
    """Raise ValueError for a model that cannot compute logits at chosen positions only."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"model type {model.config.model_type}: the forward method of "
                         f"{type(model).__name__} has no argument logits_to_keep")


def check_loaded(name, model, report, multimodal):
    """Raise InputError for missing, unexpected or non-finite weights.

    Of a multimodal checkpoint, weights outside the text model are allowed.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if multimodal:
        modules = tuple(f"{each}." for each, _ in model.named_modules() if each.count(".") == 1)
        unexpected = [key for key in unexpected if key.startswith(modules)]
    if missing:
        raise InputError(f"model {name}: the checkpoint lacks {', '.join(missing[:3])}")
    if unexpected:  # without the buffers that the architecture is known to drop
        raise InputError(f"model {name}: its configuration has no place for the weights "
                         f"{', '.join(unexpected[:3])}")
    for key, weight in model.named_parameters():
        if not torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all():
            raise InputError(f"model {name}: the weight {key} holds a non-finite number")


@torch.no_grad()
def check_forward(name, model, tokenizer, padded):
    """Raise InputError if logits depend on later tokens or padding, or the loss is not Eq. (1)'s.

    Runs one forward pass, as in training, on rows that share their first PREFIX tokens. If the
    caller pads rows (`padded`), a last row holds these tokens after padding. The logits of the
    shared tokens must be equal up to rounding.
    """
    kind = f"model {name}, of type {model.config.model_type}"
    vocabulary = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    draws = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)).tolist()
    special = {tokenizer.pad_token_id, *tokenizer.all_special_ids}
    ids = [token for token in draws[:1000] if token not in special]
    ids = ids * (PREFIX + 2 * OTHERS)  # for a vocabulary of fewer tokens
    shared, others = ids[:PREFIX], ids[PREFIX:PREFIX + 2 * OTHERS]
    rows = [shared + others[:OTHERS], shared + others[OTHERS:]]
    rows += [[tokenizer.pad_token_id] * OTHERS + shared] * padded
    input_ids = torch.tensor(rows)  # (rows, width)
    mask = torch.ones_like(input_ids)
    mask[2:, :OTHERS] = 0
    labels = torch.where(torch.arange(1, input_ids.shape[1]) < OTHERS, -100, input_ids[:, 1:])
    answer = model(input_ids=input_ids, attention_mask=mask, labels=labels,
                   position_ids=(mask.cumsum(-1) - 1).clamp_min(0), num_items_in_batch=2,
                   logits_to_keep=torch.arange(1, input_ids.shape[1]), use_cache=False)
    logits = answer.logits.float()  # (rows, width - 1, vocabulary)
    first, second = logits[:2, :PREFIX - 1]
    tolerance = max(ROUNDING[weight.dtype] for weight in model.parameters())
    if distance(first, second) > tolerance:
        raise InputError(f"{kind}: its logits depend on later tokens; only causal language models "
                         "are trained")
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                               reduction="sum") / 2  # num_items_in_batch
    if not abs(answer.loss - expected) <= tolerance * expected:
        raise InputError(f"{kind}: its loss is {answer.loss:.4f}, but the cross-entropy of the "
                         f"next tokens is {expected:.4f}")
    if padded and distance(first, logits[2, 1 - PREFIX:]) > tolerance:
        raise InputError(f"{kind}: padding changes its logits, so results would depend on the "
                         "batch size; give --batch_size 1 --eval_batch_size 1, which need no "
                         "padding (--gradient_accumulation_steps N keeps the global batch)")


def distance(logits, others):
    """Return the relative distance of two tensors of logits (tokens, vocabulary)."""
    return (logits - others).norm() / (logits - logits.mean(-1, keepdim=True)).norm()
