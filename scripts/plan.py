"""Print the memory that a training run needs per device, with every --base, on 1 to 8 processes.

    python scripts/plan.py --method badit --model qwen3-8b --mixed_precision bf16

It reads the model's configuration alone. Weights are counted, and a training step runs, on fake
tensors, which have shapes and no values. Only bytes of tensors are counted, not what libraries and
allocators need besides.
"""

import sys
import weakref
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402
from harness import arguments  # noqa: E402
from harness.sharding import shared_tensors  # noqa: E402
from inputs.errors import InputError, exit_status  # noqa: E402
from inputs.settings import Flag, program_parser  # noqa: E402
from method import find_blocks  # noqa: E402
from quantized import check_experts, quantise  # noqa: E402
from registry import METHODS, method_class  # noqa: E402

READ = ("method", "model", "max_length", "max_new_tokens", "batch_size",
        "gradient_accumulation_steps", "seed")
FLAGS = (*(flag for name, flag in arguments.ALL_FLAGS.items() if name in READ or flag.of_method),
         Flag("mixed_precision", Literal["no", "bf16"], "no", "as given to accelerate launch "
              "(default: no, which holds the base in float32)"))
BASES, PROCESSES = ("dense", "int8", "nf4"), (1, 2, 4, 8)
DEVICES = (24, 40, 80)  # GB
SPARE = 1.1  # a run fits a device that has a tenth more than was counted
GATHERED = 2  # blocks of a sharded base that a process holds whole at a time


class Sizes(NamedTuple):
    """Bytes of one model; `activations` by (rows, gradient checkpointing)."""

    outside: int  # embeddings, output layer, norms
    blocks: int  # of the frozen base
    block: int  # the largest
    adapter: int  # trained or not
    trained: int  # their gradients have the same size
    sums: int  # of Eq. 8
    activations: dict


class Row(NamedTuple):
    """One line of the plan, in bytes but for the first three."""

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


class Peak(TorchDispatchMode):
    """A mode that counts the bytes of new storages: `now`, and at most, `peak`.

    The storages of `tensors`, made before, are not counted.
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
    """Return a wrapped model without values, on the CPU; called in a FakeTensorMode."""
    model = models.skeleton(args.model, "cpu", dtype, layers)
    method = method_class(args.method)(arguments.settings_of(args))
    method.base_sha256 = "of no weights"
    method.wrap(model, fresh=False)
    quantise(model, base)
    return model


def batch_of(args, rows):
    """Return a micro-batch of rows of --max_length tokens, answers of --max_new_tokens."""
    row = {"task": None, "input_ids": [0] * args.max_length,
           "num_targets": min(args.max_new_tokens + 1, args.max_length - 1)}
    return data.collate_micro_batch([data.MicroBatch([row] * rows, 1, 1)], 0)


def peak_of_step(args, model, rows):
    """Return the peak bytes of a forward and backward pass, beside weights and gradients."""
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    before = [*model.parameters(), *model.buffers(), *(weight.grad for weight in trained)]
    batch = batch_of(args, rows)
    with Peak(before) as peak:
        model.adapted_by.before_forward(batch)
        # Under fake tensors torch's own grouped product of experts accepts bfloat16 only.
        with mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False):
            model(**data.model_inputs(batch), use_cache=False).loss.backward()
    return peak.peak


def measure(args, base, dtype, rows):
    """Return the Sizes of a model with one --base, for some numbers of `rows` per micro-batch.

    Every block adds equally to the activations, so they are measured with two blocks and three.
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
                each.activation_checkpointing_enable({"use_reentrant": False})
            for count in rows:
                two, three = (peak_of_step(args, each, count) for each in small)
                peaks[count, checkpointing] = two + (len(blocks) - 2) * (three - two)
    return Sizes(everything - sum(shared) - adapter, sum(shared), max(shared), adapter,
                 size(trained), size(banks), peaks)


def rows_of(args, processes):
    """Return the rows of a micro-batch in a run of `processes`."""
    shares = processes * args.gradient_accumulation_steps
    return args.batch_size or max(1, arguments.PAPER_BATCH // shares)


def plan(args, dtype, bases=None):
    """Yield the Rows for each of `bases` (default: all) and number of processes.

    One process holds the whole base, several shard it.
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
    """Return the smallest of DEVICES that holds `total` bytes and a tenth more, as text."""
    return next((str(device) for device in DEVICES if total * SPARE <= device * 1e9), "-")


def lines(args, dtype):
    """Yield the plan as a table, in GB of 10^9 bytes."""
    yield (f"plan without weights: {args.method} on {args.model}, {dtype} base, rows of "
           f"{args.max_length} tokens, answers of {args.max_new_tokens}; GB (10^9 bytes) on each "
           "process; one process holds the whole base, several shard it (--shard_base)")
    yield ("base   processes  rows  weights  adapter   Adam  gradients  Eq. 8  activations  total  "
           "fits | with --gradient_checkpointing: activations  total  fits")
    bases, note = BASES, None
    try:
        check_experts(models.skeleton(args.model), "nf4")
    except InputError as error:
        bases, note = ("dense",), str(error)
    for row in plan(args, dtype, bases):
        fixed = (row.weights, row.adapter, row.adam, row.gradients, row.sums)
        totals = [sum(fixed) + kept for kept in (row.activations, row.checkpointed)]
        parts = [each / 1e9 for each in fixed]
        yield (f"{row.base:6} {row.processes:9} {row.rows:5} {parts[0]:8.2f} {parts[1]:8.2f} "
               f"{parts[2]:6.2f} {parts[3]:10.2f} {parts[4]:6.2f} {row.activations / 1e9:12.2f} "
               f"{totals[0] / 1e9:6.2f} {fits(totals[0]):>5} | {row.checkpointed / 1e9:42.2f} "
               f"{totals[1] / 1e9:6.2f} {fits(totals[1]):>5}")
    yield (f"fits: the smallest of {', '.join(map(str, DEVICES))} GB with a tenth to spare, or -; "
           "without loading, evaluation, and what libraries keep")
    if note:
        yield note


def parse_flags(argv):
    """Return the flags in `argv`. Raises InputError for one that the method ignores."""
    parser = program_parser("scripts/plan.py", __doc__, FLAGS)
    typed = arguments.typed_flags(parser, argv)
    args = parser.parse_args(argv, arguments.build_parser().parse_args([]))
    if args.method not in METHODS or not METHODS[args.method].trains:
        raise InputError(f"--method {args.method!r}: a plan is for one that trains, of "
                         f"{', '.join(name for name, each in METHODS.items() if each.trains)}")
    arguments.refuse_flags_without_effect(args, typed & arguments.ALL_FLAGS.keys())
    arguments.settings_of(args).refuse_flags_without_effect(typed)
    return args


def print_plan(argv):
    """Print the plan that the flags in `argv` ask for. Raises InputError."""
    args = parse_flags(argv)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    for line in lines(args, dtype):
        print(line, flush=True)


def main(argv=None):
    return exit_status(print_plan, argv)


if __name__ == "__main__":
    sys.exit(main())
