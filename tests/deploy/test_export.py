"""export.py: an adapter as one low-rank update, exact or nearest, as other libraries load it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, NO_EVAL, SMALL, failing, settings_of, succeed, write_json
from peft import PeftModel
from tiny import base_model, learn, loader_of, logits_of, randn, rows_of
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import adapter
import export
import models
from deploy import exporting, fidelity, low_rank
from harness.adapter_config import read_adapter_config
from inputs.errors import InputError
from registry import method_class

ROOT = Path(__file__).resolve().parents[2]
# What has an exact form, and the rank of its update: name of the method, settings, rank.
EXACT = {"lora": ("lora", {}, 2), "pissa": ("pissa", {}, 4), "olora": ("olora", {}, 4),
         "static": ("badit", dict(routing="static"), 32),
         "all linear": ("lora", dict(target_modules=("all-linear",)), 2),
         "two targets": ("badit", dict(routing="static", num_experts=2,
                                       target_modules=("gate_proj", "k_proj")), 8)}
ROUTED = {"badit": ("badit", {}, 32), "top_8": ("badit", dict(top_k=8), 32),
          "drop": ("badit", dict(inactive="drop"), 32), "no_bad": ("badit", dict(no_bad=True), 16),
          "loramoe": ("loramoe", {}, 16)}
CASES = EXACT | ROUTED


def trained(case, model):
    """`model` after two tasks, with gates and groupings that are far from those of the start."""
    name, changed, _ = CASES[case]
    torch.manual_seed(0)
    method = method_class(name)(settings_of(name, **changed))
    method.wrap(model)
    model.eval()
    learn(method, 0, 1)
    for number, layer in enumerate(method.layers.values()):
        if hasattr(layer, "expert_of"):
            layer.expert_of.copy_(layer.expert_of[torch.randperm(len(layer.expert_of))])
        for kind in ("alpha", "router"):
            if isinstance(getattr(layer, kind, None), nn.Parameter):
                weight = getattr(layer, kind).data
                weight += 0.3 * randn(number, *weight.shape).to(weight.dtype)
    return model


@pytest.fixture
def adapters(checkpoints, tmp_path, capsys):
    """What makes the folder of a trained adapter on a checkpoint -> (folder, wrapped model)."""
    def make(case, architecture="llama"):
        model, _ = models.load(str(checkpoints[architecture]))
        trained(case, model).adapted_by.base_name = str(checkpoints[architecture])
        adapter.save(model, tmp_path / "adapter")
        capsys.readouterr()  # what training says
        return tmp_path / "adapter", model
    return make


def call(capsys, *argv):
    """export.main -> (status, lines, lines to stderr without bars)."""
    status = export.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out.splitlines(), [line for line in err.splitlines() if "%|" not in line]


# --- the forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXACT)
def test_constant_update_is_the_layer(case):
    """W0 x + B' A' x, entry by entry in float64."""
    base = base_model(dtype=torch.float64)
    weights = {name: module.weight.clone() for name, module in base.named_modules()
               if isinstance(module, nn.Linear)}
    layers = trained(case, base).adapted_by.layers
    for number, (name, layer) in enumerate(layers.items()):
        x = randn(number, 5, layer.residual.shape[1])
        update = low_rank.constant_update(layer)
        with torch.no_grad():
            assert_close(x @ (weights[name] + update.B @ update.A).T, layer(x))
        assert not low_rank.depends_on_token(layer)
    ranks = [len(low_rank.constant_update(layer).A) for layer in layers.values()]
    assert max(ranks) == CASES[case][2]


@pytest.mark.parametrize("case", ROUTED)
def test_a_mixing_that_is_what_the_router_says_gives_the_layer(case):
    """For one token, whose gates are known: B' = B diag(c)."""
    base = base_model(dtype=torch.float64)
    weights = {name: module.weight.clone() for name, module in base.named_modules()
               if isinstance(module, nn.Linear)}
    for name, layer in trained(case, base).adapted_by.layers.items():
        assert low_rank.depends_on_token(layer)
        x = randn(3, 1, 32)
        with torch.no_grad():
            c = torch.tensor([layer.scaling * layer.route(x).weight[0, k] for k in layer.expert_of])
            update = low_rank.constant_update(layer, torch.diag(c))
            assert_close(x @ (weights[name] + update.B @ update.A).T, layer(x))


