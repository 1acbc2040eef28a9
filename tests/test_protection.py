"""--protect: updates stay out of the inputs of old tasks, so that old outputs stay."""

import json
from types import SimpleNamespace

import pytest
import study
import torch
from conftest import settings_of, wrapped
from tiny import (
    IN,
    OUT,
    assert_same,
    base_model,
    flattened,
    learn,
    linear,
    loader_of,
    logits_of,
    projector,
    randn,
    rows_of,
    start,
    weights_of,
)
from torch.testing import assert_close

import adapter
from badit import BaditLinear
from baselines.lora import LoraLinear
from baselines.loramoe import LoraMoeLinear
from baselines.pissa import PissaLinear
from energy import EnergyLinear
from harness import identity
from harness.adapter_config import ADAPTER_CONFIG
from harness.arguments import parse_flags, recorded_args
from inputs.errors import InputError
from registry import METHODS

CASES = {
    "badit": ("badit", {"regroup_every": 2}),
    "drop": ("badit", {"regroup_every": 2, "inactive": "drop"}),
    "initial": ("badit", {"regroup_every": 2, "inactive": "initial"}),
    "energy": ("badit", {"regroup_every": 2, "routing": "energy"}),
    "no_bad": ("badit", {"regroup_every": 2, "no_bad": True}),
    "random": ("badit", {"regroup_every": 1, "grouping": "random"}),
    "lora": ("lora", {}),
    "pissa": ("pissa", {}),
    "olora_qr": ("olora_qr", {}),
}
LAYERS = {
    "lora": lambda base: LoraLinear(base, 3, 6),
    "pissa": lambda base: PissaLinear(base, 3, 6),
    "badit": lambda base: BaditLinear(base, 4, 2, 6, top_k=2),
    "drop": lambda base: BaditLinear(base, 4, 2, 6, top_k=2, inactive="drop"),
    "initial": lambda base: BaditLinear(base, 4, 2, 6, top_k=2, inactive="initial"),
    "energy": lambda base: EnergyLinear(base, 4, 2, 6, top_k=2),
    "loramoe": lambda base: LoraMoeLinear(base, 4, 2, 6, top_k=2),
}


@pytest.fixture(params=CASES)
def protected(request):
    """Make a wrapped tiny model of each kind, with a given share."""
    method, changed = CASES[request.param]
    return lambda share: wrapped(base_model(), method, protect=share, **changed)


def onto(subspace):
    """Return the projector (d, d) onto a stored subspace, float64."""
    return projector(subspace.get()).double()


def repeated(task, words=3):
    """Rows of one repeated token each: a layer's inputs then span no more than `words` directions.
    """
    return [{"task": f"task{task}", "input_ids": [20 + 60 * task + 7 * i] * 6, "num_targets": 2}
            for i in range(words)]


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_bank_inputs_are_what_B_reads(kind):
    """The layer's update is B h, times s where h does not hold it."""
    layer, x = LAYERS[kind](linear()).eval(), randn(1, 30, IN)
    for weight in layer.parameters():
        if weight.requires_grad:
            weight.add_(0.3 * randn(2, *weight.shape))
    h = layer.bank_inputs(x)
    if kind in ("lora", "pissa"):
        assert_close(layer(x), linear_of(layer, x) + layer.scaling * h @ layer.lora_B.T)
        return
    y = torch.zeros(30, OUT, dtype=torch.float64)
    layer.add_inactive(y, x, layer.route(x), layer.expert_of)
    assert_close(layer(x), linear_of(layer, x) + y + h @ layer.lora_B.T)


def linear_of(layer, x):
    return x @ layer.residual.T + layer.bias


