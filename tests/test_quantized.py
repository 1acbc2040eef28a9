"""A quantised base: its codes, its gradients, what stays exact, and whole runs on it."""

import json

import numpy as np
import pytest
import torch
from conftest import NO_EVAL, TRAINED, complaint, refused, results_of, run, succeed, wrapped
from scipy.stats import norm
from tiny import PROMPTS, assert_same, base_model, continuations, learn, logits_of, randn

import adapter
from decomposition import residual_weight
from method import fingerprint
from quantized import NF4, Quantised, dequantise, frozen_linear, quantise, to_int8, to_nf4

KINDS = ("nf4", "int8")
# The layer of a method does not see the kind, so each method takes one of them.
each_method = pytest.mark.parametrize(("method", "kind"), [
    (name, KINDS[index % 2]) for index, name in enumerate(TRAINED)])
# Largest relative error on a Gaussian weight.
ERROR = {"nf4": 0.10, "int8": 0.012}


@pytest.fixture
def flags(wide, suite, tmp_path):
    """The flags of a short run on that model, its folder last."""
    return ("--model", wide, "--suite", suite, "--rank", 2, "--alpha", 16, "--max_length", 64,
            "--max_new_tokens", 3, "--epochs", 1, "--output_dir", tmp_path / "out")


def quantised(method, kind, **changed):
    """Return a wrapped model on a quantised base."""
    model = wrapped(base_model("wide"), method, **changed)
    quantise(model, kind)
    return model


# --- codes --------------------------------------------------------------------------------------


