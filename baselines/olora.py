"""O-LoRA (Wang et al. 2023a): one LoRA branch per task, kept orthogonal to past tasks' branches.

Not to be confused with the QR initialisation that PEFT calls "olora". Axis names as in
decomposition.py; r is the rank of one branch, t the number of branches. The paper writes a branch
as A B with A on the output side; here `lora_A` reads the input, and the penalty is on `lora_A`, as
in the authors' code.
"""

import math

import torch
from accelerate import PartialState
from torch import nn

from baselines.lora import LowRankLinear, check_rank
from method import Method


def orthogonality(A_t, A_old):
    """Return sum |O_jk| of O = A_old A_t' (Sec. 3.2), for A_t (r, in) and A_old (r * past, in).

    It is 0 if the current branch is orthogonal to all past ones.
    """
    # Deviation: the paper sums O_jk^2; this is the authors' code.
    return (A_old @ A_t.T).abs().sum()


def branch_penalty(layers, orth_weight):
    """Return lambda1 * orthogonality, summed over `layers`; 0.0 without past branches."""
    total = 0.0
    for layer in layers:
        *past, A_t = layer.lora_A
        if past and orth_weight:
            total = total + orth_weight * orthogonality(A_t, torch.cat(past))
    return total


class OloraLinear(LowRankLinear):
    """Compute y = base(x) + s sum_i B_i A_i dropout(x), s = alpha / rank, with one dropout mask.

    `lora_A` and `lora_B` hold a branch (r, in), (out, r) per task; the last one is trained. A
    branch starts with Kaiming-uniform A and zero B, so adding one changes no output.
    """

    def __init__(self, base, rank=4, alpha=32, dropout=0.05):
        super().__init__(base, rank, alpha, dropout)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ParameterList(), nn.ParameterList()
        self.add_branch()

    def add_branch(self):
        """Freeze the branches so far and append a trainable one."""
        self.requires_grad_(False)
        like = self.lora_B[-1] if len(self.lora_B) else self.residual  # may be quantised
        kind = dict(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.lora_A.append(nn.Parameter(torch.empty(self.rank, self.in_features, **kind)))
        self.lora_B.append(nn.Parameter(torch.zeros(self.out_features, self.rank, **kind)))
        nn.init.kaiming_uniform_(self.lora_A[-1], a=math.sqrt(5))

    def bank(self):
        """Return all branches side by side: A (t * r, in) and B (out, t * r)."""
        return torch.cat(list(self.lora_A)), torch.cat(list(self.lora_B), dim=1)


class BranchMethod(Method):
    """Base of methods with a branch per task: adds branches, also when an adapter is loaded.

    The first branch exists from the start, so that one task draws the same random numbers as LoRA.
    """

    started = False  # whether a task has trained the last branch

    def check_layer(self, linear):
        check_rank(self.settings.rank, linear.weight.shape)

    def add_branch(self):
        """Freeze all branches and append one per layer.

        Processes draw different numbers; DDP then sends those of the first to all.
        """
        for layer in self.layers.values():
            layer.add_branch()

    def active_parameters(self):
        past = sum(weight.numel() for layer in self.layers.values()
                   for branches in (layer.lora_A, layer.lora_B) for weight in branches
                   if not weight.requires_grad)
        return super().active_parameters() + past

    def start_stage(self, stage, loader):
        if self.started:
            self.add_branch()
        elif len(stage.tasks) > 1:
            PartialState().print(f"{self.name}: mixed training is one task: one branch, and no "
                                 "past branch to protect")
        self.started = True

    def grow(self, state):
        """Add the branches of `state` that a fresh adapter lacks."""
        name, layer = next(iter(self.layers.items()))
        while f"{name}.lora_A.{len(layer.lora_A)}" in state:
            self.add_branch()

    def load_state_dict(self, state):
        """Load a `state_dict`; the next task then adds a branch."""
        super().load_state_dict(state)
        self.started = True


class Olora(BranchMethod):
    """Train a new branch for every task; all branches act on every input."""

    name = "olora"

    def build_layer(self, linear, fresh):
        return OloraLinear(linear, self.settings.rank, self.settings.alpha,
                           self.settings.dropout)

    def penalty(self, batch):
        # Deviation: the loop averages this over micro-batches; the authors' code adds it to each.
        return branch_penalty(self.layers.values(), self.settings.orth_weight)
