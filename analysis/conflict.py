"""Compute statistics of conflict and interference between tasks (pure functions).

The paper claims that BADIT "mitigates the degree of cross-task interference" without a measurement.
Axis names
    T, H      tasks; folds of the rows of a task
    t, u      two tasks
"""

import numpy as np
import torch
from scipy import stats

DECIDED = 0.975  # quantile of Student's t that decides the sign of a pair
CHUNK = 2**20  # columns converted to float64 at a time


def gram_matrix(vectors):
    """Compute the inner products (n, n) of vectors (n, P) in float64."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[1], CHUNK):
        part = vectors[:, start:start + CHUNK].double()
        total += part @ part.T
    return total.cpu()


def own_products(G):
    """Estimate |E g_t|^2 (T,) without bias from G (T, H, T, H): the mean over different folds."""
    T, H = G.shape[:2]
    own = G[np.arange(T), :, np.arange(T), :]  # (T, H, H)
    return (own.sum((1, 2)) - np.trace(own, axis1=1, axis2=2)) / (H * (H - 1))


def jackknife_error(G):
    """Compute the jackknife standard error (T, T) of the mean of G (T, H, T, H) over folds."""
    H = G.shape[1]
    same_fold = np.einsum("tfuf->tuf", G)  # (T, T, H)
    without = (G.sum((1, 3))[..., None] - G.sum(3).swapaxes(1, 2) - G.sum(1) + same_fold
               ) / (H - 1)**2  # (T, T, H)
    return np.sqrt((H - 1) / H * ((without - without.mean(-1, keepdims=True))**2).sum(-1))


def conflict(G):
    """Compute conflict statistics from inner products G (T, H, T, H) of gradients by task and fold.

    `decided` are the shares of pairs whose inner product is significantly below zero, undecided,
    and significantly above zero. None where a task has no gradient.
    """
    T, H = G.shape[:2]
    mean = G.mean((1, 3))  # (T, T)
    size = mean.diagonal()
    if (size <= 0).any():
        return None
    pair = np.triu_indices(T, 1)
    cosine = mean / np.sqrt(np.outer(size, size))
    own = own_products(G)
    margin = stats.t.ppf(DECIDED, H - 1) * jackknife_error(G)
    sign = np.where(mean < -margin, -1, np.where(mean > margin, 1, 0))
    total = own.sum()
    return {
        "cosine": float(cosine[pair].mean()), "negative": float((cosine[pair] < 0).mean()),
        "reliability": (own / size).tolist(), "median_reliability": float(np.median(own / size)),
        "decided": [float((sign[pair] == which).mean()) for which in (-1, 0, 1)],
        "cancellation": float((mean.sum() - size.sum()) / ((T - 1) * total)) if total > 0
        else None, "norms": np.sqrt(size).tolist(),
        "cosines": cosine.tolist(), "signs": sign.tolist()}


def interference(delta, losses):
    """Summarise the loss changes delta (T, T) after one step for each task; losses (T,) before it.

    Row i: the task whose gradient makes the step; column j: the task whose loss changes. The three
    numbers are None, with the reason, unless at least 3 of 4 steps improve their own task.
    """
    T = len(losses)
    own, other = delta.diagonal(), ~np.eye(T, dtype=bool)
    improved = int((own < 0).sum())
    found = {"own_gain": float(-own.mean()), "improved": improved, "tasks": T,
             "interference_share": None, "harm_ratio": None, "transfer": None, "reason": None}
    if 4 * improved < 3 * T:
        return found | {"reason": f"a step improves its own task in only {improved} of {T} cases: "
                        "noise, or too large a step (--rows, --learning_rate)"}
    moved, harm = np.abs(delta[other]).sum(), np.maximum(delta[other], 0).sum()
    helped = other & (own < 0)[:, None]
    ratios = (delta / np.where(own < 0, own, 1)[:, None])[helped]
    return found | {
        "interference_share": float((delta > 1e-5 * losses)[other].mean()),
        "harm_ratio": float(harm / moved) if moved > 0 else None,
        "transfer": float(np.median(ratios))}
