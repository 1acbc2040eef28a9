"""The program as a library: loaded adapters generate by themselves, and nothing is mistaken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TRAINED, settings_of, wrapped
from peft import PeftModel
from tiny import base_model, continuations, learn, logits_of, one_line

import adapter
import models
from harness.adapter_config import ADAPTER_CONFIG, NOT_OF_PEFT, read_adapter_config
from inputs.errors import InputError
from registry import method_class

ROOT = Path(__file__).resolve().parents[1]


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


# --- installed ----------------------------------------------------------------------------------

ELSEWHERE = '''
import sys
from pathlib import Path
from badit_reference import adapter, models, registry
model, tokenizer = models.load(sys.argv[1])
model = adapter.load(model, sys.argv[2])
ids = tokenizer("red cat", return_tensors="pt").input_ids
print(model.generate(input_ids=ids, max_new_tokens=4).tolist()[0])

import data, utils
assert (data.mine, utils.mine) == (1, 2)
from badit_reference import data, train, report, generate, export
assert all(registry.method_class(name).name == name for name in registry.METHODS)
assert len(data.load_suite("mini").tasks) == 15 and report.main(["nowhere"]) == 2
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"badit", "adapter", "models", "inputs", "harness", "baselines", "deploy"}
'''


def test_the_package_clashes_with_nobody(llama, tmp_path):
    """In a project with a data.py and a utils.py of its own, the files as `pip install .` has them.
    """
    pytest.importorskip("setuptools")
    import build_package  # takes setuptools, which comes with pip

    model, tokenizer = models.load(str(llama))
    method_class("gainlora")(settings_of("gainlora")).wrap(model)
    learn(model.adapted_by, 0)
    adapter.save(model, tmp_path / "adapter")
    ids = tokenizer("red cat", return_tensors="pt").input_ids
    wanted = model.generate(input_ids=ids, max_new_tokens=4).tolist()[0]
    build_package.write_package(tmp_path / "site")
    for name, value in (("data", 1), ("utils", 2)):
        (tmp_path / f"{name}.py").write_text(f"mine = {value}\n")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, llama, tmp_path / "adapter"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(wanted)
    for program in ("train", "export"):
        done = subprocess.run([sys.executable, "-m", f"badit_reference.{program}", "--help"],
                              cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
        assert done.returncode == 0 and done.stdout.startswith("usage: ")


def test_an_import_that_cannot_be_renamed_is_refused():
    build_package = pytest.importorskip("build_package")
    text = "from data import a\nimport json\n\ndef f():\n    import data  # late\n"
    assert build_package.renamed(text, {"data"}) == text.replace(
        "from data", "from badit_reference.data").replace(
        "import data  #", "from badit_reference import data  #")
    for odd in ("import data, models", "import data.x", "import data as other"):
        with pytest.raises(ValueError, match="one module a line"):
            build_package.renamed(odd, {"data"})


def block_of(language, text):
    """A code block of docs/after_training.md, the last in its language that has some text."""
    page = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)
    return [block for block in blocks if text in block][-1]


def test_the_recipe_for_another_harness(llama, tmp_path):
    """The files in docs/after_training.md, as they stand there, without a network."""
    pytest.importorskip("lm_eval", reason="optional: pip install lm_eval")
    model, _ = models.load(str(llama))
    method_class("badit")(settings_of()).wrap(model)
    adapter.save(model, tmp_path / "adapter")
    (tmp_path / "measure.py").write_text(block_of("python", "simple_evaluate"))
    (tmp_path / "opposites.yaml").write_text(block_of("yaml", "multiple_choice"))
    (tmp_path / "opposites.jsonl").write_text(block_of("json", "choices"))
    done = subprocess.run(
        [sys.executable, "measure.py", llama, "adapter", ".", "opposites"], cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {
            "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'sample_len': 2, 'acc,none': " in done.stdout


def test_a_second_adapter_is_refused(tmp_path):
    """The base is right; it is the first adapter that is in the way."""
    model = wrapped(base_model())
    adapter.save(model, tmp_path)
    with pytest.raises(InputError, match="has an adapter already"):
        adapter.load(model, tmp_path)
