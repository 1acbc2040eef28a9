"""Test activations and gradients of rows against naive versions in float64."""

import argparse

import numpy as np
import pytest
import torch
from conftest import wrapped
from tiny import base_model, one_line, rows_of

from analysis import probes, session, sharing, units
from analysis.probes import GradientProbe, NeuronProbe, batch_of, positions
from evaluation import row_losses, target_logits
from inputs.errors import InputError

LAYERS = (0, 1)
MODULES = ["gate_proj", "q_proj", "v_proj"]
ROWS = rows_of(0, 6)


def model_of(architecture):
    return base_model(architecture, torch.float64).requires_grad_(False)


def loss_of(model, row):
    """Compute the loss of one row, token by token."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    n = len(row["input_ids"])
    steps = range(n - row["num_targets"], n)
    return -sum(logits[j - 1, row["input_ids"][j]] for j in steps) / row["num_targets"]


def naive_gradients(model, name, rows):
    """Compute the gradients (rows, out, in) by one autograd pass for each row."""
    weight = model.get_submodule(name).weight.requires_grad_()
    found = [torch.autograd.grad(loss_of(model, row), weight)[0] for row in rows]
    weight.requires_grad_(False)
    return torch.stack(found)


def probed(model, names, rows, size):
    """Compute the same gradients by hooks, in micro-batches."""
    found = {name: [] for name in names}
    for first in range(0, len(rows), size):
        with GradientProbe(model, names) as probe:
            batch = batch_of(rows[first:first + size], 2, "cpu")
            row_losses(target_logits(model, batch), batch).sum().backward()
        for name in names:
            found[name].append(probe.gradients(name))
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("size", [1, 3])
def test_gradients(architecture, size):
    """Equal to autograd, with and without padding; the mean of squares is no square of a mean."""
    model, close = model_of(architecture), dict(rtol=1e-10, atol=1e-12)
    if architecture == "gemma2" and size > 1:  # its attention mask overflows in float64
        model, close = model.float(), dict(rtol=1e-3, atol=1e-4)
    names = session.linear_layers(model, LAYERS, MODULES)
    assert len(names) == len(LAYERS) * len(MODULES)
    found = probed(model, names, ROWS, size)
    for name in names:
        naive = naive_gradients(model, name, ROWS)
        assert torch.allclose(found[name], naive, **close)
        assert not torch.allclose(found[name].square().mean(0), naive.mean(0).square())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_neurons(architecture):
    """Equal to calling the MLP by hand, token by token, also with padding."""
    model = model_of(architecture)
    close = 1e-12
    if architecture == "gemma2":  # its attention mask overflows in float64
        model, close = model.float(), 1e-4
    names = session.linear_layers(model, LAYERS, ["gate_proj"])
    mlps = probes.mlp_names(dict(zip(LAYERS, names, strict=True)))
    inputs = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, name=name: inputs.__setitem__(name, args[0])) for name in mlps.values()]
    with torch.no_grad(), NeuronProbe(model, mlps) as probe:
        batch = batch_of(ROWS, 2, "cpu")
        model(**{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")})
        means = {layer: probes.row_means(values.abs(), positions(batch))
                 for layer, values in probe.values.items()}
        for index, row in enumerate(ROWS):
            model(input_ids=torch.tensor([row["input_ids"]]))
            length, n = len(row["input_ids"]), row["num_targets"]
            for layer, name in mlps.items():
                mlp, h = model.get_submodule(name), inputs[name][0]
                value = torch.stack([mlp.act_fn(mlp.gate_proj(h[p])) for p in range(length)]).abs()
                for place, tokens in enumerate((range(length), range(length - n - 1, length - 1))):
                    naive = torch.stack([value[p] for p in tokens]).mean(0)
                    assert torch.allclose(means[layer][place, index], naive, atol=close)
    for handle in handles:
        handle.remove()


def test_padding_is_not_counted():
    """Padding is found by the length of a row: a pad token inside the text counts."""
    planted = [ROWS[0] | {"input_ids": [2, *ROWS[0]["input_ids"]]}, ROWS[-1]]
    where = positions(batch_of(planted, 2, "cpu"))
    assert where[0].sum(1).tolist() == [len(row["input_ids"]) for row in planted]
    assert where[1].sum(1).tolist() == [row["num_targets"] for row in planted]


def test_row_losses():
    model = model_of("llama")
    naive = [float(loss_of(model, row)) for row in ROWS]
    batch = batch_of(ROWS, 2, "cpu")
    logits = target_logits(model, batch)
    assert row_losses(logits, batch).tolist() == pytest.approx(naive)


def test_adapted_layer():
    """The gradient belongs to the effective weight."""
    model = wrapped(base_model("llama", torch.float64), "lora")
    name = next(iter(model.adapted_by.layers))
    (found,) = probed(model, [name], ROWS[:1], 1).values()
    bare = model_of("llama")
    assert torch.allclose(found, naive_gradients(bare, name, ROWS[:1]))


# --- the sweep over a task ----------------------------------------------------------------------


def sweep_of(model, **changed):
    args = argparse.Namespace(**{"micro_batch": 2, "share": 0.1} | changed)
    gates = session.linear_layers(model, LAYERS, ["gate_proj"])
    return units.Sweep(args, model, 2, session.linear_layers(model, LAYERS, MODULES),
                       probes.mlp_names(dict(zip(LAYERS, gates, strict=True))))


def test_sweep():
    """Masks, signs and numbers agree with naive gradients; repeating all rows changes nothing."""
    model = base_model("llama").requires_grad_(False)
    sweep, exact = sweep_of(model), base_model("llama").double().requires_grad_(False)
    kept = sweep.task(ROWS, lambda rows: None)
    for name in sweep.names:
        G = naive_gradients(exact, name, ROWS).flatten(1)
        P = G.shape[1]
        parts = {"all": G, "fold0": G[::2], "fold1": G[1::2]}
        for part, mine in parts.items():
            F = mine.square().mean(0)
            mask = units.unpacked(kept[f"{name}.0.1.{part}"], P)
            assert mask.sum() == round(0.1 * P)
            assert F[mask].min() >= 0.999 * F[~mask].max()
            up = units.unpacked(kept[f"{name}.up.{part}"], P)
            clear = (mine.mean(0).abs() > 1e-7).numpy()
            assert (up == (mine.sum(0) > 0).numpy())[clear].all()
        numbers = kept[f"{name}.numbers"]
        assert numbers[2] == pytest.approx(sharing.additive_structure(
            G.square().mean(0).view(sweep.shapes[name]))[0], abs=1e-4)
        assert numbers[4] == pytest.approx(float(G.mean(0).norm()), rel=1e-4)
    assert float(kept["loss"]) == pytest.approx(float(sum(loss_of(exact, row)
                                                          for row in ROWS) / 6), rel=1e-4)
    doubled = sweep.task([row for row in ROWS for _ in range(2)], lambda rows: None)
    for layer in LAYERS:
        assert torch.allclose(kept[f"neurons.{layer}"][0], doubled[f"neurons.{layer}"][0])
        assert torch.allclose(kept[f"neurons.{layer}"][1:].mean(0), kept[f"neurons.{layer}"][0])


def test_planted_input_channel():
    """An input channel that is always large contains the active weights."""
    model = base_model("llama").requires_grad_(False)
    sweep = sweep_of(model, share=1 / 32)
    name = sweep.names[0]
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: (
        torch.cat([args[0][..., :3], args[0][..., 3:4] * 1e4, args[0][..., 4:]], -1),))
    kept = sweep.task(ROWS, lambda rows: None)
    mask = units.unpacked(kept[f"{name}.{1 / 32}.all"], np.prod(sweep.shapes[name]))
    assert mask.reshape(sweep.shapes[name])[:, 3].mean() > 0.95


@pytest.mark.parametrize("what", ["model.layers.0.self_attn.q_proj", "lm_head"])
def test_non_finite(what):
    model = base_model("llama").requires_grad_(False)
    model.get_submodule(what).weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite") as caught:
        sweep_of(model).task([row | {"id": f"r{i}"} for i, row in enumerate(ROWS)],
                             lambda rows: None)
    assert "task0, row r0" in one_line(caught)
