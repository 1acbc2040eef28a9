"""BADIT: basic ability decomposition (BAD) and dynamically orthogonal grouping (DOG).

Axis glossary, used by every shape comment:
    in, out   input and output features of one linear layer (the paper's n and m)
    K, r, N   experts, rank of each, and rank-1 components in all: N = K * r
    D         length of one component's gradient, in + out
    ...       any leading axes: (batch, seq) in the layer, (layers,) in the grouping

All N components of a layer live in one bank, `lora_A` (N, in) and `lora_B` (out, N); `expert_of`
(N,) says which expert owns each. Regrouping rewrites that index and moves no weight.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from scipy.optimize import linear_sum_assignment
from torch import nn

from errors import InputError
from flags import non_negative, positive_int
from method import Method, check_tensors, frozen
from utils import stable_seed

KRYLOV_BLOCKS, KRYLOV_EXTRA = 8, 16  # of --svd fast: 99.99 % of the leading energy
KMEANS_PASSES, ROUNDS = 50, 10
EIGENVALUE_CUTOFF = 1e-6  # of the largest: below it an eigenvalue of P'GP counts as zero
PROBE_TOKENS = 256  # at least, of those that a regrouping's drift and health are measured on
NON_FINITE = "non-finite gradient"
ALPHA_RATIO = (0.1, 10.0)  # static routing: |alpha_p / alpha_q| outside it is not compensated


# --- BAD: basic ability decomposition -----------------------------------------------------------


class Decomposition(NamedTuple):
    """W0 = residual + scaling * lora_B @ lora_A, whatever the accuracy of the SVD."""

    lora_A: torch.Tensor  # (N, in)
    lora_B: torch.Tensor  # (out, N)
    residual: torch.Tensor  # (out, in), in the type of W0
    singular_values: torch.Tensor  # (N,), descending


def orient_singular_pairs(U, Vh):
    """Make the largest entry (by magnitude, first on ties) of every row of `Vh` positive.

    U (out, N), Vh (N, in). (u, v) and (-u, -v) are one component, but Eq. (10) is not invariant to
    the flip: without a convention the grouping would hang on the SVD routine.
    """
    largest = Vh.abs().argmax(dim=1, keepdim=True)  # (N, 1)
    sign = torch.where(Vh.gather(1, largest) < 0, -1.0, 1.0).to(Vh.dtype)  # (N, 1)
    return U * sign.T, Vh * sign


def top_singular_triplets(W0, N, svd):
    """The N leading singular triplets U (out, N), S (N,), Vh (N, in) of W0 (out, in).

    "exact" is LAPACK's SVD; "fast" looks for them in a `krylov_basis` of the rows.
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
    """Orthonormal V (in, n) that nearly holds the leading right singular vectors of W (out, in).

    Randomised block Krylov (Musco and Musco 2015): the span of (W'W)^i X for i = 1, 2, ... and one
    random X (in, width), which keeps what power iterations throw away. Its random numbers are its
    own.
    """
    generator = torch.Generator(W.device).manual_seed(0)
    X = torch.randn(W.shape[1], width, generator=generator, dtype=W.dtype, device=W.device)
    blocks = []
    for _ in range(min(KRYLOV_BLOCKS, 1 + W.shape[1] // width)):
        X = torch.linalg.qr(W.T @ (W @ X)).Q  # (in, width)
        blocks.append(X)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


def residual_weight(W0, A, B, s):
    """Eq. (6): residual = W0 - s B A, computed in the bank's precision, stored in that of W0."""
    return (W0.to(A.dtype) - s * (B @ A)).to(W0.dtype)  # (out, in)


@torch.no_grad()
def decompose(weight, num_experts, rank, scaling, svd="exact"):
    """Eq. (5), (6): split a weight (out, in) into N = num_experts * rank components and a residual.

    b_i = sqrt(S_i / s) u_i and a_i = sqrt(S_i / s) v_i', by descending singular value: expert k
    starts with components r*k to r*k + r - 1. Returns a Decomposition in float32, or in float64 for
    a float64 weight. Raises ValueError for N outside 1 .. min(out, in).
    """
    W0, N, s = weight, num_experts * rank, scaling
    check_bank_size(num_experts, rank, W0.shape)
    W = W0.to(torch.promote_types(W0.dtype, torch.float32))
    U, S, Vh = top_singular_triplets(W, N, svd)
    U, Vh = orient_singular_pairs(U, Vh)
    root = (S / s).sqrt()  # (N,)
    A, B = root[:, None] * Vh, U * root  # (N, in), (out, N)
    return Decomposition(A, B, residual_weight(W0, A, B, s), S)


def check_bank_size(num_experts, rank, shape):
    """Raise InputError unless 1 <= num_experts * rank <= the smaller side of `shape`."""
    if not 1 <= num_experts * rank <= min(shape):
        raise InputError(f"num_experts * rank = {num_experts} * {rank} = {num_experts * rank} must "
                         f"be from 1 to {min(shape)}, the smaller side of a {tuple(shape)} weight")


# --- routing ------------------------------------------------------------------------------------


def routing_weights(logits):
    """Eq. (7) with alpha = K softmax(z): logits (..., K) -> (..., K), all 1 for equal logits."""
    return logits.shape[-1] * logits.softmax(dim=-1)


def select_experts(logits, top_k):
    """The `top_k` largest of logits (..., K) as a bool mask; ties go to the lowest index."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices  # (..., K)
    selected = torch.zeros_like(logits, dtype=torch.bool)
    return selected.scatter_(-1, order[..., :top_k], True)


def add_components(y, u, A, B, w):
    """y + B (w * (A u)), and A u: the whole bank in two products, each component weighted.

    y (tokens, out), u (tokens, in), A (N, in), B (out, N), w (tokens, N). The narrow products with
    A and w are in the bank's precision, the wide one in that of y: under bf16 the leading singular
    values would otherwise double the rounding error.
    """
    with torch.autocast(u.device.type, enabled=False):
        h = u.to(A.dtype) @ A.T  # (tokens, N)
        return torch.addmm(y, (h * w).to(y.dtype), B.to(y.dtype).T), h  # (tokens, out)


class RoutedBank(torch.autograd.Function):
    """`add_components` with its backward; `active` (tokens, N) bool, or None for all.

    Where `active` is False the component still acts on u, but A and B get no gradient from it.
    """

    @staticmethod
    def forward(ctx, y, u, A, B, w, active):
        y, h = add_components(y, u, A, B, w)
        ctx.save_for_backward(u, A, B, w, active, h)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        u, A, B, w, active, h = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            grad_c = (grad_y @ B.to(grad_y.dtype)).to(A.dtype)  # (tokens, N), c = w * h
            grad_u = grad_w = None
            if ctx.needs_input_grad[1]:
                grad_u = (grad_c * w).to(u.dtype) @ A.to(u.dtype)  # (tokens, in)
            if ctx.needs_input_grad[4]:
                grad_w = grad_c * h
            trained_w = w if active is None else w * active
            grad_A = (grad_c * trained_w).T @ u.to(A.dtype)  # (N, in)
            grad_B = (grad_y.T @ (h * trained_w).to(grad_y.dtype)).to(B.dtype)  # (out, N)
        return grad_y, grad_u, grad_A, grad_B, grad_w, None


class Routing(NamedTuple):
    """How one layer routes its tokens."""

    alpha: torch.Tensor  # (..., K) routing weights
    weight: torch.Tensor  # (..., K) the factor with which each expert acts
    active: torch.Tensor | None  # (..., K) bool, experts that learn from the token; None for all


class BankLinear(nn.Module):
    """A frozen linear layer plus a routed bank of N rank-1 components owned by K experts.

    Subclasses define `route(x) -> Routing`. Raises InputError for a bank that does not fit the
    layer or top_k outside 1 .. num_experts.
    """

    base_tensors = ("residual", "bias")

    def __init__(self, base, num_experts, rank, alpha, dropout, top_k):
        super().__init__()
        check_bank_size(num_experts, rank, base.weight.shape)
        if not 1 <= top_k <= num_experts:
            raise InputError(f"top_k {top_k} must be from 1 to num_experts = {num_experts}")
        self.num_experts, self.rank, self.top_k = num_experts, rank, top_k
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.residual = frozen(base.weight)  # (out, in); frozen, but no buffer: DDP sends those
        self.bias = None if base.bias is None else frozen(base.bias)
        N, (out_features, in_features) = num_experts * rank, base.weight.shape
        kind = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32),
                    device=base.weight.device)
        self.lora_A = nn.Parameter(torch.zeros(N, in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(out_features, N, **kind))
        first = torch.arange(N, device=base.weight.device) // rank
        self.register_buffer("expert_of", first)  # (N,) int64: the grouping

    def forward(self, x):
        """(..., in) -> (..., out)."""
        y = F.linear(x, self.residual, self.bias)  # (..., out)
        return self.add_bank(y.reshape(-1, y.shape[-1]), x).view_as(y)

    def add_bank(self, y, x):
        """y (tokens, out) plus what the experts make of x (..., in)."""
        weight, active = self.per_component(self.route(x))  # (tokens, N)
        u = self.dropout(x).reshape(-1, x.shape[-1])  # (tokens, in): one mask for all experts
        if not torch.is_grad_enabled():
            return add_components(y, u, self.lora_A, self.lora_B, weight)[0]
        return RoutedBank.apply(y, u, self.lora_A, self.lora_B, weight, active)

    def per_component(self, routing):
        """Expand a Routing from experts to components: s * weight and active, (tokens, N)."""
        K = self.num_experts
        weight = self.scaling * routing.weight.reshape(-1, K).index_select(1, self.expert_of)
        if routing.active is None or not torch.is_grad_enabled():
            return weight, None
        return weight, routing.active.reshape(-1, K).index_select(1, self.expert_of)

    def active_parameters(self, drops):
        """Weights that act on one token; `drops`: experts outside the top_k do not act at all."""
        bank = self.lora_A.numel() + self.lora_B.numel()
        routed = sum(weight.numel() for weight in self.parameters() if weight.requires_grad) - bank
        return routed + (bank * self.top_k // self.num_experts if drops else bank)

    def restore(self, tensors):
        """Take over saved adapter tensors, named as in this layer's state_dict."""
        owned = tensors["expert_of"].clamp(-1, self.num_experts) + 1  # what is out of range counts
        if owned.bincount(minlength=self.num_experts + 2).tolist() != [
                0, *[self.rank] * self.num_experts, 0]:
            raise InputError(f"expert_of of the adapter does not give each of {self.num_experts} "
                             f"experts {self.rank} components")
        for name, tensor in self.state_dict().items():
            if name not in self.base_tensors:
                tensor.copy_(tensors[name])

    def regroup(self, gradients):
        """DOG on this layer alone, from gradients (N, in + out), Eq. (8).

        Returns a dict: angles in degrees (inter_, intra_) and objective_ before and after,
        components moved, rounds, and `skipped`, the reason if the layer was left as it was.
        """
        K, old = self.num_experts, self.expert_of[None].to("cpu", copy=True)  # (1, N)
        gram = component_gram(gradients[None])  # (1, N, N)
        if torch.isfinite(gram).all():
            new, rounds = grouping_from_gram(gram, K, old)
            skipped = self.take_grouping(new[0])
        else:
            gram, rounds, skipped = torch.zeros_like(gram), torch.zeros(1), NON_FINITE
        report = grouping_report(gram, old, old if skipped else new, rounds, K)
        return {key: values[0] for key, values in report.items()} | dict(skipped=skipped)

    @torch.no_grad()
    def take_grouping(self, grouping):
        """Adopt a grouping (N,). Returns None, or the reason why the layer was left as it was."""
        self.expert_of.copy_(grouping)
        return None


class InitialBank:
    """Mixin of a layer with a decomposed base: residual = W0 - s B0 A0.

    The frozen initial bank `lora_A0`, `lora_B0` is part of the adapter: loading rebuilds the
    residual from it and decomposes nothing again.
    """

    def add_initial_bank(self):
        """Reserve the initial bank, all zero until `start_from` or `restore`."""
        self.lora_A0 = frozen(torch.zeros_like(self.lora_A))
        self.lora_B0 = frozen(torch.zeros_like(self.lora_B))

    @torch.no_grad()
    def start_from(self, lora_A0, lora_B0, residual):
        """Set the initial bank, the bank and the residual, which may be the base's own tensor."""
        for parameter, value in ((self.lora_A, lora_A0), (self.lora_A0, lora_A0),
                                 (self.lora_B, lora_B0), (self.lora_B0, lora_B0)):
            parameter.copy_(value)
        self.residual.data = residual

    @torch.no_grad()
    def restore(self, tensors):
        """Take over saved tensors; the residual is rebuilt from the saved initial bank."""
        same = all(torch.equal(getattr(self, name), tensors[name].to(self.lora_A))
                   for name in ("lora_A0", "lora_B0"))
        if not same:
            assert not self.lora_A0.any(), "the residual of another decomposition is gone"
            A0, B0 = (tensors[name].to(self.lora_A) for name in ("lora_A0", "lora_B0"))
            self.start_from(A0, B0, residual_weight(self.residual, A0, B0, self.scaling))
        super().restore(tensors)


class BaditLinear(InitialBank, BankLinear):
    """A linear layer as K basic abilities plus a frozen residual (Eq. 7).

    Token routing, alpha = K softmax(z) and S = the top_k experts by z, u = dropout(x):

        y = residual x + s sum_{k in S} alpha_k B_k A_k u + s sum_{k not in S} sg(B_k A_k) u

    `router` (K, in) starts at zero, so alpha = 1 and the layer starts as `base`. In training the
    selection sees Gaussian noise of std `router_noise` (default 1 / K) on z. `inactive="drop"`
    leaves the last sum out. Static routing: all experts act, weighted by the Parameter `alpha`
    (K,). `svd=None` decomposes nothing and awaits `restore`. Raises InputError for bad values.
    """

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4,
                 routing="token", inactive="keep", router_noise=None, svd="exact"):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        if routing not in ("token", "static") or inactive not in ("keep", "drop"):
            raise InputError(f"routing {routing!r} must be token or static, "
                             f"inactive {inactive!r} must be keep or drop")
        self.inactive = inactive
        self.router_noise = 1 / num_experts if router_noise is None else router_noise
        if routing == "token":
            self.router = nn.Parameter(self.lora_A.new_zeros(num_experts, base.in_features))
        else:
            self.alpha = nn.Parameter(self.lora_A.new_ones(num_experts))
        self.static = routing == "static"
        self.add_initial_bank()
        if svd is not None:
            bank = decompose(base.weight.detach(), num_experts, rank, self.scaling, svd)
            self.start_from(bank.lora_A, bank.lora_B, bank.residual)

    def route(self, x):
        """x (..., in) -> Routing over (..., K)."""
        if self.static:
            alpha = self.alpha.expand(*x.shape[:-1], -1)  # (..., K)
            return Routing(alpha, alpha, None)
        with torch.autocast(x.device.type, enabled=False):  # the router is float32 always
            logits = F.linear(x.to(self.router.dtype), self.router)  # (..., K)
            alpha = routing_weights(logits)
        if self.top_k == self.num_experts:
            return Routing(alpha, alpha, None)
        if self.training and self.router_noise > 0:
            # Equal logits at init would always pick the same experts; from the global generator,
            # so that gradient checkpointing draws the same noise again.
            logits = logits + self.router_noise * torch.randn_like(logits)
        active = select_experts(logits, self.top_k)
        kept = 1.0 if self.inactive == "keep" else 0.0
        return Routing(alpha, torch.where(active, alpha, kept), active)

    @torch.no_grad()
    def take_grouping(self, grouping):
        """Adopt a grouping (N,); under static routing rescale what moves (Prop. C.3).

        With rho = alpha_p / alpha_q for a move from p to q: b *= sign(rho) sqrt|rho| and
        a *= sqrt|rho| leave the output as it was. Returns the reason where that is not possible.
        """
        if self.static:
            old, new = self.expert_of, grouping.to(self.expert_of.device)
            rho = torch.where(new == old, 1, self.alpha[old] / self.alpha[new])  # (N,)
            low, high = ALPHA_RATIO
            if not ((rho.abs() >= low) & (rho.abs() <= high)).all():  # also for NaN: 0 / 0
                return f"a ratio of routing weights is outside {low} to {high}"
            self.lora_A *= rho.abs().sqrt()[:, None]
            self.lora_B *= rho.sign() * rho.abs().sqrt()
        return super().take_grouping(grouping)


# --- DOG: dynamically orthogonal grouping -------------------------------------------------------


def component_gradients(grad_A, grad_B):
    """Eq. (8): g_i = [dL/da_i ; dL/db_i]; grad_A (N, in), grad_B (out, N) -> (N, D)."""
    return torch.cat([grad_A, grad_B.T], dim=1)


def unit_gradients(g):
    """Eq. (9): g (..., N, D) -> unit rows; a zero gradient stays zero.

    Divided by the largest entry first, since squares of very small gradients underflow.
    """
    largest = g.abs().amax(dim=-1, keepdim=True)  # (..., N, 1)
    g = g / torch.where(largest > 0, largest, 1)
    norm = g.norm(dim=-1, keepdim=True)  # (..., N, 1)
    return g / torch.where(norm > 0, norm, 1)


def component_gram(gradients):
    """G = Ghat Ghat' (..., N, N) of gradients (..., N, D), on the CPU in float64."""
    unit = unit_gradients(gradients)
    return (unit @ unit.mT).to("cpu", torch.float64)


def membership(grouping, K, dtype=torch.float64):
    """The one-hot grouping P: (..., N) -> (..., N, K)."""
    return F.one_hot(grouping, K).to(dtype)


def centroid_gram(gram, grouping, num_experts):
    """Eq. (12) in Gram space: P' G P, the inner products of the centroids, (..., K, K)."""
    P = membership(grouping, num_experts, gram.dtype)  # (..., N, K)
    return P.mT @ gram @ P


def grouping_objective(gram, grouping, num_experts):
    """Eq. (10): sum over experts of the squared centroid norm, (...)."""
    return centroid_gram(gram, grouping, num_experts).diagonal(dim1=-2, dim2=-1).sum(-1)


def spherical_kmeans(gram, num_experts):
    """Eq. (11): cluster unit gradients by cosine; gram (..., N, N) -> labels (..., N), any sizes.

    Deterministic: the first centre is component 0 (of those with a gradient), each next one the
    component whose largest cosine to the chosen is smallest; the lowest index wins ties.
    """
    N, K = gram.shape[-1], num_experts
    G = gram.reshape(-1, N, N)  # (L, N, N)
    layer = torch.arange(len(G))
    alive = G.diagonal(dim1=-2, dim2=-1) > 0  # (L, N)
    centres = [alive.long().argmax(-1)]
    closest = G[layer, centres[0]].masked_fill(~alive, torch.inf)  # (L, N)
    while len(centres) < K:
        centres.append(closest.argmin(-1))
        closest = torch.maximum(closest, G[layer, centres[-1]])
    cosine = G.gather(2, torch.stack(centres, -1)[:, None].expand(-1, N, -1))  # (L, N, K)
    labels = cosine.argmax(-1)  # (L, N)
    for _ in range(KMEANS_PASSES):
        P = membership(labels, K, G.dtype)  # (L, N, K)
        inner = G @ P  # (L, N, K)
        norm = (P * inner).sum(1, keepdim=True).clamp_min(0).sqrt()  # (L, 1, K)
        cosine = torch.where(norm > 1e-6, inner / norm, -torch.inf)  # an empty cluster stays empty
        previous, labels = labels, cosine.argmax(-1)
        if torch.equal(labels, previous):
            break
    return labels.view(gram.shape[:-1])


def orthogonalized_similarity(gram, grouping, num_experts):
    """Eq. (13) in Gram space: <ghat_i, q_k> = [G P (P'GP)^(-1/2)]_ik, (..., N, K).

    Q = U_c V_c' is the polar factor of the centroid matrix C; (P'GP)^(-1/2) is a pseudo-inverse
    root, since empty or dependent clusters make it singular.
    """
    P = membership(grouping, num_experts, gram.dtype)  # (..., N, K)
    inner = gram @ P  # (..., N, K)
    eigenvalues, V = torch.linalg.eigh(P.mT @ inner)  # (..., K), (..., K, K)
    kept = eigenvalues > EIGENVALUE_CUTOFF * eigenvalues[..., -1:]
    inverse_root = torch.where(kept, eigenvalues, 1).rsqrt() * kept  # (..., K)
    return inner @ (V * inverse_root[..., None, :]) @ V.mT


def balanced_assignment(similarity):
    """Eq. (14): the grouping with N / K components each that maximises the summed similarity.

    similarity (..., N, K) -> (..., N). Exact: an assignment with every column repeated r times.
    """
    N, K = similarity.shape[-2:]
    r = N // K
    places = similarity.reshape(-1, N, K).repeat_interleave(r, dim=-1).numpy()  # (L, N, N)
    columns = np.stack([linear_sum_assignment(layer, maximize=True)[1] for layer in places])
    return torch.from_numpy(columns // r).view(similarity.shape[:-1])


def refine_grouping(gram, grouping, num_experts):
    """Beyond the paper: swap the best pair of components while that raises Eq. (10). (..., N)."""
    N = gram.shape[-1]
    layers = zip(gram.reshape(-1, N, N).numpy(), grouping.reshape(-1, N).numpy(), strict=True)
    refined = np.stack([_swap_pairs(G, labels, num_experts) for G, labels in layers])
    return torch.from_numpy(refined).view(grouping.shape)


def _swap_pairs(G, labels, K):
    """One layer of `refine_grouping`: G (N, N), labels (N,)."""
    labels = labels.copy()
    distance = np.diag(G)[:, None] + np.diag(G) - 2 * G  # (N, N) squared
    while True:
        S = G @ np.eye(K)[labels]  # (N, K)
        M = S[:, labels]  # (N, N): M[j, i] = S_jp for the group p of i
        own = np.diag(M)
        gain = 2 * (M + M.T - own[:, None] - own) + 2 * distance
        gain[labels[:, None] == labels] = 0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-9:  # rounding, not a gain
            return labels
        labels[i], labels[j] = labels[j], labels[i]


def relabel(grouping, current, num_experts, counted=None):
    """Name the groups so that they overlap `current` most, (..., N); the partition stays.

    Labels of a clustering are arbitrary, the router's rows are not. Without `current` the labels
    are in order of their first member. `counted` (..., N) bool restricts the overlap.
    """
    P = membership(grouping, num_experts)  # (..., N, K)
    if current is None:
        names = P.argmax(-2).argsort(-1).argsort(-1)  # (..., K)
    else:
        weight = 1 if counted is None else counted[..., None]
        overlap = P.mT @ (weight * membership(current, num_experts))  # (..., K new, K old)
        names = balanced_assignment(overlap)  # (..., K): every new group one old name
    return names.gather(-1, grouping)


def place_components_without_gradient(grouping, alive, current):
    """Give the components that are not `alive` the places that are left, most where they were.

    grouping, alive, current (N,): one layer. Without `current` they fill the places in order.
    """
    idle = (~alive).nonzero().squeeze(1)
    places = grouping[idle].sort().values  # (idle,): one expert each
    if current is not None:
        stays = (current[idle][:, None] == places).numpy()  # (idle, places)
        places = places[linear_sum_assignment(stays, maximize=True)[1]]
    return grouping.index_copy(0, idle, places)


def solve_grouping(gram, num_experts, refine=False):
    """Eq. (11) to (14): gram (..., N, N) -> balanced grouping (..., N) and rounds used (...)."""
    labels = spherical_kmeans(gram, num_experts)
    rounds = torch.zeros(labels.shape[:-1], dtype=torch.int64)
    settled = torch.zeros_like(rounds, dtype=torch.bool)
    for _ in range(ROUNDS):
        previous = labels
        labels = balanced_assignment(orthogonalized_similarity(gram, labels, num_experts))
        rounds += ~settled
        settled |= (labels == previous).all(-1)  # for good: its next round would be the same
        if settled.all():
            break
    return refine_grouping(gram, labels, num_experts) if refine else labels, rounds


def grouping_from_gram(gram, num_experts, current=None, refine=False):
    """Eq. (10) to (14) from finite gram (L, N, N): grouping (L, N), named, and rounds (L,)."""
    grouping, rounds = solve_grouping(gram, num_experts, refine)
    alive = gram.diagonal(dim1=-2, dim2=-1) > 0  # (L, N)
    if current is not None:
        grouping = relabel(grouping, current, num_experts, counted=alive)
    for layer in (~alive.all(-1)).nonzero().flatten():
        grouping[layer] = place_components_without_gradient(
            grouping[layer], alive[layer], None if current is None else current[layer])
    return (relabel(grouping, None, num_experts) if current is None else grouping), rounds


def group_components(gradients, num_experts, current=None, refine=False):
    """Eq. (9) to (14): gradients (N, D) or (L, N, D) -> balanced int64 grouping (N,) or (L, N).

    Deterministic, no random numbers. With `current` (a grouping of the same shape) the groups are
    named to overlap it, and a layer with a non-finite gradient keeps it. Raises ValueError for
    such a layer without `current`, and where N is no multiple of num_experts.
    """
    *_, N, D = gradients.shape
    if num_experts < 1 or N % num_experts:
        raise InputError(f"{N} components cannot be shared out equally to {num_experts} experts")
    gram = component_gram(gradients.reshape(-1, N, D))  # (L, N, N)
    finite = torch.isfinite(gram).all(-1).all(-1)  # (L,)
    if current is None:
        if not finite.all():
            raise InputError(f"non-finite gradient in layers {(~finite).nonzero().T.tolist()}")
        grouping, _ = grouping_from_gram(gram, num_experts, None, refine)
    else:
        grouping = current.reshape(-1, N).cpu().clone()
        if finite.any():
            grouping[finite], _ = grouping_from_gram(gram[finite], num_experts, grouping[finite],
                                                     refine)
    return grouping.view(gradients.shape[:-1])


def gradient_angles(gram, grouping, num_experts):
    """Mean angles in degrees, each (...): between experts' centroids, and inside experts.

    Pairs with a zero vector have no angle; the mean over no pair is NaN.
    """
    centroids = centroid_gram(gram, grouping, num_experts)  # (..., K, K)
    inter = _mean_angle(centroids, torch.ones_like(centroids, dtype=torch.bool).triu(1))
    same = grouping[..., :, None] == grouping[..., None, :]  # (..., N, N)
    return inter, _mean_angle(gram, same.triu(1))


def _mean_angle(inner, pair):
    """Mean angle over the pairs in the bool mask `pair`, from inner products (..., n, n)."""
    norm = inner.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (..., n)
    product = norm[..., :, None] * norm[..., None, :]
    pair = pair & (product > 0)
    cosine = (inner / torch.where(product > 0, product, 1)).clamp(-1, 1)
    total = torch.where(pair, cosine.acos().rad2deg(), 0).sum((-2, -1))
    return total / pair.sum((-2, -1))


def grouping_report(gram, old, new, rounds, K):
    """What a regrouping changed, one list entry per layer: angles in degrees, Eq. (10), moves."""
    columns = dict(rounds=rounds, moved=(old != new).sum(-1))
    for moment, grouping in (("before", old), ("after", new)):
        inter, intra = gradient_angles(gram, grouping, K)
        columns |= {f"inter_{moment}": inter, f"intra_{moment}": intra,
                    f"objective_{moment}": grouping_objective(gram, grouping, K)}
    return {key: [None if value != value else value for value in column.tolist()]
            for key, column in columns.items()}


def router_health(routing):
    """Share of tokens that select each expert, and how even alpha is, of a Routing (tokens, K).

    All None where there is no token: a micro-batch of nothing but fillers.
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
    """The model's inputs for the first rows of a left-padded batch, with PROBE_TOKENS or more."""
    lengths = batch["attention_mask"].sum(dim=1)  # (batch,)
    rows = lengths.cumsum(0) - lengths < PROBE_TOKENS
    longest = max(1, int(lengths[rows].max()))  # fillers have no tokens
    return {key: batch[key][rows, -longest:]
            for key in ("input_ids", "attention_mask", "position_ids")}


class Dog:
    """When and how the experts of all layers are regrouped, and what is logged of it.

    `regroup_every` is in optimizer steps (None: once per epoch of the stage); `grouping` is "dog",
    or one of the controls "random" and "fixed", which see the same schedule and the same log.
    """

    def __init__(self, layers, regroup_every, grouping, refine, seed):
        self.layers, self.regroup_every = layers, regroup_every
        self.grouping, self.refine, self.seed = grouping, refine, seed

    def start(self, stage):
        """Begin a stage: step counter and mean gradient start afresh."""
        self.stage, self.step = stage, 0
        self.interval = self.regroup_every or stage.steps_per_epoch
        if self.grouping != "fixed" and self.interval >= stage.steps:
            PartialState().print(f"stage {stage.name} never regroups: it has {stage.steps} steps, "
                                 f"and every {self.interval} would be the first (--regroup_every)")
        self._reset()

    def _reset(self):
        self.count = 0
        self.sums = {name: (torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B))
                     for name, layer in self.layers.items()}

    def state(self):
        """All that `start` does not set, as tensors by name."""
        banks = {f"{name}.{side}": tensor for name, pair in self.sums.items()
                 for side, tensor in zip("AB", pair, strict=True)}
        return {"step": torch.tensor(self.step), "count": torch.tensor(self.count)} | banks

    def restore(self, state):
        """Put back what `state` gave, after `start`. Raises InputError for anything else."""
        check_tensors(state, self.state(), "the checkpoint")
        self.step, self.count = int(state["step"]), int(state["count"])
        for name, pair in self.sums.items():
            for side, tensor in zip("AB", pair, strict=True):
                tensor.copy_(state[f"{name}.{side}"])

    @torch.no_grad()
    def accumulate(self):
        """Eq. (8): add this step's gradients of the banks to their sum."""
        self.count += 1
        for name, layer in self.layers.items():
            sum_A, sum_B = self.sums[name]
            sum_A += layer.lora_A.grad
            sum_B += layer.lora_B.grad

    def after_step(self, model, batch):
        """Count a step; at the end of an interval regroup. Returns a record per layer, or none."""
        self.step += 1
        last = self.step == self.stage.steps
        if self.step % self.interval and not last:
            return []
        # Nothing would train on a grouping that comes after the last step.
        records = self.regroup(model, batch, "fixed" if last else self.grouping)
        self._reset()
        return records

    @torch.no_grad()
    def regroup(self, model, batch, grouping):
        """Regroup all layers by their mean gradients; one record per layer, in order."""
        layers = list(self.layers.values())
        K = layers[0].num_experts
        grams, norms = zip(*map(self._gram_and_norms, self.layers), strict=True)
        gram = torch.stack(grams)  # (L, N, N)
        old = torch.stack([layer.expert_of.cpu() for layer in layers])  # (L, N)
        finite = torch.isfinite(gram).all(-1).all(-1)  # (L,)
        gram[~finite] = 0  # no direction: such a layer keeps its grouping
        new, rounds = self._new_grouping(grouping, gram, old, K)
        new[~finite] = old[~finite]
        measured = self._take_and_measure(model, batch, new)
        for index, record in enumerate(measured):
            if not finite[index]:
                record["skipped"] = NON_FINITE
            if record["skipped"]:
                new[index] = old[index]
            norm = (norms[index].square() @ membership(old[index], K)).sqrt()  # (K,)
            record["gradient_norm"] = norm.tolist() if finite[index] else None
        report = grouping_report(gram, old, new, rounds, K)
        return [dict(layer=name, steps=self.count, grouping=grouping, **measured[index],
                     **{key: values[index] for key, values in report.items()})
                for index, name in enumerate(self.layers)]

    def _gram_and_norms(self, name):
        """Gram matrix (N, N) and norms (N,) of one layer's mean gradients, on the CPU."""
        gradients = component_gradients(*self.sums[name]) / self.count  # (N, D)
        return component_gram(gradients), gradients.norm(dim=1).to("cpu", torch.float64)

    def _new_grouping(self, grouping, gram, old, K):
        """The groupings (L, N) to adopt, and the rounds (L,) that they took."""
        if grouping == "dog":
            return grouping_from_gram(gram, K, old, self.refine)
        no_rounds = torch.zeros(len(old), dtype=torch.int64)
        if grouping == "random":
            generator = torch.Generator().manual_seed(
                stable_seed("grouping", self.seed, self.stage.name, self.step))
            new = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in old])
            return relabel(new, old, K), no_rounds
        return old.clone(), no_rounds

    def _take_and_measure(self, model, batch, new):
        """Adopt the groupings (L, N) during one evaluation pass over rows of the last micro-batch.

        Every layer sees the input that the old model gives it, so that `regroup_drift` is the
        relative change of that layer's output alone. Padding is left out. One dict per layer.
        """
        batch = probe_rows(batch)
        records, tokens = [], batch["attention_mask"].bool()

        def measure(name, grouping):
            def hook(layer, inputs, output):
                if inputs[0].shape[:-1] != tokens.shape:
                    raise InputError(f"--target_modules: {name} gets an input of shape "
                                     f"{list(inputs[0].shape)}, not {list(tokens.shape)} tokens: "
                                     "it can be neither regrouped nor measured")
                x, y = inputs[0][tokens], output[tokens].float()  # (tokens, in), (tokens, out)
                before = layer.add_bank(torch.zeros_like(y), x)  # (tokens, out)
                health = router_health(layer.route(x))
                skipped = layer.take_grouping(grouping)
                change = layer.add_bank(torch.zeros_like(y), x) - before  # (tokens, out)
                drift = float(change.norm() / y.norm()) if len(y) else None
                records.append(dict(skipped=skipped, regroup_drift=drift, **health))
            return hook

        handles = [layer.register_forward_hook(measure(name, grouping))
                   for (name, layer), grouping in zip(self.layers.items(), new, strict=True)]
        training = model.training
        model.eval()
        model(**batch, logits_to_keep=1, use_cache=False)
        model.train(training)
        for handle in handles:
            handle.remove()
        return records


