"""What every method shares: the hooks of the training loop, target layers, the base's fingerprint.

Knows no method. A method on disk is in adapter.py, the names of all methods are in registry.py.
"""

import hashlib
import inspect
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from inputs.errors import InputError
from registry import ALL_LINEAR


class Stage(NamedTuple):
    """One run of the training loop with its own optimizer and schedule.

    `name` is a task's name, or "mixed"; `tasks` the tasks in it; both lengths are in optimizer
    steps, summed over all processes.
    """

    name: str
    tasks: tuple[str, ...]
    epochs: int
    steps_per_epoch: int

    @property
    def steps(self):
        return self.epochs * self.steps_per_epoch


class Method:
    """Base of all methods: every hook does nothing. The loop of `train.py` calls only these.

    `settings` are of the class that registry.py names for the method. A subclass defines
    `build_layer`, which makes the adapted version of one linear layer. An adapted layer names its
    frozen base tensors in `base_tensors`; all its other tensors are the adapter, and it has
    `restore(tensors)`, which takes them over.

    To be exported as a LoRA adapter, a layer also has `depends_on_token`, whether its update
    differs from token to token, and `constant_update(mixing)`: A (R, in) and B (out, R) in float64,
    for which W0 x + B A x is its output without dropout. Where the update depends on the token it
    has `components(x)`, and `mixing` (N, N) replaces what these show: see `experts.BankLinear`.

    A batch is a dict: input_ids, attention_mask and position_ids (batch, seq), in training also
    labels (batch, n) for its last n columns, and `tasks`, the task of every row, None for a filler.
    """

    name: str  # its value for --method
    chat_template = False  # whether its prompts were wrapped in one; kept with the adapter
    base_name = None  # of the base model, a name or a path, where it is known; kept, too
    device = None  # where layers are decomposed and adapters are; None: where the model is
    base = "dense"  # how the frozen base is stored: see quantized.py; kept, too
    trained_on = {}  # the run's flags that say on which prompts, {name: value}; kept, too
    reached_by_loss = False  # whether every adapted layer is known to get a gradient

    def __init__(self, settings):
        self.settings = settings
        self.model = None
        self.base_sha256, self.base_parameters = None, None
        self.layers = {}

    # --- set-up ---------------------------------------------------------------------------------

    def targets(self, model):
        """The linear layers to adapt, by full name."""
        return find_targets(model, self.settings.target_modules)

    def build_layer(self, linear, fresh):
        """The adapted form of `linear`; with `fresh=False` its adapter is left for `restore`."""
        raise NotImplementedError(f"{type(self).__name__} adapts no layers")

    def check_tasks(self, tasks):
        """Raise InputError where the names of the suite's `tasks` do not fit the settings."""

    def check_model(self, model):
        """Raise InputError where `model` (may be on the meta device) cannot be adapted."""
        for linear in self.targets(model).values():
            self.check_layer(linear)

    def check_layer(self, linear):
        """Raise InputError where one target layer (may be on the meta device) cannot be adapted."""

    def wrap(self, model, fresh=True):
        """Freeze `model` and replace its target layers in place (Alg. 1, step 1).

        `fresh=False` skips decomposition and initialisation: `load_state_dict` follows.
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
            if self.device is not None:  # which the whole base may not fit
                for tensor in (getattr(layer, base) for base in layer.base_tensors):
                    if tensor is not None:
                        tensor.data = tensor.data.to(home)
            model.set_submodule(name, layer)
        model.adapted_by = self
        if targets:
            model.save_pretrained = refuse_to_save

    # --- hooks of the training loop -------------------------------------------------------------

    def start_stage(self, stage, loader):
        """Called with the Stage and its data loader before its first step."""

    def training_state(self):
        """Tensors by name that a stage needs, beside `state_dict`, to be resumed in its middle."""
        return {}

    def resume_stage(self, stage, state):
        """Called in place of `start_stage` in a resumed stage: after `load_state_dict`.

        `state` is what `training_state` gave.
        """

    def before_forward(self, batch):
        """Called with every batch, before the forward pass and before generation."""

    def penalty(self, batch):
        """A scalar tensor added to the loss, or 0.0.

        Called after the forward pass of every micro-batch; an optimizer step sees the mean over its
        micro-batches and processes.
        """
        return 0.0

    def after_backward(self):
        """Called once per optimizer step: gradients are synchronised and not yet clipped.

        The first call raises InputError for an adapted layer without a gradient.
        """
        if not self.reached_by_loss:
            self.reached_by_loss = True
            refuse_dead_layers(self.layers)

    def after_step(self, batch) -> Iterable[dict]:
        """Called after every optimizer step, with its last micro-batch.

        Returns lines for regroup.jsonl; the loop adds the stage and the step to each.
        """
        return ()

    def end_stage(self, stage, loader):
        """Called after the last step of a stage, before its evaluation."""

    # --- export ---------------------------------------------------------------------------------

    def export_obstacle(self):
        """Return why this adapter cannot be a LoRA adapter, or None. Reads the settings alone."""
        return None

    # --- counts and adapter state ---------------------------------------------------------------

    def active_parameters(self):
        """Adapter weights that act on one token; here all that are trained."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    def state_dict(self):
        """All tensors of the adapter by name: what a frozen base needs to become this model."""
        return {f"{name}.{key}": tensor.detach()
                for name, layer in self.layers.items()
                for key, tensor in layer.state_dict().items() if not of_base(layer, key)}

    def grow(self, state):
        """Make room for the tensors of a `state_dict` that a fresh adapter does not have."""

    def load_state_dict(self, state):
        """Put the tensors of `state_dict` back, after `grow`."""
        for name, layer in self.layers.items():
            prefix = f"{name}."
            layer.restore({key.removeprefix(prefix): tensor for key, tensor in state.items()
                           if key.startswith(prefix)})


