"""LoRAMoE (Dou et al. 2024): a trained per-token router over randomly initialised LoRA experts.

Axis names as in experts.py. BADIT's ablation `--no_bad` uses this layer, too.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from experts import BankLinear, Routing, select_experts
from inputs.errors import InputError
from regrouping import ExpertMethod


class LoraMoeLinear(BankLinear):
    """Compute y = base(x) + s sum_k g_k B_k A_k u, with g = softmax(x R') over the top_k experts.

    The weights of the top_k experts sum to 1, the others are 0; with `top_k` = `num_experts` this
    is the dense original. A and the router R start Kaiming-uniform, B at zero. u = dropout(x); the
    router reads x. Deviation: all experts share one dropout mask. While `gates` is a list, every
    forward pass appends its g (batch, seq, K) to it.
    """

    inactive = "drop"

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        self.router = nn.Parameter(self.lora_A.new_empty(num_experts, base.in_features))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self.gates = None

    def route(self, x, expert_of=None):
        """Route x (..., in), independently of the grouping."""
        with torch.autocast(x.device.type, enabled=False):  # the router is always float32
            logits = F.linear(x.to(self.router.dtype), self.router)  # (..., K)
            if self.top_k == self.num_experts:
                active, g = None, logits.softmax(dim=-1)
            else:
                active = select_experts(logits, self.top_k)
                g = logits.masked_fill(~active, -torch.inf).softmax(dim=-1)  # renormalised top_k
        if self.gates is not None:
            self.gates.append(g)
        return Routing(g, g, active, logits)


# --- localized balancing constraint -------------------------------------------------------------


def expert_importance(g, mask):
    """Return Q (rows, K), each expert's mean weight over the tokens of a row; g (rows, seq, K).

    Deviation: padding, False in mask (rows, seq), is left out, and Q is a mean over tokens. The
    paper's sum would keep the loss above zero for every router when rows differ in length.
    """
    inside = torch.where(mask[..., None], g, 0)  # (rows, seq, K)
    return inside.sum(1) / mask.sum(1, keepdim=True)  # (rows, K)


def importance_coefficients(types, K, delta):
    """Return I (rows, K): 1 + delta where row and expert have the same type, else 1 - delta.

    types (rows,) are 0 or 1. The first half of the experts has type 1, as in the released code.
    """
    first_half = torch.arange(K, device=types.device) < K // 2  # (K,)
    return torch.where(types.bool()[:, None] == first_half, 1 + delta, 1 - delta)


def balancing_loss(Q, I):  # noqa: E741 (the paper's letter)
    """Return L_lbc = var(Z) / mean(Z) for Z = I * Q, both (rows, K), with the unbiased variance.

    This is the paper's formula; the released code divides by the square of the mean.
    """
    Z = I * Q  # (rows, K)
    return Z.var() / Z.mean()


# --- the method ---------------------------------------------------------------------------------


def type_of(task, pairs):
    """Return the type of `task` from pairs TASK=TYPE of folder names or T-numbers.

    Raises InputError unless exactly one pair fits.
    """
    found = []
    for name, kind in (pair.rsplit("=", 1) for pair in pairs):
        number = re.fullmatch(r"[Tt]?0*(\d+)", name)
        if name == task or (number and re.match(rf"task0*{number[1]}_", task)):
            found.append(int(kind))
    if len(found) != 1:
        raise InputError(f"--balance_types gives task {task} {len(found)} types, it needs one: "
                         "0 for knowledge questions, 1 for others")
    return found[0]


class LoraMoe(ExpertMethod):
    """LoRAMoE, with its localized balancing constraint if --balance_weight is above 0."""

    name = "loramoe"

    def check_tasks(self, tasks):
        """Raise InputError if --balance_weight needs the type of a task and does not find it."""
        if self.settings.balance_weight > 0:
            for task in tasks:
                type_of(task, self.settings.balance_types)

    def build_layer(self, linear, fresh):
        return LoraMoeLinear(linear, **{key: getattr(self.settings, key) for key in (
            "num_experts", "rank", "alpha", "dropout", "top_k")})

    def before_forward(self, batch):
        if self.model.training and self.settings.balance_weight > 0:
            self.gates = []
            self._collect_gates_in(self.gates)

    def penalty(self, batch):
        """Return beta times the sum of L_lbc over layers; 0 for a micro-batch of fillers."""
        read = self.settings
        if read.balance_weight == 0:
            return 0.0
        # Stop before the backward pass, where checkpointing runs the layers again.
        self._collect_gates_in(None)
        mask = batch["attention_mask"].bool()  # (batch, seq)
        real = mask.any(1)  # (batch,): a filler has no tokens
        if not real.any():
            return 0.0
        types = torch.tensor([type_of(task, read.balance_types) for task, kept
                              in zip(batch["tasks"], real.tolist(), strict=True) if kept],
                             device=mask.device)  # (rows,)
        coefficients = importance_coefficients(types, read.num_experts, read.balance_delta)
        return read.balance_weight * sum(
            balancing_loss(expert_importance(g.view(*mask.shape, -1)[real], mask[real]),
                           coefficients)
            for g in self.gates)

    def _collect_gates_in(self, gates):
        for layer in self.layers.values():
            layer.gates = gates
