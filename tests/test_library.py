"""The program as a library: loaded adapters generate by themselves, and nothing is mistaken."""

import pytest
import torch
from conftest import TRAINED, settings_of, wrapped
from peft import PeftModel
from tiny import base_model, continuations, learn, logits_of, one_line

import adapter
from harness.adapter_config import ADAPTER_CONFIG, NOT_OF_PEFT, read_adapter_config
from inputs.errors import InputError


def learned(name, tasks=(0, 1)):
    """A wrapped model that has learned some tasks."""
    model = wrapped(base_model(), name)
    learn(model.adapted_by, *tasks)
    return model


@pytest.mark.parametrize("name", TRAINED)
def test_three_lines_generate(name, tmp_path):
    """A bare model, adapter.load, model.generate: what the model that was trained says."""
    model = learned(name)
    model.adapted_by.base_name = "a/model"
    adapter.save(model, tmp_path)
    loaded = adapter.load(base_model(), tmp_path)
    assert loaded.adapted_by.base_name == read_adapter_config(tmp_path)[0].model == "a/model"
    assert continuations(loaded) == continuations(model) != continuations(base_model())


@pytest.mark.parametrize("name", TRAINED)
def test_a_wrapped_model_is_not_saved_without_its_weights(name, tmp_path):
    model = wrapped(base_model(), name)
    with pytest.raises(InputError, match=r"adapter\.save.*export\.py") as caught:
        model.save_pretrained(tmp_path)
    assert one_line(caught) and not any(tmp_path.iterdir())


def test_a_bare_model_is_saved(tmp_path):
    model = wrapped(base_model(), "zero_shot")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


# --- neither takes the other's files ------------------------------------------------------------


@pytest.mark.parametrize("load", [
    lambda path: PeftModel.from_pretrained(base_model(), path),
    lambda path: base_model().load_adapter(str(path))], ids=["peft", "transformers"])
def test_peft_says_what_our_adapter_is(load, tmp_path):
    """It quotes the kind that the configuration names, which says what to do."""
    adapter.save(wrapped(base_model()), tmp_path)
    with pytest.raises(KeyError, match=r"BADIT: .*export\.py FOLDER"):
        load(tmp_path)


def test_an_adapter_of_pefts_is_named(tmp_path):
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(InputError, match=r"adapter of PEFT's \(peft_type 'LORA'\)") as caught:
        read_adapter_config(tmp_path)
    one_line(caught)


def test_an_adapter_of_format_1_loads(tmp_path):
    """Without the name of its model and the word to PEFT, as all were written once."""
    model = wrapped(base_model())
    adapter.save(model, tmp_path)
    file = tmp_path / ADAPTER_CONFIG
    text = file.read_text()
    assert NOT_OF_PEFT in text
    lines = [line for line in text.replace('"format": 2', '"format": 1').splitlines()
             if '"peft_type"' not in line and '"model":' not in line]
    file.write_text("\n".join(lines))
    loaded = adapter.load(base_model(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.adapted_by.settings == settings_of()


@pytest.mark.parametrize("asked, there", [("run", "run/adapter"), ("run/adapter/x", "run/adapter")])
def test_a_path_one_level_off_names_the_adapter(asked, there, tmp_path):
    adapter.save(wrapped(base_model()), tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match=f"there is one at {tmp_path / there}$"):
        read_adapter_config(tmp_path / asked)


def test_a_second_adapter_is_refused(tmp_path):
    """The base is right; it is the first adapter that is in the way."""
    model = wrapped(base_model())
    adapter.save(model, tmp_path)
    with pytest.raises(InputError, match="has an adapter already"):
        adapter.load(model, tmp_path)