@pytest.mark.parametrize("name", ["gainlora"])
def test_a_layer_without_a_constant_form_is_refused(name):
    model = base_model()
    method = method_class(name)(settings_of(name))
    method.wrap(model)
    with pytest.raises(InputError, match="GainLinear has no constant"):
        low_rank.constant_update(next(iter(method.layers.values())))


def test_refactoring_keeps_the_product():
    """Balanced factors of the same product, of which bf16 loses far less."""
    A, B = randn(0, 6, 20), randn(1, 30, 6)
    # The small difference of two large products, as a trained bank beside its initial one.
    update = low_rank.Update(torch.cat([A + 0.01 * randn(2, 6, 20), A]),
                             torch.cat([B, -B], dim=1))
    new, lost = low_rank.refactored(update)
    assert lost == 0.0
    assert_close(new.B @ new.A, update.B @ update.A, rtol=1e-9, atol=1e-12)
    assert_close(new.A.norm(dim=1), new.B.norm(dim=0))

    def error(pair):
        rounded = [each.bfloat16().double() for each in (pair.B, pair.A)]
        product = update.B @ update.A
        return float((rounded[0] @ rounded[1] - product).norm() / product.norm())

    assert error(new) < 0.01 < 0.1 < error(update)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_nearest_one(rank):
    update = low_rank.Update(randn(0, 6, 20), randn(1, 30, 6))
    new, lost = low_rank.refactored(update, rank)
    product = update.B @ update.A
    U, S, Vh = torch.linalg.svd(product)
    assert new.A.shape == (rank, 20) and new.B.shape == (30, rank)
    assert_close(new.B @ new.A, (U[:, :rank] * S[:rank]) @ Vh[:rank])
    assert lost == pytest.approx(float((new.B @ new.A - product).norm() / product.norm()))


def test_padding_adds_nothing():
    update = low_rank.Update(randn(0, 3, 20), randn(1, 30, 3))
    new = low_rank.padded(update, 5)
    assert new.A.shape == (5, 20) and new.B.shape == (30, 5)
    assert_close(new.B @ new.A, update.B @ update.A)


def test_an_untrained_layer_has_an_update_of_zero():
    update = low_rank.Update(randn(0, 3, 20), torch.zeros(30, 3, dtype=torch.float64))
    for rank in (None, 2):
        new, lost = low_rank.refactored(update, rank)
        assert lost == 0.0 and not (new.B @ new.A).any()


# --- the nearest constant -----------------------------------------------------------------------


def tokens_of(seed, count=200, N=6):
    """Inputs of components that hang together, and factors that hang on them."""
    h = randn(seed, count, N) @ randn(seed + 1, N, N)
    return h, 1 + 0.3 * torch.tanh(h @ randn(seed + 2, N, N))


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_against_a_loop(seed):
    """Row by row an ordinary regression of c_i h_i on h."""
    h, c = tokens_of(seed)
    sums = low_rank.moments(h, c)
    parts = [low_rank.moments(h[start:start + 70], c[start:start + 70]) for start in (0, 70, 140)]
    for whole, *each in zip(sums, *parts, strict=True):
        assert_close(whole, sum(each))
    wanted = [torch.linalg.lstsq(h, c[:, i] * h[:, i]).solution for i in range(6)]
    assert_close(low_rank.least_squares(sums, ridge=0), torch.stack(wanted), rtol=1e-6, atol=1e-8)
    means = [sum(float(row[i]) for row in c) / len(c) for i in range(6)]
    assert_close(low_rank.mean_gates(sums).diagonal(), torch.tensor(means, dtype=torch.float64))


@pytest.mark.parametrize("ridge", [0, 1e-9, 1e-3, 1.0])
@pytest.mark.parametrize("count", [3, 200])
def test_least_squares_is_never_worse_than_mean_gates(ridge, count):
    """On its own tokens, also where those are fewer than components."""
    if ridge == 0 and count == 3:
        ridge = 1e-12  # singular without any
    h, c = tokens_of(5, count)
    sums = low_rank.moments(h, c)
    missed = [float((c * h - h @ M.T).square().sum())
              for M in (low_rank.least_squares(sums, ridge), low_rank.mean_gates(sums))]
    assert missed[0] < missed[1]


@pytest.mark.parametrize("count", [3, 200])
def test_equal_gates_give_the_diagonal(count):
    h, _ = tokens_of(0, count)
    c = torch.linspace(0.5, 2, 6, dtype=torch.float64).expand_as(h)
    assert_close(low_rank.least_squares(low_rank.moments(h, c)), torch.diag(c[0]), rtol=0,
                 atol=1e-12 if count > 6 else 1e-9)
    nothing = low_rank.moments(torch.zeros(4, 6), c[:1].expand(4, -1))
    assert_close(low_rank.least_squares(nothing), torch.diag(c[0]))


