"""How tasks share active units: statistics on masks, each beside chance, ceiling and controls.

Pure functions of Fig. 1, 5 to 10 and H.1; no model here. Axis names
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
EXACT_UNITS = 10**5  # above, E[J] is the ratio of expectations: the error is O(1 / P)
SAMPLED_UNITS = 10**6  # patterns of larger matrices are counted on so many units
MOST_TASKS = 62  # a pattern is an int64
SMALLEST_HEADROOM = 0.02  # of ceiling over chance, below which kappa would be noise
GROUPS = 15  # largest pattern groups that are shown


# --- from scores to masks -----------------------------------------------------------------------


def top_masks(scores, counts):
    """The k largest of the scores (P,) for every k in `counts`, as bool tensors (P,).

    Ties go to the lower index, so every mask has exactly k units and smaller ones nest in larger.
    """
    order = scores.sort(descending=True, stable=True).indices  # (P,)
    for k in counts:
        mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        mask[order[:k]] = True
        yield mask


def concentration(scores, shares=(0.01, 0.1)):
    """Share of the sum of non-negative scores (P,) that their largest units hold."""
    ordered = scores.double().sort(descending=True).values  # (P,)
    total = ordered.sum()
    return [float(ordered[:round(share * len(ordered))].sum() / total) if total > 0 else None
            for share in shares]


def additive_structure(F):
    """How far log F (out, in) is a row effect plus a column effect -> (R2, rows, columns, clamped).

    R2 = 1 - SS(log F - mean - row - column) / SS(log F - mean), None where F is constant; the
    effects are (out,) and (in,); `clamped` entries were 0 and count as the smallest normal number.
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
    """Mean over pairs of the correlation of profiles (T, n); None where one has no spread."""
    profiles = np.asarray(profiles, dtype=float)
    centred = profiles - profiles.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1)
    if (norm == 0).any() or len(profiles) < 2:
        return None
    unit = centred / norm[:, None]
    return float(off_diagonal(unit @ unit.T).mean())


def off_diagonal(matrix):
    """The entries above the diagonal of a symmetric (T, T): one for each pair of tasks."""
    return matrix[np.triu_indices(len(matrix), 1)]


# --- overlap ------------------------------------------------------------------------------------


def common(M, N):
    """|A_t and B_u| for masks M (T, P) and N (U, P), (T, U)."""
    # Float32 products use BLAS and count exactly up to 2**24 units at a time.
    total = np.zeros((len(M), len(N)))
    for start in range(0, M.shape[1], 2**22):
        part = slice(start, start + 2**22)
        total += M[:, part].astype(np.float32) @ N[:, part].astype(np.float32).T
    return total


def jaccard(M, N):
    """J = |A and B| / |A or B|, (T, U); 0 where both sets are empty."""
    both = common(M, N)
    either = M.sum(1)[:, None] + N.sum(1) - both
    return both / np.maximum(either, 1)


def chance_jaccard(k, j, P):
    """E[J] of two independent random sets of k and j among P units (hypergeometric overlap)."""
    if P > EXACT_UNITS:
        a, b = k / P, j / P
        return a * b / (a + b - a * b)
    i = np.arange(max(0, k + j - P), min(k, j) + 1)
    return float((stats.hypergeom(P, k, j).pmf(i) * i / (k + j - i)).sum())


def mean_chance_jaccard(k, P):
    """`chance_jaccard`, mean over pairs of tasks with k (T,) units."""
    pairs = [(int(k[t]), int(k[u])) for t in range(len(k)) for u in range(t)]
    distinct = {pair: chance_jaccard(*pair, P) for pair in set(pairs)}
    return float(np.mean([distinct[pair] for pair in pairs]))


def cross_jaccard(halves):
    """Mean J over pairs of tasks and both combinations of their folds; halves (2, T, P)."""
    J = (jaccard(halves[0], halves[1]) + jaccard(halves[1], halves[0])) / 2  # (T, T)
    return float(off_diagonal(J).mean())


def kappa(cross, chance, ceiling):
    """0: tasks share as random sets do; 1: as much as two halves of one task. None: no headroom."""
    headroom = ceiling - chance
    return (cross - chance) / headroom if headroom >= SMALLEST_HEADROOM else None


def chance_histogram(q):
    """Probability that a unit is active in n = 0..T tasks: Poisson-binomial with q (T,)."""
    pmf = np.ones(1)
    for share in q:
        pmf = np.convolve(pmf, [1 - share, share])
    return pmf


def shared_share(M):
    """Mean over tasks of the share of active units that another task has too."""
    shared = M.sum(0) >= 2  # (P,)
    return float(((M & shared).sum(1) / M.sum(1)).mean())


def shared_chance(q):
    """`shared_share` of independent random sets."""
    idle = 1 - np.asarray(q)
    return float(np.mean([1 - np.prod(np.delete(idle, t)) for t in range(len(idle))]))


# --- base groups --------------------------------------------------------------------------------


def pattern_sizes(M):
    """(patterns, sizes): the tasks of a unit as bits, for all units active at all; largest first.
    """
    codes = np.zeros(M.shape[1], dtype=np.int64)
    for t, mask in enumerate(M):
        codes |= mask.astype(np.int64) << t
    patterns, sizes = np.unique(codes[codes > 0], return_counts=True)
    order = np.lexsort((patterns, -sizes))
    return patterns[order], sizes[order]


def pattern_summary(sizes, patterns, T):
    """Numbers of the base groups, by name."""
    active = int(sizes.sum())
    covering = int(np.searchsorted(sizes.cumsum(), active / 2) + 1)
    everywhere = sizes[patterns == 2**T - 1].sum()
    return {"active": active, "distinct": len(sizes), "cover_half": covering,
            "largest": float(sizes[0] / active), "all_tasks": float(everywhere / active)}


