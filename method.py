"""What every method shares: the hooks, target layers, and adapters on disk. Knows no method."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from errors import InputError
from utils import atomic_path, open_file, read_text, write_json, write_tensors

ADAPTER_FORMAT = 1
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # taken one for another
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


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

    A subclass sets `reads`, the names of the flags that it reads (they arrive as `settings`), and
    `build_layer`, which makes the adapted version of one linear layer. An adapted layer names its
    frozen base tensors in `base_tensors`; all its other tensors are the adapter.
    """

    name: str  # its value for --method
    reads: tuple[str, ...] = ()
    chat_template = False  # whether its prompts were wrapped in one; kept with the adapter
    trains = True  # False for the untrained base model
    row_tasks = ()  # set before each training forward: the task of every row, None for a filler

    def __init__(self, **settings):
        unknown = set(settings) ^ set(self.reads)
        if unknown:
            raise InputError(f"settings {sorted(unknown)} do not fit {type(self).__name__}, "
                             f"which reads {sorted(self.reads)}")
        self.settings = settings
        self.model = None
        self.base_sha256 = None
        self.layers = {}

    @staticmethod
    def add_flags(group):
        """Declare the flags that only this method reads on an argparse group."""

    @classmethod
    def check(cls, settings, given):
        """Refuse flags (`given`: those typed by the user) that contradict each other."""

    def check_tasks(self, tasks):
        """Raise InputError where the names of the suite's `tasks` do not fit the settings."""

    # --- set-up ---------------------------------------------------------------------------------

    def build_layer(self, linear, fresh):
        """The adapted form of `linear`; with `fresh=False` its adapter is left for `restore`."""
        raise NotImplementedError(f"{type(self).__name__} adapts no layers")

    def check_model(self, model):
        """Raise InputError where `model` (may be on the meta device) cannot be adapted."""
        if self.trains:
            for linear in find_targets(model, self.settings["target_modules"]).values():
                self.check_layer(linear)

    def check_layer(self, linear):
        """Raise InputError where one target layer (may be on the meta device) cannot be adapted."""

    def wrap(self, model, fresh=True):
        """Freeze `model` and replace its target layers in place (Alg. 1, step 1).

        `fresh=False` skips decomposition and initialisation: `load_state_dict` follows.
        """
        self.check_model(model)
        self.base_sha256 = self.base_sha256 or fingerprint(model)
        model.requires_grad_(False)
        self.model = model
        if self.trains:
            targets = find_targets(model, self.settings["target_modules"])
            for name, linear in tqdm(targets.items(), desc="adapt layers", unit="layer",
                                     delay=2, leave=False):
                self.layers[name] = self.build_layer(linear, fresh).train(linear.training)
                model.set_submodule(name, self.layers[name])
        model.adapted_by = self

    # --- hooks of the training loop -------------------------------------------------------------

    def start_task(self, task, loader):
        """Called with the Stage and its data loader before its first step."""

    def training_state(self):
        """Tensors by name that a stage needs, beside `state_dict`, to be resumed in its middle."""
        return {}

    def resume_task(self, task, state):
        """Called in place of `start_task` in a resumed stage: after `load_state_dict`.

        `state` is what `training_state` gave.
        """

    def before_forward(self, batch):
        """Called with every batch, before the forward pass and before generation."""

    def penalty(self):
        """A scalar tensor added to the loss, or 0.0.

        Called after the forward pass of every micro-batch; an optimizer step sees the mean over its
        micro-batches and processes.
        """
        return 0.0

    def after_backward(self):
        """Called once per optimizer step: gradients are synchronised and not yet clipped."""

    def after_step(self) -> Iterable[dict]:
        """Called after every optimizer step; returns records for regroup.jsonl.

        The loop adds the stage and the step to each.
        """
        return ()

    def end_task(self, task, loader):
        """Called after the last step of a stage, before its evaluation."""

    # --- counts and adapter state ---------------------------------------------------------------

    def active_parameters(self):
        """Adapter weights that act on one token; here all that are trained."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    def state_dict(self):
        """All tensors of the adapter by name: what a frozen base needs to become this model."""
        return {f"{name}.{key}": tensor.detach()
                for name, layer in self.layers.items()
                for key, tensor in layer.state_dict().items() if key not in layer.base_tensors}

    def load_state_dict(self, state):
        """Put the tensors of `state_dict` back. Raises InputError on any other key, shape, type."""
        check_tensors(state, self.state_dict())
        for name, layer in self.layers.items():
            prefix = f"{name}."
            layer.restore({key.removeprefix(prefix): tensor for key, tensor in state.items()
                           if key.startswith(prefix)})


def check_tensors(state, expected, what="the adapter"):
    """Raise InputError unless `state` is finite and has `expected`'s keys, shapes and types."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise InputError(f"{what} does not fit this model: {len(missing)} tensors are missing "
                         f"{missing[:2]}, {len(extra)} are unknown {extra[:2]}")
    for key, tensor in state.items():
        want = expected[key]
        kinds = FLOATS if want.is_floating_point() else {want.dtype}
        if tensor.shape != want.shape or tensor.dtype not in kinds:
            raise InputError(f"{what} does not fit this model: {key} is {tensor.dtype} "
                             f"{list(tensor.shape)}, expected {want.dtype} {list(want.shape)}")
        if not torch.isfinite(tensor.to(want.dtype)).all():
            raise InputError(f"{what} is damaged: {key} holds a non-finite number")


