"""Equations 5 to 14 against looped float64 versions in full space (no Gram matrix, no batches)."""

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
    """A balanced grouping in random order."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(N) // (N // K))[order]


def units(seed, N, D):
    """N unit vectors with some structure: each a random one plus one of five common ones."""
    g = randn(seed, N, D) + 1.5 * randn(seed + 1, 5, D)[random_labels(seed, 5 * N, 5)[:N]]
    return torch.stack([row / row.norm() for row in g])


def planted(seed, K, r, D=40, noise=0.3, truth=None):
    """Gradients around K orthogonal directions, shuffled, of any length: (gradients, truth)."""
    directions = torch.linalg.qr(randn(seed, D, K)).Q.T
    truth = random_labels(seed, K * r, K) if truth is None else truth
    g = directions[truth] + noise * randn(seed + 1, len(truth), D) / D**0.5
    return g * randn(seed + 2, len(truth), 1).exp(), truth


def partition(labels):
    """What a grouping says apart from its names: which pairs are together."""
    return labels[:, None] == labels[None, :]


def members(labels, k):
    return [i for i, label in enumerate(labels.tolist()) if label == k]


def is_balanced(labels, K):
    N = labels.shape[-1]
    rows = labels.reshape(-1, N)
    return all(len(members(row, k)) * K == N for row in rows for k in range(K))


def balanced_labelings(N, K):
    """Every balanced grouping of a tiny N."""
    return sorted(set(itertools.permutations([i // (N // K) for i in range(N)])))


def centroid_matrix(unit, labels, K):
    """Eq. 12: C (D, K), one centroid a column."""
    C = torch.zeros(unit.shape[1], K, dtype=torch.float64)
    for i, k in enumerate(labels.tolist()):
        C[:, k] = C[:, k] + unit[i]
    return C


def polar(C):
    """Eq. 13: Q = U V^T from the SVD, leaving out singular values with a vanishing square."""
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    keep = S**2 > 1e-6 * S[0] ** 2
    return U[:, keep] @ Vh[keep]


def objective(unit, labels, K):
    """Eq. 10: sum over the groups of the squared norm of the sum of their members."""
    return sum(float(centroid_matrix(unit, labels, K)[:, k].norm() ** 2) for k in range(K))


def similarity(unit, labels, K):
    """Eq. 13: <ghat_i, q_k> one at a time."""
    Q = polar(centroid_matrix(unit, labels, K))
    return torch.tensor([[float(g @ Q[:, k]) for k in range(K)] for g in unit]).double()


def naive_kmeans(unit, K):
    """Eq. 11: farthest-first centres, then assign and renormalise; asserts no empty cluster."""
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
    """Eq. 14 with one column per place instead of one per group."""
    N, K = sim.shape
    places = [k for k in range(K) for _ in range(N // K)]
    _, chosen = linear_sum_assignment(sim[:, places].numpy(), maximize=True)
    return torch.tensor([places[c] for c in chosen])


def first_member_order(labels):
    """Names 0, 1, ... in order of first member."""
    names = {}
    return torch.tensor([names.setdefault(k, len(names)) for k in labels.tolist()])


def naive_groups(gradients, K):
    """Eq. 9 to 14 in full space."""
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
    """residual + s B A = W0 whatever the accuracy of the SVD."""
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
    """Eq. 5, 6: s b_i a_i = sigma_i u_i v_i^T, shared equally by a_i and b_i, sigma falling."""
    weight = randn(2, 15, 22)
    bad = decompose(weight, 3, 4, scaling)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert_close(bad.singular_values, S[:12], rtol=1e-10, atol=1e-12)
    for i in range(12):
        a, b = bad.lora_A[i], bad.lora_B[:, i]
        assert_close(scaling * torch.outer(b, a), S[i] * torch.outer(U[:, i], Vh[i]))
        assert_close(a.norm(), (S[i] / scaling).sqrt())
        assert_close(b.norm(), (S[i] / scaling).sqrt())


def test_decompose_a_matrix_known_by_hand():
    """Eq. 5, 6: diag(9, 4, 1) with s = 1 has a_i = b_i = sqrt(sigma_i) e_i and residual e_3."""
    bad = decompose(torch.diag(torch.tensor([4.0, 1.0, 9.0]).double()), 2, 1, 1.0)
    expected = torch.tensor([[0.0, 0.0, 3.0], [2.0, 0.0, 0.0]]).double()
    assert_close(bad.lora_A, expected)
    assert_close(bad.lora_B, expected.T)
    assert_close(bad.residual, torch.diag(torch.tensor([0.0, 1.0, 0.0]).double()))


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_experts_are_orthogonal_at_init(svd):
    """Theorem A.1, Prop. A.2: Frobenius products of experts vanish; squared norms add up."""
    K, r, s = 4, 3, 2.0
    bad = decompose(randn(3, 26, 21), K, r, s, svd=svd)
    experts = [s * bad.lora_B[:, k * r:(k + 1) * r] @ bad.lora_A[k * r:(k + 1) * r]
               for k in range(K)]
    for k, j in itertools.product(range(K), range(K)):
        product = float((experts[k] * experts[j]).sum())
        sigma = bad.singular_values[k * r:(k + 1) * r]
        expected = float((sigma**2).sum()) if k == j else 0.0
        assert abs(product - expected) <= 1e-8 * float(experts[0].norm() ** 2)


def test_fast_svd_finds_a_decaying_spectrum():
    """The fast decomposition agrees with the exact one where the spectrum decays."""
    U, V = (torch.linalg.qr(randn(seed, 60, 60)).Q for seed in (4, 5))
    S = 0.8 ** torch.arange(60, dtype=torch.float64)
    bad = decompose(U @ torch.diag(S) @ V.T, 4, 2, 8.0, svd="fast")
    assert_close(bad.singular_values, S[:8], rtol=0, atol=1e-2)
    total, best = 8.0 * bad.lora_B @ bad.lora_A, U[:, :8] @ torch.diag(S[:8]) @ V[:, :8].T
    assert (total - best).norm() <= 0.05 * best.norm()


def captured(W, N):
    """Share of the energy of the exact N leading triplets that "fast" ones capture."""
    U, S, Vh = top_singular_triplets(W, N, "fast")
    assert (U.T @ U - torch.eye(N)).abs().max() < 1e-4
    assert (Vh @ Vh.T - torch.eye(N)).abs().max() < 1e-4
    exact = torch.linalg.svdvals(W.double())[:N]
    return float((W @ Vh.T).double().square().sum() / exact.square().sum())


def test_fast_svd_on_real_weights(smollm2):
    """At least 99.9 % of the energy of the exact top 32, in layers whose spectrum is flat."""
    model, _ = models.load(smollm2)
    layers = model.model.layers
    assert min(captured(layers[i].mlp.gate_proj.weight.detach(), 32) for i in (0, 9, 29)) > 0.9999


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 33), (500, 48)])
def test_fast_svd_on_the_flattest_spectrum(shape):
    """A random matrix has no gap at all after the leading singular values."""
    generator = torch.Generator().manual_seed(0)
    assert captured(torch.randn(shape, generator=generator), 32) > 0.999


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_decomposition_leaves_the_global_generator_alone(svd):
    """Equal banks under any global seed, and the generator's state is untouched."""
    weight, banks = randn(6, 40, 30).float(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        banks.append(decompose(weight, 2, 3, 8.0, svd=svd))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(banks[0].lora_A, banks[1].lora_A)
    assert torch.equal(banks[0].lora_B, banks[1].lora_B)


@pytest.mark.parametrize("svd", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(11, 30), (30, 11)])
def test_decompose_refuses_more_components_than_dimensions(shape, svd):
    """N > min(m, n) is an error that names the values; N = min(m, n) is not."""
    with pytest.raises(ValueError, match="11"):
        decompose(randn(7, *shape), 3, 4, 8.0, svd=svd)
    full = decompose(randn(7, *shape), 11, 1, 8.0)
    assert full.residual.abs().max() <= 1e-12