def base_groups(M, generator):
    """The groups of units with equal patterns, and the same after permuting each task's mask.

    {"observed", "permuted"} of `pattern_summary`, the number of units they were counted on, and
    the largest groups as (pattern, size, expected size). Permutations keep every k.
    """
    T, P = M.shape
    if P > SAMPLED_UNITS:
        M = M[:, np.sort(generator.choice(P, SAMPLED_UNITS, replace=False))]
    patterns, sizes = pattern_sizes(M)
    permuted = []
    for _ in range(MASK_PERMUTATIONS):
        shuffled = generator.permuted(M, axis=1)
        permuted.append(pattern_summary(*reversed(pattern_sizes(shuffled)), T))
    q = M.mean(1)
    groups = []
    for pattern, size in zip(patterns[:GROUPS].tolist(), sizes[:GROUPS].tolist(), strict=True):
        member = [bool(pattern >> t & 1) for t in range(T)]
        expected = M.shape[1] * float(np.prod(np.where(member, q, 1 - q)))
        groups.append({"tasks": member, "size": size, "expected": expected})
    return {"units": M.shape[1], "observed": pattern_summary(sizes, patterns, T),
            "permuted": {key: float(np.mean([each[key] for each in permuted]))
                         for key in permuted[0]},
            "groups": groups}


def category_effect(J, categories, generator):
    """Mean J within categories minus between, and its one-sided p over permuted labels.

    J (T, T), categories (T,) -> (effect, p); (None, None) unless two categories have two tasks.
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
    # Equal groupings give equal effects, but for the last digit.
    reached = (effect(permuted) >= observed - 1e-12).sum()
    return float(observed), float((1 + reached) / (1 + LABEL_PERMUTATIONS))


# --- all of it ----------------------------------------------------------------------------------


def sharing(M, halves, controls, categories, generator):
    """All statistics of masks M (T, P), their folds' halves (2, T, P), {name: control mask (P,)}.

    Tasks with no unit or all units active, in M or in a half, are left out: `left_out` has their
    numbers. None stands for what cannot be measured. `generator` is of NumPy.
    """
    P = M.shape[1]
    counts = np.stack([M.sum(1), *halves.sum(2)])  # (3, T)
    kept = ((counts > 0) & (counts < P)).all(0)  # (T,)
    found = {"units": P, "active": M.sum(1).tolist(), "left_out": np.flatnonzero(~kept).tolist()}
    if kept.sum() < 2:
        return found
    M, halves = M[kept], halves[:, kept]
    categories = [name for name, keep in zip(categories, kept, strict=True) if keep]
    T, k = len(M), M.sum(1)
    q, n = k / P, M.sum(0)
    J = jaccard(M, M)
    pairs = off_diagonal(J)
    own = np.array([jaccard(first[None], second[None])[0, 0]
                    for first, second in zip(*halves, strict=True)])  # (T,)
    chance = mean_chance_jaccard(k, P)
    half_chance = mean_chance_jaccard(halves.sum(2).mean(0).round(), P)
    cross = cross_jaccard(halves)
    effect, p = category_effect(J, categories, generator)
    core = n == T
    found |= {
        "histogram": np.bincount(n, minlength=T + 1).tolist(),
        "chance_histogram": (P * chance_histogram(q)).tolist(),
        "shared": shared_share(M), "shared_chance": shared_chance(q),
        "jaccard": float(pairs.mean()), "smallest": float(pairs.min()),
        "largest": float(pairs.max()), "chance": chance, "ceiling": float(own.mean()),
        "cross": cross, "kappa": kappa(cross, half_chance, float(own.mean())),
        "category_effect": effect, "category_p": p,
        "lower_half": float(M[:, :P // 2].sum() / M.sum()),
        "matrix": np.where(np.eye(T, dtype=bool), own, J).tolist(),
        "controls": {name: {
            "jaccard": float(jaccard(M, mask[None]).mean()),
            "by_task": jaccard(M, mask[None])[:, 0].tolist(),
            "core": float(mask[core].mean()) if core.any() else None}
            for name, mask in controls.items()},
        "patterns": base_groups(M, generator)}
    return found


# --- signs --------------------------------------------------------------------------------------


def minority_chance(n):
    """E[min(i, n - i)] / n for i of n independent fair signs."""
    i = np.arange(n + 1)
    return float((stats.binom(n, 0.5).pmf(i) * np.minimum(i, n - i)).sum() / n)


def signs(M, positive, negative, halves):
    """Do tasks pull the weights that they share in opposite directions (Fig. 10)?

    Masks M and signs of the mean gradient, all (T, P); `halves` is a pair of (positive, negative)
    of the two folds. A zero gradient counts in neither sign. By n = number of tasks with a sign:
    the share of weights with both signs, and the mean share of the rarer one, each with the value
    for independent fair signs. None where no weight has so many.
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
        """The mean over all weights active in two tasks or more."""
        return sum(line["weights"] * line[key] for line in by_n
                   if line["weights"]) / weights if weights else None

    return {"by_n": by_n, "both": weighted("both"), "both_chance": weighted("both_chance"),
            "minority_all": by_n[-1]["minority"], "zero": int((M & ~signed).sum()),
            "pairwise": float((off_diagonal(agree)[pairs] / off_diagonal(shared)[pairs]).mean())
            if pairs.any() else None,
            "reliability": float(np.mean(reliable)) if reliable else None}
