"""Test conflict statistics on planted vectors, and adapters against autograd."""

import argparse
import types

import numpy as np
import pytest
import torch
from conftest import Killed, failing, wrapped
from tiny import assert_same, base_model, rows_of, trainable, weights_of

from analysis import conflict, gradients
from analysis.probes import loss_of

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
    assert found["norms"] == pytest.approx([mean[t][t] ** 0.5 for t in range(T)])
    off = sum(mean[t][u] for t in range(T) for u in range(T) if t != u)
    assert found["cancellation"] == pytest.approx(off / ((T - 1) * sum(own)))
    folds = [[G[0, g, 1, h] for g in range(H) for h in range(H) if f not in (g, h)]
             for f in range(H)]
    left = np.array([np.mean(values) for values in folds])
    error = np.sqrt((H - 1) / H * ((left - left.mean())**2).sum())
    assert conflict.jackknife_error(G)[0, 1] == pytest.approx(error)
    assert conflict.conflict(G * (np.arange(T) > 0)[:, None]) is None  # a task without gradient


@pytest.mark.parametrize("signal", [0, 1, 5])
def test_orthogonal_tasks_are_not_decided(signal):
    """Few pairs are decided at any signal strength; without signal no task is reliable."""
    found = [conflict.conflict(gram_of(planted(signal, 3, seed))) for seed in range(40)]
    below, _, above = np.mean([each["decided"] for each in found], axis=0)
    assert below <= 0.08 and above <= 0.08
    if signal == 0:
        assert abs(np.median([each["median_reliability"] for each in found])) < 0.1
    if signal == 5:
        assert np.mean([each["cancellation"] for each in found]) == pytest.approx(0, abs=0.02)


def test_equal_and_opposite_tasks():
    generator = np.random.default_rng(1)
    mean = generator.normal(size=200)
    noise = generator.normal(size=(2, H, 200))
    same = conflict.conflict(gram_of(mean + noise))
    assert same["cancellation"] == pytest.approx(1, abs=0.1) and same["decided"] == [0, 0, 1]
    opposite = conflict.conflict(gram_of(mean * np.array([1, -1])[:, None, None] + 0 * noise))
    assert opposite["cosine"] == pytest.approx(-1) and opposite["decided"] == [1, 0, 0]
    assert opposite["cancellation"] == pytest.approx(-1)


def test_gram_matrix_in_parts(monkeypatch):
    vectors = torch.randn(3, 70)
    monkeypatch.setattr(conflict, "CHUNK", 16)
    assert torch.allclose(conflict.gram_matrix(vectors), vectors.double() @ vectors.double().T)


def test_interference():
    delta = np.array([[-2., 1, -1], [0.5, -1, 0], [-0.5, 1e-9, -4]])
    found = conflict.interference(delta, np.ones(3))
    assert found["interference_share"] == 2 / 6 and found["improved"] == 3
    assert found["harm_ratio"] == pytest.approx(1.5 / 3) and found["own_gain"] == 7 / 3
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
    args = argparse.Namespace(folds=H, lookahead=3, learning_rate=1e-6)
    adapter = types.SimpleNamespace(results={})
    return gradients.OneAdapter(args, adapter, model, rows, list(model.adapted_by.layers)[:1])


def kept_of(one):
    return {task: one.gradients(task, lambda rows: None) for task in one.rows}


@pytest.mark.parametrize("method", ["badit", "loramoe", "lora"])
def test_gram_is_that_of_autograd(method):
    one = one_adapter(method)
    kept = kept_of(one)
    naive = []  # T H vectors
    for rows in one.rows.values():
        for fold in range(H):
            one.model.zero_grad()
            mine = rows[fold::H]
            sum(loss_of(one.model, row)[0] for row in mine).div(len(mine)).backward()
            naive.append(np.concatenate([
                weight.grad.numpy().ravel() for weight in one.weights.values()
                if weight.grad is not None]))
    naive = gram_of(np.reshape(naive, (3, H, -1)))
    assert np.allclose(sum(one.gram(name, kept) for name in one.weights), naive, rtol=1e-3,
                       atol=1e-5)


def test_a_regrouping_changes_no_task_gradient():
    """With equal gates and all experts active, by trained and effective weight."""
    one = one_adapter("badit", top_k=8)
    layer = one.model.get_submodule(one.chosen[0])
    with torch.no_grad():
        layer.router.zero_()
    before = one.gradients("task0", lambda rows: None)
    layer.expert_of.copy_(layer.expert_of.flip(0))
    after = one.gradients("task0", lambda rows: None)
    for name in before:
        close = torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-7)
        assert close != name.endswith(f"{one.chosen[0]}.router"), name


def test_lookahead():
    """Weights are restored to the bit, also after an error; the first order predicts the change."""
    one = one_adapter("lora")
    one.held_out = one.rows  # the very rows of the gradients
    one.model.double()
    before = weights_of(one.model)
    kept = {task: {key: value.double() for key, value in each.items()}
            for task, each in kept_of(one).items()}
    steps = one.steps(kept)
    for name in one.weights:
        g = torch.stack([each[name].mean(0) for each in kept.values()])
        naive = -1e-6 * g[1] / (((g**2).sum(0) / 3).sqrt() + 1e-8)
        assert torch.allclose(steps[1][name], naive, atol=0)
    start = one.losses_after({}, lambda rows: None)
    delta = torch.stack([one.losses_after(step, lambda rows: None) for step in steps]) - start
    assert_same(before, weights_of(one.model))
    predicted = np.array([[sum(float((step[name] * each[name].mean(0)).sum()) for name in step)
                           for each in kept.values()] for step in steps])
    assert np.abs(delta.numpy() - predicted).max() < 0.05 * np.abs(predicted).max()
    with pytest.raises(Killed), failing(gradients, "loss_of", 3):
        one.losses_after(steps[0], lambda rows: None)
    assert_same(before, weights_of(one.model))
