"""BADIT on whole models, damaged adapters, and the embedded model."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from conftest import complaint, run, save_checkpoint, snapshot, wrapped
from tiny import (
    PROMPTS,
    backward,
    base_model,
    batch_of,
    flattened,
    learn,
    logits_of,
    rows_of,
    start,
    weights_of,
)

import adapter
import data
import evaluation
import models
from adapter import WEIGHTS_FILE
from harness.adapter_config import ADAPTER_CONFIG
from inputs import embedded
from inputs.errors import InputError
from method import method_of
from registry import EMBEDDED
from regrouping import measure

FP32, BF16 = torch.float32, torch.bfloat16


def badit(architecture="llama", **changed):
    """Return the method of a tiny model with a fresh BADIT adapter."""
    return method_of(wrapped(base_model(architecture), regroup_every=1, **changed))


def regroup(method, *batches, spoil=lambda layer: None):
    """Take an optimizer step over some micro-batches; return the log line of each layer."""
    method.model.train()
    start(method, 0, steps=2)  # the last step never regroups
    for rows in batches:
        batch = batch_of(rows, targets=13)
        backward(method, batch)
    spoil(next(iter(method.layers.values())))
    method.after_backward()
    lines = method.after_step(batch)
    json.dumps(lines, allow_nan=False)
    assert len(lines) == len(method.layers)
    return lines


# --- BADIT on a model ---------------------------------------------------------------------------


def test_a_regrouping_after_a_batch_of_fillers(architecture):
    """The last micro-batch of a process may hold no token; earlier ones give the gradients."""
    lines = regroup(badit(architecture), rows_of(0), [None, None])
    assert sum(line["moved"] for line in lines) > 0


def test_layers_are_measured_by_name():
    """A model may call its layers in another order than it holds them in."""
    method, batch = badit(), batch_of(rows_of(0), targets=13)
    learn(method, 0)
    layers = method.layers
    new = torch.stack([layer.expert_of.roll(3 * i) for i, layer in enumerate(layers.values())])
    with torch.no_grad():
        one = measure(method.model, batch, layers, new)
        other = measure(method.model, batch, dict(reversed(layers.items())), new.flip(0))
    assert one == other and len({line["regroup_drift"] for line in one.values()}) == len(layers)


@pytest.mark.parametrize("routing, spoil", [
    ("static", lambda layer: layer.alpha.data[:4].fill_(20.0)),
    ("static", lambda layer: layer.alpha.data[3].zero_()),
    ("token", lambda layer: layer.lora_A.grad[2].fill_(torch.nan)),
    ("static", lambda layer: layer.lora_B.grad[0].fill_(torch.inf))])
def test_a_layer_that_cannot_be_regrouped_is_skipped(architecture, routing, spoil):
    """It is reported and unchanged; the other layers are regrouped."""
    method, before = badit(architecture, routing=routing), []

    def spoil_and_look(layer):
        spoil(layer)
        before.append(weights_of(layer))

    line, *rest = regroup(method, rows_of(0), spoil=spoil_and_look)
    first, *others = method.layers.values()
    assert line["skipped"] and line["moved"] == 0 and line["regroup_drift"] == 0
    assert all(torch.equal(before[0][name], tensor) for name, tensor in weights_of(first).items())
    assert all(each["skipped"] is None and each["moved"] > 0 for each in rest)
    assert all((layer.expert_of != torch.arange(16) // 2).any() for layer in others)


def test_a_layer_whose_input_is_flattened():
    """As in OPT: it regroups and trains as with (batch, seq, hidden)."""
    lines, others = (regroup(method_of(model), rows_of(0)) for model in (
        badit().model, flattened(badit().model)))
    assert lines == others and any(line["moved"] for line in lines)


def test_a_layer_that_gets_some_tokens_only():
    """They cannot be told from padding: refused, with its name and the shape needed."""
    model = flattened(badit().model, slice(1, None))
    message = complaint(regroup, method_of(model), rows_of(0))
    assert "model.layers.1.mlp.gate_proj" in message and ", 32]" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [0, 3])
def test_logits_that_are_not_finite(llama, bad, step):
    """Non-finite logits in one row of a batch are refused, also in a later step."""
    model, tokenizer = models.load(llama)
    model.generation_config.eos_token_id = None
    steps = []

    def spoil(module, inputs, output):
        steps.append(1)
        if len(steps) > step:
            output[1, -1, 7] = bad

    batch = data.pad_left(PROMPTS, 2)
    model.lm_head.register_forward_hook(spoil)
    if step:
        evaluation.generate(model, tokenizer, batch, step)  # finite so far
        steps.clear()
    assert "NaN or infinite" in complaint(evaluation.generate, model, tokenizer, batch, 5)


# --- adapters on disk ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory):
    """A checkpoint stored in bf16, as those of the paper."""
    return save_checkpoint(tmp_path_factory.mktemp("bf16"), "llama", BF16)


@pytest.mark.parametrize("made", [FP32, BF16])
@pytest.mark.parametrize("used", [FP32, BF16])
def test_one_checkpoint_in_two_precisions(bf16_checkpoint, tmp_path, made, used):
    """An adapter made on a bf16 load fits an fp32 load of the same checkpoint, and vice versa."""
    model = wrapped(models.load(bf16_checkpoint, made)[0], regroup_every=1)
    learn(method_of(model), 0)
    adapter.save(model, tmp_path)
    loaded = adapter.load(models.load(bf16_checkpoint, used)[0], tmp_path).eval()
    change = (logits_of(loaded) - logits_of(model)).norm() / logits_of(model).norm()
    assert change == 0 if made == used else 0 < change < 5e-2


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def assert_refused(folder, named):
    """Assert that loading is refused in one line that names the fault, and writes nothing."""
    before = snapshot(folder)
    assert named in complaint(adapter.load, base_model(), folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name, content", [
    (WEIGHTS_FILE, b""), (WEIGHTS_FILE, None), (WEIGHTS_FILE, "half"), (WEIGHTS_FILE, "pickle"),
    (ADAPTER_CONFIG, None), (ADAPTER_CONFIG, "half"), (ADAPTER_CONFIG, b"\xff\xfe{}"),
    (ADAPTER_CONFIG, b"[{}]")])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    """Empty, missing, truncated or of another format; a pickle is never executed."""
    adapter.save(badit().model, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if content is not None:
        content = {"half": whole[:len(whole) // 2],
                   "pickle": pickle.dumps(Payload(tmp_path / "executed"))}.get(content, content)
        (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, name)


@pytest.mark.parametrize("grouping", [torch.arange(16), torch.zeros(16, dtype=torch.int64)])
def test_an_invalid_grouping_is_refused(tmp_path, grouping):
    """Experts out of range, or of unequal sizes."""
    adapter.save(badit().model, tmp_path)
    state = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    state["model.layers.0.mlp.gate_proj.expert_of"] = grouping
    safetensors.torch.save_file(state, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    assert_refused(tmp_path, "expert_of")


def test_a_bare_model_has_no_adapter_to_save(tmp_path):
    """Saving a model that was never wrapped is refused and leaves no file."""
    with pytest.raises(InputError):
        adapter.save(base_model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- energies -----------------------------------------------------------------------------------


def test_mean_energies_are_measured_once():
    """By a loop over the tokens of each row alone; the next task does not measure again."""
    method = wrapped(base_model(), routing="energy").adapted_by
    inputs = {name: [] for name in method.layers}
    handles = [layer.register_forward_pre_hook(
        lambda _, given, name=name: inputs[name].extend(given[0][0]))
        for name, layer in method.layers.items()]
    with torch.no_grad():
        for row in rows_of(0):
            method.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    for handle in handles:
        handle.remove()
    learn(method, 0, 1)
    for name, layer in method.layers.items():
        for mean, a, b in zip(layer.mean_energy, layer.lora_A0, layer.lora_B0.T, strict=True):
            naive = sum(float(a @ x) ** 2 for x in inputs[name]) * float(b @ b) / len(inputs[name])
            assert float(mean) == pytest.approx(naive, rel=1e-4)


# --- the embedded model -------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_an_incomplete_conversion_leaves_no_folder(tmp_path, monkeypatch, failure):
    """The folder is complete or absent; the next call starts again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "sha256_file", lambda path: embedded.SHA256)

    def stop(source, folder):
        (folder / "config.json").write_text("{}")
        raise failure

    monkeypatch.setattr(embedded, "_convert_gguf", stop)
    with pytest.raises(type(failure)):
        embedded.embedded_folder(EMBEDDED)
    assert [path for path in tmp_path.rglob("*") if path.name != "badit"] == []
    monkeypatch.setattr(embedded, "_convert_gguf",
                        lambda source, folder: (folder / "config.json").write_text("[]"))
    folder = embedded.embedded_folder(EMBEDDED)
    assert [str(path) for path in (tmp_path / "badit").iterdir()] == [folder]
    assert [path.read_text() for path in (tmp_path / "badit").rglob("*.json")] == ["[]"]


