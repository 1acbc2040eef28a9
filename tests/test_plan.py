"""scripts/plan.py: bytes counted by hand, and a plan for every method."""

import json
import shutil

import plan
import pytest
import torch
from conftest import TRAINED, complaint
from torch._subclasses import FakeTensorMode
from transformers import Qwen3MoeConfig


@pytest.fixture
def bare(wide, tmp_path):
    """The folder of a model's configuration alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(wide / "config.json", folder)
    return folder


def flags_of(folder, *words):
    return plan.parse_flags(["--model", str(folder), "--rank", "2", "--max_length", "32",
                             "--max_new_tokens", "4", *words])


def test_weights_are_those_of_a_count_by_hand(bare):
    """hidden 64, 2 blocks of 4 and 2 heads of 16, 128 inner, 300 words: tied nowhere; K r = 16."""
    rows = {(row.base, row.processes): row for row in plan.plan(
        flags_of(bare, "--batch_size", "8"), torch.float32)}
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # linear weights
    outside = 2 * 300 * 64 + 64  # embeddings, output layer, last norm
    buffers = 2 * 8  # inverse frequencies, kept twice, of 8 each
    sizes = {"dense": 4 * block, "nf4": block // 2 + block // 16,  # and the scales of the rows:
             "int8": block + 4 * (3 * 64 + 2 * 32 + 2 * 128)}
    trained = 2 * (16 * (64 + 128) + 8 * 64)  # bank and router
    for base, size in sizes.items():
        size += 4 * 2 * 64  # its norms
        one, two = rows[base, 1], rows[base, 2]
        assert one.weights == 4 * (outside + buffers) + 2 * size
        assert two.weights == 4 * (outside + buffers) + size + 2 * size
        assert one.adapter == 4 * (trained + 2 * 16 * (64 + 128)) + 2 * 16 * 8
        assert one.adam == 2 * one.gradients == two.gradients == 8 * trained
        assert one.sums == 2 * 4 * 16 * (64 + 128)
        assert (one.rows, two.rows) == (8, 8)
        assert one.checkpointed < one.activations


def test_activations_grow_with_the_blocks(bare):
    """Those of five blocks, from two and three, are those measured with five."""
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    args = flags_of(bare, "--batch_size", "8")
    one, *_ = plan.plan(args, torch.float32, ["dense"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        measured = plan.peak_of_step(args, plan.fake_model(args, "dense", torch.float32), 8)
    assert one.activations == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_has_a_plan(method, bare, monkeypatch, capsys):
    """From the configuration alone: the folder holds no weights and no tokenizer."""
    monkeypatch.setattr(plan, "BASES", ("dense",))
    assert plan.main(["--method", method, "--model", str(bare), "--rank", "2", "--max_length", "32",
                      "--max_new_tokens", "4", "--batch_size", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if line.startswith(plan.BASES)]) == 4


def test_a_plan_of_experts(tmp_path):
    """In float32 as well; a base that would leave most of the model dense is named and left out."""
    Qwen3MoeConfig(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, moe_intermediate_size=32,
                   num_experts=32).save_pretrained(tmp_path)
    lines = list(plan.lines(flags_of(tmp_path, "--batch_size", "1", "--target_modules", "q_proj"),
                            torch.float32))
    assert {line.split()[0] for line in lines[2:-2]} == {"dense"}
    assert "its weights and would stay dense" in lines[-1]


@pytest.mark.parametrize(("words", "named"), [
    (["--method", "zero_shot"], "for one that trains"), (["--epochs", "2"], "--epochs"),
    (["--method", "lora", "--top_k", "2"], "--top_k has no effect")], ids=str)
def test_flags_that_a_plan_refuses(words, named):
    assert named in complaint(plan.parse_flags, words)


def test_an_unknown_model_is_refused(capsys):
    assert plan.main(["--model", "none"]) == 2
    assert "is unknown: allowed are" in capsys.readouterr().err


@pytest.mark.parametrize(("total", "words"), [(21e9, "24"), (22e9, "40"), (72e9, "80"),
                                              (73e9, "-")])
def test_what_fits_leaves_a_tenth(total, words):
    assert plan.fits(total) == words


def test_peak_counts_what_lives_at_once():
    """Two tensors of 4,000 bytes at a time, of three."""
    with plan.Peak([before := torch.zeros(10)]) as peak:
        before += 1
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
        del second
    assert peak.peak == 8000 and peak.now == 4000 and len(third) == 1000
