"""Test the statistics on masks against naive versions, planted structure and chance."""

import itertools

import numpy as np
import pytest
import torch

from analysis import sharing


def rng(seed=0):
    return np.random.default_rng(seed)


def exact_masks(generator, T, P, k):
    """Return T independent random sets of k of P units."""
    masks = np.zeros((T, P), dtype=bool)
    for row in masks:
        row[generator.choice(P, k, replace=False)] = True
    return masks


def measured(M, halves=None, categories=None, controls=None, seed=0):
    halves = np.stack([M, M]) if halves is None else halves
    categories = categories or ["one"] * len(M)
    return sharing.sharing(M, halves, controls or {}, categories, rng(seed))


# --- masks --------------------------------------------------------------------------------------


def test_top_mask():
    """Exact counts, ties by index, one mask for each row."""
    scores = torch.tensor([[3., 1., 3., 2., 3., 0.], [0., 1., 2., 2., 1., 0.]])
    assert sharing.top_mask(scores, 1 / 3).int().tolist() == [[1, 0, 1, 0, 0, 0],
                                                              [0, 0, 1, 1, 0, 0]]
    assert sharing.top_mask(scores[0], 4 / 6).int().tolist() == [1, 0, 1, 1, 1, 0]


def test_additive_structure():
    """The log of a product of row and column effects is additive."""
    rows, columns = torch.rand(6, dtype=torch.float64) + 1, torch.rand(9, dtype=torch.float64) + 1
    R2, row_effects, column_effects = sharing.additive_structure(rows[:, None] * columns)
    assert R2 == pytest.approx(1)
    assert row_effects.numpy() == pytest.approx((rows.log() - rows.log().mean()).numpy())
    assert column_effects.numpy() == pytest.approx((columns.log() - columns.log().mean()).numpy())
    noise = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)).double()
    logs = noise.log() - noise.log().mean()
    naive = sum(float(logs[i, j] - logs[i].mean() - logs[:, j].mean())**2
                for i in range(40) for j in range(50)) / float((logs**2).sum())
    assert sharing.additive_structure(noise)[0] == pytest.approx(1 - naive)
    assert np.isnan(sharing.additive_structure(torch.ones(3, 3))[0])
    assert sharing.mean([1.0, np.nan]) is sharing.mean([]) is None


# --- overlap ------------------------------------------------------------------------------------


def test_overlap_by_loops():
    M = rng(1).random((4, 30)) < 0.3
    sets = [set(np.flatnonzero(mask)) for mask in M]
    J = sharing.jaccard(M, M)
    for t, u in itertools.product(range(4), repeat=2):
        assert J[t, u] == pytest.approx(len(sets[t] & sets[u]) / len(sets[t] | sets[u]))
    halves = M ^ (rng(2).random((2, 4, 30)) < 0.1)  # alike, as two halves of a task are
    own = np.mean([(a & b).sum() / (a | b).sum() for a, b in zip(*halves, strict=True)])
    cross = np.mean([sharing.jaccard(halves[:1, t], halves[1:, u]) for t, u in
                     itertools.permutations(range(4), 2)])
    chance = sharing.mean_chance_jaccard(halves.sum(2).mean(0).round(), 30)
    found = measured(M, halves)
    assert found["ceiling"] == pytest.approx(own)
    assert found["kappa"] == pytest.approx((cross - chance) / (own - chance))
    n = M.sum(0)
    pairs = sum(len(sets[t] & sets[u]) for t, u in itertools.combinations(range(4), 2))
    assert pairs == (n * (n - 1) // 2).sum() == sharing.off_diagonal(sharing.common(M, M)).sum()
    naive = np.mean([len([p for p in mine if n[p] >= 2]) / len(mine) for mine in sets])
    found = measured(M)
    assert found["shared"] == pytest.approx(naive)
    of_pairs = [J[t, u] for t, u in itertools.combinations(range(4), 2)]
    assert [found[key] for key in ("jaccard", "smallest", "largest")] == pytest.approx(
        [np.mean(of_pairs), min(of_pairs), max(of_pairs)])
    assert found["lower_half"] == sum(p < 15 for mine in sets for p in mine) / M.sum()
    control = set(range(10))
    assert measured(M, controls={"ten": np.arange(30) < 10})["controls"]["ten"]["jaccard"] == (
        pytest.approx(np.mean([len(mine & control) / len(mine | control) for mine in sets])))
    assert sum(found["histogram"]) == 30 == pytest.approx(sum(found["chance_histogram"]))
    assert sum(n * count for n, count in enumerate(found["histogram"])) == M.sum()


@pytest.mark.parametrize("k", [2, 3])
def test_chance_jaccard(k):
    """Equal to an enumeration."""
    sets = [set(each) for each in itertools.combinations(range(6), k)]
    mean = np.mean([len(a & b) / len(a | b) for a in sets for b in sets])
    assert sharing.chance_jaccard(k, k, 6) == pytest.approx(mean)


def test_chance_jaccard_of_large_matrices():
    """Above 100,000 units it is an approximation."""
    exact = sharing.chance_jaccard(10_000, 10_000, 100_000)
    assert sharing.chance_jaccard(10_001, 10_001, 100_010) == pytest.approx(exact, abs=1e-5)


def test_chance_histogram_by_enumeration():
    q = [0.1, 0.35, 0.5, 0.02, 0.9]
    naive = np.zeros(6)
    for active in itertools.product((0, 1), repeat=5):
        naive[sum(active)] += np.prod([p if on else 1 - p for p, on in zip(q, active, strict=True)])
    assert sharing.chance_histogram(q) == pytest.approx(naive)
    assert sharing.shared_chance([0.1] * 15) == pytest.approx(1 - 0.9**14)


def test_kappa():
    assert sharing.kappa(0.2, 0.1, 0.5) == pytest.approx(0.25)
    assert sharing.kappa(0.1, 0.1, 0.11) is None


# --- planted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, covering", [
    ((60, 10, 20, 31), 1), ((60, 10, 20, 29), 2), ((0, 20, 20, 20), 2)])
