"""`data.py convert`: what it makes of every layout, and that it writes a whole suite or nothing."""

import json
import random

import datasets
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
    """Return the tasks that convert makes of `source`."""
    assert data.main(["convert", str(source), "--to", str(tmp_path / "made" / "suite"),
                      *flags]) == 0
    return data.load_suite(tmp_path / "made" / "suite").tasks


def refused(source, tmp_path, capsys, *flags, to="new"):
    """Return the one line with which convert refuses `source`, writing nothing."""
    before = snapshot(tmp_path)
    assert data.main(["convert", str(source), "--to", str(tmp_path / to), *flags]) == 2
    assert snapshot(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def exchanges(task):
    """Return {(definition and input, first output)} of a task's rows in both splits."""
    return {("\n\n".join(filter(None, (task.definition, row["input"]))), row["outputs"][0])
            for row in task.train + task.test}


def parquet(rows, **features):
    """Return the bytes of a Parquet file, with features as `datasets` writes them."""
    schema = datasets.Features(features).arrow_schema if features else None
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sink)
    return sink.getvalue().to_pybytes()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


LAYOUTS = {  # files, the only task: name, definition, category, metric
    "natural-instructions": (
        {"tasks/task7_x.json": HEAD | {"Categories": ["Toys", "Games"], "Instances": INSTANCES},
         "README.md": "?"}, ("task7_x", "Do it.", "Toys, Games", "rouge_l")),
    "its tasks": ({"task7_x.json": HEAD | {"Categories": "Toys", "Instances": INSTANCES}},
                  ("task7_x", "Do it.", "Toys", "rouge_l")),
    "a line break in a name": ({"a\nb.jsonl": lines(PAIR)}, ("a_b", "", "other", "rouge_l")),
    "labels": ({"CB/train.json": HEAD | {"Instances": PAIR}, "CB/labels.json": ["b"],
                "CB/dev.json": "?", "CB/test.json": HEAD | {"Instances": PAIR}},
               ("CB", "Do it.", "other", "accuracy")),
    "groups": ({"TC/ag/train.json": [{"sentence": "a", "label": "b"}],
                "TC/ag/test.json": [{"sentence": "a", "label": "b"}]}, ("ag", "", "TC", "rouge_l")),
    "own": ({"mine/train.json": {"Definition": "D", "Metric": "accuracy", "Category": "c",
                                 "Instances": PAIR}}, ("mine", "D", "c", "accuracy")),
    "TRACE": ({"t/train.json": [{"prompt": "a", "answer": "b"}], "t/eval.json": "?",
               "t/test.json": [{"prompt": "a", "answer": "b"}]}, ("t", "", "other", "rouge_l")),
    "Alpaca": ({"t/train.json": ALPACA}, ("t", "Say.", "other", "rouge_l")),
    "JSON lines named JSON": ({"t.json": lines(PAIR)}, ("t", "", "other", "rouge_l")),
    "Dolly": ({"t.jsonl": lines([{"instruction": "I", "context": f"c{i}", "response": "r"}
                                 for i in range(2)])}, ("t", "I", "other", "rouge_l")),
    "files by split": ({"t_train.jsonl": lines(PAIR[:1]), "t_test.jsonl": lines(PAIR[1:]),
                        "t_valid.jsonl": "?", "t_val.jsonl": "?"}, ("t", "", "other", "rouge_l")),
    "a clone of the hub": ({f"t/{split}-00000-of-00001.jsonl": lines(rows) for split, rows in (
        ("train", PAIR[:1]), ("test", PAIR[1:]))}, ("t", "", "other", "rouge_l")),
    "an older clone": ({f"t/{split}-00000-of-00001-a09b74b3ef9c3b56.jsonl": lines(rows)
                        for split, rows in (("train", PAIR[:1]), ("test", PAIR[1:]))},
                       ("t", "", "other", "rouge_l")),
    "capitals": ({"t_Train.JSONL": lines(PAIR[:1]), "t_TEST.jsonl": lines(PAIR[1:])},
                 ("t", "", "other", "rouge_l")),
    "a space": ({"t train.jsonl": lines(PAIR[:1]), "t test.jsonl": lines(PAIR[1:])},
                ("t", "", "other", "rouge_l")),
    "a name that ends as a split": ({"constrain.jsonl": lines(PAIR)},
                                    ("constrain", "", "other", "rouge_l")),
    "FLAN": ({"t.jsonl": lines([{"inputs": f"a{i}", "targets": "b"} for i in range(2)])},
             ("t", "", "other", "rouge_l")),
    "code in a TSV": ({"t.tsv": 'input\toutput\n"a():\n\tb\nc"\td\ne\tf\n'},
                      ("t", "", "other", "rouge_l")),
    "TSV": ({"t.tsv": 'question\tanswer\na, "b"\t"c\td"\ne\tf\n'}, ("t", "", "other", "rouge_l")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, capsys, layout):
    """Every row is in the task; keys and files that are not read are named."""
    files, about = LAYOUTS[layout]
    (task,) = converted(write(tmp_path / "source", files), tmp_path).values()
    assert task[:4] == about
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{task.name}: {len(task.train)} training and {len(task.test)} test")
    assert len(task.train + task.test) == (
        6 if layout in ("natural-instructions", "its tasks", "Alpaca") else
        4 if layout == "labels" else 2)
    left_out = "".join(line for line in rest if line.startswith("left out"))
    for name in ("Contributors", "Positive Examples", "dev.json", "eval.json"):
        assert (name in left_out) == (name in str(files))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_texts_stay_as_they_are(tmp_path, suffix):
    """Whatever reads a file, no text becomes a number, a time or nothing."""
    texts = ["007", "0.10", "NA", "null", "2020-01-31", 'a "b", c', "two\nlines", "é 北京", "True"]
    rows = [{"question": f"q{text}", "answer": text, "id": f"0{i}"}
            for i, text in enumerate(texts)]
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values())
              for row in rows]
    file = {"json": rows, "jsonl": lines(rows), "parquet": parquet(rows),
            "csv": "\ufeffquestion,answer,id\r\n" + "\r\n".join(quoted)}
    (task,) = converted(write(tmp_path, {f"t.{suffix}": file[suffix]}) / f"t.{suffix}",
                        tmp_path).values()
    found = {(row["id"], row["input"], *row["outputs"]) for row in task.train + task.test}
    assert found == {(row["id"], row["question"], row["answer"]) for row in rows}


