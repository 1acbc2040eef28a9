"""What a run meets outside: little memory, other threads, users, systems, models of other kinds."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import SMALL, TRAINED, failing, lines_of, refused, succeed, write_json
from suite_files import complaint
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

import models
from harness import arguments, checks, launch
from harness.arguments import parse_flags
from harness.run import Recorder
from inputs.files import cache_dir
from method import find_targets
from registry import ALL_LINEAR

ROOT = Path(__file__).resolve().parents[1]


# --- memory, threads, users, systems ------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")],
                         ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line_and_keeps_the_checkpoint(tiny, tmp_path, error):
    """It names what takes memory; the run resumes where there is more."""
    argv = [*tiny, *SMALL, "--epochs", 1, "--checkpoint_every", 2, "--output_dir", tmp_path / "out"]
    with failing(Recorder, "add_step", 4, error):
        line = refused("out of memory", *argv)
    for flag in ("batch_size 8", "gradient_accumulation_steps 1", "max_length 64",
                 "eval_batch_size 16", "gradient_checkpointing", "resume"):
        assert f"--{flag}" in line
    succeed(*argv, "--resume")
    assert len(lines_of(tmp_path / "out" / "log.jsonl")) == 5


def test_memory_that_the_machine_does_not_have():
    """What PyTorch raises in earnest."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert launch.is_out_of_memory(caught.value)
    assert not launch.is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_user_without_a_home(monkeypatch):
    """The variables that help are named, and do."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    message = complaint(cache_dir)
    assert str(os.getuid()) in message and "HOME" in message and "XDG_CACHE_HOME" in message
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/badit")


# --- models -------------------------------------------------------------------------------------


def test_adapted_layers_are_named_by_pattern(tiny, tmp_path):
    outcome = succeed(*tiny, *SMALL, "--epochs", 1, "--eval_tasks", "none", "--target_modules",
                      "gate_proj,q_proj", "--output_dir", tmp_path / "out")
    assert ("adapted layers: model.layers.*.self_attn.q_proj (2), model.layers.*.mlp.gate_proj (2)"
            in outcome.out)


@pytest.mark.parametrize("method", TRAINED)
def test_all_linear_layers_but_the_output(tiny, tmp_path, method):
    outcome = succeed(*tiny, *SMALL, "--method", method, "--epochs", 1, "--eval_tasks", "none",
                      "--max_train_per_task", 2, "--target_modules", ALL_LINEAR, "--output_dir",
                      tmp_path / "out")
    (line,) = (line for line in outcome.out if line.startswith("adapted layers"))
    assert line.count("(2)") == 7 and "lm_head" not in line
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())[
        "settings"]["target_modules"] == [ALL_LINEAR]


def test_all_linear_stands_alone(llama):
    model, _ = models.load(llama)
    assert "stands alone" in complaint(find_targets, model, (ALL_LINEAR, "gate_proj"))


def skeleton(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_transposed_layers_are_named(llama):
    """GPT-2's: what they are, and that only others are adapted."""
    model = skeleton(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    for names in (("gate_proj",), (ALL_LINEAR,), ("c_fc",)):
        message = complaint(checks.check_architecture, model, names)
        assert "Conv1D" in message and "gpt2" in message and "c_fc" in message


@pytest.mark.parametrize("names, fits", [
    (("gate_proj",), False), (("down_proj",), False), ((ALL_LINEAR,), False), (("q_proj",), True),
    (("q_proj", "up_proj"), False), ((), True)])
def test_fused_experts_do_not_stay_frozen_in_silence(names, fits):
    """A mixture keeps its experts in one tensor; its attention can be adapted."""
    model = skeleton(MixtralConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=16,
                                   num_attention_heads=2, num_key_value_heads=2, vocab_size=9,
                                   num_local_experts=2))
    if fits:
        checks.check_architecture(model, names)
    else:
        message = complaint(checks.check_architecture, model, names)
        assert "mixtral" in message and "one tensor" in message and "q_proj" in message