# The sign convention


def test_orient_makes_the_largest_entry_positive():
    """The largest entry of v_i is positive, the first one on ties."""
    U = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]).double()
    Vh = torch.tensor([[1, -3, 2], [3, 1, -2], [-2, 2, 1], [2, -2, 1]]).double()
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0]).double()
    U_new, Vh_new = orient_singular_pairs(U.clone(), Vh.clone())
    assert torch.equal(U_new, U * signs)
    assert torch.equal(Vh_new, Vh * signs[:, None])


@pytest.mark.parametrize("seed", range(3))
def test_flipped_svd_gives_equal_banks_and_groupings(seed, monkeypatch):
    """Other signs from the SVD change neither the bank nor the grouping."""
    weight, gradient, true_svd = randn(seed, 30, 26), randn(seed + 10, 30, 26), torch.linalg.svd

    def bank_and_groups():
        bad = decompose(weight, 4, 4, 2.0)
        g = [torch.cat([bad.lora_B[:, i] @ gradient, gradient @ bad.lora_A[i]]) for i in range(16)]
        return bad, group_components(torch.stack(g), 4), torch.stack(g)

    def flipped_svd(*args, **kwargs):
        U, S, Vh = true_svd(*args, **kwargs)
        flip = randn(seed + 20, len(S)).sign().to(S.dtype)
        U, Vh = U.clone(), Vh.clone()
        U[:, : len(S)] *= flip
        Vh[: len(S)] *= flip[:, None]
        return U, S, Vh

    bad, groups, g = bank_and_groups()
    monkeypatch.setattr(torch.linalg, "svd", flipped_svd)
    flipped_bad, flipped_groups, _ = bank_and_groups()
    monkeypatch.undo()
    assert torch.equal(bad.lora_A, flipped_bad.lora_A)
    assert torch.equal(bad.lora_B, flipped_bad.lora_B)
    assert torch.equal(groups, flipped_groups)
    turned = g * randn(seed + 20, 16).sign()[:, None]  # the convention is needed
    assert not torch.equal(groups, group_components(turned, 4))


