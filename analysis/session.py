"""What all analyses share: the rows of every task, a frozen model, a folder, going on after a stop.

Section numbers are those of the paper; symbols as in method.py and data.py.
"""

import contextlib
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from accelerate import PartialState

import adapter
import data
import models
from adapter import WEIGHTS_FILE
from harness import identity
from harness.output_folder import LOCK
from inputs.bars import Bar
from inputs.errors import InputError
from inputs.files import atomic_path, sha256_file, write_json
from inputs.formats import load
from inputs.numbers import stable_seed
from inputs.tensors import read_tensor, write_tensors
from method import find_targets, fingerprint

RESULT, ARRAYS, TEXT, FIGURES, PARTIAL = ("analysis.json", "arrays.npz", "analysis.md", "figures",
                                          "partial")
FREE = {"out", "data_dir"}  # flags in which equal analyses may differ: data is compared by content


# --- rows ---------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """The rows that an analysis sees, by task, and what was done to get them."""

    rows: dict[str, list]  # of task, id, input_ids (prompt + target), num_targets
    available: dict[str, int]  # rows of each task that fit
    left_out: int  # that do not
    shortened: int  # of all that fit, those with a cut input field


def read_suite(args, smallest=2, largest=62):
    """The suite, cut to --tasks. Raises InputError for too few or too many tasks to compare."""
    suite = data.load_suite(args.suite, args.data_dir)
    suite = data.select_tasks(suite, args.tasks) if args.tasks else suite
    if not smallest <= len(suite.tasks) <= largest:
        raise InputError(f"suite {suite.name}: {len(suite.tasks)} task(s); tasks are compared, "
                         f"from {smallest} to {largest} of them")
    return suite


def draw(suite, tokenizer, args, folds, chat_template, more=0):
    """--rows training rows of each task and `more`, without replacement -> Drawn.

    Not the first ones: neighbouring rows can share a passage. Row j of a task is of fold j mod
    `folds`. Raises InputError for a task with fewer than two rows in a fold.
    """
    count = args.rows + more
    encoded = data.encode_suite(suite, tokenizer, args.max_length, chat_template, ("train",))
    rows = {}
    for name, fitting in encoded.train.items():
        order = random.Random(stable_seed("analysis", args.seed, name))
        rows[name] = order.sample(fitting, min(count, len(fitting)))
        if len(rows[name]) < 2 * folds + more:
            raise InputError(f"{name}: {2 * folds + more} rows are needed, two in each of {folds} "
                             f"fold(s) and {more} more; --rows {args.rows}, of {len(fitting)} that "
                             f"fit --max_length {args.max_length}, gives {len(rows[name])}")
    available = {name: len(fitting) for name, fitting in encoded.train.items()}
    return Drawn(rows, available, len(encoded.left_out), sum(encoded.shortened["train"].values()))


def describe(drawn, args):
    """A line about what is seen."""
    counts = [len(rows) for rows in drawn.rows.values()]
    fewer = [f"{name} {len(rows)}" for name, rows in drawn.rows.items() if len(rows) < args.rows]
    tokens = sum(len(row["input_ids"]) for rows in drawn.rows.values() for row in rows)
    line = (f"{len(counts)} tasks, {sum(counts)} rows, {tokens:,} tokens; of "
            f"{sum(drawn.available.values()):,} rows that fit {args.max_length} tokens "
            f"{drawn.shortened:,} have a shortened input; {drawn.left_out:,} do not fit")
    return line + (f"; fewer than {args.rows} rows: {', '.join(fewer)}" if fewer else "")


def task_lines(suite, drawn):
    """What analysis.json says of each task."""
    return [{"name": name, "category": suite.tasks[name].category,
             "rows": len(drawn.rows[name]), "available": drawn.available[name],
             "tokens": sum(len(row["input_ids"]) for row in drawn.rows[name])}
            for name in suite.tasks]


def micro_batches(rows, folds, size):
    """(fold, rows) of at most `size` rows of one fold."""
    for fold in range(folds):
        mine = rows[fold::folds]
        for first in range(0, len(mine), size):
            yield fold, mine[first:first + size]


# --- the model ----------------------------------------------------------------------------------


def layer_number(name):
    """The index of the decoder layer that a module belongs to."""
    return int(re.search(r"\.(\d+)\.", name)[1])