@contextmanager
def observe(model, layers, hook):
    """Call hook(name, x, y) on each input (batch, seq, in) and output of `layers` {name: module}.

    The model is called with attention_mask (batch, seq), and is in evaluation mode meanwhile.
    Raises InputError for an input of another shape.
    """
    tokens = None  # shape of the current batch

    def begin(_, __, batch):
        nonlocal tokens
        tokens = batch["attention_mask"].shape

    def call(_, inputs, y, name):
        if inputs[0].shape[:-1] != tokens:  # such as a pooler, which gets one token of a row
            raise InputError(f"--target_modules: {name} gets an input of shape "
                             f"{list(inputs[0].shape)}, not {list(tokens)} tokens: it can be "
                             "neither regrouped nor measured")
        hook(name, inputs[0], y)

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


def of_base(layer, key):
    """Whether a key of an adapted layer's state_dict is of its frozen base, not of the adapter."""
    return key.partition(".")[0] in layer.base_tensors


def find_blocks(model):
    """The decoder blocks by full name. Raises InputError where the model names none."""
    kinds = set(model._no_split_modules or ())
    blocks = {name: module for name, module in model.named_modules()
              if type(module).__name__ in kinds}
    if not blocks:
        raise InputError(f"model type {model.config.model_type} does not say which of its modules "
                         "are its blocks (_no_split_modules): they can be neither quantised nor "
                         "sharded")
    return blocks


def find_linears(model):
    """Return {full name: nn.Linear} of the layers that another module may replace.

    Left out: the output layer, which sees only the positions whose logits are kept, and layers
    whose parent reads their weight instead of calling them, as Mamba's mixers do for their kernels.
    """
    linears = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            if f"self.{last}.weight" not in inspect.getsource(type(model.get_submodule(parent))):
                linears[name] = module
    return linears


def find_targets(model, target_modules):
    """Return {full name: nn.Linear} of the layers whose last name component is a target.

    ("all-linear",) means all of `find_linears`. Raises InputError for a name that none of them has.
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
    """SHA-256 over all weights of a bare model, as float32.

    Equal for a bf16 and an fp32 load of a checkpoint that is stored in bf16; one stored in fp32
    loses digits in a bf16 load and counts as another model.
    """

    def digest(item):
        name, tensor = item
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        return hashlib.sha256(name.encode() + b"\0" + values.tobytes()).digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        digests = list(pool.map(digest, sorted(model.named_parameters())))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def frozen(tensor):
    """A Parameter that is not trained, sharing the tensor's memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def refuse_to_save(*_, **__):
    """In place of save_pretrained of a wrapped model, whose layers transformers does not know."""
    raise InputError("save_pretrained cannot save a wrapped model: it would leave out the adapted "
                     "weights. adapter.save(model, folder) saves its adapter; of that, `python "
                     "export.py FOLDER --out OTHER` makes an adapter for PEFT or, with --merged, a "
                     "whole checkpoint")


def method_of(model):
    """The method that wrapped `model`. Raises InputError for a bare model."""
    if not isinstance(getattr(model, "adapted_by", None), Method):
        raise InputError("this model carries no adapter: wrap it with a method or load one first")
    return model.adapted_by