# Eq. 7: routing


@pytest.mark.parametrize("shape", [(8,), (3, 4), (2, 3, 5)])
def test_routing_weights_are_k_times_softmax(shape):
    """alpha = K softmax(z)."""
    z, K = 3 * randn(8, *shape), shape[-1]
    alpha = routing_weights(z)
    for index in itertools.product(*map(range, shape[:-1])):
        row = z[index].exp()
        assert_close(alpha[index], torch.stack([K * e / row.sum() for e in row]))


def test_routing_weights_by_hand():
    """Equal logits of any size give 1; logits log(1), log(3) give 0.5 and 1.5."""
    assert_close(routing_weights(torch.full((2, 6), 700.0)), torch.ones(2, 6))
    z = torch.tensor([1.0, 3.0]).double().log()
    assert_close(routing_weights(z), torch.tensor([0.5, 1.5]).double())


@pytest.mark.parametrize("top_k", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("decimals", [9, 0, -1])
def test_select_experts(top_k, decimals):
    """The top_k largest logits, the lowest index on ties, exactly top_k; also of equal logits."""
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
    """Eq. 9: each row over its norm; a zero row stays zero."""
    g = randn(12, *batch, 6, 9)
    g[..., 2, :] = 0
    unit = unit_gradients(g)
    for got, row in zip(unit.reshape(-1, 9), g.reshape(-1, 9), strict=True):
        assert_close(got, row / row.norm() if row.any() else row)
    by_hand = unit_gradients(torch.tensor([[3.0, -4.0], [0.0, 0.0]]).double())
    assert_close(by_hand, torch.tensor([[0.6, -0.8], [0.0, 0.0]]).double())


@pytest.mark.parametrize("exponent", [-30, -25, -20, 0, 19, 25, 30])
def test_unit_gradients_in_float32_at_any_scale(exponent):
    """Eq. 9: no under- or overflow for norms from 1e-30 to 1e30."""
    row = randn(13, 4, 50)
    row = row / row.norm(dim=1, keepdim=True)
    unit = unit_gradients((row * 10.0**exponent).float())
    assert_close(unit.double(), row, rtol=1e-5, atol=1e-6)


# Eq. 10 to 14, one function at a time


def naive_angles(unit, labels, K):
    """Means of the arccos over pairs of groups, and over pairs within groups."""
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
    """Each against its loop in full space, for layers alone and for several at once."""
    function, naive, tolerance = FUNCTIONS[name]
    seeds = [10 * seed + 1 for seed in range(4)]
    unit = torch.stack([units(seed, N, D) for seed in seeds])
    labels = torch.stack([random_labels(seed, N, K) for seed in seeds])
    together = function(unit @ unit.mT, labels.clone(), K)
    for layer in range(4):
        alone = function(unit[layer] @ unit[layer].T, labels[layer].clone(), K)
        assert_close(together[layer], alone)
        assert_close(alone, naive(unit[layer], labels[layer], K), **tolerance)


def test_objective_by_hand():
    """Eq. 10: two pairs of equal vectors score 4 + 4 together and 2 + 2 apart."""
    unit = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    for labels, value in [([0, 0, 1, 1], 8.0), ([0, 1, 0, 1], 4.0), ([1, 0, 0, 1], 4.0)]:
        assert float(grouping_objective(unit @ unit.T, torch.tensor(labels), 2)) == value


@pytest.mark.parametrize("seed", range(10))
def test_spherical_kmeans_finds_groups_of_unequal_size(seed):
    """Eq. 11: k-means does not balance."""
    sizes = torch.tensor([1, 2, 5, 8])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    g, truth = planted(seed, 4, 4, truth=torch.arange(4).repeat_interleave(sizes)[order])
    unit = unit_gradients(g)
    found = spherical_kmeans(unit @ unit.T, 4)
    assert torch.equal(partition(found), partition(truth))


@pytest.mark.parametrize(("distance", "low", "high"),
                         [(0.0, 0.0, 1e-15), (1e-3, 5e-8, 8e-7), (3e-3, 1.2e-6, 1e-5)])
def test_orthogonalized_similarity_with_a_singular_centroid_matrix(distance, low, high):
    """Eq. 13: an empty group and an eigenvalue below 1e-6 of the largest are left out."""
    unit = units(31, 12, 10)
    unit[4:8] = unit[:4] + distance * randn(32, 4, 10)  # c_0 and c_1 are (nearly) parallel
    unit = unit / unit.norm(dim=1, keepdim=True)
    labels = torch.arange(12) // 4  # group 3 is empty
    ratio = torch.linalg.svdvals(centroid_matrix(unit, labels, 3)) ** 2
    assert low <= float(ratio[-1] / ratio[0]) <= high, "choose another distance for this test"
    got = orthogonalized_similarity(unit @ unit.T, labels, 4)
    assert_close(got, similarity(unit, labels, 4), rtol=1e-6, atol=1e-7)
    assert got[:, 3].abs().max() <= 1e-7


def test_orthogonalized_similarity_by_hand():
    """Eq. 13: orthogonal centroids 2 e_1 and 2 e_2 have q_1 = e_1 and q_2 = e_2."""
    unit = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1]]
    got = orthogonalized_similarity(unit @ unit.T, torch.tensor([0, 0, 1, 1]), 2)
    assert_close(got, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).double())