def test_numbers_references_and_ids(tmp_path, capsys):
    """Numbers become text, a list of answers several references; ids that repeat are replaced."""
    rows = [{"input": i, "output": output, "id": i} for i, output in enumerate([2.5, ["a", "b"]])]
    (task,) = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path).values()
    assert sorted((row["id"], row["input"], row["outputs"]) for row in task.train + task.test) == [
        ("0", "0", ["2.5"]), ("1", "1", ["a", "b"])]
    rows[1]["id"] = 0
    (task,) = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path / "b").values()
    assert {row["id"] for row in task.train + task.test} == {"t-0", "t-1"}
    assert "rows were numbered, because ids are missing or repeated: t\n" in capsys.readouterr().out


def test_names_of_class_labels(tmp_path, capsys):
    """Labels are their names, a test file without labels is named, a single gap is refused."""
    label = datasets.ClassLabel(names=["bad", "good"])
    features = {"text": datasets.Value("string"), "label": label}
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
    unlabelled = [row | {"label": -1} for row in rows]
    source = write(tmp_path / "t", {"train.parquet": parquet(rows, **features),
                                    "test.parquet": parquet(unlabelled, **features)})
    (task,) = converted(source, tmp_path).values()
    assert exchanges(task) == {("t0", "bad"), ("t1", "good"), ("t2", "bad"), ("t3", "good")}
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not used" in line)
    assert "no row has a label" in line and "test.parquet" in line
    write(source, {"train.parquet": parquet([*rows, *unlabelled[:2]], **features)})
    line = refused(source, tmp_path, capsys)
    assert "train.parquet, row 5 has no label, nor have 1 other rows" in line
    several = {"text": datasets.Value("string"), "label": datasets.List(label)}
    rows = [{"text": f"t{i}", "label": [i, 1]} for i in range(2)]
    write(tmp_path / "u", {"train.parquet": parquet(rows, **several)})
    (task,) = converted(tmp_path / "u", tmp_path / "b").values()
    assert sorted(row["outputs"] for row in task.train + task.test) == [["bad", "good"],
                                                                        ["good", "good"]]