def test_old_outputs_stay_and_new_ones_change(protected, monkeypatch):
    """With nearly all energy kept, later tasks leave the logits of old prompts as they are."""
    old, new = repeated(0), repeated(1)
    monkeypatch.setattr("tiny.rows_of", lambda task: repeated(task))
    prompts = [row["input_ids"] for row in old]
    moved = {}
    for share in (0.0, 1 - 1e-9):
        model = protected(share)
        learn(model.adapted_by, 0, 0)  # the first pass keeps one direction fewer
        before, others = logits_of(model, prompts), logits_of(model, [new[0]["input_ids"]])
        learn(model.adapted_by, 1, 1, steps=8)
        moved[share] = float((logits_of(model, prompts) - before).abs().max())
        assert (logits_of(model, [new[0]["input_ids"]]) - others).abs().max() > 0.02
    assert moved[1 - 1e-9] < 1e-3 < 0.02 < moved[0.0]


def test_updates_are_orthogonal_to_the_inputs_of_old_tasks(protected):
    """Checked for all weights against the leading directions of inputs that are computed anew."""
    model = protected(0.7)
    method = model.adapted_by
    learn(method, 0)
    inputs = inputs_of(model, rows_of(0))
    before = weights_of(model)
    for name, layer in method.layers.items():
        for subspace, v in zip((layer.old_x, layer.old_h), inputs[name], strict=True):
            U, S, _ = torch.linalg.svd(v.T)
            shares = S.square().cumsum(0) / S.square().sum()
            k = max(1, int((shares < 0.7).sum()))
            assert_close(onto(subspace), U[:, :k] @ U[:, :k].T, atol=1e-4, rtol=0)
    learn(method, 1)
    after, checked = weights_of(model), 0
    for name in method.layers:
        for key, v in (("lora_A", 0), ("router", 0), ("lora_B", 1)):
            weight = f"{name}.{key}"
            if weight in after:
                change = (after[weight] - before[weight]).double()
                U = torch.linalg.svd(inputs[name][v].T)[0][:, :1]
                assert change.abs().max() > 1e-4 or key == "router"
                assert (change @ U).abs().max() < 1e-5
                checked += 1
    assert checked >= 2 * len(method.layers)


@pytest.mark.parametrize("kind", ["badit", "energy", "initial", "random"])
def test_only_the_first_task_regroups(kind, tmp_path):
    """Also when an adapter goes on; without --protect later tasks regroup."""
    method, changed = CASES[kind]
    for share, later in ((0.0, True), (0.7, False)):
        model = wrapped(base_model(), method, protect=share, **changed)
        groups = [groups_of(model)]
        learn(model.adapted_by, 0)
        adapter.save(model, tmp_path / str(share))
        loaded = adapter.load(base_model(), tmp_path / str(share))
        for each in (model, loaded):
            groups.append(groups_of(each))
            learn(each.adapted_by, 1)
            groups.append(groups_of(each))
        start, first, second, again, gone_on = groups
        assert start != first == again
        assert (first != second) == (first != gone_on) == later


def groups_of(model):
    return [layer.expert_of.tolist() for layer in model.adapted_by.layers.values()]