def test_nf4_codes_by_hand():
    """The 16 values have the codes 0 to 15 at any scale; the first of two is in the high bits."""
    row = torch.cat([NF4, NF4.flip(0), NF4, NF4])[None]  # (1, 64)
    codes, scale = to_nf4(3.5 * row)
    assert scale.tolist() == [[3.5]]
    assert codes[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert codes[0, 8] == 0xFE
    torch.testing.assert_close(dequantise(codes, scale, torch.float32), 3.5 * row, rtol=0, atol=0)


def test_nf4_holds_quantiles_of_a_normal_distribution():
    """8 above zero and 7 below, as in QLoRA; 0.9677083 is the largest probability that is used."""
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    assert NF4.numpy() == pytest.approx(np.sort([*below, 0, *above]) / above.max(), abs=1e-6)


def test_nf4_takes_the_nearest_value():
    """Equal to a loop over the 16 values; a block of zeros stays zero."""
    weight = randn(1, 6, 128).float()
    weight[2, 64:] = 0
    values = dequantise(*to_nf4(weight), torch.float32)
    for row, found in zip(weight.unflatten(1, (2, 64)), values.unflatten(1, (2, 64)), strict=True):
        for block, mine in zip(row, found, strict=True):
            unit = block / block.abs().max().clamp_min(1e-30)
            nearest = NF4[(unit[:, None] - NF4).abs().argmin(1)] * block.abs().max()
            torch.testing.assert_close(mine, nearest, rtol=0, atol=0)


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = randn(2, 48, 192).float()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scale = to_nf4(weight)
    assert torch.equal(packed.flatten(), codes.flatten())
    assert torch.equal(functional.dequantize_4bit(packed, state),
                       dequantise(codes, scale, torch.float32))


def test_int8_is_within_half_a_step():
    weight = randn(3, 5, 64).float()
    weight[1] = 0
    codes, scale = to_int8(weight)
    error = (dequantise(codes, scale, torch.float32) - weight).abs()
    assert (error <= scale / 127 * 0.5001).all() and codes.abs().max() == 127


@pytest.mark.parametrize("kind", KINDS)
def test_error_and_size(kind):
    """A Gaussian weight has an error within the bound, and 4.5 or 8 bits a weight."""
    weight = randn(4, 256, 512).float()
    held = Quantised(weight, kind)
    found = dequantise(held.codes, held.scale, torch.float32)
    assert 0.001 < (found - weight).norm() / weight.norm() < ERROR[kind]
    size = sum(part.numel() * part.element_size() for part in held.parameters())
    assert 8 * size / weight.numel() == {"nf4": 4.5, "int8": 8 + 32 / 512}[kind]


# --- layers and models --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_dense_weight(kind, dtype):
    """Bitwise, after an evaluation, with and without autocast."""
    weight, bias = randn(5, 96, 128).to(dtype), randn(6, 96).to(dtype)
    held = Quantised(weight, kind)
    dense = dequantise(held.codes, held.scale, dtype)
    x = randn(7, 2, 9, 128).to(dtype)
    with torch.no_grad():
        frozen_linear(x, held, bias)
    for autocast in (False, True):
        answers = []
        for base in (held, dense):
            given = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = frozen_linear(given, base, bias)
            (y * torch.arange(96)).sum().backward()
            answers.append((y, given.grad))
        assert all(map(torch.equal, *answers))


@each_method
def test_a_model_is_its_dense_twin(method, kind):
    """Logits and training equal those of a model with the dequantised weights, bitwise."""
    model = quantised(method, kind, dropout=0.0)
    twin = wrapped(base_model("wide"), method, dropout=0.0)
    for name, module in model.named_modules():
        if isinstance(module, Quantised):
            owner = twin.get_submodule(name.rpartition(".")[0])
            weight = getattr(owner, name.rpartition(".")[2])
            weight.data = dequantise(module.codes, module.scale, weight.dtype)
    assert sum(isinstance(module, Quantised) for module in model.modules()) == 14
    assert torch.equal(logits_of(model), logits_of(twin))
    learned = [learn(each.adapted_by, 0, 1) for each in (model, twin)]
    assert learned[0] == learned[1]
    assert_same(*(each.adapted_by.state_dict() for each in (model, twin)))


def test_the_bank_stays_exact():
    """Only the residual is quantised, so the error is smaller than that of a quantised W0."""
    bare = base_model("wide")
    model, plain = quantised("badit", "nf4"), base_model("wide")
    shares = []
    for name, layer in model.adapted_by.layers.items():
        W0 = bare.get_submodule(name).weight.detach()
        residual = residual_weight(W0, layer.lora_A0, layer.lora_B0, layer.scaling)
        held = layer.residual
        assert_same(Quantised(residual, "nf4").state_dict(), held.state_dict())
        whole = (dequantise(held.codes, held.scale, W0.dtype)
                 + layer.scaling * layer.lora_B0 @ layer.lora_A0)
        without = dequantise(*to_nf4(plain.get_submodule(name).weight.detach()), W0.dtype)
        shares.append(((whole - W0).norm() / (without - W0).norm()).item())
    assert max(shares) < 1.05 and sum(shares) / len(shares) < 1.0


def test_layers_without_whole_blocks_stay_dense():
    """Their names are returned; a second call changes nothing."""
    model = wrapped(base_model())
    left = quantise(model, "int8")
    assert {name.rpartition(".")[2] for name in left} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"} and len(left) == 12
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert quantise(model, "int8") == left
    assert_same(before, dict(model.state_dict()))


def test_a_model_without_blocks_is_refused():
    model = wrapped(base_model("wide"))
    model._no_split_modules = None
    assert "does not say which of its modules" in complaint(quantise, model, "nf4")


@each_method
def test_saved_and_loaded(method, kind, tmp_path):
    """Loaded on a dense base, which is quantised again: bitwise equal logits and tokens."""
    model = quantised(method, kind)
    learn(model.adapted_by, 0, 1)
    model.adapted_by.base_sha256 = fingerprint(base_model("wide"))
    adapter.save(model, tmp_path)
    assert not [name for name in model.adapted_by.state_dict() if "residual" in name]
    again = adapter.load(base_model("wide"), tmp_path).eval()
    assert again.adapted_by.base == kind
    assert torch.equal(logits_of(model), logits_of(again))
    assert continuations(model, PROMPTS) == continuations(again, PROMPTS)


# --- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_train_resume_evaluate(kind, flags, forks, tmp_path):
    """A killed and resumed run gives equal bytes, and its adapter alone equal predictions."""
    more = ("--base", kind, "--checkpoint_every", 1, "--regroup_every", 2)
    succeed(*flags, *more)
    killed = (*flags[:-1], tmp_path / "killed", *more)
    forks(*killed, out=tmp_path / "printed", signal=9,
          seen=f"{tmp_path}/killed/checkpoints/000002")
    succeed(*killed, "--resume")
    for name in ("adapter/adapter_model.safetensors", "log.jsonl", "predictions/01_mixed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base"] == results_of(tmp_path / "out")["args"]["base"] == kind
    folder = ("--adapter", tmp_path / "out/adapter")
    succeed("--eval_only", *folder, "--output_dir", tmp_path / "eval")
    assert ((tmp_path / f"eval/predictions/01_badit-{kind}.jsonl").read_bytes()
            == (tmp_path / "out/predictions/01_mixed.jsonl").read_bytes())
    assert results_of(tmp_path / "eval")["args"]["base"] == kind
    refused(f"the adapter was trained with --base {kind}", "--eval_only", *folder,
            "--base", "dense", "--output_dir", tmp_path / "other")
    succeed(*flags[:-1], tmp_path / "on", *folder, "--overwrite")
    assert results_of(tmp_path / "on")["args"]["base"] == kind


def test_another_base_is_another_run(flags, tmp_path):
    succeed(*flags, *NO_EVAL)
    refused("--base", *flags, *NO_EVAL, "--base", "int8", "--resume")


def test_zero_shot_names_its_base(flags, tmp_path):
    """Row name and losses are those of the quantised model."""
    argv = ("--method", "zero_shot", *flags[:4], "--max_length", 64, "--max_new_tokens", 3,
            "--eval_loss")
    losses = {}
    for kind in ("dense", *KINDS):
        outcome = run(*argv, "--base", kind, "--output_dir", tmp_path / kind)
        assert outcome.status == 0
        assert any(f"stored as {kind}" in line for line in outcome.out) is (kind != "dense")
        results = results_of(tmp_path / kind)
        assert results["rows"] == ["zero_shot" if kind == "dense" else f"zero_shot-{kind}"]
        losses[kind] = results["losses"][0]
    assert len({str(each) for each in losses.values()}) == 3
    assert losses["int8"] == pytest.approx(losses["dense"], rel=0.05)
