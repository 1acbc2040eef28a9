"""export.py: an adapter as one low-rank update of each layer, exact or fitted, for other libraries.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    NO_EVAL,
    SMALL,
    failing,
    imported_by,
    save_checkpoint,
    succeed,
    wrapped,
    write_json,
)
from peft import PeftModel
from tiny import PROMPTS, base_model, learn, loader_of, logits_of, randn, rows_of
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import adapter
import export
import models
from baselines.lora import LoraLinear
from deploy import exporting, low_rank
from harness.adapter_config import read_adapter_config
from inputs.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
# Method, settings, and rank of the update.
EXACT = {"lora": ("lora", {}, 2), "pissa": ("pissa", {}, 4), "olora_qr": ("olora_qr", {}, 4),
         "olora": ("olora", {}, 4),
         "energy_8": ("badit", dict(routing="energy", top_k=8), 32),
         "static": ("badit", dict(routing="static"), 32),
         "all linear": ("lora", dict(target_modules=("all-linear",)), 2),
         "two targets": ("badit", dict(routing="static", num_experts=2,
                                       target_modules=("gate_proj", "k_proj")), 8)}
ROUTED = {"badit": ("badit", {}, 32), "top_8": ("badit", dict(top_k=8), 32),
          "drop": ("badit", dict(inactive="drop"), 32), "no_bad": ("badit", dict(no_bad=True), 16),
          "loramoe": ("loramoe", {}, 16)}
REFUSED = {"gainlora": ("gainlora", {}, "gainlora cannot be exported as a LoRA adapter: its gates"),
           "energy": ("badit", dict(routing="energy"), "act on it as pre-trained"),
           "initial": ("badit", dict(inactive="initial"), "act on it as pre-trained")}
CASES = EXACT | ROUTED | REFUSED
INPUTS = ("input_ids", "attention_mask", "position_ids")


def trained(case, model):
    """`model` after two tasks, with gates and groupings far from those of the start."""
    name, changed, _ = CASES[case]
    method = wrapped(model, name, **changed).adapted_by
    learn(method, 0, 1)
    for number, layer in enumerate(method.layers.values()):
        if hasattr(layer, "expert_of"):
            layer.expert_of.copy_(layer.expert_of[torch.randperm(len(layer.expert_of))])
        for gate in ("alpha", "router"):
            if isinstance(getattr(layer, gate, None), nn.Parameter):
                weight = getattr(layer, gate).data
                weight += 0.3 * randn(number, *weight.shape).to(weight.dtype)
    return model


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    """A function that trains and saves an adapter, once -> (folder, wrapped model)."""
    @functools.cache
    def make(case, architecture):
        model, _ = models.load(str(checkpoints[architecture]))
        trained(case, model).adapted_by.base_name = str(checkpoints[architecture])
        folder = tmp_path_factory.mktemp("made") / "adapter"
        adapter.save(model, folder)
        return folder, model
    return make


@pytest.fixture
def adapters(made, tmp_path, capsys):
    """A function that copies a trained adapter -> (folder, wrapped model)."""
    def make(case, architecture="llama"):
        folder, model = made(case, architecture)
        capsys.readouterr()  # discard what training prints
        return shutil.copytree(folder, tmp_path / "adapter"), model
    return make


def call(capsys, *argv):
    """Call export.main -> (status, lines, lines of stderr without progress bars)."""
    status = export.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out.splitlines(), [line for line in err.splitlines() if "%|" not in line]


def assert_near(model, wanted):
    """The logits of a model are `wanted` to 1e-5 of the largest."""
    assert (logits_of(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# --- the update ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXACT | ROUTED)
def test_constant_update_is_the_layer(case):
    """W0 x + B A x is the layer's output; under token routing for one token, whose factors are M.
    """
    base = base_model(dtype=torch.float64)
    weights = {name: module.weight.clone() for name, module in base.named_modules()
               if isinstance(module, nn.Linear)}
    ranks = []
    for number, (name, layer) in enumerate(trained(case, base).adapted_by.layers.items()):
        x = randn(number, 1, layer.residual.shape[1])
        mixing = None
        if layer.depends_on_token:
            gates = layer.route(x).weight[0]
            mixing = torch.diag(torch.stack([layer.scaling * gates[k] for k in layer.expert_of]))
        A, B = layer.constant_update(mixing)
        with torch.no_grad():
            assert_close(x @ (weights[name] + B @ A).T, layer(x))
        assert layer.depends_on_token is (case in ROUTED)
        ranks.append(len(A))
    assert max(ranks) == CASES[case][2]


def test_refactoring_keeps_the_product():
    """Rounded to bf16, balanced factors lose far less than the difference of two products."""
    A, B = randn(0, 6, 20), randn(1, 30, 6)
    update = low_rank.Update(torch.cat([A + 0.01 * randn(2, 6, 20), A]),
                             torch.cat([B, -B], dim=1))
    new, lost = low_rank.refactored(update)
    product = update.B @ update.A
    assert lost == 0.0
    assert_close(new.B @ new.A, product, rtol=1e-9, atol=1e-12)
    assert_close(new.A.norm(dim=1), new.B.norm(dim=0))

    def error(pair):
        rounded = pair.B.bfloat16().double() @ pair.A.bfloat16().double()
        return float((rounded - product).norm() / product.norm())

    assert error(new) < 0.01 < 0.1 < error(update)


def test_a_lower_rank_is_the_nearest_one():
    rank, update = 3, low_rank.Update(randn(0, 6, 20), randn(1, 30, 6))
    new, lost = low_rank.refactored(update, rank)
    product = update.B @ update.A
    U, S, Vh = torch.linalg.svd(product)
    nearest = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert new.A.shape == (rank, 20) and new.B.shape == (30, rank)
    assert_close(new.B @ new.A, nearest)
    assert lost == pytest.approx(float((nearest - product).norm() / product.norm()))
    wider = low_rank.padded(new, 8)
    assert wider.A.shape == (8, 20) and wider.B.shape == (30, 8)
    assert_close(wider.B @ wider.A, nearest)
    zero, lost = low_rank.refactored(low_rank.Update(update.A, 0 * update.B), rank)
    assert lost == 0.0 and not (zero.B @ zero.A).any()


# --- the fit ------------------------------------------------------------------------------------


def tokens_of(seed, count=200, N=6):
    """Correlated inputs of components, and factors that depend on them."""
    h = randn(seed, count, N) @ randn(seed + 1, N, N)
    return h, 1 + 0.3 * torch.tanh(h @ randn(seed + 2, N, N))


def test_least_squares_against_a_loop():
    """Row i of M is an ordinary regression of c_i h_i on h."""
    h, c = tokens_of(0)
    sums = low_rank.moments(h, c)
    parts = [low_rank.moments(h[start:start + 70], c[start:start + 70]) for start in (0, 70, 140)]
    for whole, *each in zip(sums, *parts, strict=True):
        assert_close(whole, sum(each))
    wanted = [torch.linalg.lstsq(h, c[:, i] * h[:, i]).solution for i in range(6)]
    assert_close(low_rank.least_squares(sums, ridge=0), torch.stack(wanted), rtol=1e-6, atol=1e-8)
    assert_close(low_rank.mean_factors(sums), torch.diag(c.mean(0)))


@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 1.0])
@pytest.mark.parametrize("count", [3, 200])
def test_least_squares_is_never_worse_than_mean_factors(ridge, count):
    """On its own tokens, also where those are fewer than components."""
    h, c = tokens_of(5, count)
    sums = low_rank.moments(h, c)
    missed = [float((c * h - h @ M.T).square().sum())
              for M in (low_rank.least_squares(sums, ridge), low_rank.mean_factors(sums))]
    assert missed[0] < missed[1]
    equal = low_rank.moments(h, c[:1].expand_as(h))
    assert_close(low_rank.least_squares(equal), torch.diag(c[0]), rtol=0, atol=1e-9)
    nothing = low_rank.moments(0 * h, c[:1].expand_as(h))
    assert_close(low_rank.least_squares(nothing), torch.diag(c[0]))


@pytest.mark.parametrize("case", ["badit", "loramoe"])
def test_calibration_sees_every_token_once(case):
    """Padded batches give the sums of single rows, and the model stays as it was."""
    model = trained(case, base_model(dtype=torch.float64))
    before = logits_of(model)
    found = low_rank.calibrate(model, [{key: batch[key] for key in INPUTS}
                                       for batch in loader_of(rows_of(3))])
    layers = model.adapted_by.layers
    assert found.keys() == layers.keys()
    seen = {name: [] for name in layers}
    handles = [layer.register_forward_pre_hook(
        lambda _, inputs, name=name: seen[name].append(inputs[0][0]))
        for name, layer in layers.items()]
    with torch.no_grad():
        for row in rows_of(3):
            model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            x = torch.cat(seen[name])
            c = layer.scaling * layer.route(x).weight[:, layer.expert_of]
            for mine, naive in zip(found[name], low_rank.moments(x @ layer.lora_A.T, c),
                                   strict=True):
                assert_close(mine, naive, rtol=1e-8, atol=1e-10)
    assert torch.equal(logits_of(model), before)


def test_divergence_against_its_sum():
    p, q = randn(0, 3, 7), randn(1, 3, 7)
    for row in range(3):
        P, Q = (each[row].exp() / each[row].exp().sum() for each in (p, q))
        wanted = sum(float(P[i] * (P[i] / Q[i]).log()) for i in range(7))
        assert float(exporting.divergence(p, q)[row]) == pytest.approx(wanted)


def test_what_a_comparison_measures():
    """KL and share of equal tokens are means over all tokens, of the adapter and the export."""
    left, right = trained("badit", base_model()), base_model()
    rows = [{"input_ids": prompt} for prompt in PROMPTS]
    kl, said = exporting.compare(left, right, rows, "some")
    p, q = logits_of(left), logits_of(right)  # (tokens, vocabulary)
    assert kl == pytest.approx(float(exporting.divergence(p, q).mean()), rel=1e-4) and kl > 1e-3
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert f"some ({len(p)} tokens): " in said and f"token at {float(same):.1%}, " in said


# --- whole exports ------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "architecture"), [
    ("static", "llama"), ("all linear", "qwen3"), ("two targets", "gemma2")])
def test_an_exact_export_is_the_wrapped_model(case, architecture, adapters, checkpoints, suite,
                                              tmp_path, capsys):
    """Through PEFT, through transformers, and merged."""
    folder, model = adapters(case, architecture)
    words = (folder, "--suite", suite, "--rows", 3, "--out")
    status, out, _ = call(capsys, *words, tmp_path / "out")
    assert status == 0 and out[0] == f"exact; rank {CASES[case][2]}"
    wanted = logits_of(model)
    base, _ = models.load(str(checkpoints[architecture]))
    assert (logits_of(base) - wanted).abs().max() > 0.01 * wanted.abs().max()
    assert_near(PeftModel.from_pretrained(base, tmp_path / "out").eval(), wanted)
    assert_near(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoints[architecture])
    with pytest.raises(InputError, match="is a PEFT adapter"):
        read_adapter_config(tmp_path / "out")

    status, out, _ = call(capsys, *words, tmp_path / "merged", "--merged")
    assert status == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert loaded.dtype == torch.float32
    assert_near(loaded, wanted)
    again, tokenizer = models.load(str(tmp_path / "merged"))
    assert torch.equal(logits_of(again), logits_of(loaded)) and tokenizer("cat").input_ids
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()


def test_an_approximate_export_says_how_near_it_is(adapters, checkpoints, suite, tmp_path, capsys):
    folder, model = adapters("badit")
    words = (folder, "--out", tmp_path / "out", "--suite", suite,
             "--approximate", "--rows", 12)
    status, out, err = call(capsys, *words, "--max_kl", 1e-9)
    assert status == 2 and len(out) == 2 and err[-1].endswith(": nothing was written")
    said = float(err[-1].partition("export) is ")[2].partition(",")[0])
    assert f"KL(adapter || export) {said:.2g}" in out[1] and said > 1e-9
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    status, out, _ = call(capsys, *words, "--max_kl", 5)
    assert status == 0 and out[0] == (
        "approximated: 2 layers with experts that depend on the token, each replaced by a constant "
        "that was fitted to 12 training rows; rank 32")
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(line in text for line in out[:2])
    base, bare = (models.load(str(checkpoints["llama"]))[0] for _ in range(2))
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    kl, kl_bare = (float(exporting.divergence(logits_of(model), logits_of(other)).mean())
                   for other in (loaded, bare))
    assert kl < 0.5 * kl_bare


def test_a_lower_rank_says_what_it_costs(adapters, suite, tmp_path, capsys):
    folder, _ = adapters("pissa")
    words = (folder, "--suite", suite, "--rows", 3, "--max_kl", 100)
    status, out, _ = call(capsys, *words, "--out", tmp_path / "out", "--rank", 3)
    assert status == 0 and out[0].startswith("exact; rank 3; --rank cut off at most ")
    status, _, err = call(capsys, *words, "--out", tmp_path / "more", "--rank", 4)
    assert status == 2 and "--rank 4: the update has rank 4 already" in err[-1]


def test_a_merged_export_has_the_dtype_of_its_base(suite, tmp_path, capsys):
    """A base stored in bf16 gives a bf16 checkpoint, and its rounding is measured."""
    base = save_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    model, _ = models.load(str(base))
    trained("lora", model).adapted_by.base_name = str(base)
    adapter.save(model, tmp_path / "adapter")
    status, out, _ = call(capsys, tmp_path / "adapter", "--out", tmp_path / "out", "--suite", suite,
                          "--rows", 3, "--merged")
    assert status == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    said = float(out[1].rpartition("largest difference of a logit ")[2].split()[0])
    assert 1e-4 < said < 0.05


def test_a_bf16_run_on_a_float32_checkpoint(llama, suite, tmp_path, capsys, monkeypatch):
    """Its base is the checkpoint rounded to bf16, so the export starts from that as well."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    succeed("--model", llama, "--suite", suite, "--method", "lora", *SMALL, "--epochs", 1,
            "--output_dir", tmp_path / "run", *NO_EVAL)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    status, out, _ = call(capsys, tmp_path / "run" / "adapter", "--out", tmp_path / "out")
    assert status == 0 and out[0] == (
        "exact; rank 2; load the base in bfloat16, as the run did")
    kl = float(out[1].partition("export) ")[2].partition(",")[0])
    assert 0 <= kl < 1e-9


