"""LoRAMoE (Dou et al. 2024): a trained per-token router over randomly initialised LoRA experts.

Axis names as in experts.py. Its layer is also that of BADIT's ablation `--no_bad`.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from decomposition import check_bank_size
from experts import BankLinear, Routing, select_experts
from inputs.errors import InputError
from regrouping import ExpertMethod, Regrouper


class LoraMoeLinear(BankLinear):
    """y = base(x) + s sum_k g_k B_k A_k u, with g = softmax(x R') over the top_k experts.

    The weights of the top_k experts are renormalised to sum to 1, the others are 0; `top_k` equal
    to `num_experts` is the dense original. A and the router R start Kaiming-uniform, B at zero.
    u = dropout(x), for the router x itself. Deviation: one mask for all experts, not one for each.
    While `gates` is a list, every forward pass appends its g (batch, seq, K) to it.
    """

    inactive = "drop"

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        self.router = nn.Parameter(self.lora_A.new_empty(num_experts, base.in_features))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self.gates = None

    def route(self, x, expert_of=None):
        """x (..., in) -> Routing over (..., K), whoever owns which component."""
        with torch.autocast(x.device.type, enabled=False):  # the router is float32 always
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
    """Q (rows, K): what the tokens of each row give to every expert; g (rows, seq, K).

    Deviation: padding, False in mask (rows, seq), is left out, and the sum over a row's tokens is
    divided by their number: with rows of different lengths no router could bring the loss to zero.
    """
    inside = torch.where(mask[..., None], g, 0)  # (rows, seq, K)
    return inside.sum(1) / mask.sum(1, keepdim=True)  # (rows, K)


def importance_coefficients(types, K, delta):
    """I (rows, K): 1 + delta where the type of a row is that of the expert, else 1 - delta.

    types (rows,) of 0 and 1. The first half of the experts has type 1, as in the released code.
    """
    first_half = torch.arange(K, device=types.device) < K // 2  # (K,)
    return torch.where(types.bool()[:, None] == first_half, 1 + delta, 1 - delta)


def balancing_loss(Q, I):  # noqa: E741 (the paper's letter)
    """L_lbc = var(Z) / mean(Z) with Z = I * Q, both (rows, K); the variance is the unbiased one.

    The paper's formula; the released code divides by the square of the mean.
    """
    Z = I * Q  # (rows, K)
    return Z.var() / Z.mean()


# --- the method ---------------------------------------------------------------------------------


def type_of(task, pairs):
    """The type of `task` by pairs TASK=TYPE of folder names or T-numbers. Raises InputError."""
    found = []
    for name, kind in (pair.rsplit("=", 1) for pair in pairs):
        number = re.fullmatch(r"[Tt]?0*(\d+)", name)
        if name == task or (number and re.match(rf"task0*{number[1]}_", task)):
            found.append(int(kind))
    if len(found) != 1:
        raise InputError(f"--balance_types gives task {task} {len(found)} types, it needs one: "
                         "0 for knowledge questions, 1 for the rest")
    return found[0]


class LoraMoe(ExpertMethod):
    """LoRAMoE; with --balance_weight also its localized balancing constraint."""

    name = "loramoe"

    def check_tasks(self, tasks):
        """Raise InputError unless every task has a type, where the types are read."""
        if self.settings.balance_weight > 0:
            for task in tasks:
                type_of(task, self.settings.balance_types)

    def check_layer(self, linear):
        check_bank_size(self.settings.num_experts, self.settings.rank, linear.weight.shape)

    def build_layer(self, linear, fresh):
        return LoraMoeLinear(linear, **{key: getattr(self.settings, key) for key in (
            "num_experts", "rank", "alpha", "dropout", "top_k")})

    def wrap(self, model, fresh=True):
        super().wrap(model, fresh)
        # Never regroups, so it draws nothing from its seed: it logs what BADIT's does.
        self.regrouper = Regrouper(self.layers, self.settings.regroup_every, "fixed",
                                   seed=None)

    def start_stage(self, stage, loader):
        self.check_tasks(stage.tasks)
        super().start_stage(stage, loader)

    def before_forward(self, batch):
        if self.model.training and self.settings.balance_weight > 0:
            self.gates = []
            self._collect_gates_in(self.gates)

    def penalty(self, batch):
        """beta * sum over layers of L_lbc on this micro-batch, 0 where it has no tokens."""
        read = self.settings
        if read.balance_weight == 0:
            return 0.0
        # Closed before the backward pass, in which checkpointing runs the layers a second time.
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
            balancing_loss(expert_importance(g[real], mask[real]), coefficients)
            for g in self.gates)

    def _collect_gates_in(self, gates):
        for layer in self.layers.values():
            layer.gates = gates