# --- the method ---------------------------------------------------------------------------------


class DogMethod(Method):
    """The hooks of a method whose `dog` regroups its layers, or only measures them."""

    def start_task(self, task, loader):
        self.dog.start(task)

    def training_state(self):
        return self.dog.state()

    def resume_task(self, task, state):
        self.dog.start(task)
        self.dog.restore(state)

    def before_forward(self, batch):
        if self.model.training:
            self.batch = batch

    def after_backward(self):
        self.dog.accumulate()

    def after_step(self):
        return self.dog.after_step(self.model, self.batch)


class Badit(DogMethod):
    """BADIT with its ablations: `no_bad` puts DOG on LoRAMoE's layer, `no_dog` never regroups."""

    name = "badit"
    reads = ("target_modules", "num_experts", "rank", "alpha", "dropout", "top_k", "routing",
             "router_noise", "inactive", "svd", "regroup_every", "grouping", "refine", "no_bad",
             "no_dog", "seed")

    @staticmethod
    def add_flags(group):
        group.add_argument("--routing", choices=("token", "static"), default="token",
                           help="a router for every token, or one learnable scalar per layer and "
                                "expert with all experts active (Eq. 7)")
        group.add_argument("--router_noise", type=non_negative, metavar="STD",
                           help="std of the Gaussian noise on the logits that select experts in "
                                "training (default: 1 / num_experts)")
        group.add_argument("--inactive", choices=("keep", "drop"), default="keep",
                           help="experts that a token does not select keep acting on it without "
                                "learning from it, or drop out (which breaks the base model)")
        group.add_argument("--regroup_every", type=positive_int, metavar="STEPS",
                           help="optimizer steps between regroupings (default: one epoch)")
        group.add_argument("--grouping", choices=("dog", "random", "fixed"), default="dog",
                           help="regroup by gradients, or a control on the same schedule")
        group.add_argument("--refine", action="store_true",
                           help="beyond the paper: improve each grouping by pairwise swaps")
        group.add_argument("--no_bad", action="store_true",
                           help="ablation: LoRAMoE's layer and initialisation, with DOG")
        group.add_argument("--no_dog", action="store_true",
                           help="ablation: never regroup; angles are still logged")

    @classmethod
    def check(cls, settings, given):
        unread = {
            f"--top_k {settings['top_k']}": (settings["top_k"] == settings["num_experts"],
                                             {"router_noise", "inactive"}),
            "--routing static": (settings["routing"] == "static",
                                 {"top_k", "router_noise", "inactive"}),
            "--no_bad": (settings["no_bad"], {"routing", "router_noise", "inactive", "svd"}),
            "--no_dog": (settings["no_dog"], {"grouping", "refine"}),
            f"--grouping {settings['grouping']}": (settings["grouping"] != "dog", {"refine"}),
        }
        for cause, (applies, flags) in unread.items():
            if applies and given & flags:
                raise InputError(f"--{sorted(given & flags)[0]} is not read with {cause}")
        static = settings["routing"] == "static" and not settings["no_bad"]
        if settings["top_k"] > settings["num_experts"] and not static:
            raise InputError(f"--top_k {settings['top_k']} is above --num_experts "
                             f"{settings['num_experts']}")

    def check_layer(self, linear):
        check_bank_size(self.settings["num_experts"], self.settings["rank"], linear.weight.shape)

    def build_layer(self, linear, fresh):
        read = self.settings
        shared = {key: read[key] for key in ("num_experts", "rank", "alpha", "dropout", "top_k")}
        if read["no_bad"]:
            from baselines.loramoe import LoraMoeLinear  # not above: baselines imports this module
            return LoraMoeLinear(linear, **shared)
        if read["routing"] == "static":
            shared["top_k"] = read["num_experts"]  # all experts act
        return BaditLinear(linear, **shared, routing=read["routing"], inactive=read["inactive"],
                           router_noise=read["router_noise"], svd=read["svd"] if fresh else None)

    def active_parameters(self):
        drops = self.settings["no_bad"] or self.settings["inactive"] == "drop"
        return sum(layer.active_parameters(drops) for layer in self.layers.values())

    def wrap(self, model, fresh=True):
        super().wrap(model, fresh)
        grouping = "fixed" if self.settings["no_dog"] else self.settings["grouping"]
        self.dog = Dog(self.layers, self.settings["regroup_every"], grouping,
                       self.settings["refine"], self.settings["seed"])
