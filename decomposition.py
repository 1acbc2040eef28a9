"""Decompose a weight into rank-1 components and a residual: BAD, Eq. (5) and (6).

Axis names in all shape comments:
    in, out   input and output features of one linear layer (the paper's n and m)
    K, r, N   number of experts, rank of each, number of rank-1 components: N = K * r
"""

from typing import NamedTuple

import torch

from inputs.errors import InputError
from method import frozen

KRYLOV_BLOCKS, KRYLOV_EXTRA = 8, 16  # --svd fast then finds 99.99 % of the leading energy


class Decomposition(NamedTuple):
    """W0 = residual + scaling * lora_B @ lora_A, whatever the accuracy of the SVD."""

    lora_A: torch.Tensor  # (N, in)
    lora_B: torch.Tensor  # (out, N)
    residual: torch.Tensor  # (out, in), in the type of W0
    singular_values: torch.Tensor  # (N,), descending


def orient_singular_pairs(U, Vh):
    """Make the largest entry (by magnitude, first on ties) of every row of `Vh` positive.

    U (out, N), Vh (N, in). (u, v) and (-u, -v) are the same component, but Eq. (10) depends on the
    sign: without a convention the grouping would depend on the SVD routine.
    """
    largest = Vh.abs().argmax(dim=1, keepdim=True)  # (N, 1)
    sign = torch.where(Vh.gather(1, largest) < 0, -1.0, 1.0).to(Vh.dtype)  # (N, 1)
    return U * sign.T, Vh * sign


def top_singular_triplets(W0, N, svd):
    """Return the N leading singular triplets U (out, N), S (N,), Vh (N, in) of W0 (out, in).

    "exact" uses LAPACK's SVD; "fast" searches a `krylov_basis` of the rows.
    """
    if svd == "exact":
        U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
        return U[:, :N], S[:N], Vh[:N]
    if svd == "fast":
        V = krylov_basis(W0, N + KRYLOV_EXTRA)  # (in, n)
        U, S, Vh = torch.linalg.svd(W0 @ V, full_matrices=False)
        return U[:, :N], S[:N], Vh[:N] @ V.T
    raise InputError(f"svd {svd!r} is unknown; allowed: exact, fast")


def krylov_basis(W, width):
    """Return orthonormal V (in, n) that nearly spans the leading right singular vectors of W.

    Randomised block Krylov (Musco and Musco 2015): the span of (W'W)^i X for i = 1, 2, ... and a
    random X (in, width); power iterations keep only the last of these. W is (out, in). Draws from
    its own generator.
    """
    generator = torch.Generator(W.device).manual_seed(0)
    X = torch.randn(W.shape[1], width, generator=generator, dtype=W.dtype, device=W.device)
    blocks = []
    for _ in range(min(KRYLOV_BLOCKS, 1 + W.shape[1] // width)):
        X = torch.linalg.qr(W.T @ (W @ X)).Q  # (in, width)
        blocks.append(X)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


def residual_weight(W0, A, B, s):
    """Compute W0 - s B A, Eq. (6), in the bank's dtype and device; return it in those of W0."""
    return (W0.to(A) - s * (B @ A)).to(W0)  # (out, in)


@torch.no_grad()
def decompose(weight, num_experts, rank, scaling, svd="exact"):
    """Split a weight (out, in) into N = num_experts * rank components and a residual, Eq. (5), (6).

    b_i = sqrt(S_i / s) u_i and a_i = sqrt(S_i / s) v_i', by descending singular value: expert k
    starts with components r*k to r*k + r - 1. Returns a Decomposition in float32, or in float64 for
    a float64 weight. Raises InputError for N outside 1 .. min(out, in), a weight that is not
    finite, or a weight of rank below N.
    """
    W0, N, s = weight, num_experts * rank, scaling
    check_bank_size(num_experts, rank, W0.shape)
    W = W0.to(torch.promote_types(W0.dtype, torch.float32))
    if not torch.isfinite(W).all():
        raise InputError("its weight holds NaN or infinity")
    U, S, Vh = top_singular_triplets(W, N, svd)
    check_singular_values(S, W.shape)
    U, Vh = orient_singular_pairs(U, Vh)
    root = (S / s).sqrt()  # (N,)
    A, B = root[:, None] * Vh, U * root  # (N, in), (out, N)
    return Decomposition(A, B, residual_weight(W0, A, B, s), S)


def check_bank_size(num_experts, rank, shape):
    """Raise InputError unless 1 <= num_experts * rank <= the smaller side of `shape`."""
    if not 1 <= num_experts * rank <= min(shape):
        raise InputError(f"num_experts * rank = {num_experts} * {rank} = {num_experts * rank} must "
                         f"be from 1 to {min(shape)}, the smaller side of a {tuple(shape)} weight")


def check_singular_values(S, shape):
    """Raise InputError unless all of S (N,), descending, are above their rounding error.

    A component with a zero singular value has a = b = 0, hence no gradient: it cannot learn.
    """
    nonzero = int((S > S[0] * max(shape) * torch.finfo(S.dtype).eps).sum())
    if nonzero < len(S):
        raise InputError(f"its weight has {nonzero} non-zero singular values, and {len(S)} "
                         "components need as many: give fewer (--rank, --num_experts) or other "
                         "--target_modules")


class InitialBank:
    """Mixin for layers with a decomposed base: residual = W0 - s B0 A0.

    The frozen initial bank `lora_A0`, `lora_B0` is saved with the adapter: loading rebuilds the
    residual from it, without a decomposition.
    """

    def add_initial_bank(self, base, svd):
        """Start from the leading triplets of `base`; `svd=None` leaves that to `restore`."""
        self.lora_A0 = frozen(torch.zeros_like(self.lora_A))
        self.lora_B0 = frozen(torch.zeros_like(self.lora_B))
        if svd is not None:
            bank = decompose(base.weight.detach(), len(self.lora_A), 1, self.scaling, svd)
            self.start_from(bank.lora_A, bank.lora_B, bank.residual)

    @torch.no_grad()
    def start_from(self, lora_A0, lora_B0, residual):
        """Set the initial bank, the bank and the residual."""
        for parameter, value in ((self.lora_A, lora_A0), (self.lora_A0, lora_A0),
                                 (self.lora_B, lora_B0), (self.lora_B0, lora_B0)):
            parameter.copy_(value)
        self.residual.data = residual

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """Return A (2 N, in) and B (out, 2 N) of the update of W0 in float64.

        The bank comes first, then the -s B0 A0 of the residual.
        """
        A, B = super().constant_update(mixing)
        B0 = -self.scaling * self.lora_B0.double()  # (out, N)
        return torch.cat([A, self.lora_A0.double()]), torch.cat([B, B0], dim=1)

    @torch.no_grad()
    def restore(self, tensors):
        """Load saved tensors and rebuild the residual from the initial bank."""
        same = all(torch.equal(getattr(self, name), tensors[name].to(self.lora_A))
                   for name in ("lora_A0", "lora_B0"))
        if not same:
            assert not self.lora_A0.any(), "the residual of another decomposition is gone"
            A0, B0 = (tensors[name].to(self.lora_A) for name in ("lora_A0", "lora_B0"))
            self.start_from(A0, B0, residual_weight(self.residual, A0, B0, self.scaling))
        super().restore(tensors)
