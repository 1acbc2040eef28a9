"""Compute how tasks share active units: statistics on masks, with chance, ceiling and controls.

Pure functions for Fig. 1, 5 to 10 and Appendix H.1. Axis names
    T     tasks
    P     units: the neurons of a layer, or the entries of a matrix
    n     number of tasks in which a unit is active
    k, q  active units of each task, and their share k / P; both (T,)
Masks M (T, P) are bool arrays of NumPy; scores are tensors, on the device where they were made.
"""

import math

import numpy as np
import torch
from scipy import stats

from experts import select_experts

LABEL_PERMUTATIONS = 10_000
EXACT_UNITS = 10**5  # more units: E[J] is the ratio of expectations, with an error of O(1 / P)
SMALLEST_HEADROOM = 0.02  # ceiling minus chance; below this, kappa would be noise


# --- from scores to masks -----------------------------------------------------------------------


def top_mask(scores, share):
    """Return the mask (..., P) of the `share` of largest scores (..., P), ties to the lower index.
    """
    return select_experts(scores, round(share * scores.shape[-1]))


def additive_structure(F):
    """Fit log F (out, in) by row effects plus column effects -> (R2, rows, columns).

    R2 = 1 - SS(log F - mean - row - column) / SS(log F - mean), NaN where F is constant; the
    effects are (out,) and (in,). Entries of 0 are clamped to the smallest normal number.
    """
    logs = F.double().clamp_min(torch.finfo(torch.float32).tiny).log()  # (out, in)
    logs = logs - logs.mean()
    rows, columns = logs.mean(1), logs.mean(0)  # (out,), (in,)
    residual = logs - rows[:, None] - columns
    total = float(logs.square().sum())
    return 1 - float(residual.square().sum()) / total if total > 0 else math.nan, rows, columns


