"""Damaged adapters, and adapters of other models or prompts."""

import json
import shutil

import pytest
import safetensors.torch
from conftest import BRIEF, write_json
from suite_files import complaint

from harness.adapter_config import read_adapter_config
from hostile.conftest import rejected


@pytest.mark.parametrize("change, named", [
    ("{", "adapter_config.json"), ("{}", "adapter_config.json"),
    ({"method": "lara"}, "lara"), ({"method": ["badit"]}, "method"), ({"format": 4}, "format 4"),
    ({"base": "int2"}, "base"), ({"base": None}, "base"),
    ({"settings": {}}, "settings"), ({"settings": None}, "settings"), ({"extra": 1}, "extra"),
    ({"base_sha256": None}, "base_sha256"), ({"chat_template": "yes"}, "chat_template"),
], ids=str)
def test_a_broken_adapter(finished, tmp_path, change, named):
    """A damaged configuration is refused in one line."""
    content = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    text = change if isinstance(change, str) else json.dumps(content | change)
    (tmp_path / "adapter_config.json").write_text(text)
    message = complaint(read_adapter_config, tmp_path)
    assert "adapter_config.json" in message and named in message


@pytest.fixture
def evaluation(finished, llama, suite, tmp_path):
    """The flags that evaluate a copy of an adapter."""
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    return ("--eval_only", "--adapter", "adapter", "--model", llama, "--suite", suite, *BRIEF)


def test_an_adapter_of_another_base(evaluation, llama, tmp_path):
    """The weights are compared; nothing is written."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state["model.norm.weight"][0] += 1e-3
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    rejected(*evaluation, "--model", "model", "--output_dir", "out", named="another base model")


def test_an_adapter_remembers_its_chat_template(evaluation, tmp_path):
    """Another --chat_template than in training is refused."""
    file = tmp_path / "adapter" / "adapter_config.json"
    write_json(file, json.loads(file.read_text()) | {"chat_template": True})
    rejected(*evaluation, named="--chat_template")


def test_no_adapter(no_weights, evaluation):
    rejected(*evaluation, "--adapter", "nowhere", named="no adapter at nowhere")


