"""Check Eq. 5 to 14 against float64 loops in full space (no Gram matrix, no batches)."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from tiny import randn
from torch.testing import assert_close

import models
from badit import routing_weights
from decomposition import decompose, orient_singular_pairs, top_singular_triplets
from experts import select_experts
from grouping import (
    balanced_assignment,
    centroid_gram,
    component_gradients,
    gradient_angles,
    group_components,
    grouping_objective,
    orthogonalized_similarity,
    relabel,
    spherical_kmeans,
    unit_gradients,
)
from inputs.errors import InputError

SHAPES = [(32, 20, 4), (24, 30, 3), (12, 9, 3)]  # (N, D, K)


def random_labels(seed, N, K):
    """Return a balanced grouping in random order."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(N) // (N // K))[order]


def units(seed, N, D):
    """Return N unit vectors, each a random one plus one of five common ones."""
    g = randn(seed, N, D) + 1.5 * randn(seed + 1, 5, D)[random_labels(seed, 5 * N, 5)[:N]]
    return torch.stack([row / row.norm() for row in g])


def planted(seed, K, r, D=40, noise=0.3, truth=None):
    """Return gradients around K orthogonal directions, shuffled and rescaled, and the truth."""
    directions = torch.linalg.qr(randn(seed, D, K)).Q.T
    truth = random_labels(seed, K * r, K) if truth is None else truth
    g = directions[truth] + noise * randn(seed + 1, len(truth), D) / D**0.5
    return g * randn(seed + 2, len(truth), 1).exp(), truth


def partition(labels):
    """Return which pairs are in one group, which does not depend on names."""
    return labels[:, None] == labels[None, :]


def members(labels, k):
    return [i for i, label in enumerate(labels.tolist()) if label == k]


def is_balanced(labels, K):
    N = labels.shape[-1]
    rows = labels.reshape(-1, N)
    return all(len(members(row, k)) * K == N for row in rows for k in range(K))


