"""LoRA (Hu et al. 2022): a trained low-rank update of a frozen linear layer.

Axis names as in decomposition.py; r is the rank.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from inputs.errors import InputError
from method import find_targets, frozen
from protection import ProtectedMethod
from quantized import frozen_linear
from registry import BaditSettings

BADIT = BaditSettings()  # the paper's values


def low_rank_update(u, A, B, s):
    """Return s B A u, LoRA's Eq. (3): u (..., in), A (r, in), B (out, r) -> (..., out).

    s is alpha / r, or any factors of A u (..., r).
    """
    h = F.linear(u, A)  # (..., r)
    return F.linear(s * h, B)  # (..., out)


def check_rank(rank, shape):
    """Raise InputError unless 1 <= rank <= the smaller side of `shape`."""
    if not 1 <= rank <= min(shape):
        raise InputError(f"rank {rank} must be from 1 to {min(shape)}, the smaller side of a "
                         f"{tuple(shape)} weight")


def match_badit(settings, model):
    """Return `settings` with the rank whose number of trainable parameters is nearest to BADIT's.

    A LoRA layer trains r (in + out) weights, BADIT's K r (in + out) in the bank and K * in in the
    router. A default alpha is set for the settings' `matched_scaling`. Settings that have this rank
    were matched before and are returned unchanged.
    """
    layers = find_targets(model, settings.target_modules).values()
    one = sum(linear.in_features + linear.out_features for linear in layers)
    routers = BADIT.num_experts * sum(linear.in_features for linear in layers)
    rank = BADIT.num_experts * BADIT.rank + round(routers / one)
    if settings.rank == rank:
        return settings
    given = settings.alpha != type(settings).alpha
    alpha = settings.alpha if given else settings.matched_scaling * rank
    return replace(settings, rank=rank, alpha=alpha)


class LowRankLinear(nn.Module):
    """Base of layers y = base(x) + s B A dropout(x), s = alpha / rank.

    A subclass defines `bank`, which returns A (R, in) and B (out, R).
    """

    base_tensors = ("residual", "bias")
    depends_on_token = False

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.rank, self.scaling = rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.residual = frozen(base.weight)  # (out, in), all of W0; named as in experts.py
        self.bias = None if base.bias is None else frozen(base.bias)

    def forward(self, x):
        """Map (..., in) to (..., out)."""
        y = frozen_linear(x, self.residual, self.bias)  # (..., out)
        u = self.dropout(x).to(y.dtype)
        A, B = (weight.to(y.dtype) for weight in self.bank())
        return y + low_rank_update(u, A, B, self.factors(y))

    def factors(self, y):
        """Return the factors of A u, here s; y (..., out) is the output of the base."""
        return self.scaling

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """Return A (R, in) and s B (out, R) in float64."""
        A, B = self.bank()
        return A.double(), self.scaling * B.double()

    def restore(self, tensors):
        """Load saved adapter tensors, named as in this layer's state_dict."""
        self.load_state_dict(tensors, strict=False)  # `base_tensors` are not saved


class LoraLinear(LowRankLinear):
    """Compute y = base(x) + s B A dropout(x), s = alpha / rank.

    `lora_A` (r, in) starts Kaiming-uniform, `lora_B` (out, r) at zero, so the layer starts equal to
    `base`.
    """

    def __init__(self, base, rank=4, alpha=32, dropout=0.05):
        super().__init__(base, rank, alpha, dropout)
        kind = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32),
                    device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        # Deviation: the paper initialises A from a Gaussian; its code, and PEFT, do this.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def bank(self):
        return self.lora_A, self.lora_B

    def bank_inputs(self, x):
        """Return A x (tokens, r), what `lora_B` reads, for x (tokens, in)."""
        return F.linear(x.to(self.lora_A.dtype), self.lora_A)


class Lora(ProtectedMethod):
    """Train one adapter through all tasks, never reset and never merged."""

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
