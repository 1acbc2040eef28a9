"""What the model's shape rules out, refused before its weights are loaded."""

import math
import re
from collections import Counter

from torch import nn

import models
from data import SPLITS
from harness.identity import refuse_another_model
from harness.run import say
from inputs.errors import InputError
from registry import ALL_LINEAR

# The linear layers that are slices of one tensor of all experts, by its name.
FUSED = {"gate_up_proj": {"gate_proj", "up_proj"}, "down_proj": {"down_proj"}}


def check_model(setup, method):
    """Raise InputError where the run's data or its `method` (None: a saved one) do not fit."""
    args = setup.args
    skeleton = models.skeleton(args.model)
    limit = getattr(skeleton.config, "max_position_embeddings", math.inf)
    if args.max_length + args.max_new_tokens > limit:
        raise InputError(f"--max_length {args.max_length} + --max_new_tokens {args.max_new_tokens} "
                         f"is more than the model's {limit} positions")
    rows = skeleton.get_input_embeddings().weight.shape[0]
    if setup.tokenizer.pad_token_id >= rows:  # the others are in the rows that are checked below
        raise InputError(f"model {args.model}: its tokenizer pads with the token "
                         f"{setup.tokenizer.pad_token_id}, its embedding has only {rows} rows")
    check_encoded(setup.encoded, limit - args.max_new_tokens, rows)
    if method is not None:
        asked = method.settings
        method.check_tasks(setup.order)
        check_architecture(skeleton, getattr(asked, "target_modules", ()))
        method.check_model(skeleton)
        for name in asked.names():
            value = getattr(method.settings, name)
            if value != getattr(asked, name):  # chosen by the model's shape
                say(setup.accelerator, f"{name} {value}")


def check_architecture(model, target_modules):
    """Raise InputError where layers that are meant, by their names, are no nn.Linear modules.

    Those are GPT-2's, which are transposed, and a mixture's experts in one tensor.
    """
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in
             model.named_modules() if not isinstance(module, nn.Linear)}
    transposed = sorted(name for name, kind in kinds.items() if kind == "Conv1D")
    if transposed:
        raise InputError(f"model type {model.config.model_type}: its layers "
                         f"{', '.join(transposed)} are Conv1D modules, which keep their weights "
                         "transposed; only nn.Linear is adapted")
    wanted = set(target_modules)
    for name, weight in model.named_parameters():
        last = name.rpartition(".")[2]
        if weight.ndim == 3 and (wanted == {ALL_LINEAR} or wanted & FUSED.get(last, set())):
            raise InputError(f"model type {model.config.model_type} is a mixture of experts, with "
                             f"all of them in one tensor, {name} {list(weight.shape)}, which would "
                             "stay frozen; --target_modules can name its attention's layers, such "
                             "as q_proj")


def adapted_layers(method):
    """A line with the names of the adapted layers by pattern, and the number of each."""
    return f"adapted layers: {patterns(method.layers)}"


def patterns(names):
    """Names of modules in words, those of all blocks as one, with the number of each."""
    counts = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def check_frame(args, method):
    """Raise InputError where a saved adapter was trained on prompts in another frame."""
    if method.chat_template != args.chat_template:
        raise InputError(f"--adapter {args.adapter} was trained with --chat_template "
                         f"{'on' if method.chat_template else 'off'}: go on with it so")


def check_hashes(run, hashes):
    """Raise InputError where the loaded model is not that of the run to go on with or to repeat."""
    args, setup = run.args, run.setup
    why = (f"model {args.model} is not that of the run to be "
           f"{'resumed' if args.resume else 'repeated'},")
    refuse_another_model(run.progress.hashes or setup.known_hashes, hashes, why)
    if setup.single and setup.single.base_sha256 != hashes["base_sha256"]:
        raise InputError(f"--single_task_results {args.single_task_results} was made on another "
                         "base model")


def check_encoded(encoded, positions, vocabulary):
    """Raise InputError for a test prompt of more than `positions` tokens, or a token that is none.

    A Definition that alone exceeds max_length is left whole in evaluation; and a tokenizer may know
    ids from `vocabulary` on, for which the model has no embedding.
    """
    for split in SPLITS:
        for task, rows in getattr(encoded, split).items():
            for row in rows:
                length, largest = len(row["input_ids"]), max(row["input_ids"], default=0)
                if split == "test" and length > positions:
                    raise InputError(f"task {task}, {row['id']}: the prompt of {length} tokens, "
                                     f"without any input, exceeds the {positions} that the model "
                                     "has room for beside --max_new_tokens")
                if largest >= vocabulary:
                    raise InputError(f"task {task}, {row['id']}: the tokenizer gives the token "
                                     f"{largest}, the model's embedding has {vocabulary}")
