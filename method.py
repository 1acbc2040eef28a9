"""Define what every method shares: hooks of the training loop, target layers, the base's hash.

adapter.py saves and loads methods; registry.py lists them.
"""

import hashlib
import inspect
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from inputs.errors import InputError
from registry import ALL_LINEAR

INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a forward pass without a loss


class Stage(NamedTuple):
    """One run of the training loop, with its own optimizer and schedule.

    `name` is a task's name or "mixed"; `tasks` are the tasks that it trains on. An optimizer step
    covers all processes.
    """

    name: str
    tasks: tuple[str, ...]
    epochs: int
    steps_per_epoch: int

    @property
    def steps(self):
        return self.epochs * self.steps_per_epoch


class Method:
    """Base class of all methods, with hooks that do nothing. The training loop calls only these.

    `settings` is an instance of the class in the method's registry entry. A subclass defines
    `build_layer`, which makes the adapted version of one linear layer. An adapted layer lists its
    frozen base tensors in `base_tensors`; all its other tensors belong to the adapter, and
    `restore(tensors)` loads them.

    To be exported as a LoRA adapter, a layer also has `depends_on_token`, whether its update
    differs between tokens, and `constant_update(mixing)`, which returns A (R, in) and B (out, R) in
    float64 such that W0 x + B A x is its output without dropout. A layer whose update depends on
    the token has `components(x)`, and `mixing` (N, N) replaces its factors: see
    `experts.BankLinear`.

    A batch is a dict with input_ids, attention_mask and position_ids (batch, seq); in training also
    labels (batch, n) for its last n columns, and `tasks`, the task of every row (None: a filler).
    """

    name: str  # value of --method
    # Saved with the adapter:
    chat_template = False  # whether prompts were wrapped in the chat template
    base_name = None  # name or path of the base model, if known
    base = "dense"  # how the frozen base is stored: see quantized.py
    trained_on = {}  # {name: value} of the run's flags that shape prompts
    # Not saved:
    device = None  # where layers are decomposed and adapters live; None: with the model
    reached_by_loss = False  # whether every adapted layer is known to get a gradient

    def __init__(self, settings):
        self.settings = settings
        self.model = None
        self.base_sha256, self.base_parameters = None, None
        self.layers = {}

    # --- set-up ---------------------------------------------------------------------------------

    def targets(self, model):
        """Return {full name: nn.Linear} of the layers to adapt."""
        return find_targets(model, self.settings.target_modules)

    def build_layer(self, linear, fresh):
        """Return the adapted `linear`; with `fresh=False`, `restore` must fill its adapter."""
        raise NotImplementedError(f"{type(self).__name__} adapts no layers")

    def check_tasks(self, tasks):
        """Raise InputError if the settings do not fit the suite's `tasks`."""

    def check_model(self, model):
        """Raise InputError if `model`, which may be on the meta device, cannot be adapted."""
        for linear in self.targets(model).values():
            self.check_layer(linear)

    def check_layer(self, linear):
        """Raise InputError if a target layer, possibly on the meta device, cannot be adapted."""

    def wrap(self, model, fresh=True):
        """Freeze `model` and replace its target layers in place (Alg. 1, step 1).

        `fresh=False` skips decomposition and initialisation; call `load_state_dict` next.
        """
        self.check_model(model)
        self.base_sha256 = self.base_sha256 or fingerprint(model)
        self.base_parameters = sum(weight.numel() for weight in model.parameters())
        model.requires_grad_(False)
        self.model = model
        targets = self.targets(model)
        for name, linear in tqdm(targets.items(), desc="adapt layers", unit="layer", delay=2,
                                 leave=False):
            home = linear.weight.device
            if self.device is not None:
                linear.to(self.device)
            try:
                layer = self.build_layer(linear, fresh).train(linear.training)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            self.layers[name] = layer
            if self.device is not None:  # the whole base may not fit there
                for tensor in (getattr(layer, base) for base in layer.base_tensors):
                    if tensor is not None:
                        tensor.data = tensor.data.to(home)
            model.set_submodule(name, layer)
        model.adapted_by = self
        if targets:
            model.save_pretrained = refuse_to_save

    # --- hooks of the training loop -------------------------------------------------------------

    def start_stage(self, stage, loader):
        """Prepare for a Stage, before its first step; `loader` yields its batches."""

    def training_state(self):
        """Return the tensors, beside `state_dict`, from which a stage resumes, by name."""
        return {}

    def resume_stage(self, stage, state):
        """Resume a Stage from the `state` that `training_state` returned.

        Called after `load_state_dict`, in place of `start_stage`.
        """

    def before_forward(self, batch):
        """Prepare for a batch, before its forward pass or generation."""

    def penalty(self, batch):
        """Return a scalar to add to the loss of a micro-batch, after its forward pass.

        The loop averages it over the micro-batches and processes of an optimizer step.
        """
        return 0.0

    def after_backward(self):
        """See the gradients of an optimizer step: all-reduced, not yet clipped.

        The first call raises InputError for an adapted layer without a gradient.
        """
        if not self.reached_by_loss:
            self.reached_by_loss = True
            refuse_dead_layers(self.layers)

    def after_step(self, batch) -> Iterable[dict]:
        """Act after an optimizer step, whose last micro-batch is `batch`.

        Returns lines for regroup.jsonl, to which the loop adds stage and step.
        """
        return ()

    def end_stage(self, stage, loader):
        """Finish a Stage, after its last step and before its evaluation."""

    # --- export ---------------------------------------------------------------------------------

    def export_obstacle(self):
        """Return why this adapter cannot become a LoRA adapter, or None. Uses only the settings."""
        return None

    # --- counts and adapter state ---------------------------------------------------------------

    def active_parameters(self):
        """Count the adapter weights that act on one token; by default all trained ones."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    def state_dict(self):
        """Return all tensors of the adapter by name; with the frozen base they give this model."""
        return {f"{name}.{key}": tensor.detach()
                for name, layer in self.layers.items()
                for key, tensor in layer.state_dict().items() if not of_base(layer, key)}

    def grow(self, state):
        """Add what `state` holds and a fresh adapter lacks, such as branches of later tasks."""

    def load_state_dict(self, state):
        """Load the tensors of a `state_dict`, after `grow`."""
        for name, layer in self.layers.items():
            prefix = f"{name}."
            layer.restore({key.removeprefix(prefix): tensor for key, tensor in state.items()
                           if key.startswith(prefix)})


@contextmanager
def observe(model, layers, hook):
    """Call hook(name, x, y) on each input (batch, seq, in) and output of `layers` {name: module}.

    Inside this context the model is in evaluation mode and is called with attention_mask
    (batch, seq). A model may flatten the tokens to (batch * seq, in), as OPT does. Raises
    InputError for an input of another shape.
    """
    tokens = None  # shape of the current batch

    def begin(_, __, batch):
        nonlocal tokens
        tokens = batch["attention_mask"].shape

    def call(_, inputs, y, name):
        x = inputs[0]
        if x.shape[:-1] == (tokens.numel(),):
            x, y = x.view(*tokens, -1), y.view(*tokens, -1)
        if x.shape[:-1] != tokens:  # such as a pooler's, which gets one token of a row
            raise InputError(f"--target_modules: {name} gets an input of shape "
                             f"{list(x.shape)}, not {list(tokens)} tokens: it can be neither "
                             "regrouped nor measured")
        hook(name, x, y)

    training = model.training
    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [layer.register_forward_hook(partial(call, name=name))
                for name, layer in layers.items()]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def first_rows(loader, count):
    """Yield batches until they hold `count` rows over all processes, but read all of `loader`.

    Accelerate's loaders must be read to their end. Fillers count as rows, so that all processes
    stop at the same batch.
    """
    state = PartialState()
    left = math.ceil(count / state.num_processes)
    for batch in tqdm(loader, desc="measure inputs", unit="batch", delay=2, leave=False,
                      disable=not state.is_main_process):
        if left > 0:
            left -= len(batch["attention_mask"])
            yield batch


def of_base(layer, key):
    """Return whether a key of an adapted layer's state_dict belongs to the frozen base."""
    return key.partition(".")[0] in layer.base_tensors


