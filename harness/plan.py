"""What a run takes of a device's memory, from the model's configuration alone (--plan).

Weights are counted, and a training step is run, on fake tensors, which have shapes and no values.
Bytes are those of tensors; what a library or an allocator keeps besides is not among them.
"""

import weakref
from typing import NamedTuple
from unittest import mock

import torch
from accelerate import PartialState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import models
from harness.arguments import PAPER_BATCH, settings_of
from harness.run import say
from harness.sharding import shared_tensors
from inputs.errors import InputError
from method import find_blocks
from quantized import check_experts, quantise
from registry import method_class

BASES, PROCESSES = ("dense", "int8", "nf4"), (1, 2, 4, 8)
DEVICES = (24, 40, 80)  # GB
SPARE = 1.1  # for what is not counted: a device fits that has a tenth more
GATHERED = 2  # blocks that a process holds whole at a time, of a shared base


class Sizes(NamedTuple):
    """Bytes of one model; `activations` by (rows, checkpointing)."""

    outside: int  # embeddings, output layer, norms
    blocks: int  # of the frozen base
    block: int  # the largest
    adapter: int  # trained or not
    trained: int  # in the type of their gradients
    sums: int  # of Eq. 8
    activations: dict


class Row(NamedTuple):
    """One line of a plan; all in bytes but the first three."""

    base: str
    processes: int
    rows: int
    weights: int
    adapter: int
    adam: int
    gradients: int
    sums: int
    activations: int  # without gradient checkpointing
    checkpointed: int  # with it

    def total(self, checkpointing):
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.adapter + self.adam + self.gradients + self.sums + kept


class Peak(TorchDispatchMode):
    """A mode that counts the bytes of storages made in it: `now`, and at most, `peak`.

    What was there before, in `tensors`, counts nothing.
    """

    def __init__(self, tensors):
        super().__init__()
        self.now = self.peak = 0
        self.before = [tensor.untyped_storage() for tensor in tensors]
        self.known = {storage._cdata: 0 for storage in self.before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key):
        self.now -= self.known.pop(key)


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fake_model(args, base, dtype, layers=None):
    """A wrapped model without values, on the CPU; in a FakeTensorMode."""
    model = models.skeleton(args.model, "cpu", dtype, layers)
    method = method_class(args.method)(settings_of(args))
    method.base_sha256 = "of no weights"
    method.wrap(model, fresh=False)
    quantise(model, base)
    return model


def batch_of(args, rows):
    """A micro-batch of rows as long as --max_length, with answers of --max_new_tokens."""
    row = {"task": None, "input_ids": [0] * args.max_length,
           "num_targets": min(args.max_new_tokens + 1, args.max_length - 1)}
    return data.collate_micro_batch([data.MicroBatch([row] * rows, 1, 1)], 0)


def peak_of_step(args, model, rows):
    """Peak bytes that one forward and backward pass makes, beside weights and their gradients."""
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    there = [*model.parameters(), *model.buffers(), *(weight.grad for weight in trained)]
    batch = batch_of(args, rows)
    with Peak(there) as peak:
        model.adapted_by.before_forward(batch)
        # Under fake tensors torch's own grouped product of experts accepts bfloat16 only.
        with mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False):
            model(**data.model_inputs(batch), use_cache=False).loss.backward()
    return peak.peak


def measure(args, base, dtype, rows):
    """The Sizes of a model with one kind of base, for some numbers of `rows` of a micro-batch.

    Every block adds as much to the activations, so they are measured with two blocks and three.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(args, base, dtype)
        method, blocks = model.adapted_by, find_blocks(model)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        shared = [size(shared_tensors(block, method)) for block in blocks.values()]
        adapter = size(method.state_dict().values())
        banks = [weight for layer in method.layers.values() if hasattr(method, "regrouper")
                 for weight in (layer.lora_A, layer.lora_B)]
        everything = size({*model.parameters(), *model.buffers()})
        small, peaks = [fake_model(args, base, dtype, layers) for layers in (2, 3)], {}
        for checkpointing in (False, True):
            for each in small if checkpointing else ():
                each.gradient_checkpointing_enable({"use_reentrant": False})
            for count in rows:
                two, three = (peak_of_step(args, each, count) for each in small)
                peaks[count, checkpointing] = two + (len(blocks) - 2) * (three - two)
    return Sizes(everything - sum(shared) - adapter, sum(shared), max(shared), adapter,
                 size(trained), size(banks), peaks)


def rows_of(args, processes):
    """Rows of a micro-batch where a run has so many processes."""
    shares = processes * args.gradient_accumulation_steps
    return args.batch_size or max(1, PAPER_BATCH // shares)


def plan(args, dtype, bases=None):
    """The Rows for each kind of base, of `bases` or all, and number of processes.

    One process holds all of the base, more share it.
    """
    counts = {rows_of(args, processes) for processes in PROCESSES}
    for base in bases or BASES:
        found = measure(args, base, dtype, sorted(counts))
        for processes in PROCESSES:
            rows, several = rows_of(args, processes), processes > 1
            weights = found.outside + found.blocks // processes
            weights += GATHERED * found.block * several
            yield Row(base, processes, rows, weights, found.adapter, 2 * found.trained,
                      found.trained * (1 + several), found.sums, found.activations[rows, False],
                      found.activations[rows, True])


def fits(total):
    """The smallest of DEVICES with so many bytes and some to SPARE, in words."""
    return next((str(device) for device in DEVICES if total * SPARE <= device * 1e9), "-")


def lines(args, dtype):
    """The plan as a table, in GB of 10^9 bytes."""
    yield (f"a plan, without weights: {args.method} on {args.model}, {dtype} base, rows of "
           f"{args.max_length} tokens, answers of {args.max_new_tokens}; GB (10^9 bytes) on each "
           "process; one holds all of the base, more share it (--shard_base)")
    yield ("base   processes  rows  weights  adapter   Adam  gradients  Eq. 8  activations  total  "
           "fits | with --gradient_checkpointing: activations  total  fits")
    bases, note = BASES, None
    try:
        check_experts(models.skeleton(args.model), "nf4")
    except InputError as error:
        bases, note = ("dense",), str(error)
    for row in plan(args, dtype, bases):
        parts = [each / 1e9 for each in (row.weights, row.adapter, row.adam, row.gradients,
                                         row.sums)]
        totals = [row.total(checkpointing) for checkpointing in (False, True)]
        yield (f"{row.base:6} {row.processes:9} {row.rows:5} {parts[0]:8.2f} {parts[1]:8.2f} "
               f"{parts[2]:6.2f} {parts[3]:10.2f} {parts[4]:6.2f} {row.activations / 1e9:12.2f} "
               f"{totals[0] / 1e9:6.2f} {fits(totals[0]):>5} | {row.checkpointed / 1e9:42.2f} "
               f"{totals[1] / 1e9:6.2f} {fits(totals[1]):>5}")
    yield (f"fits: the smallest of {', '.join(map(str, DEVICES))} GB with a tenth to spare, - for "
           "none; without loading, evaluation, and what libraries keep")
    if note:
        yield note


def show(args, dtype):
    """Print the plan of a run, which is not started."""
    for line in lines(args, dtype):
        say(PartialState(), line)
