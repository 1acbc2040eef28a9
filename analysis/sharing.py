"""Compute how tasks share active units: statistics on masks, with chance, ceiling and controls.

Pure functions for Fig. 1, 5 to 10 and Appendix H.1. Axis names
    T     tasks
    P     units: the neurons of a layer, or the entries of a matrix
    n     number of tasks in which a unit is active
    k, q  active units of each task, and their share k / P; both (T,)
Masks M (T, P) are bool arrays of NumPy; scores are tensors, on the device where they were made.
"""

import numpy as np
import torch
from scipy import stats

LABEL_PERMUTATIONS, MASK_PERMUTATIONS = 10_000, 20
EXACT_UNITS = 10**5  # more units: E[J] is the ratio of expectations, with an error of O(1 / P)
SAMPLED_UNITS = 10**6  # patterns of larger matrices are counted on a random sample of this size
MOST_TASKS = 62  # a pattern is an int64
SMALLEST_HEADROOM = 0.02  # ceiling minus chance; below this, kappa would be noise


# --- from scores to masks -----------------------------------------------------------------------


def top_masks(scores, counts):
    """Yield the mask (P,) of the k largest scores (P,) for every k in `counts`.

    Ties go to the lower index, so every mask has exactly k units and contains the smaller ones.
    """
    order = scores.sort(descending=True, stable=True).indices  # (P,)
    for k in counts:
        mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        mask[order[:k]] = True
        yield mask


def concentration(scores, shares=(0.01, 0.1)):
    """Compute the share of the sum of scores (P,) >= 0 in the largest 1% and 10% of the units."""
    ordered = scores.double().sort(descending=True).values  # (P,)
    total = ordered.sum()
    return [float(ordered[:round(share * len(ordered))].sum() / total) if total > 0 else None
            for share in shares]


def additive_structure(F):
    """Fit log F (out, in) by row effects plus column effects -> (R2, rows, columns, clamped).

    R2 = 1 - SS(log F - mean - row - column) / SS(log F - mean), None where F is constant; the
    effects are (out,) and (in,). Entries of 0 are clamped to the smallest normal number; `clamped`
    is their number.
    """
    tiny = torch.finfo(torch.float32).tiny
    logs = F.double().clamp_min(tiny).log()  # (out, in)
    logs = logs - logs.mean()
    rows, columns = logs.mean(1), logs.mean(0)  # (out,), (in,)
    residual = logs - rows[:, None] - columns
    total = float(logs.square().sum())
    R2 = 1 - float(residual.square().sum()) / total if total > 0 else None
    return R2, rows, columns, int((F < tiny).sum())


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


def own_jaccard(halves):
    """Compute J of the two halves (2, T, P) of each task, (T,)."""
    return np.array([jaccard(first[None], second[None])[0, 0]
                     for first, second in zip(*halves, strict=True)])


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


def cross_jaccard(halves):
    """Average J over pairs of tasks and both combinations of their folds; halves (2, T, P)."""
    J = (jaccard(halves[0], halves[1]) + jaccard(halves[1], halves[0])) / 2  # (T, T)
    return float(off_diagonal(J).mean())


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


# --- base groups --------------------------------------------------------------------------------


def pattern_sizes(M):
    """Count the units of each pattern, the tasks of a unit as bits -> (patterns, sizes).

    Units that are active in no task are left out. Sorted by decreasing size.
    """
    codes = np.zeros(M.shape[1], dtype=np.int64)
    for t, mask in enumerate(M):
        codes |= mask.astype(np.int64) << t
    patterns, sizes = np.unique(codes[codes > 0], return_counts=True)
    order = np.lexsort((patterns, -sizes))
    return patterns[order], sizes[order]


def pattern_summary(sizes, patterns, T):
    """Summarise the pattern groups."""
    active = int(sizes.sum())
    covering = int(np.searchsorted(sizes.cumsum(), active / 2) + 1)
    everywhere = sizes[patterns == 2**T - 1].sum()
    return {"active": active, "distinct": len(sizes), "cover_half": covering,
            "largest": float(sizes[0] / active), "all_tasks": float(everywhere / active)}


