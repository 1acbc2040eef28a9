"""results/paper.json, the figures that the paper reports, cell by cell against the paper's text."""

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

SETTINGS_AND_METRICS = ["mixed/rouge", "mixed/forward", "sequential/rouge",
                        "sequential/forget_rate", "sequential/forward", "sequential/backward"]
COLUMNS = {"table1": SETTINGS_AND_METRICS,
           "table2": ["sequential/rouge", "sequential/forget_rate", "mixed/rouge", "degradation"],
           "table3": ["relative_time"], "table4": ["train", "test"]}
ALL_MODELS = ["qwen3-8b", "qwen3-4b", "llama3-8b", "llama3-3b", "gemma2-9b", "gemma2-2b"]
LARGE_MODELS = ["qwen3-8b", "llama3-8b", "gemma2-9b"]
COMPARED = ["lora", "olora_qr", "loramoe", "pissa", "gainlora", "badit"]
ABLATIONS = ["badit", "badit --no_bad", "badit --no_dog", "badit --no_bad --no_dog"]
TIMED = ["lora", "loramoe", "pissa", "badit", "badit --no_dog", "badit --no_bad"]
# Which run each matrix is of. The text has no captions; test_matrices_fit_the_main_table checks.
MATRICES = {"table6": ("qwen3-8b", "loramoe"), "table7": ("qwen3-8b", "badit"),
            "table8": ("gemma2-9b", "loramoe"), "table9": ("gemma2-9b", "badit")}


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


def test_ablations_fit_the_main_table():
    """Whole BADIT and BADIT without both parts repeat rows; degradations are sums of three."""
    for model in LARGE_MODELS:
        for ablation, method in (("badit", "badit"), ("badit --no_bad --no_dog", "loramoe")):
            for column in COLUMNS["table2"][:-1]:
                assert value("table2", model, ablation, column) == \
                    value("table1", model, method, column)
        for ablation in ABLATIONS[1:]:
            lost = sum(abs(value("table2", model, "badit", column)
                           - value("table2", model, ablation, column))
                       for column in COLUMNS["table2"][:-1])
            found = value("table2", model, ablation, "degradation")
            assert found == pytest.approx(lost, abs=1e-9)


def test_times_fit_their_averages():
    """LoRAMoE is the unit; the last row averages the others (0.877 is printed as 0.87)."""
    for method in TIMED:
        times = [value("table3", model, method, "relative_time") for model in ALL_MODELS]
        average = value("table3", "average", method, "relative_time")
        assert abs(mean(times) - average) < 0.01
        assert method != "loramoe" or set(times) == {1.0}


def test_sizes():
    """The instances add up to those of the split that the project downloads."""
    for column, total in (("train", 11741), ("test", 1197)):
        assert sum(value("table4", task, column) for task in PAPER["table4"]["rows"]) == total


def test_matrices_fit_the_main_table():
    """The last row of each matrix is nearer to its own method's mean than to the other's."""
    for table, (model, method) in MATRICES.items():
        final = mean(cell["value"] for cell in list(rows_of(table).values())[-1].values())
        other = {"loramoe": "badit", "badit": "loramoe"}[method]
        distance = {name: abs(final - value("table1", model, name, "sequential/rouge"))
                    for name in (method, other)}
        assert distance[method] < distance[other], table


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

ROW_NAMES = {"Qwen3": "qwen3-8b", "Llama3": "llama3-8b", "Gemma2": "gemma2-9b",
             "OLoRA": "olora_qr", "w/o BAD": "badit --no_bad", "w/o DOG": "badit --no_dog",
             "w/o BAD & DOG": "badit --no_bad --no_dog", "- DOG": "badit --no_dog",
             "- BAD": "badit --no_bad"}
HEADERS = {"Method", "Task ID", "Seed", "Evaluation Task ID"}  # first cells of a table


def row_name(label):
    """This project's name of a model, a method or an ablation."""
    name = label.split(" (")[0]  # without its citation
    return ROW_NAMES.get(name) or name.lower()


def split_line(line):
    """The non-empty cells of one line of a table."""
    return [part.strip() for part in line.split("|") if part.strip()]


