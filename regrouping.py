"""Regroup the experts of all layers on a schedule, and measure what that changes.

Axis names as in grouping.py.
"""

import math

import torch
from accelerate import PartialState

from decomposition import check_bank_size
from grouping import (
    component_gradients,
    component_gram,
    gradient_angles,
    grouping_from_gram,
    grouping_objective,
    membership,
    relabel,
)
from inputs.numbers import stable_seed
from method import INPUTS, Method, observe

PROBE_TOKENS = 256  # drift and router health are measured on at least so many
NON_FINITE = "non-finite gradient"


class Regrouper:
    """Sum gradients and regroup the experts of all layers by them on a schedule.

    `regroup_every` is in optimizer steps (None: once per epoch of the stage). `grouping` is "dog"
    or a control with the same schedule and log: "random" or "fixed".
    """

    def __init__(self, layers, regroup_every, grouping, seed):
        self.layers, self.regroup_every = layers, regroup_every
        self.grouping, self.seed = grouping, seed

    def start(self, stage):
        """Begin a stage: reset the step counter and the gradient sums."""
        self.stage, self.step = stage, 0
        self.interval = self.regroup_every or stage.steps_per_epoch
        if self.grouping != "fixed" and self.interval >= stage.steps:
            PartialState().print(f"stage {stage.name} never regroups: its {stage.steps} steps do "
                                 f"not exceed the interval of {self.interval} (--regroup_every)")
        self._reset()

    def _reset(self):
        self.count = 0
        self.sums = {name: (torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B))
                     for name, layer in self.layers.items()}

    def state(self):
        """Return all that `start` does not set, as tensors by name."""
        banks = {f"{name}.{side}": tensor for name, pair in self.sums.items()
                 for side, tensor in zip("AB", pair, strict=True)}
        return {"step": torch.tensor(self.step), "count": torch.tensor(self.count)} | banks

    def restore(self, state):
        """Load what `state` returned, after `start`."""
        self.step, self.count = int(state["step"]), int(state["count"])
        self.sums = {name: tuple(state[f"{name}.{side}"].to(sum_) for side, sum_ in
                                 zip("AB", pair, strict=True))
                     for name, pair in self.sums.items()}

    @torch.no_grad()
    def accumulate(self):
        """Add this step's gradients of the banks to their sums, Eq. (8)."""
        self.count += 1
        sums = [bank for pair in self.sums.values() for bank in pair]
        grads = [bank.grad for layer in self.layers.values()
                 for bank in (layer.lora_A, layer.lora_B)]
        torch._foreach_add_(sums, grads)  # one kernel for all layers

    def after_step(self, model, batch):
        """Count a step and regroup at the end of an interval. Returns a line per layer, or []."""
        self.step += 1
        last = self.step == self.stage.steps
        if self.step % self.interval and not last:
            return []
        # Nothing trains after the last step, so it only measures.
        lines = self.regroup(model, batch, "fixed" if last else self.grouping)
        self._reset()
        return lines

    @torch.no_grad()
    def regroup(self, model, batch, grouping):
        """Regroup all layers by their mean gradients. Returns a line per layer, in order."""
        layers = list(self.layers.values())
        K = layers[0].num_experts
        grams, norms = zip(*map(self._gram_and_norms, self.layers), strict=True)
        gram = torch.stack(grams)  # (L, N, N)
        old = torch.stack([layer.expert_of.cpu() for layer in layers])  # (L, N)
        finite = torch.isfinite(gram).all(-1).all(-1)  # (L,)
        gram[~finite] = 0  # such a layer keeps its grouping
        new, rounds = self.propose(grouping, gram, old, K)
        skipped = [layer.obstacle(proposed) if ok else NON_FINITE
                   for layer, proposed, ok in zip(layers, new, finite, strict=True)]
        kept = torch.tensor([reason is not None for reason in skipped])  # (L,)
        new[kept] = old[kept]
        measured = measure(model, batch, self.layers, new)
        for layer, adopted in zip(layers, new, strict=True):
            layer.take_grouping(adopted)
        report = grouping_report(gram, old, new, rounds, K)
        return [dict(layer=name, steps=self.count, grouping=grouping, skipped=skipped[i],
                     **measured[name], gradient_norm=expert_norms(norms[i], old[i], K),
                     **{key: values[i] for key, values in report.items()})
                for i, name in enumerate(self.layers)]

    def _gram_and_norms(self, name):
        """Return the Gram matrix (N, N) and norms (N,) of a layer's mean gradients, on the CPU."""
        gradients = component_gradients(*self.sums[name]) / self.count  # (N, D)
        return component_gram(gradients), gradients.norm(dim=1).to("cpu", torch.float64)

    def propose(self, grouping, gram, old, K):
        """Return new groupings (L, N) and the rounds (L,) of their solver."""
        if grouping == "dog":
            return grouping_from_gram(gram, K, old)
        no_rounds = torch.zeros(len(old), dtype=torch.int64)
        if grouping == "random":
            generator = torch.Generator().manual_seed(
                stable_seed("grouping", self.seed, self.stage.name, self.step))
            new = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in old])
            return relabel(new, old, K), no_rounds
        return old.clone(), no_rounds