def find_targets(model, target_modules):
    """All nn.Linear modules whose last name component is in `target_modules`, by full name."""
    # Not the output layer: it sees only the positions whose logits are kept.
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()}
    existing = {name.rpartition(".")[2] for name in linears}
    for target in target_modules:
        if target not in existing:
            raise InputError(f"--target_modules {target}: the model has no such linear layer; "
                             f"it has {', '.join(sorted(existing))}")
    return {name: linear for name, linear in linears.items()
            if name.rpartition(".")[2] in target_modules}


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


def method_of(model):
    """The method that wrapped `model`. Raises InputError for a bare model."""
    if not isinstance(getattr(model, "adapted_by", None), Method):
        raise InputError("this model carries no adapter: wrap it with a method or load one first")
    return model.adapted_by


def save_adapter(model, path):
    """Write the adapter of a wrapped model into folder `path`; equal adapters give equal bytes."""
    method, path = method_of(model), Path(path)
    with atomic_path(path / WEIGHTS_FILE) as temporary:
        write_tensors(temporary, method.state_dict())
    write_json(path / CONFIG_FILE, {
        "format": ADAPTER_FORMAT, "method": method.name, "settings": method.settings,
        "base_sha256": method.base_sha256, "model_type": model.config.model_type,
        "chat_template": method.chat_template})


def read_adapter_config(path):
    """The configuration of a saved adapter. Raises InputError where it is not one."""
    file = Path(path) / CONFIG_FILE
    try:
        config = json.loads(read_text(file), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"no adapter at {path}: cannot read {file} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    wanted = {"format", "method", "settings", "base_sha256", "model_type", "chat_template"}
    if not isinstance(config, dict) or set(config) != wanted:
        raise InputError(f"{file} is not an adapter's configuration: it needs {sorted(wanted)}")
    if config["format"] != ADAPTER_FORMAT:
        raise InputError(f"{file} has format {config['format']}, this code reads {ADAPTER_FORMAT}")
    for key, kind in (("method", str), ("settings", dict), ("base_sha256", str),
                      ("chat_template", bool)):
        if not isinstance(config[key], kind):
            raise InputError(f"{file}: {key} is {config[key]!r}, not a {kind.__name__}")
    return config


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")


def load_adapter(model, path):
    """Wrap the bare base `model` with the adapter saved in `path` and return it.

    Nothing is decomposed again: the saved initial bank gives the residual. Raises InputError for a
    damaged adapter and for any base model but the one that it was made on.
    """
    from arguments import check_settings  # the flags and the registry, which import this module
    from baselines import METHODS

    path = Path(path)
    config = read_adapter_config(path)
    if config["method"] not in METHODS:
        raise InputError(f"{path} was made by method {config['method']!r}; "
                         f"known: {', '.join(METHODS)}")
    try:
        open_file(path / WEIGHTS_FILE).close()  # no pipe, which safetensors would wait for
        state = safetensors.torch.load_file(path / WEIGHTS_FILE)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {path / WEIGHTS_FILE}: {error}") from None
    sha256 = fingerprint(model)
    if sha256 != config["base_sha256"]:
        raise InputError(f"{path} was made on another base model: its SHA-256 is "
                         f"{config['base_sha256'][:12]}…, this one's is {sha256[:12]}…")
    check_settings(config["settings"], METHODS[config["method"]], path / CONFIG_FILE)
    method = METHODS[config["method"]](**config["settings"])
    method.base_sha256, method.chat_template = sha256, config["chat_template"]
    try:
        method.wrap(model, fresh=False)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # a value that no flag would let in
        raise InputError(f"{path / CONFIG_FILE}: the settings make no adapter ({error})") from error
    method.load_state_dict(state)
    return model
