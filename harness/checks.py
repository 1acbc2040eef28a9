"""Check that flags, data and model fit together; all but the hashes before the weights load."""

import math
import re
from collections import Counter
from pathlib import Path

from torch import nn

import models
from data import SPLITS
from harness.run import print_main
from inputs import formats
from inputs.errors import InputError
from inputs.task_files import listed
from quantized import check_experts, find_experts
from registry import ALL_LINEAR

# Linear layers that one tensor holds for all experts, by the name of that tensor.
FUSED = {"gate_up_proj": {"gate_proj", "up_proj"}, "down_proj": {"down_proj"}}
# The hashes of the base model in results.json and in checkpoints, in words.
MODEL_HASHES = {"base_sha256": "weights", "config_sha256": "a configuration or tokenizer"}


def check_model(setup, method):
    """Raise InputError unless the data, and `method` if not None, fit the model; return None."""
    args = setup.args
    skeleton = models.skeleton(args.model)
    limit = getattr(skeleton.config, "max_position_embeddings", None) or math.inf
    if args.max_length + args.max_new_tokens > limit:
        raise InputError(f"--max_length {args.max_length} + --max_new_tokens {args.max_new_tokens} "
                         f"is more than the model's {limit} positions")
    rows = skeleton.get_input_embeddings().weight.shape[0]
    if setup.tokenizer.pad_token_id >= rows:  # it is in no row that check_encoded reads
        raise InputError(f"model {args.model}: its tokenizer pads with the token "
                         f"{setup.tokenizer.pad_token_id}, its embedding has only {rows} rows")
    if args.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise InputError(f"--gradient_checkpointing: {type(skeleton).__name__} does not support it")
    check_encoded(setup.encoded, limit, args.max_new_tokens, args.eval_loss, rows)
    check_experts(skeleton, args.base)
    if models.is_multimodal(args.model):
        print_main(setup.accelerator, f"model {args.model} is multimodal: only its text model, "
                   f"{type(skeleton).__name__}, is loaded")
    if method is not None:
        asked = method.settings
        method.check_tasks(setup.order)
        check_architecture(skeleton, getattr(asked, "target_modules", ()), args.base != "dense")
        method.check_model(skeleton)
        for name in asked.names():
            value = getattr(method.settings, name)
            if value != getattr(asked, name):  # chosen by the model's shape
                print_main(setup.accelerator, f"{name} {value}")


def rows_of_the_adapter(args, suite):
    """Yield a line if --validation may evaluate rows that the --adapter was trained on."""
    if not (args.validation and args.adapter):
        return
    files = [folder / "results.json" for folder in Path(args.adapter).resolve().parents[:2]]
    content = next((formats.load(file) for file in files if file.is_file()), None)
    run = content.get("args", {}) if isinstance(content, dict) else {}
    if not {"suite", "validation", "max_train_per_task"} <= set(run):
        yield (f"--validation {args.validation}: the rows that {args.adapter} was trained on are "
               "unknown, and may be among those that are evaluated")
        return
    if Path(run["suite"]).name != Path(args.suite).name:
        return
    known = []
    for name, task in suite.tasks.items():
        kept = len(task.train) - (run["validation"] or 0)
        if min(kept, run["max_train_per_task"] or kept) > len(task.train) - args.validation:
            known.append(name)
    if known:
        yield (f"--validation {args.validation}: {args.adapter} may have been trained on rows that "
               f"are evaluated, of {listed(known)}")


def check_architecture(model, target_modules, quantised=False):
    """Raise InputError where layers to adapt or to store `quantised` are not nn.Linear modules.

    These are the transposed layers of GPT-2, and experts that share one tensor.
    """
    types = {name.rpartition(".")[2]: type(module).__name__ for name, module in
             model.named_modules() if not isinstance(module, nn.Linear)}
    transposed = sorted(name for name, each in types.items() if each == "Conv1D")
    if transposed and (target_modules or quantised):
        raise InputError(f"model type {model.config.model_type}: its layers "
                         f"{', '.join(transposed)} are Conv1D modules, which store their "
                         "weights transposed; only nn.Linear is adapted or quantised")
    wanted = set(target_modules)
    for name, weight in find_experts(model).items():
        if wanted == {ALL_LINEAR} or wanted & FUSED.get(name.rpartition(".")[2], set()):
            raise InputError(f"model type {model.config.model_type} holds all experts of a layer "
                             f"in one tensor, {name} {list(weight.shape)}, which cannot be "
                             "adapted; give --target_modules layers of its attention, such as "
                             "q_proj")


def patterns(names):
    """Return module names as text; the blocks' indices become *, with the number of names."""
    counts = Counter(re.sub(r"\d+", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def check_hashes(run, hashes):
    """Raise InputError if the loaded model differs from the resumed run's."""
    for name, sha256 in run.progress.hashes.items():
        if sha256 != hashes[name]:
            raise InputError(f"model {run.args.model} differs from the resumed run's: "
                             f"{MODEL_HASHES[name]} changed, its {name} was {sha256!r:.20}, now "
                             f"{hashes[name]!r:.20}")


def check_encoded(encoded, positions, max_new_tokens, losses, vocabulary):
    """Raise InputError for a test item that needs more than `positions`, or an unknown token.

    Evaluation keeps a Definition whole even if it alone exceeds max_length, and with `losses` reads
    the whole reference. A tokenizer may have ids from `vocabulary` on, for which the model has no
    embedding.
    """
    for split in SPLITS:
        for task, rows in getattr(encoded, split).items():
            for row in rows:
                length, largest = len(row["input_ids"]), max(row["input_ids"], default=0)
                if split == "test" and length + max_new_tokens > positions:
                    raise InputError(f"task {task}, {row['id']}: the prompt has {length} tokens "
                                     "even with an empty input; the model has room for "
                                     f"{positions - max_new_tokens} beside --max_new_tokens")
                if split == "test" and losses and length + row["target_tokens"] > positions:
                    raise InputError(f"task {task}, {row['id']}: --eval_loss reads a prompt of "
                                     f"{length} tokens and a reference of {row['target_tokens']}; "
                                     f"the model has {positions} positions: lower --max_length, or "
                                     "shorten the definition")
                if largest >= vocabulary:
                    raise InputError(f"task {task}, {row['id']}: the tokenizer gives the token "
                                     f"{largest}, the model's embedding has {vocabulary}")