class ExpertMethod(Method):
    """Implement the hooks of a method whose layers are banks of experts.

    Its `regrouper` regroups them; with "fixed" it only measures.
    """

    def check_layer(self, linear):
        check_bank_size(self.settings.num_experts, self.settings.rank, linear.weight.shape)

    def wrap(self, model, fresh=True, grouping="fixed", seed=None):
        super().wrap(model, fresh)
        self.regrouper = Regrouper(self.layers, self.settings.regroup_every, grouping, seed)

    def start_stage(self, stage, loader):
        self.regrouper.start(stage)

    def training_state(self):
        return self.regrouper.state()

    def resume_stage(self, stage, state):
        self.regrouper.start(stage)
        self.regrouper.restore(state)

    def active_parameters(self):
        return sum(layer.active_parameters() for layer in self.layers.values())

    def after_backward(self):
        super().after_backward()
        self.regrouper.accumulate()

    def after_step(self, batch):
        return self.regrouper.after_step(self.model, batch)


# --- measurements -------------------------------------------------------------------------------


def grouping_report(gram, old, new, rounds, K):
    """Return lists over layers of what a regrouping changed: angles in degrees, Eq. (10), moves."""
    columns = dict(rounds=rounds, moved=(old != new).sum(-1))
    for moment, grouping in (("before", old), ("after", new)):
        inter, intra = gradient_angles(gram, grouping, K)
        columns |= {f"inter_{moment}": inter, f"intra_{moment}": intra,
                    f"objective_{moment}": grouping_objective(gram, grouping, K)}
    return {key: [None if value != value else value for value in column.tolist()]
            for key, column in columns.items()}


def expert_norms(norms, grouping, K):
    """Return each expert's gradient norm from its components' (N,); None if not finite."""
    by_expert = (norms.square() @ membership(grouping, K)).sqrt()  # (K,)
    return by_expert.tolist() if torch.isfinite(norms).all() else None


def router_health(routing):
    """Return the share of tokens that select each expert, and statistics of alpha (tokens, K).

    All are None without tokens, in a micro-batch of fillers.
    """
    alpha = routing.alpha.float()
    if not len(alpha):
        return dict.fromkeys(("expert_share", "alpha_mean", "alpha_max", "alpha_entropy"))
    share = torch.ones_like(alpha) if routing.active is None else routing.active.float()
    p = alpha.abs() / alpha.abs().sum(-1, keepdim=True)
    return dict(expert_share=share.mean(0).tolist(), alpha_mean=alpha.mean(0).tolist(),
                alpha_max=float(alpha.max()),
                alpha_entropy=float(torch.special.entr(p).sum(-1).mean()))


def probe_rows(batch):
    """Return the first rows of a left-padded batch that hold at least PROBE_TOKENS tokens."""
    lengths = batch["attention_mask"].sum(dim=1)  # (batch,)
    rows = lengths.cumsum(0) - lengths < PROBE_TOKENS
    longest = max(1, int(lengths[rows].max()))  # fillers have no tokens
    return {key: batch[key][rows, -longest:] for key in INPUTS}


def measure(model, batch, layers, new):
    """Return {layer: dict}: what groupings `new` (L, N) would change, and the router's health.

    One evaluation pass over rows of the last micro-batch, padding left out. `regroup_drift` is the
    relative change of the layer's output for the same input. The groupings are not adopted.
    """
    batch = probe_rows(batch)
    measured, tokens = {}, batch["attention_mask"].bool()
    groupings = dict(zip(layers, new, strict=True))

    def look(name, x, y):
        layer = layers[name]
        x, y = x[tokens], y[tokens].float()  # (tokens, in), (tokens, out)
        now, then = (layer.add_bank(torch.zeros_like(y), x, bank)
                     for bank in (layer.bank, layer.regrouped(groupings[name])))  # (tokens, out)
        drift = float((then - now).norm() / y.norm())  # NaN where all outputs are zero
        measured[name] = dict(regroup_drift=drift if math.isfinite(drift) else None,
                              **router_health(layer.route(x)))

    with observe(model, layers, look):
        model(**batch, logits_to_keep=1, use_cache=False)
    return measured
