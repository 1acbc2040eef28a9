"""Check results/paper.json, the paper's figures, against itself and the paper's text."""

import json
import math
import re
from pathlib import Path

import pytest

import data
from metrics import continual_metrics, mean
from registry import METHODS, MODELS

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT.parent / "shared" / "paper" / "paper.txt"

ALL_MODELS = ["qwen3-8b", "qwen3-4b", "llama3-8b", "llama3-3b", "gemma2-9b", "gemma2-2b"]
COMPARED = ["lora", "olora_qr", "loramoe", "pissa", "gainlora", "badit"]
ABLATIONS = ["badit", "badit --no_bad", "badit --no_dog", "badit --no_bad --no_dog"]
TIMED = ["lora", "loramoe", "pissa", "badit", "badit --no_dog", "badit --no_bad"]

PAPER = json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))


def cells(node, path=()):
    """Yield (path, cell) of every number below `node`, in the order of the file."""
    if "value" in node or "mean" in node:
        yield path, node
        return
    for name, below in node.items():
        yield from cells(below, (*path, name))


def rows_of(table):
    """Paths of the rows of a table, each with its cells, in the order of the file."""
    rows = {}
    for (*row, column), cell in cells(PAPER[table]["rows"]):
        rows.setdefault(tuple(row), {})[column] = cell
    return rows


def value(table, *path):
    """The mean or the only number of one cell."""
    node = PAPER[table]["rows"]
    for name in path:
        node = node[name]
    return node.get("mean", node.get("value"))


# --- what needs no text -------------------------------------------------------------------------


def test_names_are_those_of_this_project():
    """A report can look up its own models, methods and tasks."""
    assert set(ALL_MODELS) <= set(MODELS)
    assert {row.split()[0] for row in COMPARED + ABLATIONS + TIMED} <= set(METHODS)
    resolved = data.resolve_names(PAPER["table4"]["rows"], list(data.SUPERNI))
    assert sorted(resolved) == sorted(data.SUPERNI)


def test_sizes():
    """The instances add up to those of the split that the project downloads."""
    for column, total in (("train", 11741), ("test", 1197)):
        assert sum(value("table4", task, column) for task in PAPER["table4"]["rows"]) == total


# --- what the tables say of themselves: the numbers of docs/results.md --------------------------


def table1(model, method, column):
    return value("table1", model, method, column)


def test_the_main_table_breaks_its_own_definitions():
    """Rouge in sequence is what single-task runs score, plus what was learnt, minus what was lost.

    The 36 rows of Table 1 are off by 1.8 points rms, 22 of them by more than 1.
    """
    off = {(model, method): table1(model, method, "sequential/rouge") - (
        table1(model, method, "mixed/rouge") - table1(model, method, "mixed/forward")
        + table1(model, method, "sequential/forward")
        + 14 / 15 * table1(model, method, "sequential/backward"))
        for model in ALL_MODELS for method in COMPARED}
    assert math.sqrt(mean(error**2 for error in off.values())) == pytest.approx(1.8, abs=0.05)
    assert max(off, key=lambda row: abs(off[row])) == ("gemma2-9b", "pissa")
    assert off["gemma2-9b", "pissa"] == pytest.approx(5.0, abs=0.05)
    assert sum(abs(error) > 1 for error in off.values()) == 22


def matrix_metrics(table):
    """(metrics of a matrix, mean score right after a task's own stage)."""
    order = list(PAPER[table]["columns"])
    rows = [[cell["value"] for cell in row.values()] for row in rows_of(table).values()]
    return continual_metrics(rows, order, None), mean(rows[i][i] for i in range(len(order)))


def test_matrices_against_the_main_table():
    """The baseline of Table 8 forgets nothing; Table 7 gains over Table 6 mostly by learning."""
    assert matrix_metrics("table8")[0]["backward"] == pytest.approx(1.9)
    assert table1("gemma2-9b", "loramoe", "sequential/backward") == -10.11
    (baseline, learnt), (ours, learnt_by_ours) = map(matrix_metrics, ("table6", "table7"))
    assert ours["rouge"] - baseline["rouge"] == pytest.approx(1.53, abs=0.01)
    assert learnt_by_ours - learnt == pytest.approx(1.17, abs=0.01)
    assert 14 / 15 * (ours["backward"] - baseline["backward"]) == pytest.approx(0.36, abs=0.01)


def test_gains_over_the_best_baseline():
    """2.68 is over GainLoRA; over the best baseline of each model it is 2.16, mixed 1.66."""
    def gain(setting, methods):
        return mean(table1(model, "badit", f"{setting}/rouge") - max(
            table1(model, method, f"{setting}/rouge") for method in methods)
            for model in ALL_MODELS)

    assert gain("sequential", ["gainlora"]) == pytest.approx(2.68, abs=0.005)
    assert gain("sequential", COMPARED[:-1]) == pytest.approx(2.16, abs=0.006)
    assert gain("mixed", COMPARED[:-1]) == pytest.approx(1.66, abs=0.005)
    assert all(table1(model, "lora", "mixed/rouge") != table1(model, "olora_qr", "mixed/rouge")
               for model in ALL_MODELS)


# --- what the paper's text says -----------------------------------------------------------------


def test_numbers_are_those_of_the_text():
    """The text's tables hold the same decimals in the same order, none missing and none more."""
    if not TEXT.is_file():
        pytest.skip("the paper's text is not here")
    rows = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    in_text = [float(number) for row in rows for number in re.findall(r"-?\d+\.\d\d?", row)]
    whole = {path for path, _ in cells(PAPER["table3"]["rows"]) if path[1] == "loramoe"}  # "1"
    ours = [cell[key] for table in PAPER if table != "table4"  # whole numbers, see test_sizes
            for path, cell in cells(PAPER[table]["rows"]) if path not in whole
            for key in ("mean", "std", "value") if key in cell]
    assert ours == in_text and len(ours) == 216 * 2 + 45 + 35 + 4 * 225