def tables_of(text):
    """The tables of the text in order, each a list of lines of cells, without the equations."""
    tables = []
    for line in text.splitlines():
        found = split_line(line) if line.startswith("|") else []
        if not found or re.fullmatch(r"\(\d+\)", " ".join(found)):
            continue
        if found[0] in HEADERS:
            tables.append([])
        tables[-1].append(found)
    return tables


def glued(text):
    """Mean and deviation that stand together, both with two decimals."""
    end = text.index(".") + 3
    number, deviation = text[:end], text[end:]
    assert re.fullmatch(r"-?\d+\.\d\d", number) and re.fullmatch(r"\d+\.\d\d", deviation), text
    return {"mean": float(number), "std": float(deviation)}


def read_grouped(lines, columns, read):
    """(path, cell) of rows whose first line of a model has the model's name before the method."""
    model = None
    for line in lines:
        if len(line) == len(columns) + 2:
            model, *line = line
        label, *numbers = line
        for column, number in zip(columns, numbers, strict=True):
            if number != "-":
                yield (row_name(model), row_name(label), column), read(number)


def single(text):
    """A number without a deviation."""
    return {"value": float(text)}


def read_table1(table):
    """Two lines of headers, then methods by model."""
    assert table[0][1:] == ["Mixed Training", "Sequential Training"]
    names = [name.lower().replace(" ", "_") for name in table[1]]
    columns = [f"mixed/{name}" for name in names[:2]] + [f"sequential/{name}" for name in names[2:]]
    yield from read_grouped(table[2:], columns, glued)


def read_table2(table):
    """The last column has lost its name."""
    assert table[0][1:] == ["ST R.", "ST F.", "MT R."]
    yield from read_grouped(table[1:], COLUMNS["table2"], single)


def read_table3(table):
    """A line of methods, then models."""
    for label, *numbers in table[1:]:
        for method, number in zip(table[0][1:], numbers, strict=True):
            yield (row_name(label), row_name(method), "relative_time"), single(number)


def read_table4(table):
    """Sizes are columns 4 and 5 of 6; the names of category and metric are the project's."""
    assert table[0][3:5] == ["#Train", "#Eval"]
    for task, name, category, *sizes, metric in table[1:]:
        assert data.resolve_names([task], list(data.SUPERNI)) == [name]
        assert data.SUPERNI[name] == (category, metric.lower().replace("-", "_"))
        for column, size in zip(COLUMNS["table4"], sizes, strict=True):
            yield (task, column), {"value": int(size.replace(",", ""))}


def read_matrix(table, model, method):
    """Two lines of headers, then training tasks; a label of the axis stands in the first row."""
    columns = [f"T{task}" for task in table[1]]
    table[2].pop(0)
    assert [f"T{line[0]}" for line in table[2:]] == columns
    for task, *scores in table[2:]:
        for column, score in zip(columns, scores, strict=True):
            yield (model, method, f"T{task}", column), single(score)


@pytest.fixture(scope="module")
def in_text():
    """(path, cell) of every cell of the text by table."""
    if not TEXT.is_file():
        pytest.skip("the paper's text is not here: the figures are checked only for their shape")
    found = tables_of(TEXT.read_text(encoding="utf-8"))
    assert len(found) == 9
    assert found[4] == [["Seed", "Task Ordering"], *([str(seed)] for seed in range(1, 6))]
    readers = (read_table1, read_table2, read_table3, read_table4)
    read = {f"table{number}": list(reader(table))
            for number, (reader, table) in enumerate(zip(readers, found, strict=False), start=1)}
    for (name, (model, method)), table in zip(MATRICES.items(), found[5:], strict=True):
        read[name] = list(read_matrix(table, model, method))
    return read


@pytest.mark.parametrize("table", PAPER)
def test_every_cell_of_the_text(table, in_text):
    """The same cells with the same numbers in the same order, none missing and none more."""
    assert list(cells(PAPER[table]["rows"])) == in_text[table]


def test_no_table_of_the_text_is_left_out(in_text):
    """Every number in the text's tables is accounted for."""
    assert list(in_text) == list(PAPER)
    counts = {table: len(found) for table, found in in_text.items()}
    assert counts == {"table1": 216, "table2": 45, "table3": 42, "table4": 30,
                      "table6": 225, "table7": 225, "table8": 225, "table9": 225}
