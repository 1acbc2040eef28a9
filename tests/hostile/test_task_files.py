"""Malformed task files: one line that names the file and what is wrong in it."""

import pytest
from conftest import complaint, write_json
from suite_files import DEFINITION, item, write_task

import data
from inputs.task_files import LONGEST

GOOD = {"Definition": [DEFINITION],
        "Instances": [item(text, id="odd" if text == "e" else f"good-{text}") for text in "abcdef"]}
MISSING = "a key that is not there"


def changed(content, key, value):
    """Return a copy of an object with another value of a key, or without it."""
    content = content | {key: value}
    return {key: value for key, value in content.items() if value != MISSING}


@pytest.fixture(params=["train", "test"])
def file(request, tmp_path):
    """One of the two files of the only task of a suite."""
    write_task(tmp_path / "suite", "alpha")
    return tmp_path / "suite" / "alpha" / f"{request.param}.json"


def complaint_about(file):
    """Return the error about a file's suite, without the suite's folder."""
    message = complaint(data.load_suite, str(file.parents[1]))
    assert f"alpha/{file.name}" in message
    return message.replace(str(file.parents[1]), "")


@pytest.mark.parametrize("content", [
    b"", b" \n", b'{"Definition": ["x"], "Instances": [',
    b'{"Definition": ["x"], "Instances": [{"input": "a", "output": "b"},]}',
    b'{"Definition": ["\xff\xfe"], "Instances": [{"input": "a", "output": "b"}]}',
    b"[" * 100_000, b'{"Definition": "x", "Instances": [{"input": "a", "output": NaN}]}',
    b'{"Definition": "x", "Instances": [{"input": "a", "output": "b"}], "more": %s}' % b"9" * 5000,
], ids=["empty", "blank", "cut", "comma", "not UTF-8", "deep", "NaN", "digits"])
def test_no_json(file, content):
    file.write_bytes(content)
    complaint_about(file)


def test_no_file(file):
    file.unlink()
    complaint_about(file)
    file.mkdir()
    complaint_about(file)


@pytest.mark.parametrize("content", [
    [], "text", None, 5,
    *(changed(GOOD, "Instances", rows) for rows in (MISSING, [], {}, "text", None))])
def test_no_list_of_instances(file, content):
    write_json(file, content)
    message = complaint_about(file)
    assert "Definition" in message and "Instances" in message


@pytest.mark.parametrize("key", ["metric", "category"])
def test_a_key_in_small_letters(file, key):
    write_json(file, GOOD | {key: "accuracy"})
    assert f"the key '{key}' must be '{key.capitalize()}'" in complaint_about(file)


def test_keys_of_a_task_in_a_line(file):
    lines = file.with_suffix(".jsonl")
    lines.write_text('{"Definition": "D", "Metric": "accuracy", "input": "a", "output": "b"}\n')
    file.unlink()
    assert "Definition belongs in" in complaint_about(lines)


@pytest.mark.parametrize("value", [MISSING, 5, None, [5], ["a \ud800"]], ids=ascii)
def test_a_malformed_definition(file, value):
    """Missing, or not text."""
    for each in file.parent.iterdir():
        write_json(each, changed(GOOD, "Definition", value))
    assert "Definition" in complaint(data.load_suite, str(file.parents[1]))


@pytest.mark.parametrize("key, value", [
    *(("Metric", value) for value in ("bleu", "ROUGE_L", "", 5, None, ["accuracy"])),
    *(("Category", value) for value in (5, None, [], "x" * (10**5 + 1)))
], ids=lambda part: ascii(part)[:12])
def test_a_malformed_metric_or_category(tmp_path, key, value):
    message = complaint(data.load_suite, write_task(tmp_path / "s", "alpha", **{key: value}))
    assert "alpha/train.json" in message and key in message
    if key == "Metric" and isinstance(value, str):
        assert "rouge_l" in message and "accuracy" in message


@pytest.mark.parametrize("key", ["Definition", "Metric", "Category"])
def test_files_that_differ(file, key):
    """Both files of a task say the same of it."""
    write_json(file, GOOD | {key: "accuracy"})
    message = complaint(data.load_suite, str(file.parents[1]))
    assert "test.json" in message and key in message


@pytest.mark.parametrize("key, value", [
    *(("input", value) for value in (MISSING, None, 5, ["a"], "a \udc00 b")),
    *(("output", value) for value in (MISSING, None, 5, {"text": "x"}, [], ["x", 5], ["x", None],
                                      [["x"]], "\ud83d", ["x", "\ud83d"])),
], ids=ascii)
def test_a_bad_instance_among_good_ones(file, key, value):
    """The message has its file, its index, its id, and what is wrong."""
    rows = list(GOOD["Instances"])
    rows[4] = changed(rows[4], key, value)
    write_json(file, GOOD | {"Instances": rows})
    message = complaint_about(file)
    assert "instance 4 (id 'odd')" in message and key in message


@pytest.mark.parametrize("row", ["text", None, 5, ["a", "b"], item("a", id=5.5),
                                 item("a", id="good-b")], ids=str)
def test_a_bad_instance_without_an_id(file, row):
    """Not an object, with a malformed id, or with the id of another; named by its index."""
    write_json(file, GOOD | {"Instances": [*GOOD["Instances"][:3], row]})
    message = complaint_about(file)
    assert "instance 3" in message
    assert row != item("a", id="good-b") or "'good-b'" in message and "same id" in message


@pytest.mark.parametrize("end, more, key", [("}]}", ', "input": "other"}]}', "input"),
                                            ("}", ', "Instances": []}', "Instances")])
def test_repeated_keys(file, end, more, key):
    """A key with two values is refused, where Python's reader would drop one."""
    file.write_text(file.read_text().removesuffix(end) + more)
    assert f"the key {key!r} twice" in complaint_about(file)


@pytest.mark.parametrize("key, longest", LONGEST.items())
def test_endless_texts(tmp_path, key, longest):
    """A text that would take minutes to encode; the limit is named, and itself allowed."""
    for more in (0, 1):
        text = "x" * (longest + more)
        if key == "Definition":
            write_task(tmp_path / "s", "alpha", Definition=text)
        else:
            write_task(tmp_path / "s", "alpha", [item(id="odd") | {key: text}])
        if not more:
            data.load_suite(str(tmp_path / "s"))
    assert f"the limit is {longest:,}" in complaint(data.load_suite, str(tmp_path / "s"))


@pytest.mark.parametrize("name", ["t" * 201, "a b", "é", "a\n"])
def test_a_task_name_that_files_of_a_run_cannot_have(tmp_path, name):
    """Too long, or with other characters."""
    data.load_suite(str(write_task(tmp_path / "s", "t" * 200)))
    assert repr(name) in complaint(data.load_suite, str(write_task(tmp_path / "s", name)))


def test_no_suite(tmp_path):
    """A name that is neither a shipped suite nor a folder with tasks."""
    (tmp_path / "hollow").mkdir()
    (tmp_path / "file").write_text("{}")
    for name in ("nowhere", "hollow", "file", "maxi", ""):
        assert name in complaint(data.load_suite, name)
    assert "download" in complaint(data.load_suite, "superni")
