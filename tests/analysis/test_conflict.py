"""Test conflict statistics on planted vectors, and adapters against autograd."""

import argparse
import types

import numpy as np
import pytest
import torch
from conftest import Killed, failing, wrapped
from tiny import assert_same, base_model, rows_of, trainable, weights_of

from analysis import conflict, gradients
from analysis.probes import batch_of
from evaluation import row_losses, target_logits

T, H = 5, 8


def gram_of(vectors):
    """Return G (T, H, T, H) of fold vectors (T, H, P)."""
    return np.einsum("tfp,ugp->tfug", vectors, vectors)


def planted(signal, noise, seed, P=400, T=T, H=H):
    """Return vectors (T, H, P): orthogonal task means of norm `signal`, noise of norm `noise`."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(T, H, P)) * noise / np.sqrt(P)
    vectors[np.arange(T), :, np.arange(T)] += signal
    return vectors


# --- statistics ---------------------------------------------------------------------------------


def test_by_loops():
    G = gram_of(planted(1, 1, 0))
    found = conflict.conflict(G)
    mean = [[np.mean(G[t, :, u, :]) for u in range(T)] for t in range(T)]
    own = [np.mean([G[t, f, t, g] for f in range(H) for g in range(H) if f != g])
           for t in range(T)]
    assert conflict.own_products(G) == pytest.approx(own)
    assert found["reliability"] == pytest.approx([own[t] / mean[t][t] for t in range(T)])
    cosine = mean[0][1] / np.sqrt(mean[0][0] * mean[1][1])
    assert found["cosines"][0][1] == pytest.approx(cosine)
    off = sum(mean[t][u] for t in range(T) for u in range(T) if t != u)
    assert found["cancellation"] == pytest.approx(off / ((T - 1) * sum(own)))
    folds = [[G[0, g, 1, h] for g in range(H) for h in range(H) if f not in (g, h)]
             for f in range(H)]
    left = np.array([np.mean(values) for values in folds])
    error = np.sqrt((H - 1) / H * ((left - left.mean())**2).sum())
    assert conflict.jackknife_error(G)[0, 1] == pytest.approx(error)


def test_own_products_are_unbiased():
    own = [conflict.own_products(gram_of(planted(1, 3, seed, P=50))).mean() for seed in range(400)]
    assert np.mean(own) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("signal", [0, 1, 5])
def test_orthogonal_tasks_are_not_decided(signal):
    """Few pairs are decided at any signal strength; without signal no task is reliable."""
    found = [conflict.conflict(gram_of(planted(signal, 3, seed))) for seed in range(40)]
    below, _, above = np.mean([each["decided"] for each in found], axis=0)
    assert below <= 0.08 and above <= 0.08
    if signal == 0:
        assert abs(np.median([each["median_reliability"] for each in found])) < 0.1
        assert np.mean([each["corrected_pairs"] for each in found]) < 1
    if signal == 5:
        assert np.mean([each["cancellation"] for each in found]) == pytest.approx(0, abs=0.02)


def test_equal_and_opposite_tasks():
    generator = np.random.default_rng(1)
    mean = generator.normal(size=200)
    noise = generator.normal(size=(2, H, 200))
    same = conflict.conflict(gram_of(mean + noise))
    assert same["corrected"] == pytest.approx(1, abs=0.1) and same["decided"] == [0, 0, 1]
    opposite = conflict.conflict(gram_of(mean * np.array([1, -1])[:, None, None] + 0 * noise))
    assert opposite["cosine"] == pytest.approx(-1) and opposite["decided"] == [1, 0, 0]
    assert opposite["cancellation"] == pytest.approx(-1)


def test_a_task_without_gradient():
    vectors = planted(1, 1, 0)
    vectors[2] = 0
    assert conflict.conflict(gram_of(vectors)) is None


def test_gram_matrix_in_parts(monkeypatch):
    vectors = torch.randn(3, 70)
    monkeypatch.setattr(conflict, "CHUNK", 16)
    assert torch.allclose(conflict.gram_matrix(vectors), vectors.double() @ vectors.double().T)


def test_interference():
    delta = np.array([[-2., 1, -1], [0.5, -1, 0], [-0.5, 1e-9, -4]])
    found = conflict.interference(delta, np.ones(3))
    assert found["interference_share"] == 2 / 6 and found["improved"] == 3
    assert found["harm_ratio"] == pytest.approx(1.5 / 3)
    assert found["transfer"] == pytest.approx(np.median([-0.5, 0.5, -0.5, 0, 0.125, -1e-9 / 4]))
    delta[0, 0] = 1
    none = conflict.interference(delta, np.ones(3))
    assert none["harm_ratio"] is None and "in only 2 of 3 cases" in none["reason"]


# --- adapters -----------------------------------------------------------------------------------


def one_adapter(method, **changed):
    """Return a OneAdapter for three tasks, with trained weights that are not zero."""
    model = wrapped(base_model(), method, **changed)
    for index, weight in enumerate(trainable(model).values()):
        torch.manual_seed(index)
        with torch.no_grad():
            weight += 0.05 * torch.randn_like(weight)
    rows = {f"task{t}": [row | {"id": str(i)} for i, row in enumerate(rows_of(t, 19))]
            for t in range(3)}
    args = argparse.Namespace(folds=H, lookahead=3, learning_rate=1e-6, micro_batch=4)
    adapter = types.SimpleNamespace(results={})
    names = list(model.adapted_by.layers)
    return gradients.OneAdapter(args, adapter, model, rows, 2, names, names[:1])


def kept_of(one):
    return {task: one.gradients(task, lambda rows: None) for task in one.rows}


def autograd(one, task, fold):
    """Compute {weight: mean gradient} of one fold, row by row."""
    mine, total = one.rows[task][fold::H], {}
    for row in mine:
        batch = batch_of([row], 2, "cpu")
        loss = row_losses(target_logits(one.model, batch), batch).sum() / len(mine)
        weights = trainable(one.model)
        for name, g in zip(weights, torch.autograd.grad(loss, weights.values(),
                                                        allow_unused=True), strict=True):
            total[name] = total.get(name, 0) + (torch.zeros_like(weights[name]) if g is None else g)
    return total


@pytest.mark.parametrize("method", ["badit", "loramoe", "lora"])
def test_gram_is_that_of_autograd(method):
    """The groups add up to the whole; each is symmetric and positive semidefinite."""
    one = one_adapter(method)
    kept = kept_of(one)
    whole = 0
    for name in one.names:
        mine = [key for key, _ in gradients.trained_weights(one.model) if key.startswith(name)]
        grams = [one.gram(vectors) for vectors in one.groups(name, mine, kept)]
        assert len(grams) == (9 if method != "lora" else 1)
        for gram in grams:
            flat = gram.reshape(3 * H, 3 * H)
            assert np.allclose(flat, flat.T)
            assert np.linalg.eigvalsh(flat).min() > -1e-6 * max(1, flat.max())
        whole = whole + sum(grams)
    naive = np.array([[np.concatenate([part.numpy().ravel() for part in
                                       autograd(one, task, fold).values()]) for fold in range(H)]
                      for task in one.rows])
    assert np.allclose(whole, gram_of(naive), rtol=1e-3, atol=1e-5)
    found = one.conflicts(kept)
    assert found["whole"]["norms"] == pytest.approx(np.sqrt(
        [gram_of(naive)[t, :, t, :].mean() for t in range(3)]), rel=1e-3)
    assert (found["energy"] is None) == (method == "lora")


def test_a_regrouping_changes_no_task_gradient():
    """With equal gates and all experts active, the Gram matrices of experts sum to the same."""
    one = one_adapter("badit", top_k=8)
    name = one.names[0]
    layer = one.model.get_submodule(name)
    with torch.no_grad():
        layer.router.zero_()
    mine = [key for key, _ in gradients.trained_weights(one.model) if key.startswith(name)]
    sums, parts = [], []
    for seed in range(2):
        layer.expert_of.copy_(layer.expert_of[torch.randperm(
            16, generator=torch.Generator().manual_seed(seed))])
        grams = [one.gram(vectors) for vectors in one.groups(name, mine, kept_of(one))]
        parts.append(grams[0])
        sums.append(sum(grams[:-1]))
    assert np.allclose(*sums, rtol=1e-4, atol=1e-8) and not np.allclose(*parts, rtol=0.1)


def test_lookahead():
    """Weights are restored to the bit, also after an error; the first order predicts the change."""
    one = one_adapter("lora")
    one.held_out = one.rows  # the very rows of the gradients
    one.model.double()
    before = weights_of(one.model)
    kept = {task: {key: value.double() for key, value in each.items()}
            for task, each in kept_of(one).items()}
    means = gradients.Means(kept, [name for name, _ in gradients.trained_weights(one.model)])
    start = one.losses_after({}, lambda rows: None)
    delta = torch.stack([one.losses_after(means.step(task, one.step_size), lambda rows: None)
                         for task in one.rows]) - start
    assert_same(before, weights_of(one.model))
    predicted = -one.step_size * means.preconditioned().numpy()
    assert np.abs(delta.numpy() - predicted).max() < 0.05 * np.abs(predicted).max()
    step = means.step("task0", 1.0)
    with pytest.raises(Killed), failing(gradients, "row_losses", 3):
        one.losses_after(step, lambda rows: None)
    assert_same(before, weights_of(one.model))
