"""Do tasks' gradients conflict, and does a step for one task hurt another?

The paper claims that BADIT "mitigates the degree of cross-task interference" and measures neither.
Axis names
    T, H      tasks; folds of the rows of a task
    t, u      two tasks
"""

import numpy as np
import torch
from scipy import stats

RELIABLE = 0.2  # R below which a cosine is not corrected for noise
DECIDED = 0.975  # quantile of Student's t beyond which a pair's sign is decided
CHUNK = 2**20  # entries of all vectors in double precision at a time


def gram_matrix(vectors):
    """Inner products (n, n) of vectors (n, P), summed in float64."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[1], CHUNK):
        part = vectors[:, start:start + CHUNK].double()
        total += part @ part.T
    return total.cpu()


def own_products(G):
    """own_t = mean over f != f' of G[t, f, t, f'], (T,): unbiased for |E g_t|^2; G (T, H, T, H).
    """
    T, H = G.shape[:2]
    own = G[np.arange(T), :, np.arange(T), :]  # (T, H, H)
    return (own.sum((1, 2)) - np.trace(own, axis1=1, axis2=2)) / (H * (H - 1))


def jackknife_error(G):
    """Standard error of the mean of G (T, H, T, H) over folds, (T, T): fold f of both left out."""
    H = G.shape[1]
    same_fold = np.einsum("tfuf->tuf", G)  # (T, T, H)
    without = (G.sum((1, 3))[..., None] - G.sum(3).swapaxes(1, 2) - G.sum(1) + same_fold
               ) / (H - 1)**2  # (T, T, H)
    return np.sqrt((H - 1) / H * ((without - without.mean(-1, keepdims=True))**2).sum(-1))


def conflict(G):
    """What the inner products G (T, H, T, H) of fold-wise task gradients say of conflict.

    `decided` are the shares of pairs whose inner product is below, not told from, above zero.
    None where a task has no gradient here.
    """
    T, H = G.shape[:2]
    mean = G.mean((1, 3))  # (T, T)
    size = mean.diagonal()
    if (size <= 0).any():
        return None
    pair = np.triu_indices(T, 1)
    cosine = mean / np.sqrt(np.outer(size, size))
    own = own_products(G)
    reliability = own / size
    reliable = np.outer(reliability >= RELIABLE, reliability >= RELIABLE)[pair]
    corrected = mean[pair][reliable] / np.sqrt(np.outer(own, own)[pair][reliable])
    margin = stats.t.ppf(DECIDED, H - 1) * jackknife_error(G)
    sign = np.where(mean < -margin, -1, np.where(mean > margin, 1, 0))
    total = own.sum()
    return {
        "cosine": float(cosine[pair].mean()), "negative": float((cosine[pair] < 0).mean()),
        "smallest": float(cosine[pair].min()), "largest": float(cosine[pair].max()),
        "reliability": reliability.tolist(), "median_reliability": float(np.median(reliability)),
        "corrected": float(corrected.mean()) if len(corrected) else None,
        "corrected_pairs": len(corrected), "pairs": len(pair[0]),
        "decided": [float((sign[pair] == which).mean()) for which in (-1, 0, 1)],
        "cancellation": float((mean.sum() - size.sum()) / ((T - 1) * total)) if total > 0
        else None, "norms": np.sqrt(size).tolist(),
        "cosines": cosine.tolist(), "signs": sign.tolist()}


def interference(delta, losses):
    """What one step for each task does to the others: delta (T, T) of losses (T,) before it.

    Row i: the task that makes the step; column j: the task that pays. The three numbers are None,
    with the reason, unless a step helps its own task in at least 3 of 4 cases.
    """
    T = len(losses)
    own, other = delta.diagonal(), ~np.eye(T, dtype=bool)
    improved = int((own < 0).sum())
    found = {"own_gain": float(-own.mean()), "improved": improved, "tasks": T,
             "interference_share": None, "harm_ratio": None, "transfer": None, "reason": None}
    if 4 * improved < 3 * T:
        return found | {"reason": f"a step improves its own task in {improved} of {T} cases only: "
                        "it is noise or too large (--rows, --step_scale)"}
    moved, harm = np.abs(delta[other]).sum(), np.maximum(delta[other], 0).sum()
    helped = other & (own < 0)[:, None]
    ratios = (delta / np.where(own < 0, own, 1)[:, None])[helped]
    return found | {
        "interference_share": float((delta > 1e-5 * losses)[other].mean()),
        "harm_ratio": float(harm / moved) if moved > 0 else None,
        "transfer": float(np.median(ratios))}
