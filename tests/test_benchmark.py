"""scripts/benchmark.py: what it compares is what it says, and its table is whole."""

import json
import sys
from types import SimpleNamespace

import benchmark
import peer
import pytest
import torch

from baselines.loramoe import LoraMoeLinear
from inputs.errors import InputError


@pytest.fixture
def options():
    return SimpleNamespace(full=False, device=torch.device("cpu"), dtype=torch.float32, rounds=2,
                           threads=1)


def test_variants_take_turns():
    """A B A B after a warm-up of each: a slow minute hurts both."""
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = benchmark.in_turn(variants, 3, torch.device("cpu"), warmup=1)
    assert calls == ["A", "B"] * 4 and {name: len(each) for name, each in seconds.items()} == {
        "A": 3, "B": 3}


def test_a_ratio_is_taken_within_rounds():
    """The machine slows down tenfold in the second round; the ratio stays."""
    seconds = {"mine": [1.0, 20.0, 1.0], "theirs": [2.0, 40.0, 2.0]}
    row = benchmark.row("what", seconds, "mine", "theirs")
    assert row["ratio"] == row["low"] == row["high"] == 0.5 and row["seconds"] == 1.0


def test_the_textbook_layer_is_loramoes(options):
    """With all experts active it computes what baselines.loramoe computes in two products."""
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 48, bias=False)
    theirs = benchmark.TextbookMoe(base).eval()
    for up in theirs.up:
        torch.nn.init.normal_(up.weight)
    ours = LoraMoeLinear(base, num_experts=8, rank=4, alpha=32, top_k=8).eval()
    with torch.no_grad():
        ours.router.copy_(theirs.router.weight)
        ours.lora_A.copy_(torch.cat([down.weight for down in theirs.down]))
        ours.lora_B.copy_(torch.cat([up.weight for up in theirs.up], dim=1))
    x = torch.randn(2, 5, 40)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_step_trains_every_variant(options):
    """Each has its adapter on every gate_proj, and one step moves it."""
    model = benchmark.base_model(options)
    batch = benchmark.random_batch(model, 2, 16, 4, options.device)
    layers = model.config.num_hidden_layers
    for make in (lambda m: benchmark.adapted(m, "badit"), lambda m: benchmark.with_peft(m, 32),
                 benchmark.textbook_moe):
        variant = make(benchmark.base_model(options))
        trained = {name: weight for name, weight in variant.named_parameters()
                   if weight.requires_grad}
        assert len({name.split("layers.")[1].split(".")[0] for name in trained}) == layers
        assert all("gate_proj" in name for name in trained)
        before = {name: weight.detach().clone() for name, weight in trained.items()}
        benchmark.training_step(variant, batch, options.device)()
        assert any(not weight.equal(before[name]) for name, weight in trained.items())


def test_the_synthetic_weight_has_its_spectrum():
    """Its leading singular values are the given ones, and the tail follows."""
    spectrum = torch.linspace(30, 1, 80, dtype=torch.float64)
    W, leading = benchmark.weight_like(spectrum, (120, 100), torch.device("cpu"))
    found = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(found[:32], leading, rtol=1e-4, atol=1e-4)
    assert leading[0] == 30 and found[-1] >= 0.9


def test_the_command_writes_json_and_a_table(tmp_path, monkeypatch, capsys):
    """One section from end to end."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "regroup", "--rounds", "2",
                                      "--threads", "1", "--out", str(tmp_path)])
    for name, value in benchmark.MALLOC.items():
        monkeypatch.setenv(name, value)  # it would start itself again with them
    benchmark.main()
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["variant"] for row in written["rows"]] == ["all", "Gram matrices",
                                                           "grouping from them"]
    assert all(row["seconds"] > 0 for row in written["rows"])
    table = (tmp_path / "benchmark.md").read_text()
    assert table.strip() in capsys.readouterr().out and table.count("| regrouping") == 3


def test_trl_gets_our_tokens_and_labels():
    """The prompt has no loss, the target with its EOS has."""
    row = {"input_ids": [5, 6, 7, 8, 9], "num_targets": 2}
    assert peer.as_labels(row) == {"input_ids": [5, 6, 7, 8, 9],
                                   "labels": [-100, -100, -100, 8, 9]}


def test_other_work_is_no_comparison(options):
    """Other tokens, or another loss before training, end the benchmark."""
    lora = {"tokens": 100, "first_loss": 3.0}
    options.peer = ["trl"]
    benchmark.check_same_work("trl", {"tokens": 100, "first_loss": 3.00001}, lora, options)
    benchmark.check_same_work("badit", {"tokens": 100, "first_loss": 3.1}, lora, options)
    for mine in ({"tokens": 99, "first_loss": 3.0}, {"tokens": 100, "first_loss": 3.1}):
        with pytest.raises(InputError, match="trl"):
            benchmark.check_same_work("trl", mine, lora, options)
    options.dtype, lora["first_loss"] = torch.bfloat16, 4.528  # rounded to three digits: 1 %
    benchmark.check_same_work("trl", {"tokens": 100, "first_loss": 4.541}, lora, options)
    with pytest.raises(InputError, match="trl"):
        benchmark.check_same_work("trl", {"tokens": 100, "first_loss": 4.6}, lora, options)


@pytest.mark.parametrize(("installed", "flags", "named"), [
    (False, [], "trl is not installed"), (True, ["--rows", "16"], "--rows 16")])
def test_a_comparison_that_cannot_be_made(installed, flags, named, tmp_path, monkeypatch, capsys):
    """One line, exit status 2."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--peer", "trl", "--threads", "1", *flags,
                                      "--out", str(tmp_path)])
    for name, value in benchmark.MALLOC.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: installed or None)
    assert benchmark.main() == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