def test_a_hub_id_is_asked_for_and_no_code_of_it(monkeypatch):
    """With the libraries' own loaders, trust_remote_code off; what goes wrong is one line."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "auth_check", asked.append)
    assert models.locate("Some/model-0.5B") == "Some/model-0.5B" and asked == ["Some/model-0.5B"]
    message = complaint(models.load_tokenizer, "Some/model-0.5B")
    assert "no folder Some/model-0.5B" in message and "--model" in message
    for name in ("nowhere", "a/b/c", "/a", "a/", "../a"):
        assert "hub id" in complaint(models.locate, name)


# --- an adapter knows what it was trained on ----------------------------------------------------


def test_evaluation_takes_what_the_adapter_was_trained_on(tiny, tmp_path):
    """Model, suite and prompts, unless told otherwise; the predictions are those of the run."""
    run = tmp_path / "run"
    succeed(*tiny, *SMALL, "--tasks", "say_both", "--epochs", 1, "--output_dir", run)
    succeed("--eval_only", "--adapter", run / "adapter", "--output_dir", tmp_path / "eval")
    (mine,), (theirs,) = ((folder / "predictions").glob("*") for folder in (tmp_path / "eval", run))
    assert mine.read_bytes() == theirs.read_bytes()
    args, _ = parse_flags(["--eval_only", "--adapter", str(run / "adapter"), "--suite", "mini",
                           "--max_new_tokens", "7"])
    assert (args.suite, args.max_new_tokens, args.max_length) == ("mini", 7, 64)
    assert (args.model, args.tasks) == (str(tiny[1]), None)  # tasks of the other suite
    hint = refused("there is one at", "--eval_only", "--adapter", run)
    assert str(run / "adapter") in hint
    other = refused("another base model", "--eval_only", "--adapter", run / "adapter", "--model",
                    shutil.copytree(tiny[1], tmp_path / "model") and changed(tmp_path / "model"))
    assert str(tiny[1]) in other


@pytest.mark.parametrize("name", ["suite", "data_dir"])
def test_moved_data_of_an_adapter_is_named(name, tiny, tmp_path, monkeypatch):
    """An adapter remembers where its data was; one line says what to give if it is gone."""
    config = SimpleNamespace(model=None, chat_template=False, trained_on={
        "suite": "superni", "data_dir": None, "tasks": None} | {name: str(tmp_path / "gone")})
    args = SimpleNamespace(adapter="a", eval_only=True)
    message = complaint(arguments.take_prompts, args, set(), config)
    assert f"--{name} {tmp_path / 'gone'}, which is not there: give --{name}" in message
    arguments.take_prompts(args, {name}, config)


def test_an_adapter_of_one_task_alone_names_that_task(tiny, tmp_path):
    """Evaluated by itself it is scored on what it was trained on."""
    run = tmp_path / "run"
    succeed(*tiny, *SMALL, "--setting", "single", "--epochs", 1, "--max_train_per_task", 2,
            "--eval_tasks", "none", "--output_dir", run)
    for task in ("say_both", "which_is"):
        args, _ = parse_flags(["--eval_only", "--adapter", str(run / "adapter" / task)])
        assert args.tasks == [task]


def changed(folder):
    """The folder of a checkpoint, with another weight in it."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("trained_on, named", [
    ({"max_length": "64"}, "--max_length"), ({"rank": 4}, "'rank'"), ({"tasks": []}, "--tasks"),
    ("mini", "trained_on")])
def test_what_an_adapter_cannot_have_been_trained_on(tiny, tmp_path, trained_on, named):
    run = tmp_path / "run"
    succeed(*tiny, *SMALL, "--epochs", 1, "--max_train_per_task", 2, "--eval_tasks", "none",
            "--output_dir", run)
    file = run / "adapter" / "adapter_config.json"
    write_json(file, json.loads(file.read_text()) | {"trained_on": trained_on})
    refused(named, "--eval_only", "--adapter", run / "adapter")
