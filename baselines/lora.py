"""LoRA (Hu et al. 2022): a trained low-rank update beside a frozen linear layer.

Axis names as in decomposition.py; r is the rank.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from inputs.errors import InputError
from method import Method, find_targets, frozen
from quantized import frozen_linear
from registry import BaditSettings

BADIT = BaditSettings()  # with the paper's values


def low_rank_update(u, A, B, s):
    """LoRA Eq. (3) with the scaling of its Sec. 4.1: s B A u.

    u (..., in), A (r, in), B (out, r), s = alpha / r -> (..., out).
    """
    h = F.linear(u, A)  # (..., r)
    return F.linear(s * h, B)  # (..., out)


def check_rank(rank, shape):
    """Raise InputError unless 1 <= rank <= the smaller side of `shape`."""
    if not 1 <= rank <= min(shape):
        raise InputError(f"rank {rank} must be from 1 to {min(shape)}, the smaller side of a "
                         f"{tuple(shape)} weight")


def match_badit(settings, model):
    """Return `settings` with the rank whose trainable parameters come nearest to BADIT's.

    A LoRA layer has r (in + out) of them, BADIT's K r (in + out) in its bank and K in its router.
    The default alpha becomes that of BADIT's scaling. Settings of that rank, which were matched
    before, are returned as they are.
    """
    layers = find_targets(model, settings.target_modules).values()
    one = sum(linear.in_features + linear.out_features for linear in layers)
    routers = BADIT.num_experts * sum(linear.in_features for linear in layers)
    rank = BADIT.num_experts * BADIT.rank + round(routers / one)
    if settings.rank == rank:
        return settings
    given = settings.alpha != type(settings).alpha
    alpha = settings.alpha if given else BADIT.alpha / BADIT.rank * rank
    return replace(settings, rank=rank, alpha=alpha)


class LoraLinear(nn.Module):
    """y = base(x) + s B A dropout(x), s = alpha / rank; the base path is never dropped.

    `lora_A` (r, in) starts Kaiming-uniform, `lora_B` (out, r) at zero, so the layer starts as
    `base`. Raises InputError for a rank outside 1 .. min(in, out).
    """

    base_tensors = ("residual", "bias")
    depends_on_token = False

    def __init__(self, base, rank=4, alpha=32, dropout=0.05):
        super().__init__()
        check_rank(rank, base.weight.shape)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.residual = frozen(base.weight)  # (out, in), all of W0: named as in experts.py
        self.bias = None if base.bias is None else frozen(base.bias)
        kind = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32),
                    device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        # Deviation: the paper draws A from a Gaussian; its code, and PEFT, from this.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        """(..., in) -> (..., out)."""
        y = frozen_linear(x, self.residual, self.bias)  # (..., out)
        u = self.dropout(x).to(y.dtype)
        return y + low_rank_update(u, self.lora_A.to(y.dtype), self.lora_B.to(y.dtype),
                                   self.scaling)

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """Return A (r, in) and s B (out, r) in float64."""
        return self.lora_A.double(), self.scaling * self.lora_B.double()

    def restore(self, tensors):
        """Take over saved adapter tensors, named as in this layer's state_dict."""
        self.load_state_dict(tensors, strict=False)  # all but `base_tensors`: those are in place


class Lora(Method):
    """One adapter for all tasks: trained on, never reset, never merged at a task's end."""

    name = "lora"

    def check_model(self, model):
        if self.settings.match_parameters is not None:  # "badit" is the only choice
            self.settings = match_badit(self.settings, model)
        super().check_model(model)

    def check_layer(self, linear):
        check_rank(self.settings.rank, linear.weight.shape)

    def build_layer(self, linear, fresh):
        return LoraLinear(linear, self.settings.rank, self.settings.alpha,
                          self.settings.dropout)
