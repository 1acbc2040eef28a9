"""Subspaces of the inputs of old tasks, which updates must not touch: GPM (Saha et al. 2021).

Axis names:
    d      dimension of the inputs
    k      dimension of a subspace

A subspace is stored as an orthonormal basis P (d, k), or as its `Complement` if that is smaller.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from method import frozen

MAX_INSTANCES = 1000  # rows in one pass over a task's data; GainLoRA's code takes 1002 batches


class Complement(NamedTuple):
    """A subspace stored as the orthonormal basis N (d, d - k) of its complement."""

    N: torch.Tensor


def free_directions(space):
    """Return the number of directions outside a subspace."""
    return space.N.shape[1] if isinstance(space, Complement) else space.shape[0] - space.shape[1]


def second_moment(v):
    """Return the sum of v v' over the rows of v (n, d): (d, d), in float32 or better."""
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    return torch.einsum("ni,nj->ij", v, v)


def project_out(v, space):
    """Return (I - P P') v for vectors v (..., d), which is N N' v with a Complement.

    Computed in float64, so that results are as orthogonal as their dtype allows.
    """
    if isinstance(space, Complement):
        N = space.N.double()
        return ((v.double() @ N) @ N.T).to(v.dtype)
    P = space.double()
    return (v.double() - (v.double() @ P) @ P.T).to(v.dtype)


def constrain_update(W, W_start, space):
    """Return W_start + (W - W_start)(I - P P'), GainLoRA's updating constraint; W (..., d)."""
    # Deviation: W_start is W at the start of the task, not of the step, so that rounding does not
    # add up. Rows are not rescaled as in the T5 code, which undoes the constraint.
    return W_start + project_out(W - W_start, space)


def directions_outside(E, space):
    """Return eigenvalues (d - k,) and -vectors (d, d - k) of E (d, d) outside a subspace.

    Eigenvalues descend; all is in float64. For E = H H' the vectors are the left singular vectors
    of (I - P P') H, but orthogonal to P also for a singular value of zero.
    """
    if isinstance(space, Complement):
        N = space.N.double()
    else:
        N = torch.linalg.qr(space.double(), mode="complete").Q[:, space.shape[1]:]  # (d, d - k)
    values, V = torch.linalg.eigh(N.T @ E.double() @ N)
    return values.flip(0).clamp_min(0), (N @ V).flip(1)


def new_directions(C, space, eps):
    """Return GPM's directions (d, d - k) outside `space`, and how many of them to add.

    With them the basis holds the share `eps` of the energy, which is the trace of the second
    moments C (d, d).
    Deviation: GainLoRA's code squares C's singular values; GPM and GainLoRA's paper, whose energy
    is ||H||_F^2, do not. As in the code, the first task keeps one direction fewer than reach the
    share, at least one; later tasks keep all that reach it.
    """
    C = C.double()
    values, U = directions_outside(C, space)
    gained = values.cumsum(0) / C.trace()  # (d - k,)
    if len(values) == len(C):
        return U, max(1, int((gained < eps).sum()))
    inside = 1 - values.sum() / C.trace()
    return U, int((inside + F.pad(gained, (1, 0))[:-1] < eps).sum())


def extend(C, space, eps):
    """Return `space` plus its `new_directions`, as a basis or a smaller Complement."""
    U, q = new_directions(C, space, eps)
    held = space.N if isinstance(space, Complement) else space
    if 2 * (U.shape[1] - q) < len(U):
        return Complement(U[:, q:].to(held.dtype).contiguous())
    return torch.cat([held, U[:, :q].to(held.dtype)], dim=1)  # at most half of d: a basis


class Subspace(nn.Module):
    """Store a subspace of R^d as a frozen parameter: its basis `0`, or `outside_0`, its Complement.

    It starts empty, with dtype and device of `like`. Saved adapters hold these names.
    """

    def __init__(self, d, like):
        super().__init__()
        self.put(like.new_zeros(d, 0))

    def get(self):
        """Return the basis (d, k), or the Complement."""
        held = self._parameters.get("outside_0")
        return self._parameters["0"] if held is None else Complement(held)

    def put(self, space):
        """Store another basis or Complement."""
        self._parameters.clear()
        if isinstance(space, Complement):
            self.register_parameter("outside_0", frozen(space.N))
        else:
            self.register_parameter("0", frozen(space))

    @torch.no_grad()
    def extend(self, C, eps):
        """Extend the subspace for second moments C (d, d)."""
        self.put(extend(C, self.get(), eps))

    def resize(self, state, prefix):
        """Take the form and width of the subspace in `state`, if they are valid."""
        (like,) = self.parameters()
        for name, form in (("0", torch.Tensor.contiguous), ("outside_0", Complement)):
            saved = state.get(f"{prefix}.{name}", torch.empty(()))
            if saved.dim() == 2 and saved.shape[1] <= len(like):
                self.put(form(like.new_zeros(len(like), saved.shape[1])))