@torch.no_grad()
def inputs_of(model, rows):
    """Return {layer: (x (tokens, in), h (tokens, N))} of rows, float64, one row at a time."""
    found = {name: [] for name in model.adapted_by.layers}
    handles = [layer.register_forward_hook(
        lambda layer, given, _, name=name: found[name].append(given[0].reshape(-1, 32)))
        for name, layer in model.adapted_by.layers.items()]
    for row in rows:
        model(torch.tensor([row["input_ids"]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(xs).double(),
                   model.adapted_by.layers[name].bank_inputs(torch.cat(xs)).double())
            for name, xs in found.items()}


def test_the_subspaces_grow_with_every_task(protected):
    model = protected(0.7)
    learn(model.adapted_by, 0)
    first = {name: (onto(layer.old_x), onto(layer.old_h))
             for name, layer in model.adapted_by.layers.items()}
    learn(model.adapted_by, 1)
    for name, layer in model.adapted_by.layers.items():
        for old, subspace in zip(first[name], (layer.old_x, layer.old_h), strict=True):
            assert_close(onto(subspace) @ old, old, atol=1e-5, rtol=0)  # it holds the old one
            assert onto(subspace).trace() >= old.trace() - 1e-6


def test_a_saved_adapter_goes_on_as_the_model_itself(protected, tmp_path):
    """The subspaces are saved with it; a later task then changes the same weights."""
    model = protected(0.7)
    learn(model.adapted_by, 0)
    adapter.save(model, tmp_path)
    loaded = adapter.load(base_model(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    for each in (model, loaded):
        learn(each.adapted_by, 1)
    assert_same(weights_of(loaded), weights_of(model))


def test_without_it_nothing_is_stored_or_passed_over():
    """--protect 0 adds no tensor, and reads no data after a task."""
    model = wrapped(base_model())
    learn(model.adapted_by, 0)
    assert not [name for name in model.adapted_by.state_dict() if "old_" in name]
    model.forward = None
    model.adapted_by.end_stage(None, None)


def test_the_room_that_is_left_is_said(capsys):
    learn(wrapped(base_model(), "lora", protect=0.7).adapted_by, 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--protect 0.7: inputs of tasks so far leave ") and "for B" in line


def test_an_adapter_from_before_the_flag_loads(tmp_path):
    model = wrapped(base_model())
    adapter.save(model, tmp_path)
    file = tmp_path / ADAPTER_CONFIG
    config = json.loads(file.read_text())
    del config["settings"]["protect"]
    file.write_text(json.dumps(config | {"format": 3}))
    assert adapter.load(base_model(), tmp_path).adapted_by.settings == settings_of()
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="protect"):
        adapter.load(base_model(), tmp_path)


def test_runs_from_before_the_flag_go_on(tmp_path):
    """Their files lack it; another value is refused."""
    setup = SimpleNamespace(identity={"--protect": 0.0}, args=SimpleNamespace(allow_other=()))
    assert identity.refuse_another_run(setup, {}, "it") == set()
    setup.identity["--protect"] = 0.9
    with pytest.raises(InputError, match=r"--protect \(then 0.0, now 0.9\)"):
        identity.refuse_another_run(setup, {}, "it")
    args, _ = parse_flags(["--method", "lora", "--output_dir", str(tmp_path)])
    old = {name: value for name, value in recorded_args(args).items() if name != "protect"}
    (tmp_path / "results.json").write_text(json.dumps(
        {"args": old, "settings": {"rank": 4}, "variant": "lora"}, default=str))
    made = SimpleNamespace(folder=tmp_path, flags=lambda: SimpleNamespace(**recorded_args(args)))
    assert study.finished(made)
    args.protect = 0.9
    with pytest.raises(InputError, match="another --protect"):
        study.finished(made)


def test_a_layer_that_cannot_be_measured_is_refused_at_once():
    """Before the first step, not after the task."""
    model = wrapped(flattened(base_model(), slice(1)), "lora", protect=0.7)
    with pytest.raises(InputError, match="gets an input of shape"):
        start(model.adapted_by, 0)


def test_static_routing_refuses_it():
    with pytest.raises(InputError, match="--protect is not supported with --routing static"):
        METHODS["badit"].settings(routing="static", protect=0.9)
    METHODS["badit"].settings(routing="static", protect=0.9, no_bad=True)


def test_padding_and_fillers_do_not_count():
    """A task's subspaces do not depend on how its rows are batched."""
    spaces = []
    for size in (1, 5):
        model = wrapped(base_model(), "lora", protect=0.7)
        method = model.adapted_by
        learn(method, 0, steps=0)
        assert not [name for name, layer in method.layers.items() if layer.lora_B.any()]
        for layer in method.layers.values():  # measured again, in other batches
            layer.old_x.put(layer.lora_A.new_zeros(32, 0))
            layer.old_h.put(layer.lora_A.new_zeros(2, 0))
        method.end_stage(None, loader_of(rows_of(0), size))
        spaces.append({name: onto(layer.old_x) for name, layer in method.layers.items()})
    for name, space in spaces[0].items():
        assert_close(spaces[1][name], space, atol=1e-5, rtol=0)
