"""Matmul backends: oneDNN multiplies float32 matrices only where it keeps their precision."""

from types import SimpleNamespace

import pytest
import torch
from conftest import complaint

import models
from harness import launch


@pytest.fixture
def matmul():
    """The setting, put back afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield matmul
    matmul.fp32_precision = before


def test_loading_a_model_switches_cudnn_attention_off(llama):
    """Its backward pass gives NaN on Hopper; the switch also exists without a GPU."""
    cudnn, before = torch.backends.cuda, torch.backends.cuda.cudnn_sdp_enabled()
    cudnn.enable_cudnn_sdp(True)
    try:
        models.load(str(llama))
        assert not cudnn.cudnn_sdp_enabled()
    finally:
        cudnn.enable_cudnn_sdp(before)


def test_rows_of_a_micro_batch():
    """Three processes do not split the paper's batch of 8, but can evaluate."""
    three = SimpleNamespace(num_processes=3, gradient_accumulation_steps=1)
    assert launch.share_of_batch(three, trains=False) == 2
    assert "give --batch_size" in complaint(launch.share_of_batch, three, trains=True)
    sixteen = SimpleNamespace(num_processes=16, gradient_accumulation_steps=1)
    assert launch.share_of_batch(sixteen, trains=False) == 1


def rounded(left, right):
    """Multiply as a processor that uses bf16 inside."""
    return (left.bfloat16() @ right.bfloat16()).float()


def test_they_keep_float32s_digits(matmul):
    """Products on this machine have float32 precision, whatever is chosen."""
    chosen = launch.use_onednn()
    assert matmul.fp32_precision == ("bf16" if chosen else "ieee")
    x, W = torch.randn(40, 96), torch.randn(64, 96)
    exact = x.double() @ W.double().T
    assert ((x @ W.T).double() - exact).norm() < 1e-6 * exact.norm()


def test_bf16_inside_is_refused(matmul, monkeypatch):
    """On a processor that multiplies in bf16, the setting is undone."""
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: (
        rounded(left, right) if left.dtype == torch.float32 == right.dtype
        and matmul.fp32_precision == "bf16" else multiply(left, right)))
    assert not launch.use_onednn() and matmul.fp32_precision == "ieee"


def test_nothing_changes_without_onednn(matmul, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not launch.use_onednn() and matmul.fp32_precision == "ieee"
