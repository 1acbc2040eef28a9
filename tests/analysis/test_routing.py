"""Test routing statistics, and measurements on planted routers."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import wrapped
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_model, rows_of

from analysis import routing

ROWS = [row | {"id": f"r{i}"} for i, row in enumerate(rows_of(0, 5))]
T, K = 6, 8


def measured(model, rows=ROWS, size=1, letters=None):
    args = argparse.Namespace(micro_batch=size)
    return routing.measure_task(model, rows, args, 2, lambda rows: None, letters)


# --- statistics ---------------------------------------------------------------------------------


def test_information():
    """0 if routing ignores the task, ln 2 for two disjoint halves; equal to a loop."""
    halves = np.zeros((T, K))
    halves[:3, :4] = halves[3:, 4:] = 0.5
    assert routing.information(halves) == pytest.approx(math.log(2))
    assert routing.information(np.full((T, K), 0.3)) == 0
    u = np.random.default_rng(0).random((T, K))
    pi = [row / row.sum() for row in u]
    mean = sum(pi) / T
    naive = sum(p * math.log(p / m) for row in pi for p, m in zip(row, mean, strict=True)) / T
    assert routing.information(u) == pytest.approx(naive)
    assert math.isnan(routing.information(np.zeros((T, K))))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, K), st.integers(2, T), st.integers(0, 2**32 - 1))
def test_no_selection_exceeds_the_bound(top_k, tasks, seed):
    """Shares of tokens that select top_k of K experts tell at most ln K - ln top_k."""
    generator = np.random.default_rng(seed)
    # Each of 1 to 20 tokens of a task selects top_k experts, by preferences of the task.
    preferences = generator.normal(size=(tasks, 1, K)) * generator.exponential(3)
    tokens = generator.gumbel(size=(tasks, generator.integers(1, 21), K)) + preferences
    u = (tokens.argsort(-1).argsort(-1) >= K - top_k).mean(1)  # (T, K)
    assert u.sum(1) == pytest.approx(top_k)
    assert routing.information(u) <= math.log(K / top_k) + 1e-12


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_disjoint_selections_reach_the_bound(top_k):
    """A selection that depends on the task alone, and shares no expert."""
    u = np.repeat(np.eye(K // top_k), top_k, axis=1)  # (K / top_k tasks, K)
    assert routing.information(u) == pytest.approx(math.log(K) - math.log(top_k))


def test_null_information():
    """Random assignments of rows give the information of equal tasks."""
    generator = np.random.default_rng(1)
    rows, sizes = generator.random((30, 2, K)), np.array([4, 6, 5, 5, 5, 5])
    null = routing.null_information(rows, sizes, generator)
    assert null.shape == (routing.PERMUTATIONS, 2)
    starts = np.cumsum(sizes)[:-1]
    dealt = np.stack([part.mean(0) for part in np.split(rows, starts)])  # (T, 2, K)
    for place in range(2):
        low, high = np.quantile(null[:, place], [0.001, 0.999])
        assert low < routing.information(dealt[:, place]) < high < 0.1


def test_active_experts():
    active = routing.active_experts([[0.1, 0.3, 0.3, 0.3], [0.25] * 4], 2)
    assert active.tolist() == [[False, True, True, False], [True, True, False, False]]


# --- planted routers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["badit", "loramoe"])
def test_by_loops(method):
    """w, u and energy are equal to a loop over tokens; batches and padding change nothing."""
    model = wrapped(base_model("llama", torch.float64), method)
    layers = model.adapted_by.layers
    for index, layer in enumerate(layers.values()):
        torch.manual_seed(index)
        torch.nn.init.normal_(layer.router, std=0.3)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        layer.take_grouping(layer.expert_of[torch.randperm(len(layer.expert_of))])
    alone, together = measured(model), measured(model, size=3)
    for key in alone:
        assert torch.allclose(alone[key], together[key], atol=1e-9), key
    routed = alone["routed"]  # (n, 2, 2, L, K)
    assert torch.allclose(routed[:, 0].sum(-1), torch.ones(()).double())
    assert torch.allclose(routed[:, 1].sum(-1), torch.full((), 4.0).double())
    inputs = {}
    handles = [layer.register_forward_pre_hook(
        lambda _, args, name=name: inputs.__setitem__(name, args[0][0]))
        for name, layer in layers.items()]
    row = ROWS[3]
    with torch.no_grad():
        model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    length, n = len(row["input_ids"]), row["num_targets"]
    for index, (name, layer) in enumerate(layers.items()):
        for place, tokens in enumerate((range(length), range(length - n - 1, length - 1))):
            w, u = torch.zeros(K).double(), torch.zeros(K).double()
            for p in tokens:
                weights = F.softmax(layer.router @ inputs[name][p], dim=0)
                w += weights / len(tokens)
                u[weights.argsort(descending=True)[:4]] += 1 / len(tokens)
            assert torch.allclose(routed[3, 0, place, index], w)
            assert torch.allclose(routed[3, 1, place, index], u)
    model.zero_grad()
    total = [0.0] * K
    layer = next(iter(layers.values()))
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        m = len(row["input_ids"])
        (-sum(logits[j - 1, row["input_ids"][j]] for j in range(m - row["num_targets"], m))
         / row["num_targets"] / len(ROWS)).backward()
    for i, k in enumerate(layer.expert_of.tolist()):
        total[k] += float(layer.lora_A.grad[i].square().sum() + layer.lora_B.grad[:, i].square()
                          .sum())
    assert alone["energy"][0].tolist() == pytest.approx(total)


def test_planted_tasks():
    """A router that recognises the task selects the planted experts: ln 2 for two halves."""
    model = wrapped(base_model("llama", torch.float64), "badit")
    marks = torch.randn(2, 32, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))
    for layer in model.adapted_by.layers.values():
        with torch.no_grad():
            layer.router[:4], layer.router[4:] = marks[0], marks[1]
    kept = []
    for task in range(2):
        handles = [layer.register_forward_pre_hook(lambda _, args, task=task: (
            torch.zeros_like(args[0]) + marks[task],)) for layer in
            model.adapted_by.layers.values()]
        kept.append(measured(model)["routed"].numpy().mean(0))
        for handle in handles:
            handle.remove()
    means = np.stack(kept)  # (T, 2, 2, L, K)
    assert routing.information(np.moveaxis(means[:, 1], 0, -2)) == pytest.approx(math.log(2))
    active = routing.active_experts(means[:, 0, 0, -1], 4)
    assert active.tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]


@pytest.mark.parametrize("method", ["badit", "loramoe"])
def test_selection_comes_from_the_layer(method):
    """A layer with another `route` shows in u."""
    model = wrapped(base_model("llama"), method)
    for layer in model.adapted_by.layers.values():
        def route(x, expert_of=None, real=layer.route):
            routing = real(x, expert_of)
            return routing._replace(active=torch.arange(K).expand_as(routing.active) % 2 == 0)
        layer.route = route
    u = measured(model)["routed"][:, 1]  # (n, 2, L, K)
    assert torch.equal(u.flatten(0, 2).unique(dim=0), torch.tensor([[1., 0] * 4]).double())


def test_zero_router():
    """No information; ties go to the experts with the lowest index."""
    model = wrapped(base_model("llama"), "badit")
    routed = measured(model)["routed"].numpy().mean(0)  # (2, 2, L, K)
    assert routed[1, 0, -1].tolist() == [1] * 4 + [0] * 4
    assert routing.information(np.stack([routed[0, 0], routed[0, 0]], -2)) == pytest.approx(0)
    (active,) = routing.active_experts(routed[0, 0, -1:], 4)
    assert active.tolist() == [True] * 4 + [False] * 4


def test_letters():
    """The most probable of four letters, at the token that predicts the answer."""
    model = wrapped(base_model("llama"), "loramoe")
    letters = torch.tensor([40, 50, 60, 70])
    rows = [{"task": "t", "id": str(i), "input_ids": [1, *range(90, 95 + i), 40 + 10 * i, 2],
             "num_targets": 2} for i in range(4)]
    found = [measured(model, rows, size, letters) for size in (1, 4)]
    for row, right, place in zip(rows, found[0]["right"], itertools.count(), strict=False):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"][:-2]])).logits[0, -1]
        assert bool(right) == (logits[letters].argmax() == place)
    assert torch.equal(found[0]["right"], found[1]["right"])