ASK, ANSWER = {"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "Cold."}
CHATS = {  # a row, the exchange that it becomes
    "messages": ({"messages": [ASK, ANSWER]}, ("Hot?", "Cold.")),
    "system": ({"messages": [{"role": "system", "content": "Be."}, ASK, ANSWER]},
               ("Be.\n\nHot?", "Cold.")),
    "developer": ({"messages": [{"role": "developer", "content": "Be."}, ASK, ANSWER]},
                  ("Be.\n\nHot?", "Cold.")),
    "several turns": ({"messages": [ASK, ANSWER, ASK, ANSWER]}, ("Hot?", "Cold.")),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hot?"},
                                    {"from": "gpt", "value": "Cold."}], "system": "Be."},
                 ("Be.\n\nHot?", "Cold.")),
    "TRL": ({"prompt": [ASK], "completion": [ANSWER]}, ("Hot?", "Cold.")),
    "Alpaca": ({"instruction": "I", "input": "x", "output": "y", "system": "Be.", "history": []},
               ("Be.\n\nI\n\nx", "y")),
    "a text history": ({"instruction": "I", "input": "x", "output": "y", "history": "[]"},
                       ("I\n\nx", "y")),
    "a history as text": ({"instruction": "I", "input": "x", "output": "y",
                           "history": '[["a", "b"]]'}, None),
    "a history of dicts as text": ({"instruction": "I", "input": "x", "output": "y",
                                    "history": '[{"from": "human"}]'}, None),
    "history": ({"instruction": "I", "input": "x", "output": "y", "history": [["a", "b"]]}, None),
    "answer first": ({"messages": [ANSWER, ASK, ANSWER]}, None),
    "tool": ({"messages": [ASK, {"role": "tool", "content": "1"}, ANSWER]}, None),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, None),
    "no text": ({"messages": [ASK, {"role": "assistant", "content": None}]}, None),
    "nothing": ({"messages": []}, None),
    "odd role": ({"messages": [{"role": [1], "content": "?"}, ANSWER]}, None),
    "odd system": ({"messages": [ASK, ANSWER], "system": 5}, None),
}


@pytest.mark.parametrize("chat", CHATS)
def test_chats(tmp_path, capsys, chat):
    """The first exchange of a chat becomes a row; what is cut or left out is counted."""
    row, expected = CHATS[chat]
    usual = CHATS[chat if expected else "Alpaca" if "history" in chat else "messages"][0]
    source = write(tmp_path, {"t.jsonl": lines([row, usual, usual])}) / "t.jsonl"
    (task,) = converted(source, tmp_path).values()
    out = capsys.readouterr().out
    rows = exchanges(task)
    if expected:
        assert expected in rows and len(task.train + task.test) == 3
    else:
        assert len(task.train + task.test) == 2 and "1 of 3 chats left out" in out
    assert ("3 of 3 chats cut to their first exchange" in out) == (chat == "several turns")
    if not expected:
        assert "all 1 chats left out" in refused(
            write(tmp_path, {"u.jsonl": lines([row])}) / "u.jsonl", tmp_path, capsys)


def test_a_system_turn_that_all_chats_share_is_the_definition(tmp_path):
    source = write(tmp_path, {"t.json": [CHATS["system"][0]] * 2}) / "t.json"
    (task,) = converted(source, tmp_path).values()
    assert (task.definition, exchanges(task)) == ("Be.", {("Be.\n\nHot?", "Cold.")})