def check_layers(args, model):
    """--layers, or the second, a middle and the last, of a model (may be on the meta device)."""
    L = model.config.num_hidden_layers
    layers = args.layers or sorted({min(1, L - 1), L // 2, L - 1})
    for layer in layers:
        if layer >= L:
            raise InputError(f"--layers {layer}: the model has layers 0 to {L - 1}")
    return layers


def linear_layers(model, layers, modules):
    """Names of the linear layers `modules` in some decoder layers of a bare model, in order.

    Raises InputError for a module that the model does not have.
    """
    names = [name for name in find_targets(model, modules) if layer_number(name) in layers]
    return sorted(names, key=lambda name: (modules.index(name.rpartition(".")[2]),
                                           layers.index(layer_number(name))))


def load_model(args, path=None):
    """The model in evaluation mode, and the SHA-256 of the base model.

    With an adapter folder `path`, the model that it makes; what it trains asks for gradients.
    """
    model, _ = models.load(args.model, torch.bfloat16 if args.bf16 else torch.float32)
    model.to(PartialState().device)
    if path is None:
        return model.requires_grad_(False).eval(), fingerprint(model)
    return adapter.load(model, path).eval(), model.adapted_by.base_sha256


class Loaded:
    """Calling it with an adapter folder gives the model; one is in memory at a time."""

    def __init__(self, args):
        self.args, self.path, self.model = args, None, None

    def __call__(self, path):
        if path != self.path:
            self.model = None
            self.model, _ = load_model(self.args, path)
            self.path = path
        return self.model


# --- the folder ---------------------------------------------------------------------------------


def check_folder(folder):
    """Refuse an --out that holds anything but an analysis, finished or not."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is no folder")
    own = {RESULT, ARRAYS, TEXT, FIGURES, PARTIAL, LOCK}
    other = sorted(path.name for path in folder.glob("*") if path.name not in own
                   and not (path.name.startswith(".") and path.name.endswith(".tmp")))
    if other:
        raise InputError(f"--out {folder} holds other files, such as {other[0]}: name another")


def made_with(args, suite, base_sha256, adapters=()):
    """What must be equal for analyses to be equal, as JSON has it."""
    code = hashlib.sha256(identity.code_sha256().encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(f"{file.name} {sha256_file(file)}\n".encode())
    device = PartialState().device
    return {
        "args": {name: str(value) if isinstance(value, Path) else value
                 for name, value in sorted(vars(args).items()) if name not in FREE},
        "versions": identity.versions(), "code_sha256": code.hexdigest(),
        "device": identity.device_name(PartialState()), "threads": torch.get_num_threads()
        if device.type == "cpu" else None, "base_sha256": base_sha256,
        "data": {name: identity.task_sha256(task) for name, task in suite.tasks.items()},
        "adapters": [sha256_file(Path(path) / WEIGHTS_FILE) for path in adapters]}


class Session:
    """The --out of one analysis, which no other enters; tasks that are done are kept on the disk.

    A stopped analysis goes on from there when the same command is given again.
    """

    def __init__(self, folder, made):
        self.folder, self.made = Path(folder), json.loads(json.dumps(made, default=str))

    @contextlib.contextmanager
    def reserved(self):
        """A context with the folder; raises InputError where it is another analysis'."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.folder / LOCK, blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(f"--out {self.folder}: another analysis is writing there") from None
        try:
            self._refuse_another()
            write_json(self.folder / PARTIAL / "made.json", self.made)
            yield self
        finally:
            (self.folder / LOCK).unlink(missing_ok=True)
            lock.release()

    def _refuse_another(self):
        for file, known in ((self.folder / PARTIAL / "made.json", load),
                            (self.folder / RESULT, lambda path: load(path)["made"])):
            if not file.exists():
                continue
            before = known(file)
            different = sorted(
                name for name in {*before, *self.made} if name != "args"
                and before.get(name) != self.made.get(name)) + [
                f"--{name}" for name in sorted({*before["args"], *self.made["args"]})
                if before["args"].get(name) != self.made["args"].get(name)]
            if different:
                raise InputError(f"--out {self.folder} holds another analysis (other "
                                 f"{', '.join(different)}): name another")

    def by_task(self, lengths, compute: Callable, what):
        """{task: tensors} of compute(task, count), kept on the disk as soon as it is there.

        `lengths` {task: rows}; `compute` calls count(rows) as it goes on.
        """
        found = {name: self.folder / PARTIAL / f"{what}-{name}.safetensors" for name in lengths}
        done = [name for name, file in found.items() if file.exists()]
        if done:
            print(f"{len(done)} of {len(lengths)} {what} are done already", flush=True)
        with Bar(total=sum(lengths.values()), initial=sum(lengths[name] for name in done),
                 desc=what, unit="row") as bar:
            for name, file in found.items():
                if name not in done:
                    tensors = compute(name, bar.update)
                    with atomic_path(file) as temporary:
                        write_tensors(temporary, tensors)
        return {name: Kept(file) for name, file in found.items()}

    def finish(self, result, arrays):
        """Write analysis.json and arrays.npz; from then on nothing is partial."""
        with atomic_path(self.folder / ARRAYS) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        write_json(self.folder / RESULT, {"made": self.made} | result)
        shutil.rmtree(self.folder / PARTIAL)


class Kept:
    """The tensors of one task, each read from the disk when it is needed."""

    def __init__(self, file):
        self.file = file

    def __getitem__(self, name):
        return read_tensor(self.file, name)
