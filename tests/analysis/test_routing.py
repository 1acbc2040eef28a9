"""Test routing statistics, and measurements on planted routers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import wrapped
from tiny import base_model, rows_of

from analysis import routing
from analysis.probes import loss_of
from method import observe

ROWS = [row | {"id": f"r{i}"} for i, row in enumerate(rows_of(0, 5))]
T, K = 6, 8


def measured(model, rows=ROWS, letters=None):
    return routing.measure_task(model, rows, lambda rows: None, letters)


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
    """w, u and energy are equal to a loop over tokens."""
    model = wrapped(base_model("llama", torch.float64), method)
    layers = model.adapted_by.layers
    for index, layer in enumerate(layers.values()):
        torch.manual_seed(index)
        torch.nn.init.normal_(layer.router, std=0.3)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        layer.take_grouping(layer.expert_of[torch.randperm(len(layer.expert_of))])
    alone = measured(model)
    routed = alone["routed"]  # (n, 2, 2, L, K)
    inputs, row = {}, ROWS[3]
    with torch.no_grad(), observe(model, layers, lambda name, x, _: inputs.update({name: x[0]})):
        loss_of(model, row)
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
    for row in ROWS:
        (loss_of(model, row)[0] / len(ROWS)).backward()
    total, layer = [0.0] * K, next(iter(layers.values()))
    for i, k in enumerate(layer.expert_of.tolist()):
        total[k] += float(layer.lora_A.grad[i].square().sum() + layer.lora_B.grad[:, i].square()
                          .sum())
    assert alone["energy"][0].tolist() == pytest.approx(total)


def test_letters():
    """The most probable of four letters, at the token that predicts the answer."""
    model = wrapped(base_model("llama"), "loramoe")
    letters = torch.tensor([40, 50, 60, 70])
    rows = [{"task": "t", "id": str(i), "input_ids": [1, *range(90, 95 + i), 40 + 10 * i, 2],
             "num_targets": 2} for i in range(4)]
    found = measured(model, rows, letters)
    for place, (row, right) in enumerate(zip(rows, found["right"], strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"][:-2]])).logits[0, -1]
        assert bool(right) == (logits[letters].argmax() == place)
    alone = measured(model, [row | {"input_ids": row["input_ids"][:-1], "num_targets": 1}
                             for row in rows])  # the letter is the only target
    assert torch.allclose(found["routed"][:, :, 1], alone["routed"][:, :, 1], atol=1e-6)
    assert torch.equal(found["routed"][:, :, 0], measured(model, rows)["routed"][:, :, 0])
