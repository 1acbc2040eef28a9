"""Group components by gradient: DOG, Eq. (8) to (14), as pure functions on Gram matrices.

Axis names as in decomposition.py, and
    D         length of one component's gradient, in + out
    L, ...    number of layers, any leading axes
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from inputs.errors import InputError

KMEANS_PASSES, ROUNDS = 50, 10
EIGENVALUE_CUTOFF = 1e-6  # of the largest: below it an eigenvalue of P'GP counts as zero


def component_gradients(grad_A, grad_B):
    """Return g_i = [dL/da_i ; dL/db_i], Eq. (8): grad_A (N, in), grad_B (out, N) -> (N, D)."""
    return torch.cat([grad_A, grad_B.T], dim=1)


def unit_gradients(g):
    """Normalise each row of g (..., N, D), Eq. (9); a zero row stays zero.

    Divides by the largest entry first, since squares of very small gradients underflow.
    """
    largest = g.abs().amax(dim=-1, keepdim=True)  # (..., N, 1)
    g = g / torch.where(largest > 0, largest, 1)
    norm = g.norm(dim=-1, keepdim=True)  # (..., N, 1)
    return g / torch.where(norm > 0, norm, 1)


def component_gram(gradients):
    """Return G = Ghat Ghat' (..., N, N) of gradients (..., N, D), on the CPU in float64."""
    unit = unit_gradients(gradients)
    return (unit @ unit.mT).to("cpu", torch.float64)


def membership(grouping, K, dtype=torch.float64):
    """Return the one-hot matrix P (..., N, K) of a grouping (..., N)."""
    return F.one_hot(grouping, K).to(dtype)


def centroid_gram(gram, grouping, num_experts):
    """Return P' G P (..., K, K), the inner products of the centroids of Eq. (12)."""
    P = membership(grouping, num_experts, gram.dtype)  # (..., N, K)
    return P.mT @ gram @ P


def grouping_objective(gram, grouping, num_experts):
    """Return the sum over experts of the squared centroid norm, (...), Eq. (10)."""
    return centroid_gram(gram, grouping, num_experts).diagonal(dim1=-2, dim2=-1).sum(-1)


