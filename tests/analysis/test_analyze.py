"""Run analyze.py on tiny models: results, tables, figures, and bad input."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import NO_EVAL, SMALL, failing, files_of, write_json

import analyze
import data
from analysis import adapters, figures, mmlu, report, units
from inputs.formats import load

ROOT = Path(__file__).resolve().parents[2]
BRIEF = ("--max_length", 64, "--rows", 4)
QUARTER = ("--share", 0.25, "--layers", 1, "--target_modules", "gate_proj", "q_proj")
succeed, refused = (functools.partial(call, main=analyze.main)
                    for call in (conftest.succeed, conftest.refused))


def train_adapter(tiny, folder, method, *flags):
    """Return the adapter folder of a short training."""
    conftest.succeed("--method", method, *tiny, *SMALL, *NO_EVAL, "--max_train_per_task", 4,
                     "--epochs", 2, "--learning_rate", 0.02, "--output_dir", folder, *flags)
    return folder / "adapter"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Return a function that trains an adapter once, and returns its folder."""
    root = tmp_path_factory.mktemp("runs")
    methods = {"loramoe": ("loramoe",), "lora": ("lora",),
               "single": ("loramoe", "--setting", "single"),
               "energy": ("badit", "--routing", "energy")}  # no router: energies are the weights
    return functools.cache(lambda name: train_adapter(tiny, root / name, *methods[name]))


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


def test_documented_commands_parse():
    text = (ROOT / "docs" / "analyses.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True)
                for line in re.findall(r"^python analyze.py (.*)", text, flags=re.MULTILINE)]
    assert {analyze.parse_flags(words).command for words in commands} == set(analyze.COMMANDS)


