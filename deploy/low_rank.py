"""An adapter as one constant low-rank update of every layer: exact, or the nearest in the mean.

Axis names as in decomposition.py, and
    R         rank of an update: y = W0 x + B' A' x with A' (R, in), B' (out, R)
    h, c      (tokens, N): the inputs of the components, A x, and the factor of each, with s in it
"""

from typing import NamedTuple

import torch

from badit import BaditLinear
from baselines.gainlora import GainLinear
from baselines.lora import LoraLinear
from baselines.olora import OloraLinear
from decomposition import InitialBank
from experts import BankLinear
from inputs.bars import Bar
from inputs.errors import InputError

RIDGE = 1e-6  # of the mean square of h: what calibration rows do not show stays at the mean gates


class Update(NamedTuple):
    """One layer's update, in float64."""

    A: torch.Tensor  # (R, in)
    B: torch.Tensor  # (out, R)


# --- the forms ----------------------------------------------------------------------------------


def depends_on_token(layer):
    """Whether the layer's update is another one for every token."""
    return isinstance(layer, BankLinear) and not (isinstance(layer, BaditLinear) and
                                                layer.routing == "static")


@torch.no_grad()
def constant_update(layer, mixing=None):
    """The Update of an adapted layer; `mixing` M (N, N) stands for what a router does.

    lora B' = s B; olora the branches side by side; a bank of experts B' = B M, where routing is
    static with M = s diag(alpha of each component's expert). What starts from an initial bank has
    W0 - s B0 A0 in place of W0, so A0 and -s B0 are appended. Raises InputError for another layer.
    """
    if isinstance(layer, BankLinear):
        if mixing is None:
            mixing = torch.diag(layer.scaling * layer.alpha.double()[layer.expert_of])  # (N, N)
        A, B = layer.lora_A.double(), layer.lora_B.double() @ mixing
    elif isinstance(layer, OloraLinear) and not isinstance(layer, GainLinear):
        A = torch.cat(list(layer.lora_A)).double()  # (t * r, in)
        B = layer.scaling * torch.cat(list(layer.lora_B), dim=1).double()  # (out, t * r)
    elif isinstance(layer, LoraLinear):
        A, B = layer.lora_A.double(), layer.scaling * layer.lora_B.double()
    else:
        raise InputError(f"{type(layer).__name__} has no constant low-rank form that is known here")
    if isinstance(layer, InitialBank):
        A = torch.cat([A, layer.lora_A0.double()])  # (R, in)
        B = torch.cat([B, -layer.scaling * layer.lora_B0.double()], dim=1)  # (out, R)
    return Update(A, B)


def refactored(update, rank=None):
    """(the Update with the same product and balanced factors, the share of it that was cut off).

    By two QR decompositions and the SVD of a small matrix; `rank` keeps the leading triplets, the
    nearest in the Frobenius norm. A trained bank beside its initial one is the small difference of
    two large products: rounded as it is, it would lose percents.
    """
    Qa, Ra = torch.linalg.qr(update.A.T)  # (in, R), (R, R)
    Qb, Rb = torch.linalg.qr(update.B)  # (out, R), (R, R)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    kept = slice(rank)
    root = S[kept].sqrt()  # (rank,)
    size = torch.linalg.vector_norm(S)
    lost = 0.0 if size == 0 or rank is None else float(torch.linalg.vector_norm(S[rank:]) / size)
    return Update(root[:, None] * (Vh[kept] @ Qa.T), (Qb @ U[:, kept]) * root), lost


def padded(update, rank):
    """The Update with rows and columns of zeros up to `rank`: PEFT wants one for all layers."""
    more = rank - len(update.A)
    return Update(torch.nn.functional.pad(update.A, (0, 0, 0, more)),
                  torch.nn.functional.pad(update.B, (0, more)))


# --- the nearest constant -----------------------------------------------------------------------


class Moments(NamedTuple):
    """Sums over tokens, in float64: all that the fits below need."""

    count: torch.Tensor  # ()
    gates: torch.Tensor  # (N,): c
    routed: torch.Tensor  # (N, N): (c * h) h'
    plain: torch.Tensor  # (N, N): h h'


def moments(h, c):
    """The Moments of some tokens."""
    h, c = h.double(), c.double()
    return Moments(torch.tensor(float(len(h))), c.sum(0), (c * h).T @ h, h.T @ h)


def mean_gates(sums):
    """D (N, N): every component at its mean factor."""
    return torch.diag(sums.gates / sums.count)


def least_squares(sums, ridge=RIDGE):
    """M (N, N) = argmin sum |c * h - M h|^2 + eps |M - D|^2, with D the mean gates.

    M = D + (sum (c * h) h' - D sum h h') (sum h h' + eps I)^-1, with eps = ridge times the mean
    diagonal of sum h h'. On its own tokens it is never worse than D; factors that are the same for
    all tokens give D.
    """
    D = mean_gates(sums)
    eps = ridge * sums.plain.diagonal().mean() + torch.finfo(sums.plain.dtype).tiny
    P = sums.plain + eps * torch.eye(len(D), dtype=D.dtype, device=D.device)  # (N, N), symmetric
    return D + torch.linalg.solve(P, (sums.routed - D @ sums.plain).T).T


@torch.no_grad()
def calibrate(model, batches):
    """{name: Moments} of the layers of a wrapped model that depend on the token.

    `batches` hold input_ids, attention_mask and position_ids (batch, seq); padding is left out.
    """
    sums, tokens = {}, None

    def hook_of(name):
        def hook(layer, inputs):
            x = inputs[0][tokens]  # (tokens, in)
            factors, _ = layer.per_component(layer.route(x), layer.expert_of)  # (tokens, N)
            new = moments(x.to(layer.lora_A.dtype) @ layer.lora_A.T, factors)
            sums[name] = Moments(*map(torch.add, sums[name], new)) if name in sums else new
        return hook

    layers = {name: layer for name, layer in model.adapted_by.layers.items()
              if depends_on_token(layer)}
    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    for batch in Bar(batches, desc="calibrate", unit="batch", delay=2, leave=False):
        tokens = batch["attention_mask"].bool()  # (batch, seq)
        model(**batch, logits_to_keep=1, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


# --- using it -----------------------------------------------------------------------------------


@torch.no_grad()
def merge(model, updates, dtype=None):
    """Add {name: Update} to the weights of a bare base model, rounded to `dtype`, in place."""
    for name, update in updates.items():
        weight = model.get_submodule(name).weight  # (out, in)
        merged = weight.double() + update.B @ update.A
        weight.copy_(merged.to(dtype or weight.dtype))