def spherical_kmeans(gram, num_experts):
    """Cluster unit gradients by cosine, Eq. (11): gram (..., N, N) -> labels (..., N).

    Clusters may have any size. Deterministic: the first centre is the first component with a
    gradient, each next one the component whose largest cosine to the centres so far is smallest;
    the lowest index wins ties.
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
    """Return <ghat_i, q_k> = [G P (P'GP)^(-1/2)]_ik, (..., N, K), Eq. (13).

    Q = U_c V_c' is the polar factor of the centroid matrix C. Empty or dependent clusters make P'GP
    singular, so (P'GP)^(-1/2) is the root of its pseudo-inverse.
    """
    P = membership(grouping, num_experts, gram.dtype)  # (..., N, K)
    inner = gram @ P  # (..., N, K)
    eigenvalues, V = torch.linalg.eigh(P.mT @ inner)  # (..., K), (..., K, K)
    kept = eigenvalues > EIGENVALUE_CUTOFF * eigenvalues[..., -1:]
    inverse_root = torch.where(kept, eigenvalues, 1).rsqrt() * kept  # (..., K)
    return inner @ (V * inverse_root[..., None, :]) @ V.mT


def balanced_assignment(similarity):
    """Return the grouping with N / K components each of the largest total similarity, Eq. (14).

    similarity (..., N, K) -> (..., N). Exact: an assignment problem with each column r times.
    """
    N, K = similarity.shape[-2:]
    r = N // K
    places = similarity.reshape(-1, N, K).repeat_interleave(r, dim=-1).numpy()  # (L, N, N)
    columns = np.stack([linear_sum_assignment(layer, maximize=True)[1] for layer in places])
    return torch.from_numpy(columns // r).view(similarity.shape[:-1])


def relabel(grouping, current, num_experts, counted=None):
    """Rename the groups (..., N) for the largest overlap with `current`; the partition stays.

    A clustering's labels are arbitrary, but each row of the router belongs to one expert. Without
    `current`, groups are numbered by first member. `counted` (..., N) bool restricts the overlap.
    """
    P = membership(grouping, num_experts)  # (..., N, K)
    if current is None:
        names = P.argmax(-2).argsort(-1).argsort(-1)  # (..., K)
    else:
        weight = 1 if counted is None else counted[..., None]
        overlap = P.mT @ (weight * membership(current, num_experts))  # (..., K new, K old)
        names = balanced_assignment(overlap)  # (..., K): old name of each new group
    return names.gather(-1, grouping)


def place_components_without_gradient(grouping, alive, current):
    """Reassign the components that are not `alive`, so that as many as possible stay in `current`.

    grouping, alive, current (N,), of one layer. Their places in `grouping` are redistributed
    among them, without `current` in order.
    """
    idle = (~alive).nonzero().squeeze(1)
    places = grouping[idle].sort().values  # (idle,): an expert for each
    if current is not None:
        stays = (current[idle][:, None] == places).numpy()  # (idle, places)
        places = places[linear_sum_assignment(stays, maximize=True)[1]]
    return grouping.index_copy(0, idle, places)


def solve_grouping(gram, num_experts):
    """Solve Eq. (11) to (14): gram (..., N, N) -> balanced grouping (..., N), rounds used (...)."""
    labels = spherical_kmeans(gram, num_experts)
    rounds = torch.zeros(labels.shape[:-1], dtype=torch.int64)
    settled = torch.zeros_like(rounds, dtype=torch.bool)
    for _ in range(ROUNDS):
        previous = labels
        labels = balanced_assignment(orthogonalized_similarity(gram, labels, num_experts))
        rounds += ~settled
        settled |= (labels == previous).all(-1)  # a repeated grouping repeats for good
        if settled.all():
            break
    return labels, rounds


def grouping_from_gram(gram, num_experts, current=None):
    """Return the named grouping (L, N) of finite gram (L, N, N), and rounds used (L,)."""
    grouping, rounds = solve_grouping(gram, num_experts)
    alive = gram.diagonal(dim1=-2, dim2=-1) > 0  # (L, N)
    if current is not None:
        grouping = relabel(grouping, current, num_experts, counted=alive)
    for layer in (~alive.all(-1)).nonzero().flatten():
        grouping[layer] = place_components_without_gradient(
            grouping[layer], alive[layer], None if current is None else current[layer])
    return (relabel(grouping, None, num_experts) if current is None else grouping), rounds


def group_components(gradients, num_experts, current=None):
    """Group components by gradient, Eq. (9) to (14), without random numbers.

    gradients (N, D) or (L, N, D) -> balanced int64 grouping (N,) or (L, N). With `current`, a
    grouping of that shape, groups are named for the largest overlap with it, and a layer with a
    non-finite gradient keeps it. Raises InputError (a ValueError) for such a layer without
    `current`, or if num_experts does not divide N.
    """
    *_, N, D = gradients.shape
    if num_experts < 1 or N % num_experts:
        raise InputError(f"{N} components cannot be divided equally among {num_experts} experts")
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
    """Return mean angles in degrees, each (...): between experts' centroids, and within experts.

    Pairs with a zero vector are left out; the mean over no pair is NaN.
    """
    centroids = centroid_gram(gram, grouping, num_experts)  # (..., K, K)
    inter = _mean_angle(centroids, torch.ones_like(centroids, dtype=torch.bool).triu(1))
    same = grouping[..., :, None] == grouping[..., None, :]  # (..., N, N)
    return inter, _mean_angle(gram, same.triu(1))


def _mean_angle(inner, pair):
    """Return the mean angle over the pairs in a bool mask, from inner products (..., n, n)."""
    norm = inner.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (..., n)
    product = norm[..., :, None] * norm[..., None, :]
    pair = pair & (product > 0)
    cosine = (inner / torch.where(product > 0, product, 1)).clamp(-1, 1)
    total = torch.where(pair, cosine.acos().rad2deg(), 0).sum((-2, -1))
    return total / pair.sum((-2, -1))