def mean(values):
    """Return the mean of numbers, None where one is NaN or there is none."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()) if len(values) and not np.isnan(values).any() else None


def mean_correlation(profiles):
    """Average the correlation of two profiles over all pairs of (T, n); None for a constant one."""
    profiles = np.asarray(profiles, dtype=float)
    centred = profiles - profiles.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1)
    if (norm == 0).any() or len(profiles) < 2:
        return None
    unit = centred / norm[:, None]
    return float(off_diagonal(unit @ unit.T).mean())


def off_diagonal(matrix):
    """Return the entries above the diagonal of a symmetric (T, T): one for each pair of tasks."""
    return matrix[np.triu_indices(len(matrix), 1)]


# --- overlap ------------------------------------------------------------------------------------


def common(M, N):
    """Count the common units of masks M (T, P) and N (U, P), (T, U)."""
    # In float32 BLAS computes the product, and counts up to 2**24 are exact.
    total = np.zeros((len(M), len(N)))
    for start in range(0, M.shape[1], 2**22):
        part = slice(start, start + 2**22)
        total += M[:, part].astype(np.float32) @ N[:, part].astype(np.float32).T
    return total


def jaccard(M, N):
    """Compute J = |A and B| / |A or B| of masks M (T, P) and N (U, P), (T, U)."""
    both = common(M, N)
    either = M.sum(1)[:, None] + N.sum(1) - both
    return both / np.maximum(either, 1)


def chance_jaccard(k, j, P):
    """Compute E[J] of two random sets of k and j among P units (hypergeometric overlap)."""
    if P > EXACT_UNITS:
        a, b = k / P, j / P
        return a * b / (a + b - a * b)
    i = np.arange(max(0, k + j - P), min(k, j) + 1)
    return float((stats.hypergeom(P, k, j).pmf(i) * i / (k + j - i)).sum())


def mean_chance_jaccard(k, P):
    """Average `chance_jaccard` over pairs of tasks with k (T,) units."""
    pairs = [(int(k[t]), int(k[u])) for t in range(len(k)) for u in range(t)]
    distinct = {pair: chance_jaccard(*pair, P) for pair in set(pairs)}
    return float(np.mean([distinct[pair] for pair in pairs]))


def kappa(cross, chance, ceiling):
    """Rescale J: 0 for random sets, 1 for two halves of one task; None for too little headroom."""
    headroom = ceiling - chance
    return (cross - chance) / headroom if headroom >= SMALLEST_HEADROOM else None


def chance_histogram(q):
    """Compute the probabilities (T + 1,) of n active tasks: Poisson-binomial with q (T,)."""
    pmf = np.ones(1)
    for share in q:
        pmf = np.convolve(pmf, [1 - share, share])
    return pmf


def shared_share(M):
    """Average over tasks the share of active units that are active in another task too."""
    shared = M.sum(0) >= 2  # (P,)
    return float(((M & shared).sum(1) / M.sum(1)).mean())


def shared_chance(q):
    """Compute the expected `shared_share` of independent random sets with shares q (T,)."""
    idle = 1 - np.asarray(q)
    return float(np.mean([1 - np.prod(np.delete(idle, t)) for t in range(len(idle))]))


# --- patterns and categories --------------------------------------------------------------------


def covering_patterns(M):
    """Count the patterns that cover half of the active units, the most frequent ones first.

    The pattern of a unit is the set of tasks in which it is active.
    """
    codes = sum(mask.astype(np.int64) << t for t, mask in enumerate(M))  # (P,)
    sizes = np.sort(np.unique(codes[codes > 0], return_counts=True)[1])[::-1]
    return int(np.searchsorted(sizes.cumsum(), sizes.sum() / 2) + 1)


def category_effect(J, categories, generator):
    """Test whether J (T, T) is larger within categories than between them: (effect, p).

    The effect is the difference of the means; p comes from a one-sided permutation test over the
    labels categories (T,). (None, None) unless two categories have two tasks.
    """
    _, labels, sizes = np.unique(categories, return_inverse=True, return_counts=True)
    if (sizes >= 2).sum() < 2:
        return None, None
    values = off_diagonal(J)
    left, right = np.triu_indices(len(J), 1)

    def effect(labels):
        """Compute the effect of labels (..., T) -> (...)."""
        same = labels[..., left] == labels[..., right]  # (..., pairs)
        within, between = same.sum(-1), (~same).sum(-1)
        return (same * values).sum(-1) / within - (~same * values).sum(-1) / between

    observed = effect(labels)
    permuted = generator.permuted(np.tile(labels, (LABEL_PERMUTATIONS, 1)), axis=1)
    # Rounding: equal groupings can differ in the last digit.
    reached = (effect(permuted) >= observed - 1e-12).sum()
    return float(observed), float((1 + reached) / (1 + LABEL_PERMUTATIONS))


# --- all of it ----------------------------------------------------------------------------------


def sharing(M, halves, controls, categories, generator):
    """Compute all statistics of masks M (T, P), the folds' halves (2, T, P), {name: control (P,)}.

    Every mask has an active and an inactive unit. None: cannot be measured. `patterns` are
    `covering_patterns` of M, and after a random permutation of each task's mask.
    """
    T, P = M.shape
    k, n = M.sum(1), M.sum(0)  # (T,), (P,)
    J = jaccard(M, M)
    across = jaccard(*halves)  # (T, T): the first half of a task, the second of another
    pairs, ceiling = off_diagonal(J), float(across.diagonal().mean())
    cross = float(off_diagonal((across + across.T) / 2).mean())  # both combinations of halves
    half_chance = mean_chance_jaccard(halves.sum(2).mean(0).round(), P)
    effect, p = category_effect(J, categories, generator)
    core = n == T
    return {
        "units": P, "histogram": np.bincount(n, minlength=T + 1).tolist(),
        "chance_histogram": (P * chance_histogram(k / P)).tolist(),
        "shared": shared_share(M), "shared_chance": shared_chance(k / P),
        "jaccard": float(pairs.mean()), "smallest": float(pairs.min()),
        "largest": float(pairs.max()), "chance": mean_chance_jaccard(k, P),
        "ceiling": ceiling, "kappa": kappa(cross, half_chance, ceiling),
        "category_effect": effect, "category_p": p,
        "lower_half": float(M[:, :P // 2].sum() / M.sum()),
        "controls": {name: {
            "jaccard": float(jaccard(M, mask[None]).mean()),
            "core": float(mask[core].mean()) if core.any() else None}
            for name, mask in controls.items()},
        "patterns": [covering_patterns(M), covering_patterns(generator.permuted(M, axis=1))]}


# --- signs --------------------------------------------------------------------------------------


def minority_chance(n):
    """Compute E[min(i, n - i)] / n for i positive signs among n fair coin flips."""
    i = np.arange(n + 1)
    return float((stats.binom(n, 0.5).pmf(i) * np.minimum(i, n - i)).sum() / n)


def signs(M, positive, negative):
    """Count weights whose gradients have opposite signs in different tasks (Fig. 10).

    M (T, P) is the mask of active weights, `positive` and `negative` (3, T, P) are the signs of the
    mean gradient over all rows and over each fold. A zero gradient has neither sign. `both`: share
    of weights with both signs among those with a sign in two tasks or more; `minority_all`: mean
    share of the rarer sign in those with a sign in all tasks; `_chance`: for fair coin flips.
    `pairwise`, `reliability`: agreement of two tasks, of two halves of a task. None: no weight.
    """
    up, down = M & positive[0], M & negative[0]
    pos, neg = up.sum(0), down.sum(0)  # (P,)
    n, rarer, T = pos + neg, np.minimum(pos, neg), len(M)
    shared = common(up | down, up | down)
    with np.errstate(invalid="ignore"):  # 0 / 0
        agreement = off_diagonal((common(up, up) + common(down, down)) / shared)
    first, second = (p.astype(np.int8) - m.astype(np.int8)
                     for p, m in zip(positive[1:], negative[1:], strict=True))  # (T, P)
    signed = M & (first != 0) & (second != 0)
    return {"both": mean(rarer[n >= 2] > 0), "both_chance": mean(1 - 2.0**(1 - n[n >= 2])),
            "minority_all": mean(rarer[n == T] / T), "minority_chance": minority_chance(T),
            "pairwise": mean(agreement[~np.isnan(agreement)]),
            "reliability": mean([(first[t] == second[t])[signed[t]].mean() for t in range(T)
                                 if signed[t].any()])}
