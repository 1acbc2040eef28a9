"""Little memory, no home, unusual models, and what an adapter says of its training."""

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import SMALL, complaint, failing, refused, run, succeed, write_json
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM, MixtralConfig

import models
from harness import arguments, checks, launch
from harness.arguments import parse_flags
from harness.run import Recorder
from inputs import errors
from inputs.files import cache_dir, check_free
from method import find_targets
from registry import ALL_LINEAR

ROOT = Path(__file__).resolve().parents[1]


# --- memory and users ---------------------------------------------------------------------------


def test_out_of_memory_is_one_line(tiny, tmp_path):
    """It names the flags that take memory, and the one that continues."""
    argv = [*tiny, *SMALL, "--epochs", 1, "--checkpoint_every", 2, "--output_dir", tmp_path / "out"]
    with failing(Recorder, "add_step", 4, torch.OutOfMemoryError("CUDA out of memory")):
        line = refused("out of memory", *argv)
    for flag in ("batch_size 8", "gradient_accumulation_steps 1", "max_length 64",
                 "eval_batch_size 16", "gradient_checkpointing", "resume"):
        assert f"--{flag}" in line


def test_errors_that_are_out_of_memory():
    """Python's, CUDA's, and the RuntimeError that PyTorch raises on a CPU."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert errors.is_out_of_memory(error)
    assert not errors.is_out_of_memory(RuntimeError("shapes do not fit"))


def test_other_programs_end_in_one_line_when_memory_runs_out(capsys):
    def work(error):
        raise error

    assert errors.exit_status(work, torch.OutOfMemoryError("CUDA out of memory")) == 2
    assert capsys.readouterr().err == "error: out of memory (CUDA out of memory)\n"
    with pytest.raises(RuntimeError, match="shapes"):
        errors.exit_status(work, RuntimeError("shapes do not fit"))


def test_a_terminal_that_lacks_a_letter(monkeypatch):
    """Every program that ends by exit_status escapes it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    assert errors.exit_status(print, "suit\u00e9") == 0
    assert stream.buffer.getvalue() == b"suit\\xe9\n"


def test_a_model_without_gradient_checkpointing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    refused("LlamaForCausalLM does not support it", *tiny, *SMALL, "--gradient_checkpointing",
            "--output_dir", tmp_path / "out")


def test_a_stop_while_flags_are_read(monkeypatch):
    monkeypatch.setattr(launch, "parse_flags", mock.Mock(side_effect=KeyboardInterrupt))
    assert run() == (130, [], ["stopped by SIGINT"])


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    """A program that writes a whole folder would leave the shell in one that is gone."""
    monkeypatch.chdir(tmp_path)
    assert "--to . is in use" in complaint(check_free, Path("."), "to")
    (tmp_path / "empty").mkdir()
    check_free(Path("empty"), "to")


@pytest.mark.parametrize(("names", "advice"), [
    ((), "set OMP_NUM_THREADS"),
    (("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION"), "raise OMP_NUM_THREADS"),
    (("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"),
     "give --num_cpu_threads_per_process N to accelerate launch")])
def test_advice_on_idle_cores(names, advice, monkeypatch):
    """It names what decides the number of threads: a variable, or the launcher that sets it."""
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "1")
    assert launch.more_threads() == advice


def test_a_user_without_a_home(monkeypatch):
    """The message names the variables that help."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    message = complaint(cache_dir)
    assert str(os.getuid()) in message and "HOME" in message and "XDG_CACHE_HOME" in message
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/badit")


# --- models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere(trained_run):
    """A run on one task that adapts all linear layers: its folder, and what it printed."""
    folder = trained_run("--tasks", "say_both", "--epochs", 1, "--target_modules", ALL_LINEAR)
    return folder, folder.with_name("printed").read_text().splitlines()


def test_adapted_layers_are_named_by_pattern(everywhere):
    """all-linear adapts every linear layer but the output."""
    folder, out = everywhere
    (line,) = (line for line in out if line.startswith("adapted layers"))
    assert "model.layers.*.self_attn.q_proj (2), " in line
    assert line.count("(2)") == 7 and "lm_head" not in line
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())[
        "settings"]["target_modules"] == [ALL_LINEAR]


def test_targets_are_selected_by_name(llama):
    """Every named module of every layer; all-linear stands alone."""
    model, _ = models.load(llama)
    assert find_targets(model, ("gate_proj", "o_proj")).keys() == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.gate_proj",
                                                                  "self_attn.o_proj")}
    assert "stands alone" in complaint(find_targets, model, (ALL_LINEAR, "gate_proj"))


def skeleton(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_transposed_layers_are_named(llama):
    """GPT-2's Conv1D layers are named; only nn.Linear is adapted."""
    model = skeleton(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    for names in (("gate_proj",), (ALL_LINEAR,), ("c_fc",)):
        message = complaint(checks.check_architecture, model, names)
        assert "Conv1D" in message and "gpt2" in message and "c_fc" in message
    checks.check_architecture(model, ())  # zero_shot adapts none
    assert "Conv1D" in complaint(checks.check_architecture, model, (), True)


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
    """Hub ids go to the libraries' loaders; a failure is one line."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "auth_check", asked.append)
    assert models.locate("Some/model-0.5B") == "Some/model-0.5B" and asked == ["Some/model-0.5B"]
    message = complaint(models.load_tokenizer, "Some/model-0.5B")
    assert "no folder Some/model-0.5B" in message and "--model" in message
    for name in ("nowhere", "a/b/c", "/a", "a/", "../a"):
        assert "hub id" in complaint(models.locate, name)


# --- an adapter knows what it was trained on ----------------------------------------------------


def test_evaluation_takes_what_the_adapter_was_trained_on(everywhere, tiny, tmp_path):
    """Model, suite and prompts, unless told otherwise; the predictions are those of the run."""
    run, _ = everywhere
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


def changed(folder):
    """The folder of a checkpoint, with another weight in it."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("trained_on, named", [
    ({"max_length": "64"}, "--max_length"), ({"rank": 4}, "'rank'"), ({"tasks": []}, "--tasks"),
    ("mini", "trained_on")])
def test_what_an_adapter_cannot_have_been_trained_on(everywhere, tmp_path, trained_on, named):
    """Unknown flags and bad values in its configuration."""
    run = shutil.copytree(everywhere[0], tmp_path / "run")
    file = run / "adapter" / "adapter_config.json"
    write_json(file, json.loads(file.read_text()) | {"trained_on": trained_on})
    refused(named, "--eval_only", "--adapter", run / "adapter")