@pytest.mark.parametrize("named, flags", [
    ("--layers 2: the model has layers 0 to 1", ("--layers", 0, 2)),
    ("--layers: 1 1 has a repeated value", ("--layers", "1,1")),
    ("allowed: down_proj, gate_proj, k_proj", ("--target_modules", "c_fc")),
    ("all-linear: name the linear layers", ("--target_modules", "all-linear")),
    ("did you mean --rows?; see `python analyze.py sharing --help`", ("--row", 4)),
    ("needs 4 rows, two in each of 2 fold(s)", ("--rows", 3)),
    ("'0' is not a number between 0 and 1", ("--share", 0)),
    ("--share 0.001 of a layer's neurons, 64, is 0", ("--share", 0.001)),
    ("task 'T9' is unknown", ("--tasks", "T9", "say_both")),
    ("1 task(s); an analysis compares 2 to 62 tasks", ("--tasks", "say_both")),
    ("the smallest that lets one in is", ("--max_length", 8)),
    ("is unknown: allowed are smollm2-135m", ("--model", "gpt2")),
], ids=str)
def test_bad_flags(tiny, tmp_path, named, flags):
    refused(named, "sharing", *tiny, *BRIEF, *QUARTER, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_stopped_and_repeated(tiny, sharing, tmp_path):
    """Ctrl-C leaves no result; equal commands leave equal bytes; a folder with files is refused."""
    flags = ("sharing", *tiny, *BRIEF, *QUARTER, "--out", tmp_path)
    with failing(units, "measure_task", 3, KeyboardInterrupt):
        outcome = conftest.run(*flags, main=analyze.main)
    assert outcome.status == 130 and "stopped" in outcome.err[-1] and not files_of(tmp_path)
    succeed(*flags)
    for out in (tmp_path, tmp_path / "analysis.md"):
        refused("is in use: name a new folder, or an empty one", *flags[:-1], out)
    assert files_of(tmp_path) == files_of(sharing)


def test_sharing(sharing):
    """The tables show the numbers of analysis.json."""
    result, shown = load(sharing / "analysis.json"), (sharing / "analysis.md").read_text()
    assert len(result["neurons"]) == len(result["weights"]) == 2
    for line in result["weights"]:
        for value in (line["jaccard"], line["ceiling"], line["controls"]["random"]["jaccard"],
                      result["tasks"][0]["loss"]):
            assert f"{value:.2f}" in shown
    assert "![neurons-all]" in shown
    with np.load(sharing / "arrays.npz") as file:
        figure = figures.neurons(result, file, "all")
        (image,) = (axes.images[0] for axes in figure.axes if axes.images)
        assert image.get_array().sum() == file["neurons.1.all"][:3].sum() > 0
    figures.plt.close(figure)


COMMITTED = sorted((ROOT / "results" / "analysis").glob("*/analysis.md"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_tables(file):
    """analysis.md of results/analysis follows from the analysis.json beside it."""
    assert report.text(file.parent) == file.read_text(encoding="utf-8")


# --- experts ------------------------------------------------------------------------------------


def test_experts(tiny, trained, tmp_path):
    """Mixed and single-task adapters in one analysis, Fig. 2; its tables show the numbers."""
    names = ("loramoe", "single", "energy")
    succeed("experts", *tiny, *BRIEF, "--adapter", *map(trained, names), "--out", tmp_path)
    result = load(tmp_path / "analysis.json")
    assert [adapter["alone"] for adapter in result["adapters"]] == [False, True, False]
    assert result["about"] == "training rows after the first 4, which no run was trained on"
    for adapter in result["adapters"]:
        for found in adapter["places"].values():
            assert np.sum(found["w"], axis=1) == pytest.approx(1) and len(found["null_95"]) == 2
            assert sum(found["tasks_per_expert"]) == 12
            assert f"| {found['mean_information']:.4f} | 0.69 |" in (
                tmp_path / "analysis.md").read_text()
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"experts", "information"}


def test_an_adapter_is_named_after_its_run(trained, monkeypatch):
    for folder, path in ((trained("lora"), "."), (trained("lora").parent, "adapter")):
        monkeypatch.chdir(folder)
        found = adapters.read(Path(path))
        assert found.name == "lora" and found.results["args"]["method"] == "lora"


def test_rows_that_no_run_has_seen(suite):
    """Test rows are added where training rows are too few; alone if a run's rows are unknown."""
    tiny = data.load_suite(suite)  # 12 training and 5 test rows
    args = {"max_train_per_task": 4}
    for needed, results, count, words in (
            (8, {"args": args}, 8, "training rows after the first 4, which no run was trained on"),
            (9, {"args": args}, 13, "test rows, and training rows after the first 4"),
            (1, {}, 5, "test rows"),
            (1, {"args": args, "went_on_from": {"adapter": "x"}}, 5, "test rows")):
        runs = [types.SimpleNamespace(results=each) for each in ({"args": args}, results)]
        found, about = adapters.unseen(tiny, runs, needed)
        assert [len(task.train) for task in found.tasks.values()] == [count] * 3
        assert about == words


def test_bad_adapters(tiny, trained, checkpoints, suite, tmp_path):
    loramoe, lora = trained("loramoe"), trained("lora")
    mixed, other = tmp_path / "mixed" / "adapter", tmp_path / "other" / "adapter"
    for source in (loramoe, lora):
        shutil.copytree(source, mixed / source.parent.name)
    shutil.copytree(loramoe, tmp_path / "alone" / "loramoe")
    shutil.copytree(loramoe, other)
    config = load(other / "adapter_config.json")
    write_json(other / "adapter_config.json", config | {"base_sha256": "0" * 64})
    for named, *folders in (
            ("lora selects no experts; methods that do: loramoe, badit", loramoe, lora),
            ("no adapter at", tmp_path), (f"there is one at {loramoe}", loramoe.parent),
            ("has a repeated value", lora, lora), ("come from different runs", mixed),
            ("has single-task adapters for loramoe, not for", tmp_path / "alone"),
            (f"base_sha256 {64 * '0'}", loramoe, other)):
        refused(named, "experts", *tiny, "--adapter", *folders, "--out", tmp_path / "x")
    refused("experts needs --adapter", "experts", *tiny, "--out", tmp_path / "x")
    refused("made on another base model", "experts", "--model", checkpoints["qwen3"], "--suite",
            suite, *BRIEF, "--adapter", loramoe, "--out", tmp_path / "y")
    assert not (tmp_path / "x").exists()


# --- conflict -----------------------------------------------------------------------------------

CONFLICT = ("--max_length", 64, "--rows", 11, "--lookahead", 2, "--layers", 1, "--folds", 4)


def test_conflict(tiny, trained, wide, tmp_path):
    """Two methods side by side, and tables of what could not be measured; a quantised base."""
    succeed("conflict", *tiny, *CONFLICT, "--adapter", trained("loramoe"), trained("lora"),
            "--out", tmp_path)
    result = load(tmp_path / "analysis.json")
    for adapter in result["adapters"]:
        assert sum(adapter["whole"]["decided"]) == pytest.approx(1)
        assert 0 <= adapter["lookahead"]["improved"] <= 3
        assert [(line["layer"], line["module"]) for line in adapter["effective"]] == [
            (1, "gate_proj")]
        assert "| 1 gate_proj |" in report.effective_table(result)
    other = ("--model", wide, *tiny[2:])
    quantised = train_adapter(other, tmp_path / "run", "badit", "--base", "int8")
    succeed("conflict", *other, *CONFLICT, "--adapter", quantised, "--out", tmp_path / "int8")
    one, other = result["adapters"]
    one["lookahead"]["reason"] = "planted"
    other["whole"] = other["lookahead"] = None
    assert "planted" in report.lookahead_table(result)
    assert "| – |" in report.conflict_table(result)
    figures.plt.close(next(figures.of_conflict(result, None))[1])


def test_bad_conflict(tiny, trained, tmp_path):
    loramoe = trained("loramoe")
    for named, *flags in (
            ("holds one adapter for each task", "--adapter", trained("single")),
            ("needs 18 rows", "--adapter", loramoe, "--folds", 8),
            ("'-1' is not a whole number from 0", "--adapter", loramoe, "--lookahead", "-1"),
            ("no effect with --lookahead 0", "--adapter", loramoe, "--lookahead", 0,
             "--learning_rate", "1e-4"),
            ("'1' is not a whole number from 2", "--adapter", loramoe, "--folds", 1),
            ("above 0", "--adapter", loramoe, "--learning_rate", 0)):
        refused(named, "conflict", *tiny, *CONFLICT, "--out", tmp_path / "x", *flags)
    assert not (tmp_path / "x").exists()


# --- MMLU ---------------------------------------------------------------------------------------


def write_questions(path, *more, count=4):
    """Write questions on red and white with a header line between them, and the lines `more`."""
    lines = [json.dumps({"question": f"which is {subject} {i}", "correct_answer": "ABCD"[i % 4],
                         "topic": subject, **{f"answer_{each}": f"cat w{i}" for each in "abcd"}})
             for subject in ("red", "white") for i in range(count)]
    lines.insert(2, lines[0].replace('"correct_answer": "A"', '"correct_answer": "answer"'))
    path.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    return path


def test_mmlu(llama, suite, tmp_path):
    """Routing and accuracy on a file's questions without its header lines."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    for index, letter in enumerate("ABCD"):  # the tiny model has no words for them
        text = text.replace(f'"w{200 + index}"', f'"{letter}"')
    file.write_text(text, encoding="utf-8")
    tiny = ("--model", tmp_path / "model", "--suite", suite)
    adapter = train_adapter(tiny, tmp_path / "run", "loramoe")
    file = write_questions(tmp_path / "questions.jsonl")
    file = write_questions(file, file.read_text().splitlines()[-1])  # one more on white
    row = mmlu.load(file, ["red", "white"])["red"].train[1]
    assert row["outputs"] == ["B"] and row["input"].splitlines() == [
        "which is red 1", "A. cat w1", "B. cat w1", "C. cat w1", "D. cat w1"]
    flags = ("mmlu", *tiny[:2], "--adapter", adapter, "--max_length", 64, "--subjects", "red",
             "white", "--out", tmp_path / "out")
    succeed(*flags, "--mmlu", file)
    result = load(tmp_path / "out" / "analysis.json")
    (found,) = result["adapters"]
    assert [task["rows"] for task in result["tasks"]] == [4, 5] and len(found["accuracy"]) == 2
    found["accuracy"] = [1.0, 0.0]
    assert f"{4 / 9:.1%}, p" in report.accuracy_table(result)
    assert "no model is above chance" in figures.mmlu_title(result)
    found["accuracy_p"] = 0.001
    assert figures.mmlu_title(result) == "MMLU: above chance: run"
    flags = (*flags, "--out", tmp_path / "x")
    line = file.read_text().splitlines()[0].replace('correct_answer": "A"', 'correct_answer": "E"')
    for named, bad in (("line 10: correct_answer 'E' must be A, B, C or D", line),
                       ("line 10 is not readable JSON", "{"),
                       ("line 10: Object missing required", '{"question": "x"}')):
        refused(named, *flags, "--mmlu", write_questions(tmp_path / "bad.jsonl", bad))
    refused("--subjects red: an analysis compares two", *flags, "--mmlu", file, "--subjects", "red")
    refused("--subjects green: ", *flags, "--mmlu", file, "--subjects", "red", "green")
    refused("of the 1 rows that fit", *flags, "--mmlu",
            write_questions(tmp_path / "few.jsonl", count=1))
