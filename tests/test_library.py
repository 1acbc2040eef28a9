"""Adapters as a library: load, generate, and formats that are told apart."""

import json
import re

import pytest
import torch
from conftest import TRAINED, complaint, settings_of, wrapped
from peft import PeftModel
from tiny import base_model, continuations, learn, logits_of

import adapter
from harness.adapter_config import ADAPTER_CONFIG, NOT_OF_PEFT, read_adapter_config
from inputs.errors import InputError


@pytest.mark.parametrize("name", TRAINED)
def test_three_lines_generate(name, tmp_path):
    """A loaded adapter generates as the trained model, without hooks of the method."""
    model = wrapped(base_model(), name)
    learn(model.adapted_by, 0, 1)
    model.adapted_by.base_name = "a/model"
    adapter.save(model, tmp_path)
    loaded = adapter.load(base_model(), tmp_path)
    assert loaded.adapted_by.base_name == read_adapter_config(tmp_path)[0].model == "a/model"
    assert continuations(loaded) == continuations(model) != continuations(base_model())


@pytest.mark.parametrize("name", TRAINED)
def test_a_wrapped_model_is_not_saved_without_its_weights(name, tmp_path):
    model = wrapped(base_model(), name)
    assert re.search(r"adapter\.save.*export\.py", complaint(model.save_pretrained, tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_bare_model_is_saved(tmp_path):
    model = wrapped(base_model(), "zero_shot")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("load", [
    lambda path: PeftModel.from_pretrained(base_model(), path),
    lambda path: base_model().load_adapter(str(path))], ids=["peft", "transformers"])
def test_peft_says_what_our_adapter_is(load, tmp_path):
    """It quotes our `peft_type`, which names export.py."""
    adapter.save(wrapped(base_model()), tmp_path)
    with pytest.raises(KeyError, match=r"BADIT: .*export\.py FOLDER"):
        load(tmp_path)


def test_an_adapter_of_pefts_is_named(tmp_path):
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 8}')
    message = complaint(read_adapter_config, tmp_path)
    assert "is a PEFT adapter (peft_type 'LORA')" in message


def test_an_adapter_of_format_1_loads(tmp_path):
    """It names no base model, has no `peft_type`, and a dense base."""
    model = wrapped(base_model())
    adapter.save(model, tmp_path)
    file = tmp_path / ADAPTER_CONFIG
    config = json.loads(file.read_text()) | {"format": 1}
    assert config["peft_type"] == NOT_OF_PEFT
    for key in ("peft_type", "model", "base", "trained_on"):
        del config[key]
    file.write_text(json.dumps(config))
    loaded = adapter.load(base_model(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.adapted_by.settings == settings_of()


@pytest.mark.parametrize("asked, there", [("run", "run/adapter"), ("run/adapter/x", "run/adapter")])
def test_a_path_one_level_off_names_the_adapter(asked, there, tmp_path):
    adapter.save(wrapped(base_model()), tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match=f"there is one at {tmp_path / there}$"):
        read_adapter_config(tmp_path / asked)


def test_a_second_adapter_is_refused(tmp_path):
    model = wrapped(base_model())
    adapter.save(model, tmp_path)
    with pytest.raises(InputError, match="has an adapter already"):
        adapter.load(model, tmp_path)