def balanced_labelings(N, K):
    """Return every balanced grouping of a small N."""
    return sorted(set(itertools.permutations([i // (N // K) for i in range(N)])))


def centroid_matrix(unit, labels, K):
    """Compute C (D, K) of Eq. 12, one centroid a column."""
    C = torch.zeros(unit.shape[1], K, dtype=torch.float64)
    for i, k in enumerate(labels.tolist()):
        C[:, k] = C[:, k] + unit[i]
    return C


def polar(C):
    """Compute Q = U V^T of Eq. 13, without singular values whose square vanishes."""
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    keep = S**2 > 1e-6 * S[0] ** 2
    return U[:, keep] @ Vh[keep]


def objective(unit, labels, K):
    """Compute Eq. 10."""
    return sum(float(centroid_matrix(unit, labels, K)[:, k].norm() ** 2) for k in range(K))


def similarity(unit, labels, K):
    """Compute <ghat_i, q_k> of Eq. 13 one by one."""
    Q = polar(centroid_matrix(unit, labels, K))
    return torch.tensor([[float(g @ Q[:, k]) for k in range(K)] for g in unit]).double()


def naive_kmeans(unit, K):
    """Cluster by Eq. 11: farthest-first centres, then assign and renormalise."""
    seeds = [0]
    while len(seeds) < K:
        largest = [max(float(g @ unit[j]) for j in seeds) for g in unit]
        seeds.append(largest.index(min(largest)))
    centres, labels = [unit[j] for j in seeds], None
    for _ in range(50):
        cosines = [[float(g @ c) for c in centres] for g in unit]
        new = torch.tensor([row.index(max(row)) for row in cosines])
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        assert all(members(labels, k) for k in range(K)), "choose another seed for this test"
        means = [sum(unit[i] for i in members(labels, k)) / len(members(labels, k))
                 for k in range(K)]
        centres = [m / m.norm() for m in means]
    return labels


def naive_assignment(sim):
    """Solve Eq. 14 with one column per place."""
    N, K = sim.shape
    places = [k for k in range(K) for _ in range(N // K)]
    _, chosen = linear_sum_assignment(sim[:, places].numpy(), maximize=True)
    return torch.tensor([places[c] for c in chosen])


def first_member_order(labels):
    """Rename groups 0, 1, ... in order of their first member."""
    names = {}
    return torch.tensor([names.setdefault(k, len(names)) for k in labels.tolist()])


def naive_groups(gradients, K):
    """Group by Eq. 9 to 14 in full space."""
    unit = torch.stack([g / g.norm() for g in gradients])
    labels = naive_kmeans(unit, K)
    for _ in range(10):
        new = naive_assignment(similarity(unit, labels, K))
        if torch.equal(new, labels):
            break
        labels = new
    return first_member_order(labels)


def angle(a, b):
    return float(np.degrees(np.arccos(np.clip(float(a @ b) / float(a.norm() * b.norm()), -1, 1))))


# Eq. 5, 6: basic ability decomposition


@pytest.mark.parametrize("shape", [(24, 17), (13, 30), (16, 16)])
@pytest.mark.parametrize("svd", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_plus_bank_is_the_weight(shape, svd, dtype):
    """residual + s B A = W0 for any accuracy of the SVD."""
    weight = randn(1, *shape).to(dtype)
    bad = decompose(weight, 4, 3, 2.5, svd=svd)
    assert bad.lora_A.shape == (12, shape[1]) and bad.lora_B.shape == (shape[0], 12)
    assert bad.residual.shape == shape and bad.singular_values.shape == (12,)
    assert bad.residual.dtype == bad.lora_A.dtype == bad.lora_B.dtype == dtype
    total = bad.residual + 2.5 * bad.lora_B @ bad.lora_A
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert (total - weight).abs().max() <= tolerance * weight.abs().max()
    assert bad.residual.norm() < 0.95 * weight.norm()
    assert all(float(row[row.abs().argmax()]) > 0 for row in bad.lora_A)  # oriented


@pytest.mark.parametrize("scaling", [0.5, 8.0])
def test_components_are_the_leading_singular_triples(scaling):
    """s b_i a_i = sigma_i u_i v_i^T, a_i and b_i of equal norm, sigma descending."""
    weight = randn(2, 15, 22)
    bad = decompose(weight, 3, 4, scaling)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert_close(bad.singular_values, S[:12], rtol=1e-10, atol=1e-12)
    for i in range(12):
        a, b = bad.lora_A[i], bad.lora_B[:, i]
        assert_close(scaling * torch.outer(b, a), S[i] * torch.outer(U[:, i], Vh[i]))
        assert_close(a.norm(), (S[i] / scaling).sqrt())
        assert_close(b.norm(), (S[i] / scaling).sqrt())


def captured(W, N):
    """Return the share of the energy of the exact N leading triplets that "fast" ones capture."""
    U, S, Vh = top_singular_triplets(W, N, "fast")
    assert (U.T @ U - torch.eye(N)).abs().max() < 1e-4
    assert (Vh @ Vh.T - torch.eye(N)).abs().max() < 1e-4
    exact = torch.linalg.svdvals(W.double())[:N]
    return float((W @ Vh.T).double().square().sum() / exact.square().sum())


def test_fast_svd_on_real_weights(smollm2):
    """It captures 99.99 % of the energy of the top 32, although the spectrum is flat."""
    model, _ = models.load(smollm2)
    layers = model.model.layers
    assert min(captured(layers[i].mlp.gate_proj.weight.detach(), 32) for i in (0, 9, 29)) > 0.9999


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 33), (500, 48)])
def test_fast_svd_on_the_flattest_spectrum(shape):
    """A random matrix has no gap after its leading singular values."""
    generator = torch.Generator().manual_seed(0)
    assert captured(torch.randn(shape, generator=generator), 32) > 0.999


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_decomposition_leaves_the_global_generator_alone(svd):
    """Banks do not depend on the global seed, nor change the generator."""
    weight, banks = randn(6, 40, 30).float(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        banks.append(decompose(weight, 2, 3, 8.0, svd=svd))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(banks[0].lora_A, banks[1].lora_A)
    assert torch.equal(banks[0].lora_B, banks[1].lora_B)


# The sign convention


def test_orient_makes_the_largest_entry_positive():
    """Of equal entries the first counts."""
    U = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]).double()
    Vh = torch.tensor([[1, -3, 2], [3, 1, -2], [-2, 2, 1], [2, -2, 1]]).double()
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0]).double()
    U_new, Vh_new = orient_singular_pairs(U.clone(), Vh.clone())
    assert torch.equal(U_new, U * signs)
    assert torch.equal(Vh_new, Vh * signs[:, None])


# Eq. 7: routing


@pytest.mark.parametrize("shape", [(8,), (3, 4), (2, 3, 5)])
def test_routing_weights_are_k_times_softmax(shape):
    """Eq. 7: alpha = K softmax(z)."""
    z, K = 3 * randn(8, *shape), shape[-1]
    alpha = routing_weights(z)
    for index in itertools.product(*map(range, shape[:-1])):
        row = z[index].exp()
        assert_close(alpha[index], torch.stack([K * e / row.sum() for e in row]))


@pytest.mark.parametrize("top_k", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("decimals", [9, 0, -1])
def test_select_experts(top_k, decimals):
    """Exactly top_k, the largest logits; ties go to the lowest index."""
    z = randn(9, 5, 40, 8).round(decimals=decimals)
    mask = select_experts(z, top_k)
    assert mask.dtype == torch.bool and mask.shape == z.shape
    for row, chosen in zip(z.reshape(-1, 8).tolist(), mask.reshape(-1, 8).tolist(), strict=True):
        ranked = sorted(range(8), key=row.__getitem__, reverse=True)  # stable: lowest index first
        assert [k for k in range(8) if chosen[k]] == sorted(ranked[:top_k])


# Eq. 8, 9


def test_component_gradients():
    """Eq. 8: g_i = [dL/da_i ; dL/db_i]."""
    grad_A, grad_B = randn(10, 6, 5), randn(11, 7, 6)
    g = component_gradients(grad_A, grad_B)
    assert g.shape == (6, 12)
    for i in range(6):
        assert g[i].tolist() == grad_A[i].tolist() + [float(grad_B[j, i]) for j in range(7)]


@pytest.mark.parametrize("batch", [(), (3,)])
def test_unit_gradients(batch):
    """Eq. 9; a zero row stays zero."""
    g = randn(12, *batch, 6, 9)
    g[..., 2, :] = 0
    unit = unit_gradients(g)
    for got, row in zip(unit.reshape(-1, 9), g.reshape(-1, 9), strict=True):
        assert_close(got, row / row.norm() if row.any() else row)
    by_hand = unit_gradients(torch.tensor([[3.0, -4.0], [0.0, 0.0]]).double())
    assert_close(by_hand, torch.tensor([[0.6, -0.8], [0.0, 0.0]]).double())


@pytest.mark.parametrize("exponent", [-30, -25, -20, 0, 19, 25, 30])
def test_unit_gradients_in_float32_at_any_scale(exponent):
    """Norms from 1e-30 to 1e30 neither underflow nor overflow."""
    row = randn(13, 4, 50)
    row = row / row.norm(dim=1, keepdim=True)
    unit = unit_gradients((row * 10.0**exponent).float())
    assert_close(unit.double(), row, rtol=1e-5, atol=1e-6)


# Eq. 10 to 14, one function at a time


def naive_angles(unit, labels, K):
    """Compute mean angles over pairs of groups, and over pairs within groups."""
    C = centroid_matrix(unit, labels, K)
    inter = [angle(C[:, k], C[:, j]) for k, j in itertools.combinations(range(K), 2)]
    intra = [angle(unit[i], unit[j]) for k in range(K)
             for i, j in itertools.combinations(members(labels, k), 2)]
    return torch.tensor([np.mean(inter), np.mean(intra)])


# On a Gram matrix, labels and K; the same on unit vectors; and how close they are.
FUNCTIONS = {
    "objective": (grouping_objective,
                  lambda *args: torch.tensor(objective(*args), dtype=torch.float64),
                  dict(rtol=1e-10, atol=0)),
    "centroids": (centroid_gram, lambda *args: centroid_matrix(*args).T @ centroid_matrix(*args),
                  dict(rtol=1e-7, atol=1e-7)),
    "k-means": (lambda gram, _, K: spherical_kmeans(gram, K),
                lambda unit, _, K: naive_kmeans(unit, K), dict(rtol=0, atol=0)),
    "similarity": (orthogonalized_similarity, similarity, dict(rtol=1e-7, atol=1e-9)),
    "angles": (lambda *args: torch.stack(gradient_angles(*args), -1), naive_angles,
               dict(rtol=0, atol=1e-6)),
}


SMALL_SHAPES = [(8, 6, 2), (9, 6, 3), (12, 6, 4)]


@pytest.mark.parametrize(("name", "N", "D", "K"), [
    (name, *shape) for name in FUNCTIONS for shape in [*SHAPES, (16, 30, 8), *SMALL_SHAPES]])
def test_functions_of_gram_matrices(name, N, D, K):
    """Each equals its loop in full space, for one layer and for several."""
    function, naive, tolerance = FUNCTIONS[name]
    seeds = [10 * seed + 1 for seed in range(4)]
    unit = torch.stack([units(seed, N, D) for seed in seeds])
    labels = torch.stack([random_labels(seed, N, K) for seed in seeds])
    together = function(unit @ unit.mT, labels.clone(), K)
    for layer in range(4):
        alone = function(unit[layer] @ unit[layer].T, labels[layer].clone(), K)
        assert_close(together[layer], alone)
        assert_close(alone, naive(unit[layer], labels[layer], K), **tolerance)


@pytest.mark.parametrize(("distance", "low", "high"),
                         [(0.0, 0.0, 1e-15), (1e-3, 5e-8, 8e-7), (3e-3, 1.2e-6, 1e-5)])
def test_orthogonalized_similarity_with_a_singular_centroid_matrix(distance, low, high):
    """Empty groups and eigenvalues below 1e-6 of the largest are left out."""
    unit = units(31, 12, 10)
    unit[4:8] = unit[:4] + distance * randn(32, 4, 10)  # c_0 and c_1 are (nearly) parallel
    unit = unit / unit.norm(dim=1, keepdim=True)
    labels = torch.arange(12) // 4  # group 3 is empty
    ratio = torch.linalg.svdvals(centroid_matrix(unit, labels, 3)) ** 2
    assert low <= float(ratio[-1] / ratio[0]) <= high, "choose another distance for this test"
    got = orthogonalized_similarity(unit @ unit.T, labels, 4)
    assert_close(got, similarity(unit, labels, 4), rtol=1e-6, atol=1e-7)
    assert got[:, 3].abs().max() <= 1e-7


@pytest.mark.parametrize(("N", "K"), [(6, 2), (6, 3), (8, 4), (4, 4)])
def test_balanced_assignment_is_optimal(N, K):
    """Brute force over all balanced groupings finds none better."""
    sim = torch.stack([randn(seed, N, K) for seed in range(3)])
    sim[..., 0] += 2  # everybody wants the first group
    together = balanced_assignment(sim)
    assert together.dtype == torch.int64 and is_balanced(together, K)
    for layer in range(3):
        sums = {c: sum(float(sim[layer, i, k]) for i, k in enumerate(c))
                for c in balanced_labelings(N, K)}
        assert tuple(together[layer].tolist()) == max(sums, key=sums.get)
        assert torch.equal(balanced_assignment(sim[layer]), together[layer])


def test_gradient_angles_by_hand():
    """Equal vectors are at 0 degrees, not NaN, and opposite centroids at 180."""
    e = torch.eye(2, dtype=torch.float64)
    unit = torch.stack([e[0], e[0], -e[0], -e[0]])
    inter, intra = gradient_angles(unit @ unit.T, torch.tensor([0, 0, 1, 1]), 2)
    assert (float(inter), float(intra)) == pytest.approx((180, 0), abs=1e-4)
    for row in units(91, 30, 7):  # rounding takes some of these cosines above 1
        unit = row.expand(6, 7)
        angles = gradient_angles(unit @ unit.T, torch.arange(6) // 3, 2)
        assert [float(a) for a in angles] == pytest.approx([0, 0], abs=1e-4)
    unit = torch.stack([e[0], e[1], -e[0], e[1]])
    inter, intra = gradient_angles(unit @ unit.T, torch.tensor([0, 0, 1, 1]), 2)
    assert (float(inter), float(intra)) == pytest.approx((90, 90), abs=1e-6)


# Names and the whole pipeline


@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_relabel_keeps_the_partition_and_most_names(K, seed):
    """No other naming of the groups overlaps `current` more."""
    labels, current = random_labels(seed, 4 * K, K), random_labels(seed + 1, 4 * K, K)
    got = relabel(labels, current, K)
    best = max(sum(names[a] == b for a, b in zip(labels.tolist(), current.tolist(), strict=True))
               for names in itertools.permutations(range(K)))
    assert got.dtype == torch.int64 and set(got.tolist()) == set(range(K))
    assert torch.equal(partition(got), partition(labels))
    assert int((got == current).sum()) == best


@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_group_components_is_the_looped_pipeline(N, D, K, seed):
    """Eq. 9 to 14 in Gram space equal those in full space, for gradients of any length."""
    g = units(10 * seed + 1, N, D) * randn(seed, N, 1).exp()
    got = group_components(g, K)
    assert got.dtype == torch.int64 and is_balanced(got, K)
    assert torch.equal(got, naive_groups(g, K))


@pytest.mark.parametrize(("K", "r"), [(8, 4), (4, 4), (3, 5), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_groups_are_found(K, r, dtype):
    """Orthogonal directions plus noise are recovered."""
    for seed in range(12):
        g, truth = planted(seed, K, r)
        got = group_components(g.to(dtype), K)
        assert torch.equal(got, first_member_order(truth))


def test_grouping_is_deterministic():
    """It uses no random numbers and changes neither inputs nor the global generator."""
    g, current, results = units(140, 32, 20), random_labels(3, 32, 8), []
    inputs = g.clone(), current.clone()
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        results.append(group_components(g, 8, current=current))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0], results[1])
    assert torch.equal(inputs[0], g) and torch.equal(inputs[1], current)


def test_layers_are_grouped_as_if_alone():
    """(L, N, D) gives each layer's own groups, named to overlap `current`."""
    g = torch.stack([units(seed + 150, 16, 12) * 10.0**seed for seed in range(4)])
    current = torch.stack([random_labels(seed, 16, 4) for seed in range(4)])
    free = group_components(g, 4)
    named = group_components(g, 4, current=current)
    assert free.shape == named.shape == (4, 16)
    for layer in range(4):
        assert torch.equal(free[layer], group_components(g[layer], 4))
        alone = group_components(g[layer], 4, current=current[layer])
        assert torch.equal(named[layer], alone)
        best = relabel(free[layer], current[layer], 4)  # of several best namings, maybe another
        assert torch.equal(partition(alone), partition(best))
        assert (alone == current[layer]).sum() == (best == current[layer]).sum()


def test_duplicated_gradients_still_give_a_balanced_grouping():
    """Fewer directions than experts leave clusters empty and C singular."""
    g = torch.eye(5, dtype=torch.float64)[[0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0]]
    assert is_balanced(group_components(g, 4), 4)
    current = random_labels(4, 12, 4)
    assert is_balanced(group_components(g, 4, current=current), 4)


DEGENERATE = {
    "all zero": (torch.zeros(12, 10), "0 non-zero singular values, and 4"),
    "rank 3": (randn(1, 12, 3) @ randn(2, 3, 10), "3 non-zero singular values, and 4"),
    "equal rows": (torch.ones(12, 10), "1 non-zero singular value"),
    "one row": (F.pad(randn(3, 1, 10), (0, 0, 0, 11)), "1 non-zero singular value"),
    "subnormal": (torch.full((12, 10), 1e-45), "non-zero singular value"),
    "NaN": (torch.full((12, 10), torch.nan), "NaN or infinity"),
    "one infinity": (torch.eye(12, 10).index_put((torch.tensor(3), torch.tensor(3)),
                                                 torch.tensor(torch.inf)), "NaN or infinity"),
    "too narrow": (randn(4, 12, 3), "smaller side"),
    "one input": (randn(5, 12, 1), "smaller side"),
}


@pytest.mark.parametrize("svd", ["exact", "fast"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_a_weight_without_as_many_components_is_refused(name, svd):
    weight, named = DEGENERATE[name]
    with pytest.raises(InputError, match=named):
        decompose(weight.float(), 2, 2, 8.0, svd)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1), (1, 9), (9, 1), (40, 4)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_and_full_rank_weights_are_decomposed(shape, scale):
    N = min(shape)
    weight = scale * randn(6, *shape).float()
    A, B, residual, _ = decompose(weight, N, 1, 8.0)
    assert (A.abs().amax(1) > 0).all() and (B.abs().amax(0) > 0).all()
    assert residual.abs().max() <= 1e-5 * weight.abs().max()


# Eq. 9: zero and non-finite gradients


@pytest.mark.parametrize("seed", range(6))
def test_zero_gradients_keep_as_many_names_as_they_can(seed):
    """Zero gradients displace no others, and as many as possible stay in place."""
    g, truth = planted(seed, 4, 4)
    zeros = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:4].tolist()
    others = [i for i in range(16) if i not in zeros]
    g[zeros] = 0
    current = truth.clone()
    moved = others[seed]  # exchanges groups with a zero component, and wants its place back
    current[zeros[0]], current[moved] = truth[moved], truth[zeros[0]]
    got = group_components(g, 4, current=current)
    assert is_balanced(got, 4)
    assert torch.equal(got[others], truth[others])
    best = max(sum(int(current[z]) == k for z, k in zip(zeros, places, strict=True))
               for places in itertools.permutations(got[zeros].tolist()))
    assert int((got[zeros] == current[zeros]).sum()) == best


def test_zero_gradients_without_names_to_keep():
    """Without `current` the others are still grouped, and groups are balanced."""
    for seed in range(4):
        g, truth = planted(seed, 4, 4)
        zeros = members(truth, 1)[:2] + members(truth, 3)[:1]
        others = [i for i in range(16) if i not in zeros]
        g[zeros] = 0
        got = group_components(g, 4)
        assert is_balanced(got, 4)
        assert torch.equal(partition(got[others]), partition(truth[others]))


def test_a_layer_without_any_gradient_keeps_its_grouping():
    """Other layers are regrouped."""
    g, truth = planted(5, 4, 4)
    current = torch.stack([random_labels(6, 16, 4), random_labels(7, 16, 4)])
    got = group_components(torch.stack([g, torch.zeros_like(g)]), 4, current=current)
    assert torch.equal(partition(got[0]), partition(truth))
    assert torch.equal(got[1], current[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_skip_that_layer_only(bad):
    """It keeps `current`; without `current` it is an error."""
    g, truth = zip(*(planted(seed, 4, 4) for seed in (8, 9, 10)), strict=True)
    g = torch.stack(g)
    g[1, 6, 3] = bad
    current = torch.stack([random_labels(seed, 16, 4) for seed in (1, 2, 3)])
    got = group_components(g, 4, current=current)
    assert torch.equal(got[1], current[1])
    assert torch.equal(partition(got[0]), partition(truth[0]))
    assert torch.equal(partition(got[2]), partition(truth[2]))
    assert torch.equal(group_components(g[1], 4, current=current[1]), current[1])
    for gradients in (g, g[1]):
        with pytest.raises(ValueError):
            group_components(gradients, 4)


def test_components_that_do_not_divide_are_refused():
    """The message names N and K."""
    with pytest.raises(ValueError, match="(?s)(14.*4|4.*14)"):
        group_components(units(1, 14, 6), 4)