@pytest.mark.parametrize(("N", "K"), [(6, 2), (6, 3), (8, 4), (4, 4)])
def test_balanced_assignment_is_optimal(N, K):
    """Eq. 14: the best of all balanced groupings, by brute force; also of several layers."""
    sim = torch.stack([randn(seed, N, K) for seed in range(3)])
    sim[..., 0] += 2  # everybody wants the first group
    together = balanced_assignment(sim)
    assert together.dtype == torch.int64 and is_balanced(together, K)
    for layer in range(3):
        sums = {c: sum(float(sim[layer, i, k]) for i, k in enumerate(c))
                for c in balanced_labelings(N, K)}
        assert tuple(together[layer].tolist()) == max(sums, key=sums.get)
        assert torch.equal(balanced_assignment(sim[layer]), together[layer])


@pytest.mark.parametrize("seed", range(6))
def test_rounds_never_lower_the_nuclear_norm(seed):
    """From one balanced round to the next the nuclear norm of C never falls."""
    N, D, K = 32, 24, 8
    unit, labels, rose = units(seed + 60, N, D), random_labels(seed, N, K), 0
    norms = [float(torch.linalg.svdvals(centroid_matrix(unit, labels, K)).sum())]
    for _ in range(8):
        labels = balanced_assignment(
            orthogonalized_similarity(unit @ unit.T, labels, K))
        assert is_balanced(labels, K)
        norms.append(float(torch.linalg.svdvals(centroid_matrix(unit, labels, K)).sum()))
        rose += norms[-1] > norms[-2] + 1e-9
        assert norms[-1] >= norms[-2] - 1e-9
    assert rose >= 1


def test_gradient_angles_by_hand():
    """Equal vectors are at 0 and not nan, opposite centroids at 180 degrees."""
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
    """The largest overlap of all K! namings, the partition untouched."""
    labels, current = random_labels(seed, 4 * K, K), random_labels(seed + 1, 4 * K, K)
    got = relabel(labels, current, K)
    best = max(sum(names[a] == b for a, b in zip(labels.tolist(), current.tolist(), strict=True))
               for names in itertools.permutations(range(K)))
    assert got.dtype == torch.int64 and set(got.tolist()) == set(range(K))
    assert torch.equal(partition(got), partition(labels))
    assert int((got == current).sum()) == best


def test_relabel_by_hand():
    """A pure renaming is undone; without names, order of first member."""
    current = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(relabel(torch.tensor([2, 2, 0, 0, 1, 1]), current, 3), current)
    got = relabel(torch.tensor([2, 0, 2, 1, 0, 1]), None, 3)
    assert got.tolist() == [0, 1, 0, 2, 1, 2]