@pytest.mark.parametrize("case", ROUTED)
def test_calibration_sees_every_token_once(case):
    """In padded batches as in rows alone, and nothing else of the model changes."""
    model = trained(case, base_model(dtype=torch.float64))
    before = logits_of(model)
    rows = [row["input_ids"] for row in rows_of(3)]
    keys = ("input_ids", "attention_mask", "position_ids")
    batches = [{key: batch[key] for key in keys} for batch in loader_of(rows_of(3))]
    found = low_rank.calibrate(model, batches)
    assert found.keys() == model.adapted_by.layers.keys()
    seen = {name: [] for name in found}
    handles = [layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen[name].append(
        inputs[0][0])) for name, layer in model.adapted_by.layers.items()]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, layer in model.adapted_by.layers.items():
            x = torch.cat(seen[name])
            h = x @ layer.lora_A.T
            c = layer.scaling * layer.route(x).weight[:, layer.expert_of]
            for mine, naive in zip(found[name], low_rank.moments(h, c), strict=True):
                assert_close(mine, naive, rtol=1e-8, atol=1e-10)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("case", ["badit", "loramoe"])
def test_least_squares_is_nearer_than_mean_gates(case):
    """By the KL of whole models on other rows of the same kind than those of the fit."""
    model = base_model()
    method = method_class(case)(settings_of(case))
    method.wrap(model)
    learn(method.model.eval().adapted_by, 0, 1, steps=20)
    rows = rows_of(1, 40)
    held_out = [row["input_ids"] for row in rows[1::2]]
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
               for batch in loader_of(rows[::2])]
    sums, kl = low_rank.calibrate(model, batches), []
    for fit in (low_rank.least_squares, low_rank.mean_gates):
        base = base_model()
        low_rank.merge(base, {name: low_rank.constant_update(layer, fit(sums[name]))
                              for name, layer in method.layers.items()})
        kl.append(float(fidelity.divergence(logits_of(model, held_out),
                                            logits_of(base, held_out)).mean()))
    assert kl[0] < kl[1]


def test_divergence_against_its_sum():
    p, q = randn(0, 3, 7), randn(1, 3, 7)
    for row in range(3):
        P, Q = (each[row].exp() / each[row].exp().sum() for each in (p, q))
        wanted = sum(float(P[i] * (P[i] / Q[i]).log()) for i in range(7))
        assert float(fidelity.divergence(p, q)[row]) == pytest.approx(wanted)


