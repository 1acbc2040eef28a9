"""Test activations and gradients of rows against naive versions in float64."""

import pytest
import torch
from conftest import complaint, wrapped
from tiny import base_model, flattened, rows_of

from analysis import session, sharing, units
from analysis.probes import loss_of, means_at_places, row_gradients
from method import observe

LAYERS = (0, 1)
MODULES = ["gate_proj", "q_proj", "v_proj"]
ROWS = [row | {"id": f"r{i}"} for i, row in enumerate(rows_of(0, 6))]


def model_of(architecture):
    return base_model(architecture, torch.float64).requires_grad_(False)


def test_layers_without_a_module():
    """Also linear layers outside the numbered blocks are in none of them."""
    model = model_of("llama")
    model.model.project_in = torch.nn.Linear(2, 2)
    for layers, module in (([7], "gate_proj"), ([0, 1], "project_in")):
        message = complaint(session.linear_layers, model, layers, [module])
        assert message.endswith(f"none of these has a {module}")


def naive_loss(model, row):
    """Compute the loss of one row, token by token."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    n = len(row["input_ids"])
    steps = range(n - row["num_targets"], n)
    return -sum(logits[j - 1, row["input_ids"][j]] for j in steps) / row["num_targets"]


def naive_gradients(model, name, rows):
    """Compute the gradients (rows, out, in) by one autograd pass for each row."""
    weight = model.get_submodule(name).weight.requires_grad_()
    found = [torch.autograd.grad(naive_loss(model, row), weight)[0] for row in rows]
    weight.requires_grad_(False)
    return torch.stack(found)


def gradients_of(model, names, rows):
    """Compute the same gradients by hooks: {name: (rows, out, in)}."""
    found = {name: [] for name in names}
    for row in rows:
        with row_gradients(model, names) as gradient:
            loss, _ = loss_of(model, row)
            loss.backward()
        assert loss.item() == pytest.approx(naive_loss(model, row).item())
        for name in names:
            found[name].append(gradient(name))
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_gradients(architecture):
    """Equal to autograd, for all rows; the mean of squares is not the square of the mean."""
    model = model_of(architecture)
    names = session.linear_layers(model, LAYERS, MODULES)
    assert len(names) == len(LAYERS) * len(MODULES)
    found = gradients_of(model, names, ROWS)
    for name in names:
        naive = naive_gradients(model, name, ROWS)
        assert torch.allclose(found[name], naive, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(found[name].square().mean(0), naive.mean(0).square())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_neurons(architecture):
    """Equal to calling the MLP by hand, token by token."""
    model, seen = model_of(architecture), {}
    mlps = {layer: model.get_submodule(f"model.layers.{layer}.mlp") for layer in LAYERS}
    for row in ROWS:
        with (torch.no_grad(), observe(model, {layer: mlp.act_fn for layer, mlp in mlps.items()},
                                       lambda layer, _, y: seen.update({layer: y[0]})),
              observe(model, {f"x{layer}": mlp for layer, mlp in mlps.items()},
                      lambda name, x, _: seen.update({name: x[0]}))):
            loss_of(model, row)
        length, n = len(row["input_ids"]), row["num_targets"]
        for layer, mlp in mlps.items():
            value = [mlp.act_fn(mlp.gate_proj(h)).abs() for h in seen[f"x{layer}"]]
            means = means_at_places(seen[layer].abs(), n)
            for mean, tokens in zip(means, (range(length), range(length - n - 1, length - 1)),
                                    strict=True):
                naive = torch.stack([value[p] for p in tokens]).mean(0)
                assert torch.allclose(mean, naive, atol=1e-12)


def test_adapted_layer():
    """The gradient belongs to the effective weight."""
    model = wrapped(base_model("llama", torch.float64), "lora")
    name = next(iter(model.adapted_by.layers))
    (found,) = gradients_of(model, [name], ROWS[:1]).values()
    assert torch.allclose(found, naive_gradients(model_of("llama"), name, ROWS[:1]))


# --- all rows of a task -------------------------------------------------------------------------


def measured(model, rows=ROWS, share=0.1):
    names, gates = (session.linear_layers(model, LAYERS, each) for each in
                    (MODULES, ["gate_proj"]))
    kept = units.measure_task(model, rows, names, gates, share, lambda rows: None)
    return names, kept


def test_measure_task():
    """Masks, signs and R2 agree with naive gradients; repeating all rows changes nothing."""
    model, exact = (base_model("llama").to(dtype).requires_grad_(False)
                    for dtype in (torch.float32, torch.float64))
    names, kept = measured(model)
    for name in names:
        G = naive_gradients(exact, name, ROWS)
        shape, P = G.shape[1:], G[0].numel()
        active, up, down = (units.unpacked([kept], f"{name}.{key}", P)[:, 0]
                            for key in ("active", "up", "down"))
        for part, mine in enumerate((G, G[::2], G[1::2])):
            F, mean = mine.flatten(1).square().mean(0), mine.flatten(1).mean(0).numpy()
            mask = active[part]
            assert mask.sum() == round(0.1 * P) and F[mask].min() >= 0.999 * F[~mask].max()
            clear = abs(mean) > 1e-7
            assert (up[part] == (mean > 0))[clear].all() and (down[part] == (mean < 0))[clear].all()
        assert float(kept[f"{name}.R2"]) == pytest.approx(sharing.additive_structure(
            G.square().mean(0).view(shape))[0], abs=1e-4)
    assert float(kept["loss"]) == pytest.approx(
        float(sum(naive_loss(exact, row) for row in ROWS) / 6), rel=1e-4)
    _, doubled = measured(model, [row for row in ROWS for _ in range(2)])
    for layer in LAYERS:
        masks, again = kept[f"neurons.{layer}"], doubled[f"neurons.{layer}"]
        assert masks.shape[:2] == (3, 2) and torch.equal(masks[0], again[0])
        assert torch.equal(again[0], again[1]) and torch.equal(again[1], again[2])


@pytest.mark.parametrize("what", ["model.layers.0.self_attn.q_proj", "lm_head"])
def test_non_finite(what):
    model = base_model("llama").requires_grad_(False)
    model.get_submodule(what).weight[0, 0] = torch.nan
    message = complaint(measured, model)
    assert "NaN or infinite" in message and "task0, row r0" in message


def test_flattened_inputs():
    """The gradient of such a layer is refused, not left out."""
    model, name = flattened(model_of("llama")), "model.layers.1.mlp.gate_proj"
    with row_gradients(model, [name]) as gradient:
        loss_of(model, ROWS[0])[0].backward()
    assert complaint(gradient, name).startswith(f"{name}: its inputs are flattened")
