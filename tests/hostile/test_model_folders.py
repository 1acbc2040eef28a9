"""Checkpoint folders that cannot be loaded are refused in one line, early where possible."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL, complaint, succeed, write_json

import models
from hostile.conftest import rejected
from inputs import embedded

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(llama, tmp_path):
    """A copy of the tiny model in the current folder."""
    return shutil.copytree(llama, tmp_path / "model")


def setting(**changed):
    """Return a function that changes keys of a JSON file."""
    return lambda file: write_json(file, json.loads(file.read_text()) | changed)


def writing(text):
    return lambda file: file.write_text(text)


def unloadable(model):
    """Return the refusal from reading tokenizer and configuration, without weights."""
    def read(name):
        models.load_tokenizer(name)
        models.skeleton(name)
    return complaint(read, os.path.relpath(model))


@pytest.mark.parametrize("name, change, named", [
    ("config.json", Path.unlink, ()),
    ("config.json", writing("{"), ()),
    ("config.json", writing("[]"), ()),
    ("config.json", setting(model_type="abacus"), "abacus"),
    ("config.json", setting(max_position_embeddings="256"),
     ("max_position_embeddings", "expected int, got str")),  # in a later line of the library's
    ("tokenizer.json", Path.unlink, ()),
    ("tokenizer.json", writing("{"), ()),
    ("tokenizer_config.json", setting(tokenizer_class="ByT5Tokenizer"), "ByT5Tokenizer"),
    ("tokenizer_config.json", setting(unk_token=""), "unk_token ''"),
    ("adapter_config.json", writing("{}"), "adapter_config.json"),
    ("model.safetensors", writing("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     ("model.safetensors", "git lfs pull")),
    ("config.json", setting(model_type="t5"), ("t5", "not a causal language model")),
    ("config.json", setting(quantization_config={"quant_method": "bitsandbytes"}),
     "give the unquantised checkpoint"),
    ("config.json", setting(num_hidden_layers=2**31), "num_hidden_layers is"),
    # Another attention may be downloaded as code.
    *(("config.json", setting(**{name: value}), f"attn_implementation is {shown!r}")
      for name, value, shown in [
          ("_attn_implementation", "some/kernel", "some/kernel"),
          ("attn_implementation", {"": "some/kernel"}, "some/kernel"),
          ("attn_implementation", "flash_attention_2", "flash_attention_2")]),
])
def test_a_folder_that_cannot_be_loaded(model, name, change, named):
    """The message names the folder and the fault."""
    change(model / name)
    line = unloadable(model)
    assert line.startswith("cannot load model model from model (")
    assert all(word in line for word in ([named] if isinstance(named, str) else named))


def test_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    assert "cannot load model model" in unloadable(tmp_path / "model")


def test_a_library_that_panics(no_weights, llama, suite, monkeypatch):
    """Panics of Rust code are not Exceptions; all lines of the message become one."""
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds:\n\n  the len is 0\x1b[31m " + "x" * 999)

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", panic)
    line = rejected("--model", llama, "--suite", suite, *SMALL,
                    named="(index out of bounds: the len is 0\\x1b[31m xxx")
    assert "x" * 300 not in line


def test_code_in_a_checkpoint_never_runs(model, tmp_path, monkeypatch):
    """trust_remote_code is never on, and the user is not asked."""
    (model / "cfg.py").write_text(
        "from transformers import LlamaConfig\nopen('executed', 'w').close()\n"
        "class Config(LlamaConfig):\n    model_type = 'abacus'\n")
    setting(model_type="abacus", auto_map={"AutoConfig": "cfg.Config"})(model / "config.json")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    unloadable(model)
    assert not (tmp_path / "executed").exists()


def test_a_damaged_copy_of_the_embedded_model(no_weights, suite, tmp_path, monkeypatch):
    """The message says to delete it, not to accept a licence."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "badit" / f"{models.EMBEDDED}-{embedded.SHA256[:12]}"
    folder.mkdir(parents=True)
    line = rejected("--suite", suite, named=f"delete {folder} and run again")
    assert "licence" not in line


def test_a_tokenizer_without_an_end(no_weights, model, suite):
    """Without an EOS token no answer would end."""
    setting(eos_token=None)(model / "tokenizer_config.json")
    rejected("--model", "model", "--suite", suite, *SMALL, named="EOS")


def test_token_ids_beyond_the_embedding(model, suite):
    """An unused id is accepted, the pad token's is refused."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["never"] = 305
    write_json(model / "tokenizer.json", content)
    argv = ("--model", "model", "--suite", suite, "--method", "zero_shot", "--max_length", 64,
            "--max_eval_per_task", 1)
    succeed(*argv, "--output_dir", "out")
    setting(pad_token="never")(model / "tokenizer_config.json")
    rejected(*argv, "--output_dir", "other", named=("305", "300"))


# --- weights ------------------------------------------------------------------------------------


def change_weights(change):
    """Return a function that changes the tensors of a checkpoint folder."""
    def apply(folder):
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def halve(folder):
    """Truncate the file of weights to its first half."""
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


BAD_WEIGHTS = {
    **{bad: (change_weights(lambda state, bad=bad: state[WEIGHT].view(-1)[-1:].fill_(float(bad))),
             WEIGHT) for bad in ("nan", "-inf")},
    "missing weight": (change_weights(lambda state: state.pop(WEIGHT)), WEIGHT),
    "other shape": (change_weights(lambda state: state.update({WEIGHT: torch.ones(3, 32)})),
                    "cannot load model"),
    "unknown": (change_weights(lambda state: state.update(stray=torch.ones(2))), "stray"),
    "fewer layers": (lambda folder: setting(num_hidden_layers=1)(folder / "config.json"),
                     "model.layers.1.input_layernorm.weight"),
    "half a file": (halve, "cannot load model"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load model"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(model, suite, tmp_path, case):
    """A non-finite weight is named; the files of an earlier run stay."""
    change, named = BAD_WEIGHTS[case]
    change(model)
    write_json(tmp_path / "out" / "results.json", {"old": True})
    rejected("--model", "model", "--suite", suite, *SMALL, "--output_dir", "out", "--overwrite",
             named=named)


def test_buffers_of_older_checkpoints(model):
    """Buffers that newer versions compute themselves are allowed in the file."""
    change_weights(lambda state: state.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(model)
    models.load(str(model))