def test_a_dataset_of_the_hub(tmp_path, capsys, monkeypatch):
    """It is read by name, or where save_to_disk wrote it; without a network one line says so."""
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in (
        ("train", PAIR), ("validation", PAIR), ("test", PAIR[:1]))})
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *words: asked.append(words) or made)
        (task,) = converted("nobody/glue:cb", tmp_path).values()
    assert (task.name, len(task.train), len(task.test)) == ("cb", 2, 1)
    assert asked == [("nobody/glue", "cb")]
    assert "left out: validation" in capsys.readouterr().out
    datasets.disable_progress_bars()
    made.save_to_disk(tmp_path / "saved")
    assert exchanges(converted(tmp_path / "saved", tmp_path / "b")["saved"]) == exchanges(task)
    made["train"].save_to_disk(tmp_path / "one")
    assert len(exchanges(converted(tmp_path / "one", tmp_path / "c")["one"])) == 2
    del made["train"]
    made.save_to_disk(tmp_path / "two")
    assert "has the splits validation, test, but no train" in refused(tmp_path / "two", tmp_path,
                                                                      capsys)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "nobody/glue does not exist" in refused("nobody/glue", tmp_path, capsys)


def test_separators(tmp_path, capsys):
    """The one that the first line is written with is read and said."""
    text = 'question;answer\n"What, now?";yes\n"a; b";no\n'
    (task,) = converted(write(tmp_path, {"x.csv": text}) / "x.csv", tmp_path).values()
    assert exchanges(task) == {("What, now?", "yes"), ("a; b", "no")}
    assert "columns separated by ';': x.csv" in capsys.readouterr().out
    write(tmp_path, {"old.csv": text.replace("\n", "\r")})  # as old spreadsheets end lines
    (task,) = converted(tmp_path / "old.csv", tmp_path / "old").values()
    assert len(exchanges(task)) == 2


def test_instructions_of_rows(tmp_path, capsys):
    """One for a whole task is its Definition; several are put before the inputs."""
    first = [{"instruction": "A.", "input": text, "output": "1"} for text in "xy"]
    second = [{"instruction": "B.", "input": "z", "output": "3"},
              {"instruction": "C.", "input": None, "output": "4"}]
    tasks = converted(write(tmp_path / "source", {"first one.json": first, "second.json": second}),
                      tmp_path)
    assert {name: (task.definition, {row["input"] for row in task.train + task.test})
            for name, task in tasks.items()} == {
        "first_one": ("A.", {"x", "y"}), "second": ("", {"B.\n\nz", "C."})}
    out = capsys.readouterr().out
    assert "'first one': first_one" in out and "before the inputs: second" in out


def test_columns_by_name(tmp_path, capsys):
    rows = [{"q": f"a{i}", "a": "b", "input": "", "n": i} for i in range(2)]
    (task,) = converted(write(tmp_path, {"t.json": rows}) / "t.json", tmp_path, "--input_column",
                        "q", "--output_column", "a").values()
    assert exchanges(task) == {("a0", "b"), ("a1", "b")}
    assert "left out: input, n\n" in capsys.readouterr().out


def test_own_test_file_is_kept(tmp_path, capsys):
    source = write(tmp_path / "mine", {"train.json": PAIR, "test.json": PAIR[:1]})
    task = converted(source, tmp_path)["mine"]
    assert (len(task.train), len(task.test)) == (2, 1)
    assert "--test_items" in refused(source, tmp_path, capsys, "--test_items", "3")


def test_drawn_test(tmp_path):
    """By id: equal whatever the order of the rows; at most half of them."""
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
    assert len(drawn(rows, name="d")) == 20


def test_tasks_and_metric(tmp_path):
    files = {f"tasks/task{n}_x.json": HEAD | {"Instances": INSTANCES} for n in (7, 70, 8)}
    files["tasks/task9_x.json"] = "not read"
    tasks = converted(write(tmp_path / "source", files), tmp_path, "--tasks", "T8", "task70_x",
                      "--metric", "accuracy")
    assert {name: task.metric for name, task in tasks.items()} == {"task8_x": "accuracy",
                                                                   "task70_x": "accuracy"}