def test_covering_patterns(sizes, covering):
    """Three groups of units, each active in two tasks; units that are active in none are left out.
    """
    units = np.repeat(np.arange(4), sizes)  # 0: never active
    M = np.array([(units > 0) & (units != absent) for absent in (1, 2, 3)])
    assert sharing.covering_patterns(M) == covering <= measured(M)["patterns"][1]


def test_core_and_control():
    """Units that are always active are active in a control too."""
    M = exact_masks(rng(5), 6, 400, 20)
    M[:, :15] = True
    control = np.arange(400) < 30
    assert measured(M, controls={"random": control})["controls"]["random"]["core"] == 1


def test_planted_categories():
    M = np.concatenate([np.repeat(exact_masks(rng(6 + c), 1, 200, 20), 3, axis=0)
                        ^ (rng(c).random((3, 200)) < 0.02) for c in range(3)])
    found = measured(M, categories=list("aaabbbccc"))
    assert found["category_p"] < 0.01 and found["category_effect"] > 0.5
    assert measured(M, categories=list("abcabcabc"))["category_p"] > 0.2
    assert measured(M)["category_p"] is None
    assert measured(M, categories=list("aabcdefgh"))["category_p"] is None


def test_mean_correlation():
    profiles = rng(8).random((3, 20))
    naive = np.mean([np.corrcoef(profiles)[t, u] for t, u in itertools.combinations(range(3), 2)])
    assert sharing.mean_correlation(profiles) == pytest.approx(naive)
    assert sharing.mean_correlation([[1, 1], [1, 2]]) is None


# --- signs --------------------------------------------------------------------------------------


def test_signs():
    """Fair coins give the chance values, equal signs give 0; a zero has neither sign."""
    M = np.ones((5, 20_000), dtype=bool)
    up = rng(9).random(M.shape) < 0.5
    other = rng(10).random(M.shape) < 0.5
    found = sharing.signs(M, [up, up, other], [~up, ~up, ~other])
    assert found["both"] == pytest.approx(1 - 2**-4, abs=0.01) == found["both_chance"]
    assert found["minority_all"] == pytest.approx(found["minority_chance"], abs=0.005)
    assert found["pairwise"] == pytest.approx(0.5, abs=0.01)
    assert found["reliability"] == pytest.approx(0.5, abs=0.01)
    same = sharing.signs(M, [M] * 3, [~M] * 3)
    assert same["both"] == same["minority_all"] == 0
    assert same["pairwise"] == same["reliability"] == 1
    none = sharing.signs(M, [~M] * 3, [~M] * 3)
    assert none["both"] is none["pairwise"] is none["reliability"] is None
    half = np.arange(5)[:, None] < 2  # active in two tasks: other tasks do not count
    assert sharing.signs(M & half, [up] * 3, [~up] * 3)["both_chance"] == 0.5
    assert sharing.minority_chance(15) == pytest.approx(0.395, abs=0.001)