def find_blocks(model):
    """Return {full name: decoder block}. Raises InputError if the model does not name them."""
    kinds = set(model._no_split_modules or ())
    blocks = {name: module for name, module in model.named_modules()
              if type(module).__name__ in kinds}
    if not blocks:
        raise InputError(f"model type {model.config.model_type} does not say which of its modules "
                         "are its blocks (_no_split_modules): they can be neither quantised nor "
                         "sharded")
    return blocks


def find_linears(model):
    """Return {full name: nn.Linear} of the layers that can be replaced.

    The output layer is left out: it sees only positions whose logits are kept. So are layers whose
    parent reads their weight instead of calling them, as Mamba's fused kernels do.
    """
    linears = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            if f"self.{last}.weight" not in source_of(type(model.get_submodule(parent))):
                linears[name] = module
    return linears


@cache
def source_of(cls):
    """Return the source code of a class; inspect takes 11 ms each time."""
    return inspect.getsource(cls)


def find_targets(model, target_modules):
    """Return {full name: nn.Linear} of the layers whose last name component is in `target_modules`.

    ("all-linear",) selects all of `find_linears`. Raises InputError for a name without a layer.
    """
    linears = find_linears(model)
    if tuple(target_modules) == (ALL_LINEAR,):
        return linears
    existing = {name.rpartition(".")[2] for name in linears}
    if ALL_LINEAR in target_modules:
        raise InputError(f"--target_modules {' '.join(target_modules)}: {ALL_LINEAR} stands alone")
    for target in target_modules:
        if target not in existing:
            why = "the model has no such linear layer"
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] == target:
                    why = ("the output layer is never adapted"
                           if module is model.get_output_embeddings() else
                           "the model reads the weight of this layer instead of calling it")
            raise InputError(f"--target_modules {target}: {why}; allowed: "
                             f"{', '.join(sorted(existing)) or 'none'}")
    return {name: linear for name, linear in linears.items()
            if name.rpartition(".")[2] in target_modules}


