"""Low-rank updates of an adapter's layers: fit, factor, pad and merge them.

Axis names as in decomposition.py, and
    R         rank of an update: y = W0 x + B A x with A (R, in), B (out, R)
    h, c      (tokens, N): the inputs of a layer's components, and the factor of each
"""

from typing import NamedTuple

import torch
from tqdm import tqdm

from method import observe

RIDGE = 1e-6  # relative to the mean square of h: other directions keep the mean factors


class Update(NamedTuple):
    """The update of one layer, in float64."""

    A: torch.Tensor  # (R, in)
    B: torch.Tensor  # (out, R)


def refactored(update, rank=None):
    """Return an Update with the same product and balanced factors, and the share that was cut off.

    `rank` keeps the leading singular triplets, the best approximation in the Frobenius norm. A
    trained bank minus its initial one is a small difference of two large products: rounded to bf16
    as it is, it would lose some percent. Uses two QR decompositions and the SVD of a small matrix.
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
    """Return the Update with zeros up to `rank`: PEFT expects one rank for all layers."""
    more = rank - len(update.A)
    return Update(torch.nn.functional.pad(update.A, (0, 0, 0, more)),
                  torch.nn.functional.pad(update.B, (0, more)))


class Moments(NamedTuple):
    """Sums over tokens that `least_squares` needs, in float64."""

    count: torch.Tensor  # ()
    factors: torch.Tensor  # (N,): c
    routed: torch.Tensor  # (N, N): (c * h) h'
    plain: torch.Tensor  # (N, N): h h'


def moments(h, c):
    """Return the Moments of some tokens."""
    h, c = h.double(), c.double()
    return Moments(torch.tensor(float(len(h))), c.sum(0), (c * h).T @ h, h.T @ h)


def mean_factors(sums):
    """Return D (N, N): the diagonal matrix of mean factors."""
    return torch.diag(sums.factors / sums.count)


def least_squares(sums, ridge=RIDGE):
    """Return M (N, N) = argmin sum |c * h - M h|^2 + eps |M - D|^2, with D the mean factors.

    M = D + (sum (c * h) h' - D sum h h') (sum h h' + eps I)^-1, with eps = ridge times the mean
    diagonal of sum h h'. On its own tokens M is never worse than D; constant factors give M = D.
    """
    D = mean_factors(sums)
    eps = ridge * sums.plain.diagonal().mean() + torch.finfo(sums.plain.dtype).tiny
    P = sums.plain + eps * torch.eye(len(D), dtype=D.dtype, device=D.device)  # (N, N), symmetric
    return D + torch.linalg.solve(P, (sums.routed - D @ sums.plain).T).T


@torch.no_grad()
def calibrate(model, batches):
    """Return {name: Moments} of the layers of a wrapped model that depend on the token.

    `batches` hold input_ids, attention_mask and position_ids (batch, seq); padding is left out.
    """
    sums, tokens = {}, None

    def add(name, x, _):
        new = moments(*layers[name].components(x[tokens]))  # of x (tokens, in)
        sums[name] = Moments(*map(torch.add, sums[name], new)) if name in sums else new

    layers = {name: layer for name, layer in model.adapted_by.layers.items()
              if layer.depends_on_token}
    with observe(model, layers, add):
        for batch in tqdm(batches, desc="calibrate", unit="batch", delay=2, leave=False):
            tokens = batch["attention_mask"].bool()  # (batch, seq)
            model(**batch, logits_to_keep=1, use_cache=False)
    return sums


@torch.no_grad()
def merge(model, updates, dtype=None):
    """Add {name: Update} to the weights of a bare base model, rounded to `dtype`, in place."""
    for name, update in updates.items():
        weight = model.get_submodule(name).weight  # (out, in)
        merged = weight.double() + update.B @ update.A
        weight.copy_(merged.to(dtype or weight.dtype))