# --- whole exports ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", EXACT)
def test_an_exact_export_is_the_wrapped_model(case, architecture, adapters, checkpoints, suite,
                                              tmp_path, capsys):
    """Through PEFT on the bare base, and through W0 + B' A'."""
    folder, model = adapters(case, architecture)
    status, out, _ = call(capsys, folder, "--out", tmp_path / "out", "--suite", suite, "--rows", 3,
                          "--max_new_tokens", 2)
    assert status == 0 and out[0] == f"exact; rank {CASES[case][2]}"
    wanted = logits_of(model)
    base, _ = models.load(str(checkpoints[architecture]))
    assert (logits_of(base) - wanted).abs().max() > 0.01 * wanted.abs().max()
    by_peft = logits_of(PeftModel.from_pretrained(base, tmp_path / "out").eval())
    assert (by_peft - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    merged, _ = models.load(str(checkpoints[architecture]))
    low_rank.merge(merged, {name: low_rank.constant_update(layer)
                            for name, layer in model.adapted_by.layers.items()})
    assert (logits_of(merged) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoints[architecture])
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits_of(by_name) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with pytest.raises(InputError, match="adapter of PEFT's"):
        read_adapter_config(tmp_path / "out")


@pytest.mark.parametrize("case", ["badit", "no_bad", "loramoe"])
def test_an_approximate_export_says_how_near_it_is(case, adapters, checkpoints, suite, tmp_path,
                                                   capsys):
    folder, model = adapters(case)
    words = (folder, "--out", tmp_path / "out", "--suite", suite, "--max_new_tokens", 2)
    status, _, err = call(capsys, *words)
    assert status == 2 and "--approximate" in err[-1]
    words += ("--approximate", "--max_kl", 5, "--rows", 12)
    status, out, _ = call(capsys, *words)
    assert status == 0 and out[0] == (
        "approximated: in 2 layers, whose experts depend on the token, the nearest constant by "
        f"least squares over 12 training rows; rank {CASES[case][2]}")
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(line in text for line in out[:3])
    base, _ = models.load(str(checkpoints["llama"]))
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    kl = float(fidelity.divergence(logits_of(model), logits_of(loaded)).mean())
    bare, _ = models.load(str(checkpoints["llama"]))
    assert kl < 0.5 * float(fidelity.divergence(logits_of(model), logits_of(bare)).mean())


def test_what_is_too_far_is_not_written(adapters, suite, tmp_path, capsys):
    folder, _ = adapters("badit")
    status, out, err = call(capsys, folder, "--out", tmp_path / "out", "--suite", suite,
                            "--approximate", "--max_kl", 0, "--rows", 3, "--max_new_tokens", 2)
    assert status == 2 and len(out) == 3 and "above --max_kl 0; nothing was written" in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_lower_rank_says_what_it_costs(adapters, suite, tmp_path, capsys):
    folder, _ = adapters("pissa")
    words = (folder, "--suite", suite, "--rows", 3, "--max_new_tokens", 2, "--max_kl", 100)
    status, out, _ = call(capsys, *words, "--out", tmp_path / "out", "--rank", 3)
    assert status == 0 and out[0].startswith("exact; rank 3; cut to it, at most ")
    status, _, err = call(capsys, *words, "--out", tmp_path / "more", "--rank", 4)
    assert status == 2 and "--rank 4: the update has rank 4 already" in err[-1]


def test_a_merged_export_is_a_whole_checkpoint(adapters, suite, tmp_path, capsys):
    """Loaded by transformers, and by this program as a base."""
    folder, model = adapters("static")
    status, out, _ = call(capsys, folder, "--out", tmp_path / "out", "--suite", suite, "--rows", 9,
                          "--max_new_tokens", 2, "--merged")
    assert status == 0 and out[-1].endswith("MiB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert loaded.dtype == torch.float32
    wanted, got = logits_of(model), logits_of(loaded)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    again, tokenizer = models.load(str(tmp_path / "out"))
    assert torch.equal(logits_of(again), got) and tokenizer("cat").input_ids
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def test_a_merged_export_has_the_type_of_its_base(suite, tmp_path, capsys):
    """Stored in bf16, and measured so."""
    from conftest import save_checkpoint  # of another type than the shared ones

    base = save_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    model, _ = models.load(str(base))
    trained("lora", model).adapted_by.base_name = str(base)
    adapter.save(model, tmp_path / "adapter")
    status, out, _ = call(capsys, tmp_path / "adapter", "--out", tmp_path / "out", "--suite", suite,
                          "--rows", 3, "--max_new_tokens", 2, "--merged")
    assert status == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    said = float(out[1].rpartition("largest difference of a logit ")[2].split()[0])
    assert 1e-4 < said < 0.05


def test_the_card(llama, suite, tmp_path, capsys, monkeypatch):
    """Of a whole run: its suite, settings, scores, hashes and frame, and the hub's keys."""
    monkeypatch.chdir(tmp_path)
    succeed("--model", llama, "--suite", suite, "--method", "lora", *SMALL, "--epochs", 1,
            "--output_dir", "run")
    monkeypatch.setattr(exporting, "hub_name", lambda model: "someone/tiny")
    monkeypatch.setitem(exporting.card.LICENSES, str(llama), "apache-2.0")
    status, out, _ = call(capsys, "run/adapter", "--out", "out", "--rows", 5, "--max_new_tokens", 3)
    assert status == 0 and "5 held-out prompts of tiny" in out[1]
    assert out[-1].endswith("vLLM needs --max-lora-rank 8 (it allows 1, 8, 16, 32, 64, 128, 256, "
                            "320, 512)")
    _, front, body = Path("out/README.md").read_text().split("---\n", 2)
    assert front.splitlines() == [
        "base_model: someone/tiny", "library_name: peft", "pipeline_tag: text-generation",
        "license: apache-2.0", "tags:", "- lora", "- badit", "- base_model:adapter:someone/tiny"]
    results = json.loads(Path("run/results.json").read_text())
    for word in (results["base_sha256"], "alpha 16.0", "rank 2", "suite",
                 f"mean score {results['metrics']['rouge']:.2f}", "Input: {input}\nOutput: ",
                 "without a chat template"):
        assert word in body
    assert str(llama) not in front
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in Path("out").iterdir())
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny" and config["r"] == 2


def test_a_failed_export_leaves_no_trace(adapters, suite, tmp_path, capsys):
    folder, _ = adapters("lora")
    words = (folder, "--out", tmp_path / "out", "--suite", suite, "--rows", 3, "--max_new_tokens",
             2)
    for error, status in ((OSError(28, "no space"), 2), (KeyboardInterrupt, 130)):
        with failing(exporting, "write_lora", 1, error):
            assert call(capsys, *words)[0] == status
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "out").mkdir()  # an empty one is taken
    assert call(capsys, *words)[0] == 0


