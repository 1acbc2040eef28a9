"""Protect what a model learnt from old tasks: --protect (GPM, Saha et al. 2021; not in the paper).

After a task every layer stores the subspaces that hold the share --protect of the energy of its
inputs x and of the inputs h of `lora_B`. In later tasks the updates of weights that read x or h are
orthogonal to these subspaces, so they hardly change the layer's output on old inputs. BADIT
regroups in the first task only: other groups would change which experts act on old tokens.

Axis names as in decomposition.py.
"""

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm import tqdm

from method import INPUTS, Method, first_rows, observe
from subspaces import MAX_INSTANCES, Subspace, constrain_update, free_directions, second_moment

# The trained weights of a layer, by the subspace of what they read.
SPACE_OF = {"lora_A": "old_x", "router": "old_x", "lora_B": "old_h"}


class ProtectedMethod(Method):
    """Implement --protect for a method whose layers train only the weights in SPACE_OF.

    A layer's `bank_inputs(x)` returns h (tokens, N), up to a constant factor, for x (tokens, in).
    With --protect 0 every hook does what the base class does. The subspaces are saved with the
    adapter. Deviation from GPM: it projects gradients; Adam's updates are projected here.
    """

    def wrap(self, model, fresh=True, *options):
        super().wrap(model, fresh, *options)
        for layer in self._protected().values():
            A = layer.lora_A.detach()  # (N, in)
            layer.old_x, layer.old_h = Subspace(A.shape[1], A), Subspace(len(A), A)

    def _protected(self):
        return self.layers if self.settings.protect else {}

    def protects_old_tasks(self):
        """Return whether the inputs of a finished task are stored."""
        return any(free_directions(layer.old_x.get()) < layer.lora_A.shape[1]
                   for layer in self._protected().values())

    def _weights(self):
        """Return {name: (weight (..., d), Subspace of R^d)} of all weights in SPACE_OF."""
        return {f"{name}.{key}": (weight, getattr(layer, SPACE_OF[key]))
                for name, layer in self._protected().items()
                for key, weight in layer.named_parameters(recurse=False) if key in SPACE_OF}

    def start_stage(self, stage, loader):
        super().start_stage(stage, loader)
        self.at_start = {name: weight.detach().clone()
                         for name, (weight, _) in self._weights().items()}
        if self._protected():
            self._moments(loader, 1)  # a layer that cannot be measured is refused now

    def training_state(self):
        return super().training_state() | {f"at_start.{name}": weight
                                           for name, weight in self.at_start.items()}

    def resume_stage(self, stage, state):
        super().resume_stage(stage, state)
        self.at_start = {name: state[f"at_start.{name}"].to(weight)
                         for name, (weight, _) in self._weights().items()}

    @torch.no_grad()
    def after_step(self, batch):
        for name, (weight, subspace) in self._weights().items():
            space = subspace.get()
            if free_directions(space) < weight.shape[-1]:
                weight.copy_(constrain_update(weight, self.at_start[name], space))
        return super().after_step(batch)

    @torch.no_grad()
    def _moments(self, loader, rows):
        """Return this process's {layer: sums of v v' for x (in, in), h (N, N)} over `rows`."""
        layers, tokens = self._protected(), None  # (batch, seq) of the current batch
        sums = {name: [layer.lora_A.new_zeros(d, d) for d in layer.lora_A.shape[::-1]]
                for name, layer in layers.items()}

        def add(name, x, _):
            x = x[tokens]  # (tokens, in)
            for total, v in zip(sums[name], (x, layers[name].bank_inputs(x)), strict=True):
                total += second_moment(v)

        with observe(self.model, layers, add):
            for batch in first_rows(loader, rows):
                tokens = batch["attention_mask"].bool()
                self.model(**{key: batch[key] for key in INPUTS}, logits_to_keep=1, use_cache=False)
        return sums

    def end_stage(self, stage, loader):
        super().end_stage(stage, loader)
        layers = self._protected()
        if not layers:
            return
        sums = self._moments(loader, MAX_INSTANCES)
        for name, layer in tqdm(layers.items(), desc="protect layers", unit="layer", delay=2,
                                leave=False, disable=not PartialState().is_main_process):
            for total, subspace in zip(sums.pop(name), (layer.old_x, layer.old_h), strict=True):
                subspace.extend(reduce(total, "sum"), self.settings.protect)
        free = {key: sum(free_directions(getattr(layer, key).get()) for layer in layers.values())
                / len(layers) for key in ("old_x", "old_h")}
        PartialState().print(f"--protect {self.settings.protect:g}: inputs of tasks so far leave "
                             f"{free['old_x']:.1f} directions free for A, {free['old_h']:.1f} for "
                             "B (mean over layers)")

    def grow(self, state):
        super().grow(state)
        for name, layer in self._protected().items():
            layer.old_x.resize(state, f"{name}.old_x")
            layer.old_h.resize(state, f"{name}.old_h")