def test_tasks_that_only_look_like_two_halves(tmp_path):
    files = {f"{task}/{split}.jsonl": lines(PAIR) for task in ("unit_test", "unit_train")
             for split in ("train", "test")}
    assert set(converted(write(tmp_path / "source", files), tmp_path)) == {"unit_test",
                                                                           "unit_train"}


BAD = {  # files, what stands in the line
    "two halves": ({"reviewsTrain.jsonl": lines(PAIR), "reviewsTest.jsonl": lines(PAIR)},
                   ("reviewsTest", "reviewsTrain", "NAME_train")),
    "a packed file": ({"a.test.jsonl.gz": "?"}, ("left out: a.test.jsonl.gz",)),
    "a quotation over two last columns": ({"t.tsv": 'input\toutput\nx\t"Yes\ny\tNo"\n'},
                                          ("t.tsv", "line 3", "whole rows")),
    "a quotation over two rows": ({"t.tsv": 'input\toutput\n"A.\tb\nC."\td\n'},
                                  ("t.tsv", "line 3", "whole rows")),
    "nothing": ({"x.md": "?"}, ("source",)),
    "test file alone": ({"test.json": PAIR}, ("source",)),
    "test file of one task": ({"a.json": PAIR, "b_test.json": PAIR}, ("source", "train")),
    "empty list": ({"t/train.json": []}, ("train.json",)),
    "empty file": ({"t/train.csv": ""}, ("train.csv",)),
    "broken json": ({"t/train.json": "[{"}, ("train.json",)),
    "broken line": ({"t/train.jsonl": '{"input": "a", "output": "b"}\n\n{"input": \n'},
                    ("train.jsonl", "line 3")),
    "long csv line": ({"t/train.csv": "input,output\na,b\na,b,c\n"}, ("train.csv", "line 3")),
    "short csv line": ({"t/train.csv": "input,output\na,b\na\n"}, ("train.csv", "line 3")),
    "open quote": ({"t/train.csv": 'input,output\na,b\n"a,b\n'}, ("train.csv", "line 3")),
    "equal columns": ({"t/train.csv": "input,input\na,b\n"}, ("train.csv", "input")),
    "empty cell": ({"t/train.csv": "input,output\na,b\na,\n"}, ("row 2", "no output")),
    "not UTF-8": ({"t/train.csv": "input,output\né,b".encode("latin-1")}, ("train.csv",)),
    "half a surrogate pair": ({"t/train.json": '[{"input": "\\ud800", "output": "b"}]'},
                              ("train.json", "surrogate")),
    "broken parquet": ({"t/train.parquet": b"PAR1"}, ("train.parquet",)),
    "no object": ({"t/train.json": [{"input": "a", "output": "b"}, 3]}, ("train.json", "row 2")),
    "columns": ({"t/train.json": [{"content": "a", "tag": "b"}]},
                ("train.json", "'content'", "'tag'", "--input_column")),
    "no output": ({"t/train.json": [*PAIR, {"input": "a", "output": None}]}, ("row 3", "output")),
    "no outputs": ({"t/train.json": [*PAIR, {"input": "a", "output": []}]}, ("row 3", "output")),
    "nested": ({"t/train.json": [{"input": {"a": 1}, "output": "b"}]}, ("row 1", "input")),
    "no input": ({"t/train.json": [{"input": "", "output": "b"}]}, ("row 1",)),
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
    (["--tasks", "u"], "'u'"), (["--input_column", "text"], "'text'"),
    (["--output_column", "input"], "--input_column and --output_column"),
    (["--test_items", "0"], "'0'"),
    (["--metric", "f1"], "rouge_l"), (["--test", "5"], "--test"),
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
    assert "does not exist" in refused(tmp_path / "gone", tmp_path, capsys)
    (tmp_path / "made" / "suite").mkdir(parents=True)
    assert list(converted(source, tmp_path)) == ["t"]