@pytest.mark.parametrize("rank, words", [
    (64, "vLLM needs --max-lora-rank 64"), (60, "vLLM needs --max-lora-rank 64 (it allows 1, 8, "),
    (1024, "vLLM takes no rank above 512")])
def test_what_vllm_is_told(rank, words):
    assert exporting.serving(rank).startswith(words)
    assert ("allows" in exporting.serving(rank)) == (rank == 60)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case, words, named", [
    ("lora", (), "--suite names tasks"), ("lora", ("--approximate",), "has an exact form"),
    ("lora", ("--rank", "0"), "--rank"), ("lora", ("--data_dir", "x"), "--suite only"),
    ("lora", ("--suite", "nowhere"), "nowhere"), ("lora", ("--model", "qwen3"), "qwen3"),
    ("lora", ("--suite", "mini", "--data_dir", "x"), "--data_dir"),
    ("badit", (), "--approximate"), ("static", ("--approximate",), "exact form"),
])
def test_bad_input_is_one_line(case, words, named, adapters, tmp_path, capsys):
    folder, _ = adapters(case)
    status, out, err = call(capsys, folder, "--out", tmp_path / "out", *words)
    assert (status, out) == (2, []) and err[-1].startswith("error: ") and named in err[-1]
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_adapter_or_in_use(adapters, checkpoints, suite, tmp_path, capsys):
    folder, _ = adapters("lora")
    for words, named in (
            ((tmp_path, "--out", "x"), f"there is one at {folder}"), ((folder,), "--out"),
            ((folder, "--out", folder), "is in use"), ((folder, "--out", suite), "is in use"),
            ((folder, "--out", tmp_path / "out", "--suite", suite, "--model",
              checkpoints["qwen3"]), "another base model")):
        status, _, err = call(capsys, *words)
        assert status == 2 and named in err[-1], err


def test_gainlora_is_refused_with_the_reason(llama, tmp_path, capsys):
    model, _ = models.load(str(llama))
    method_class("gainlora")(settings_of("gainlora")).wrap(model)
    adapter.save(model, tmp_path / "adapter")
    status, _, err = call(capsys, tmp_path / "adapter", "--out", tmp_path / "out")
    assert status == 2 and "gainlora's gates depend on the prompt" in err[-1]


def test_results_of_another_run_are_not_taken(llama, suite, adapters, tmp_path, capsys):
    """A results.json that stands beside by chance says nothing of the adapter."""
    folder, _ = adapters("lora")
    write_json(tmp_path / "results.json", {"a": 1})
    status, _, err = call(capsys, folder, "--out", tmp_path / "out")
    assert status == 2 and "results.json" in err[-1]


def test_help_and_wrong_flags_wait_for_no_library():
    for words, status in ((["--help"], 0), (["--wrong"], 2), (["nowhere", "--out", "x"], 2)):
        done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "export.py", *words],
                              capture_output=True, text=True)
        assert done.returncode == status
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "accelerate", "numpy", "safetensors"}


def test_an_adapter_of_a_quantised_base(wide, suite, tmp_path, capsys):
    """Exported for the dense base, which the card says; never merged."""
    succeed("--model", wide, "--suite", suite, "--method", "lora", "--base", "int8", *SMALL,
            "--epochs", 1, "--output_dir", tmp_path / "run", *NO_EVAL)
    words = (tmp_path / "run" / "adapter", "--max_kl", 1, "--max_new_tokens", 2)
    assert call(capsys, *words, "--out", tmp_path / "out")[0] == 0
    assert "stored as int8, exported for the dense one" in (
        tmp_path / "out" / "README.md").read_text()
    status, _, err = call(capsys, *words, "--out", tmp_path / "merged", "--merged")
    assert status == 2 and "stored int8, which a merged" in err[-1]
