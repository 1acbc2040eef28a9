"""scripts/benchmark.py compares what it names, and prints a whole table."""

from types import SimpleNamespace

import benchmark
import pytest
import torch


@pytest.fixture
def options():
    return SimpleNamespace(full=False, device=torch.device("cpu"), dtype=torch.float32, rounds=3)


def test_variants_run_in_turn(options):
    """Each is warmed up; then A B A B, so that a slow minute hurts both."""
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = benchmark.in_turn(variants, options)
    assert calls == ["A", "B"] * 4
    assert {name: len(each) for name, each in seconds.items()} == {"A": 3, "B": 3}


def test_a_ratio_is_taken_within_rounds():
    """The machine slows down tenfold in the second round; the ratio does not change."""
    seconds = {"mine": [1.0, 20.0, 1.0], "theirs": [2.0, 40.0, 2.0]}
    assert list(benchmark.rows_of("what", seconds, "mine")) == [
        ("what", "mine", "1 s", "theirs", "0.500", "0.500–0.500")]


@pytest.mark.parametrize("make", [lambda model: benchmark.adapted(model, "badit"),
                                  lambda model: benchmark.with_peft(model, 32)],
                         ids=["badit", "peft"])
def test_a_step_trains_every_variant(make, options):
    """Each has its adapter on every gate_proj, and one step moves it."""
    model = benchmark.base_model(options)
    batch = benchmark.random_batch(model, 2, 16, 4, options.device)
    variant = make(model)
    before = {name: weight.detach().clone() for name, weight in variant.named_parameters()
              if weight.requires_grad}
    assert all("gate_proj" in name for name in before)
    assert len({name.split("layers.")[1].split(".")[0] for name in before}) == 4
    benchmark.training_step(variant, batch, options.device)()
    moved = dict(variant.named_parameters())
    assert any(not moved[name].equal(weight) for name, weight in before.items())


@pytest.mark.parametrize("section, variants", [
    ("step", ["BADIT"] * 3), ("regroup", ["all", "Gram matrices", "grouping from them"])])
def test_the_command_prints_a_table(section, variants, capsys, monkeypatch):
    monkeypatch.setitem(benchmark.TINY, "hidden_size", 64)
    monkeypatch.setitem(benchmark.TINY, "intermediate_size", 128)
    threads = torch.get_num_threads()
    assert benchmark.main(["--only", section, "--rounds", "1", "--threads", str(threads)]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [line[2].strip() for line in lines[2:]] == variants
    assert all(float(line[3].removesuffix("s ")) > 0 for line in lines[2:])