def test_another_gguf_is_not_converted(tmp_path, monkeypatch):
    """The SHA-256 of the source is checked before anything is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "sha256_file", lambda path: "0" * 64)
    outcome = run("--output_dir", tmp_path / "out")
    assert outcome.status == 2 and len(outcome.err) == 1 and "SHA-256" in outcome.err[0]
    assert not any("smollm2" in path.name for path in tmp_path.rglob("*"))


def test_the_embedded_model_is_whole(smollm2):
    """Its weights are finite, and it answers in English."""
    model, tokenizer = models.load(smollm2)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert sum(weight.numel() for weight in model.parameters()) > 130e6
    ids = tokenizer("The capital of France is").input_ids
    assert "Paris" in evaluation.generate(model, tokenizer, data.pad_left([ids], 0), 8)[0]


def test_a_real_model_starts_as_it_was(six_blocks, tmp_path):
    """In float32; in bf16 an adapter adds at most a quarter to the base's mean rounding error."""
    model, tokenizer = models.load(six_blocks)
    tasks = list(data.load_suite("mini").tasks.values())[::3]  # one prompt alone: 0.8 to 1.4
    prompts = [tokenizer(data.build_prompt(task.definition, task.test[0]["input"])).input_ids
               for task in tasks]
    exact = logits_of(model.eval(), prompts)
    wrapped(model, rank=4, alpha=32.0)
    assert exact.abs().max() > 1e-2 and exact.std() > 0
    assert (logits_of(model, prompts) - exact).abs().max() <= 1e-4 * exact.abs().max()
    adapter.save(model, tmp_path)
    model = models.load(six_blocks, BF16)[0].eval()
    plain = (logits_of(model, prompts) - exact).abs().mean()
    adapted = (logits_of(adapter.load(model, tmp_path).eval(), prompts) - exact).abs().mean()
    assert 0 < adapted <= 1.25 * plain
