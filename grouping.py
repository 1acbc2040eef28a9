"""DOG, dynamically orthogonal grouping, Eq. (8) to (14), as pure functions on Gram matrices.

Axis names as in decomposition.py, and
    D         length of one component's gradient, in + out
    ..., L    any leading axes; layers
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from inputs.errors import InputError

KMEANS_PASSES, ROUNDS = 50, 10
EIGENVALUE_CUTOFF = 1e-6  # of the largest: below it an eigenvalue of P'GP counts as zero


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


def solve_grouping(gram, num_experts):
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
    return labels, rounds


def grouping_from_gram(gram, num_experts, current=None):
    """Eq. (10) to (14) from finite gram (L, N, N): grouping (L, N), named, and rounds (L,)."""
    grouping, rounds = solve_grouping(gram, num_experts)
    alive = gram.diagonal(dim1=-2, dim2=-1) > 0  # (L, N)
    if current is not None:
        grouping = relabel(grouping, current, num_experts, counted=alive)
    for layer in (~alive.all(-1)).nonzero().flatten():
        grouping[layer] = place_components_without_gradient(
            grouping[layer], alive[layer], None if current is None else current[layer])
    return (relabel(grouping, None, num_experts) if current is None else grouping), rounds


def group_components(gradients, num_experts, current=None):
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
        grouping, _ = grouping_from_gram(gram, num_experts)
    else:
        grouping = current.reshape(-1, N).cpu().clone()
        if finite.any():
            grouping[finite], _ = grouping_from_gram(gram[finite], num_experts, grouping[finite])
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