def base_groups(M, generator):
    """Group units with equal patterns, and compare with random permutations of each task's mask.

    Returns the number of units and `pattern_summary`: "observed", and "permuted" as a mean.
    """
    T, P = M.shape
    if P > SAMPLED_UNITS:
        M = M[:, np.sort(generator.choice(P, SAMPLED_UNITS, replace=False))]
    patterns, sizes = pattern_sizes(M)
    permuted = []
    for _ in range(MASK_PERMUTATIONS):
        shuffled = generator.permuted(M, axis=1)
        permuted.append(pattern_summary(*reversed(pattern_sizes(shuffled)), T))
    return {"units": M.shape[1], "observed": pattern_summary(sizes, patterns, T),
            "permuted": {key: float(np.mean([each[key] for each in permuted]))
                         for key in permuted[0]}}


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
        """labels (..., T) -> (...)."""
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

    Every mask has an active and an inactive unit. None marks what cannot be measured.
    """
    T, P = M.shape
    k, n = M.sum(1), M.sum(0)  # (T,), (P,)
    J = jaccard(M, M)
    pairs, own = off_diagonal(J), own_jaccard(halves)
    half_chance = mean_chance_jaccard(halves.sum(2).mean(0).round(), P)
    cross = cross_jaccard(halves)
    effect, p = category_effect(J, categories, generator)
    core = n == T
    return {
        "units": P, "active": k.tolist(), "histogram": np.bincount(n, minlength=T + 1).tolist(),
        "chance_histogram": (P * chance_histogram(k / P)).tolist(),
        "shared": shared_share(M), "shared_chance": shared_chance(k / P),
        "jaccard": float(pairs.mean()), "smallest": float(pairs.min()),
        "largest": float(pairs.max()), "chance": mean_chance_jaccard(k, P),
        "ceiling": float(own.mean()), "cross": cross,
        "kappa": kappa(cross, half_chance, float(own.mean())),
        "category_effect": effect, "category_p": p,
        "lower_half": float(M[:, :P // 2].sum() / M.sum()),
        "matrix": np.where(np.eye(T, dtype=bool), own, J).tolist(),
        "controls": {name: {
            "jaccard": float(jaccard(M, mask[None]).mean()),
            "by_task": jaccard(M, mask[None])[:, 0].tolist(),
            "core": float(mask[core].mean()) if core.any() else None}
            for name, mask in controls.items()},
        "patterns": base_groups(M, generator)}


# --- signs --------------------------------------------------------------------------------------


def minority_chance(n):
    """Compute E[min(i, n - i)] / n for i positive signs among n fair coin flips."""
    i = np.arange(n + 1)
    return float((stats.binom(n, 0.5).pmf(i) * np.minimum(i, n - i)).sum() / n)


def signs(M, positive, negative, halves):
    """Count weights whose gradients have opposite signs in different tasks (Fig. 10).

    Masks M and signs of the mean gradient are all (T, P); `halves` is a pair of (positive,
    negative) of the two folds. A zero gradient has neither sign. By n, the number of tasks with a
    sign: the share of weights with both signs and the mean share of the rarer sign, each with its
    value for fair coin flips; None where no weight has n signs.
    """
    up, down = M & positive, M & negative
    pos, neg = up.sum(0), down.sum(0)  # (P,)
    n, T = pos + neg, len(M)
    by_n = []
    for count in range(2, T + 1):
        here = n == count
        rarer = np.minimum(pos, neg)[here]
        by_n.append({"n": count, "weights": int(here.sum()),
                     "both": float((rarer > 0).mean()) if len(rarer) else None,
                     "both_chance": 1 - 2.0**(1 - count),
                     "minority": float(rarer.mean() / count) if len(rarer) else None,
                     "minority_chance": minority_chance(count)})
    weights = sum(line["weights"] for line in by_n)
    signed = up | down
    agree, shared = common(up, up) + common(down, down), common(signed, signed)
    pairs = off_diagonal(shared) > 0
    first, second = (p.astype(np.int8) - m.astype(np.int8) for p, m in halves)  # (T, P)
    both_folds = M & (first != 0) & (second != 0)
    reliable = [float((first == second)[t][both_folds[t]].mean()) for t in range(T)
                if both_folds[t].any()]

    def weighted(key):
        """Average over all weights that are active in at least two tasks."""
        return sum(line["weights"] * line[key] for line in by_n
                   if line["weights"]) / weights if weights else None

    return {"by_n": by_n, "both": weighted("both"), "both_chance": weighted("both_chance"),
            "minority_all": by_n[-1]["minority"], "zero": int((M & ~signed).sum()),
            "pairwise": float((off_diagonal(agree)[pairs] / off_diagonal(shared)[pairs]).mean())
            if pairs.any() else None,
            "reliability": float(np.mean(reliable)) if reliable else None}