@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_group_components_is_the_looped_pipeline(N, D, K, seed):
    """Eq. 9 to 14: equal to the full-space pipeline of any gradient lengths."""
    g = units(10 * seed + 1, N, D) * randn(seed, N, 1).exp()
    got = group_components(g, K)
    assert got.dtype == torch.int64 and is_balanced(got, K)
    assert torch.equal(got, naive_groups(g, K))


@pytest.mark.parametrize(("K", "r"), [(8, 4), (4, 4), (3, 5), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_groups_are_found(K, r, dtype):
    """Orthogonal group directions plus noise are recovered in any order."""
    for seed in range(12):
        g, truth = planted(seed, K, r)
        got = group_components(g.to(dtype), K)
        assert torch.equal(got, first_member_order(truth))


def test_grouping_keeps_names_of_the_current_one():
    """The partition does not depend on `current`, its names follow it."""
    for seed in range(5):
        g, current = units(seed + 120, 16, 12), random_labels(seed, 16, 4)
        free = group_components(g, 4)
        got = group_components(g, 4, current=current)
        assert torch.equal(partition(got), partition(free))
        overlaps = [sum(names[a] == b for a, b in zip(free.tolist(), current.tolist(), strict=True))
                    for names in itertools.permutations(range(4))]
        assert int((got == current).sum()) == max(overlaps)


def test_grouping_is_blind_to_positive_scales():
    """Eq. 9: multiplying each gradient by its own positive constant changes nothing."""
    for seed in range(4):
        g = units(seed + 130, 24, 20)
        scales = 10 ** (3 * randn(seed, 24, 1))
        assert torch.equal(group_components(g, 4),
                           group_components(g * scales, 4))


def test_grouping_is_deterministic():
    """No random numbers, and neither inputs nor the global generator change."""
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
    """(L, N, D) gives what each layer gives alone, with and without `current`."""
    g = torch.stack([units(seed + 150, 16, 12) * 10.0**seed for seed in range(4)])
    current = torch.stack([random_labels(seed, 16, 4) for seed in range(4)])
    free = group_components(g, 4)
    named = group_components(g, 4, current=current)
    assert free.shape == named.shape == (4, 16)
    for layer in range(4):
        alone = group_components(g[layer], 4)
        assert torch.equal(free[layer], alone)
        alone = group_components(g[layer], 4, current=current[layer])
        assert torch.equal(named[layer], alone)


def test_duplicated_gradients_still_give_a_balanced_grouping():
    """Eq. 11, 13: fewer directions than experts leave clusters empty and C singular."""
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


@pytest.mark.parametrize("zeros", [[0], [3, 7], [0, 5, 6, 15], [1, 2, 3, 4, 8]])
@pytest.mark.parametrize("seed", range(3))
def test_zero_gradients_stay_where_they_are_if_there_is_room(zeros, seed):
    """Eq. 9: a zero gradient takes a free place; here each one's own place is free."""
    names = torch.tensor([2, 0, 3, 1])
    g, truth = planted(seed, 4, 4, truth=torch.arange(16) % 4)
    g[zeros] = 0
    current = names[truth]
    current[zeros] = current[zeros].roll(1)  # not their planted groups: their free places
    assert torch.equal(group_components(g, 4, current=current), current)


@pytest.mark.parametrize("seed", range(6))
def test_zero_gradients_keep_as_many_names_as_they_can(seed):
    """Eq. 9: zeros never displace others, and no other filling keeps more of them in place."""
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
    """Eq. 9: with no current grouping the others are still grouped and the result balanced."""
    for seed in range(4):
        g, truth = planted(seed, 4, 4)
        zeros = members(truth, 1)[:2] + members(truth, 3)[:1]
        others = [i for i in range(16) if i not in zeros]
        g[zeros] = 0
        got = group_components(g, 4)
        assert is_balanced(got, 4)
        assert torch.equal(partition(got[others]), partition(truth[others]))


def test_a_layer_without_any_gradient_keeps_its_grouping():
    """Eq. 9: beside a layer that regroups, one with only zero gradients stays as it is."""
    g, truth = planted(5, 4, 4)
    current = torch.stack([random_labels(6, 16, 4), random_labels(7, 16, 4)])
    got = group_components(torch.stack([g, torch.zeros_like(g)]), 4, current=current)
    assert torch.equal(partition(got[0]), partition(truth))
    assert torch.equal(got[1], current[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_skip_that_layer_only(bad):
    """Eq. 9: a layer with a non-finite gradient keeps `current`; the others are regrouped."""
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
    """Eq. 14: N must be a multiple of K; the message names both."""
    with pytest.raises(ValueError, match="(?s)(14.*4|4.*14)"):
        group_components(units(1, 14, 6), 4)
