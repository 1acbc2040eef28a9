"""`data.py convert`: what it makes of every layout, and that it writes a whole suite or nothing."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
from conftest import snapshot

import data

HEAD = {"Definition": ["Do it."], "Contributors": ["x"], "Positive Examples": []}
INSTANCES = [{"id": f"n{i}", "input": f"in {i}", "output": ["a"]} for i in range(6)]
ALPACA = [{"instruction": "Say.", "input": f"in {i}", "output": f"out {i}"} for i in range(6)]
PAIR = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]


def write(folder, files):
    """Write {path: content}, as JSON unless it is text or bytes."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list | dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def converted(source, tmp_path, *flags):
    """The suite that convert makes of `source`."""
    assert data.main(["convert", str(source), "--to", str(tmp_path / "made" / "suite"),
                      *flags]) == 0
    return data.load_suite(tmp_path / "made" / "suite").tasks


def refused(source, tmp_path, capsys, *flags, to="new"):
    """The one line with which convert refuses `source`, writing nothing."""
    before = snapshot(tmp_path)
    assert data.main(["convert", str(source), "--to", str(tmp_path / to), *flags]) == 2
    assert snapshot(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def parquet(rows):
    """The bytes of a Parquet file."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


LAYOUTS = {  # kind, files, the only task: name, definition, category, metric
    "official": ("official", {"tasks/task7_x.json": HEAD | {"Categories": ["Toys", "Games"],
                                                            "Instances": INSTANCES}},
                 ("task7_x", "Do it.", "Toys, Games", "rouge_l")),
    "its tasks": ("official", {"task7_x.json": HEAD | {"Instances": INSTANCES}},
                  ("task7_x", "Do it.", "other", "rouge_l")),
    "labels": ("benchmark", {"CB/train.json": HEAD | {"Instances": PAIR}, "CB/labels.json": ["b"],
                             "CB/dev.json": "?", "CB/test.json": HEAD | {"Instances": PAIR}},
               ("CB", "Do it.", "other", "accuracy")),
    "groups": ("benchmark", {"TC/ag/train.json": [{"sentence": "a", "label": "b"}],
                             "TC/ag/test.json": [{"sentence": "a", "label": "b"}]},
               ("ag", "", "TC", "rouge_l")),
    "own": ("benchmark", {"mine/train.json": {"Definition": "D", "Metric": "accuracy",
                                              "Category": "c", "Instances": PAIR}},
            ("mine", "D", "c", "accuracy")),
    "trace": ("trace", {"t/train.json": [{"prompt": "a", "answer": "b"}],
                        "t/eval.json": "?", "t/test.json": [{"prompt": "a", "answer": "b"}]},
              ("t", "", "other", "rouge_l")),
    "alpaca": ("table", {"t/train.json": ALPACA}, ("t", "Say.", "other", "rouge_l")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, capsys, layout):
    """The kind is found, said, and the same as when it is forced; nothing is lost unsaid."""
    kind, files, about = LAYOUTS[layout]
    source = write(tmp_path / "source", files)
    (task,) = converted(source, tmp_path).values()
    assert task[:4] == about
    lines = capsys.readouterr().out.splitlines()
    assert f"--kind {kind}" in lines[0]
    row = next(line for line in lines if line.startswith(task.name + " "))
    for value in (len(task.train), len(task.test), task.metric, task.category):
        assert str(value) in row
    left_out = "".join(line for line in lines if line.startswith("left out"))
    for name in ("Contributors", "Positive Examples", "dev.json", "eval.json"):
        assert (name in left_out) == (name in json.dumps(files))
    assert data.main(["convert", str(source), "--to", str(tmp_path / "forced"), "--kind", kind]
                     ) == 0
    assert list(data.load_suite(tmp_path / "forced").tasks.values()) == [task]


@pytest.mark.parametrize("pair", [("input", "output"), ("prompt", "completion"),
                                  ("question", "answer"), ("instruction", "output")])
def test_usual_columns(tmp_path, pair):
    rows = [dict(zip(pair, (f"in {i}", f"out {i}"), strict=True)) for i in range(2)]
    (task,) = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path).values()
    assert {row["input"] for row in task.train + task.test} == {"in 0", "in 1"}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_texts_stay_as_they_are(tmp_path, suffix):
    """Whatever reads a file, no text becomes a number, a time or nothing."""
    texts = ["007", "0.10", "NA", "null", "2020-01-31", 'a "b", c', "two\nlines", "é 北京", "True"]
    rows = [{"question": f"q{text}", "answer": text, "id": f"0{i}"}
            for i, text in enumerate(texts)]
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values())
              for row in rows]
    file = {"json": rows, "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "csv": "\ufeffquestion,answer,id\n" + "\n".join(quoted), "parquet": parquet(rows)}
    (task,) = converted(write(tmp_path, {f"t.{suffix}": file[suffix]}) / f"t.{suffix}",
                        tmp_path).values()
    found = {(row["id"], row["input"], *row["outputs"]) for row in task.train + task.test}
    assert found == {(row["id"], row["question"], row["answer"]) for row in rows}


def test_numbers_and_references(tmp_path):
    """Numbers become text, a list of answers several references, integer ids text."""
    rows = [{"input": i, "output": output, "id": i} for i, output in enumerate([2.5, ["a", "b"]])]
    (task,) = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path).values()
    assert sorted((row["id"], row["input"], row["outputs"]) for row in task.train + task.test) == [
        ("0", "0", ["2.5"]), ("1", "1", ["a", "b"])]


def test_instructions_of_rows(tmp_path, capsys):
    """One for a whole task is its Definition; several stand before the inputs, which may lack."""
    rows = [{"instruction": "A.", "input": "x", "output": "1", "kind": "first one"},
            {"instruction": "A.", "input": "y", "output": "2", "kind": "first one"},
            {"instruction": "B.", "input": "z", "output": "3", "kind": "second"},
            {"instruction": "C.", "input": None, "output": "4", "kind": "second"}]
    tasks = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path, "--task_column",
                      "kind")
    assert {name: (task.definition, {row["input"] for row in task.train + task.test})
            for name, task in tasks.items()} == {
        "first_one": ("A.", {"x", "y"}), "second": ("", {"B.\n\nz", "C."})}
    out = capsys.readouterr().out
    assert "'first one': first_one" in out and "before their inputs: second" in out


def test_columns_by_name(tmp_path, capsys):
    rows = [{"q": "a", "a": "b", "how": "H", "n": i, "id": "same"} for i in range(2)]
    (task,) = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path, "--input_column",
                        "q", "--output_column", "a", "--definition_column", "how", "--id_column",
                        "n").values()
    assert task.definition == "H" and {task.train[0]["id"], task.test[0]["id"]} == {"0", "1"}
    assert "left out: id\n" in capsys.readouterr().out


def test_own_test_file_is_kept(tmp_path, capsys):
    source = write(tmp_path / "mine", {"train.json": PAIR, "test.json": PAIR[:1]})
    task = converted(source, tmp_path)["mine"]
    assert (len(task.train), len(task.test)) == (2, 1)
    for flag in ("--test_items", "--seed"):
        assert flag in refused(source, tmp_path, capsys, flag, "3")


def test_drawn_test(tmp_path):
    """By seed and id: equal whatever the order of the rows; at most half of them."""
    rows = [{"id": f"n{i}", "input": f"in {i}", "output": "a"} for i in range(40)]

    def drawn(rows, *flags, name):
        source = write(tmp_path / name, {"t.json": rows}) / "t.json"
        task = converted(source, tmp_path / name, *flags)["t"]
        ids = [{row["id"] for row in split} for split in (task.train, task.test)]
        assert ids[0] | ids[1] == {row["id"] for row in rows} and not ids[0] & ids[1]
        return ids[1]

    first = drawn(rows, "--test_items", "10", name="a")
    shuffled = random.Random(0).sample(rows, 40)
    assert len(first) == 10 and drawn(shuffled, "--test_items", "10", name="b") == first
    assert drawn(rows, "--test_items", "10", "--seed", "2", name="c") != first
    assert len(drawn(rows, name="d")) == 20


def test_tasks_and_metric(tmp_path):
    files = {f"tasks/task{n}_x.json": HEAD | {"Instances": INSTANCES} for n in (7, 70, 8)}
    files["tasks/task9_x.json"] = "not read"
    tasks = converted(write(tmp_path / "source", files), tmp_path, "--tasks", "T8", "task70_x",
                      "--metric", "accuracy")
    assert {name: task.metric for name, task in tasks.items()} == {"task8_x": "accuracy",
                                                                   "task70_x": "accuracy"}


BAD = {  # files, what stands in the line
    "nothing": ({"x.md": "?"}, ("source",)),
    "empty list": ({"t/train.json": []}, ("train.json",)),
    "empty file": ({"t/train.csv": ""}, ("train.csv",)),
    "broken json": ({"t/train.json": "[{"}, ("train.json",)),
    "broken line": ({"t/train.jsonl": '{"input": "a", "output": "b"}\n{"input": \n'},
                    ("train.jsonl", "line 2")),
    "broken csv": ({"t/train.csv": "input,output\na,b\na,b,c\n"}, ("train.csv", "line 3")),
    "broken parquet": ({"t/train.parquet": b"PAR1"}, ("train.parquet",)),
    "no object": ({"t/train.json": [{"input": "a", "output": "b"}, 3]}, ("train.json", "row 2")),
    "columns": ({"t/train.json": [{"text": "a", "tag": "b"}]},
                ("train.json", "'text'", "'tag'", "--input_column")),
    "no output": ({"t/train.json": [*PAIR, {"input": "a", "output": None}]}, ("row 3", "output")),
    "nested": ({"t/train.json": [{"input": {"a": 1}, "output": "b"}]}, ("row 1", "input")),
    "no input": ({"t/train.json": [{"input": "", "output": "b"}]}, ("row 1",)),
    "equal ids": ({"t/train.json": [row | {"id": 5} for row in PAIR]}, ("row 2", "'5'")),
    "one row": ({"t/train.json": PAIR[:1]}, ("t has one instance",)),
    "two formats": ({"t/train.json": PAIR, "t/train.csv": ""}, ("train.json", "train.csv")),
    "two tasks": ({"a/t/train.json": PAIR, "b/t/train.json": PAIR}, ("a/t", "b/t")),
    "odd name": ({"北/train.json": PAIR}, ("'北'",)),
    "definitions": ({"t/train.json": HEAD | {"Instances": PAIR},
                     "t/test.json": {"Definition": "Other.", "Instances": PAIR}}, ("test.json",)),
    "definition": ({"t/train.json": {"Definition": 3, "Instances": PAIR}},
                   ("train.json", "Definition")),
    "metric": ({"t/train.json": HEAD | {"Metric": "bleu", "Instances": PAIR}},
               ("train.json", "bleu", "rouge_l")),
    "second task": ({"a/train.json": PAIR, "b/train.json": [{"input": "a"}]}, ("b/train.json",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path, capsys, case):
    """One line that names file and row; nothing is written, also after tasks that were right."""
    files, named = BAD[case]
    line = refused(write(tmp_path / "source", files), tmp_path, capsys)
    assert all(part in line for part in named), line


@pytest.mark.parametrize("flags, named", [
    (["--kind", "folder"], "official"), (["--kind", "official"], "official"),
    (["--kind", "trace"], "prompt and answer"), (["--tasks", "u"], "'u'"),
    (["--input_column", "text"], "'text'"), (["--kind", "benchmark", "--id_column", "id"], "table"),
    (["--test_items", "0"], "'0'"), (["--seed", "-1"], "'-1'"), (["--metric", "f1"], "rouge_l"),
    (["--test", "5"], "--test"),
])
def test_bad_flags_are_refused(tmp_path, capsys, flags, named):
    assert named in refused(write(tmp_path / "source", {"t/train.json": PAIR}), tmp_path, capsys,
                            *flags)


def test_folder_in_use_is_refused(tmp_path, capsys):
    """An empty folder is taken; a file, or a folder with anything in it, is left alone."""
    source = write(tmp_path / "source", {"t/train.json": PAIR})
    write(tmp_path, {"used/file": "?", "file": "?"})
    for name in ("used", "file"):
        assert name in refused(source, tmp_path, capsys, to=name)
    assert "there" in refused(tmp_path / "gone", tmp_path, capsys)
    (tmp_path / "made" / "suite").mkdir(parents=True)
    assert list(converted(source, tmp_path)) == ["t"]
