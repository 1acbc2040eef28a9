"""What a plan says: counted by hand, and near to what real steps take."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused, run
from transformers import Qwen3MoeConfig

from harness import plan
from harness.arguments import parse_flags
from registry import METHODS


@pytest.fixture
def bare(wide, tmp_path):
    """The folder of a model's configuration alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(wide / "config.json", folder)
    return folder


def flags_of(folder, *words):
    return parse_flags(["--model", str(folder), "--rank", "2", "--max_length", "32",
                        "--max_new_tokens", "4", *words])[0]


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


TRAINED = [name for name, method in METHODS.items() if method.trains]


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_has_a_plan(method, bare, monkeypatch):
    """From the configuration alone: the folder holds no weights and no tokenizer."""
    monkeypatch.setattr(plan, "BASES", ("dense", "nf4"))
    outcome = run("--method", method, "--model", bare, "--rank", 2, "--max_length", 32,
                  "--max_new_tokens", 4, "--batch_size", 1, "--plan")
    assert outcome.status == 0, outcome.err
    assert len([line for line in outcome.out if line.startswith(plan.BASES)]) == 8
    assert not Path(f"runs/{method}-mixed-bare-seed1").exists()


def test_a_plan_of_experts(tmp_path):
    """In float32 as well; a base that would leave most of the model dense is named and left out."""
    Qwen3MoeConfig(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, moe_intermediate_size=32,
                   num_experts=32).save_pretrained(tmp_path)
    lines = list(plan.lines(flags_of(tmp_path, "--batch_size", "1", "--target_modules", "q_proj"),
                            torch.float32))
    assert {line.split()[0] for line in lines[2:-2]} == {"dense"}
    assert "its weights and would stay dense" in lines[-1]


def test_what_trains_nothing_has_none(bare):
    refused("--plan is not read by --method zero_shot", "--method", "zero_shot", "--model", bare,
            "--plan")


def test_a_model_that_is_none_is_refused(tmp_path):
    refused("is unknown: allowed are", "--model", tmp_path / "none", "--plan")


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