def refuse_dead_layers(layers):
    """Raise InputError for adapted layers {full name: module} that got no gradient."""
    reached = {name: any(weight.grad is not None for weight in layer.parameters())
               for name, layer in layers.items()}
    dead = [name for name in reached if not reached[name]]
    if dead:
        alive = {name.rpartition(".")[2] for name in reached if reached[name]}
        raise InputError(f"--target_modules: the loss does not depend on {', '.join(dead[:3])} "
                         f"({len(dead)} of {len(layers)} layers); allowed: "
                         f"{', '.join(sorted(alive)) or 'none of these'}")


def fingerprint(model):
    """Return the SHA-256 of all weights of a bare model, as float32.

    A checkpoint stored in bf16 has the same hash when loaded as bf16 or fp32. One stored in fp32 is
    rounded by a bf16 load and then has another hash.
    """

    def digest(item):
        name, tensor = item
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        return hashlib.sha256(name.encode() + b"\0" + values.tobytes()).digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        digests = list(pool.map(digest, sorted(model.named_parameters())))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def frozen(tensor):
    """Return an untrained Parameter that shares the tensor's memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def refuse_to_save(*_, **__):
    """Raise InputError: replaces save_pretrained, which does not know the adapted layers."""
    raise InputError("save_pretrained cannot save a wrapped model: it would leave out the adapted "
                     "weights. adapter.save(model, folder) saves the adapter; `python export.py "
                     "FOLDER --out OTHER` converts it for PEFT or, with --merged, to a whole "
                     "checkpoint")


def method_of(model):
    """Return the method that wrapped `model`. Raises InputError for a bare model."""
    if not isinstance(getattr(model, "adapted_by", None), Method):
        raise InputError("this model carries no adapter: wrap it with a method or load one first")
    return model.adapted_by