def test_the_card(llama, suite, tmp_path, capsys, monkeypatch):
    """It names the run's suite, settings and scores, the base's hash, the prompt format."""
    monkeypatch.chdir(tmp_path)
    succeed("--model", llama, "--suite", suite, "--method", "lora", *SMALL, "--epochs", 1,
            "--output_dir", "run")
    monkeypatch.setattr(exporting, "hub_name", lambda model: "someone/tiny")
    status, out, _ = call(capsys, "run/adapter", "--out", "out", "--rows", 5)
    assert status == 0 and "5 held-out prompts of tiny" in out[1]
    _, front, body = Path("out/README.md").read_text().split("---\n", 2)
    assert front.splitlines() == ["base_model: someone/tiny", "library_name: peft",
                                  "pipeline_tag: text-generation", "tags:", "- badit"]
    results = json.loads(Path("run/results.json").read_text())
    for word in (results["base_sha256"], "alpha 16.0", "rank 2", f"suite {suite}",
                 f"mean score {results['metrics']['rouge']:.2f}", "Input: {input}\nOutput: ",
                 "without the model's chat template"):
        assert word in body
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in Path("out").iterdir())
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny" and config["r"] == 2


def test_names_on_the_hub(tmp_path, monkeypatch):
    """The embedded model and folders have none; a hub id is its own."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert [exporting.hub_name(name) for name in ("smollm2-135m", "mine", "qwen3-4b", "a/b")] == [
        None, None, "Qwen/Qwen3-4B", "a/b"]


def test_a_failed_export_leaves_no_trace(adapters, suite, tmp_path, capsys, monkeypatch):
    folder, _ = adapters("lora")
    words = (folder, "--out", tmp_path / "out", "--suite", suite, "--rows", 3)
    for error, status in ((OSError(28, "no space"), 2), (KeyboardInterrupt, 130)):
        with failing(exporting, "write_lora", 1, error):
            assert call(capsys, *words)[0] == status
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "compare", lambda *_: (float("nan"), ""))
        status, _, err = call(capsys, *words)
        assert status == 2 and "is nan, not below --max_kl 0.05" in err[-1]
    (tmp_path / "out").mkdir()  # an empty folder is accepted
    assert call(capsys, *words)[0] == 0


def test_an_adapter_of_a_quantised_base(wide, suite, tmp_path, capsys):
    """Exported for the dense base, which the card says; never merged."""
    succeed("--model", wide, "--suite", suite, "--method", "lora", "--base", "int8", *SMALL,
            "--epochs", 1, "--output_dir", tmp_path / "run", *NO_EVAL)
    words = (tmp_path / "run" / "adapter", "--max_kl", 1)
    assert call(capsys, *words, "--out", tmp_path / "out")[0] == 0
    assert "stored as int8, exported for the dense one" in (
        tmp_path / "out" / "README.md").read_text()
    status, _, err = call(capsys, *words, "--out", tmp_path / "merged", "--merged")
    assert status == 2 and "stored as int8, but a merged" in err[-1]


def test_a_layer_that_defines_no_update_is_refused(adapters, suite, tmp_path, capsys, monkeypatch):
    """A new method is exported by what its layers define."""
    folder, _ = adapters("lora")
    monkeypatch.setattr(LoraLinear, "constant_update", None)
    status, _, err = call(capsys, folder, "--out", tmp_path / "out", "--suite", suite)
    assert status == 2 and err[-1] == ("error: lora cannot be exported as a LoRA adapter: "
                                       "LoraLinear defines no constant_update")


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case, words, named", [
    *((case, ("--approximate",), named) for case, (_, _, named) in REFUSED.items()),
    ("lora", (), "name tasks with --suite"), ("lora", ("--rank", "0"), "--rank"),
    ("lora", ("--data_dir", "x"), "without --suite"), ("lora", ("--suite", "nowhere"), "nowhere"),
    ("lora", ("--model", "qwen3"), "qwen3"),
    ("lora", ("--suite", "mini", "--data_dir", "x"), "--data_dir"),
    ("static", ("--approximate",), "is exported exactly"),
    ("badit", (), "--approximate exports the nearest one"),
])
def test_bad_input_is_one_line(case, words, named, adapters, tmp_path, capsys):
    folder, _ = adapters(case)
    status, out, err = call(capsys, folder, "--out", tmp_path / "out", *words)
    assert (status, out) == (2, []) and err[-1].startswith("error: ") and named in err[-1]
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(adapters, checkpoints, suite, tmp_path, capsys):
    folder, _ = adapters("lora")
    write_json(tmp_path / "results.json", {"a": 1})
    for words, named in (
            ((tmp_path, "--out", "x"), f"there is one at {folder}"), ((folder,), "--out"),
            ((folder, "--out", folder), "is in use"), ((folder, "--out", suite), "is in use"),
            ((folder, "--out", tmp_path / "out"), "results.json"),
            ((folder, "--out", tmp_path / "out", "--suite", suite, "--model",
              checkpoints["qwen3"]), "results.json")):
        status, _, err = call(capsys, *words)
        assert status == 2 and named in err[-1], err
    (tmp_path / "results.json").unlink()
    status, _, err = call(capsys, *words)
    assert status == 2 and "another base model" in err[-1]


@pytest.mark.parametrize("program, words, status", [("export.py", "--wrong", 2),
                                                    ("generate.py", "--help", 0)])
def test_help_and_wrong_flags_wait_for_no_library(program, words, status):
    done, imported = imported_by(program, words)
    assert done.returncode == status
    assert not imported & {"torch", "transformers", "accelerate", "numpy", "safetensors"}
