"""Shared by all analyses: the rows of every task, the model, and the output folder."""

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

import adapter
import data
import models
from adapter import WEIGHTS_FILE
from harness import identity
from inputs.errors import InputError
from inputs.files import atomic_path, sha256_file, write_json
from inputs.numbers import stable_seed
from method import find_targets, fingerprint
from registry import ALL_LINEAR

RESULT, ARRAYS = "analysis.json", "arrays.npz"
MOST_TASKS = 62  # a set of tasks is an int64
LOCATIONS = {"out", "data_dir"}  # flags that analysis.json does not record


# --- rows ---------------------------------------------------------------------------------------


def read_suite(args):
    """Return the suite, reduced to --tasks. Raises InputError for fewer than 2 or too many tasks.
    """
    suite = data.load_suite(args.suite, args.data_dir)
    suite = data.select_tasks(suite, args.tasks) if args.tasks else suite
    if not 2 <= len(suite.tasks) <= MOST_TASKS:
        raise InputError(f"suite {suite.name}: {len(suite.tasks)} task(s); an analysis compares "
                         f"2 to {MOST_TASKS} tasks")
    return suite


def draw(suite, tokenizer, args, folds, chat_template, more=0):
    """Draw --rows plus `more` training rows of each task -> {task: rows}.

    A row has task, id, input_ids (prompt + target) and num_targets. Rows are drawn at random
    because neighbouring rows can share a passage. Row j of a task belongs to fold j mod `folds`.
    Prints the number of rows. Raises InputError for a task with fewer than two rows in a fold.
    """
    count, needed = args.rows + more, 2 * folds + more
    encoded = data.encode_suite(suite, tokenizer, args.max_length, chat_template, ("train",))
    rows = {}
    for name, fitting in encoded.train.items():
        order = random.Random(stable_seed("analysis", args.seed, name))
        rows[name] = order.sample(fitting, min(count, len(fitting)))
        if len(rows[name]) < needed:
            raise InputError(f"{name}: needs {needed} rows, two in each of {folds} fold(s) and "
                             f"{more} more; --rows {args.rows} gives {len(rows[name])} of the "
                             f"{len(fitting)} rows that fit --max_length {args.max_length}")
    tokens = sum(len(row["input_ids"]) for mine in rows.values() for row in mine)
    print(f"{len(rows)} tasks, {sum(map(len, rows.values()))} rows, {tokens:,} tokens; of "
          f"{sum(map(len, encoded.train.values())):,} rows that fit {args.max_length} tokens "
          f"{sum(encoded.shortened['train'].values()):,} have a shortened input; "
          f"{len(encoded.left_out):,} do not fit", flush=True)
    return rows


def task_lines(suite, drawn):
    """Return the entry of each task in analysis.json."""
    return [{"name": name, "category": suite.tasks[name].category,
             "rows": len(drawn[name]),
             "tokens": sum(len(row["input_ids"]) for row in drawn[name])}
            for name in suite.tasks]


def by_task(lengths, compute, title):
    """Return {task: tensors on the CPU} of compute(task, count), with a progress bar.

    `lengths`, {task: number of rows}, give the bar's total; `compute` calls count(n) after every n
    rows.
    """
    with tqdm(total=sum(lengths.values()), desc=title, unit="row") as bar:
        return {name: {key: tensor.cpu() for key, tensor in compute(name, bar.update).items()}
                for name in lengths}


# --- the model ----------------------------------------------------------------------------------


def layer_number(name):
    """Return the index of the decoder layer that the module `name` belongs to, or None."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def check_layers(args, model):
    """Return --layers, or by default the second, the middle and the last layer of `model`."""
    L = model.config.num_hidden_layers
    layers = args.layers or sorted({min(1, L - 1), L // 2, L - 1})
    for layer in layers:
        if layer >= L:
            raise InputError(f"--layers {layer}: the model has layers 0 to {L - 1}")
    return layers


def linear_layers(model, layers, modules):
    """Return the names of the linear layers `modules` of some decoder layers, in this order.

    Raises InputError for a module that the bare `model` or these layers do not have.
    """
    if ALL_LINEAR in modules:
        raise InputError(f"--target_modules {ALL_LINEAR}: name the linear layers to analyse")
    names = [name for name in find_targets(model, modules) if layer_number(name) in layers]
    for module in sorted({*modules} - {name.rpartition(".")[2] for name in names}):
        raise InputError(f"--layers {' '.join(map(str, layers))}: none of these has a {module}")
    return sorted(names, key=lambda name: (modules.index(name.rpartition(".")[2]),
                                           layers.index(layer_number(name))))


def load_model(args, path=None):
    """Return the model in evaluation mode, and the SHA-256 of the base model.

    With an adapter folder `path` it is the adapted model, whose trained weights require gradients.
    """
    model, _ = models.load(args.model, torch.bfloat16 if args.bf16 else torch.float32)
    model.to(PartialState().device)
    if path is None:
        return model.requires_grad_(False).eval(), fingerprint(model)
    return adapter.load(model, path).eval(), model.adapted_by.base_sha256


# --- the folder ---------------------------------------------------------------------------------


def made_with(args, suite, base_sha256, adapters=()):
    """Return what decides the result: flags, versions, code, device, model, data, adapters."""
    code = "".join(sha256_file(file) for file in sorted(Path(__file__).parent.glob("*.py")))
    flags = {name: value for name, value in vars(args).items() if name not in LOCATIONS}
    return {
        "args": json.loads(json.dumps(flags, default=str)),  # paths become strings
        "versions": identity.versions(), "device": identity.device_name(PartialState()),
        "code_sha256": hashlib.sha256((identity.code_sha256() + code).encode()).hexdigest(),
        "base_sha256": base_sha256,
        "data": {name: identity.task_sha256(task) for name, task in suite.tasks.items()},
        "adapters": [sha256_file(Path(path) / WEIGHTS_FILE) for path in adapters]}


def write(folder, result, arrays=None):
    """Write analysis.json, and arrays.npz where the figures need arrays."""
    if arrays:
        with atomic_path(folder / ARRAYS) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    write_json(folder / RESULT, result)
