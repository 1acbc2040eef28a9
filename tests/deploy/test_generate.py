"""generate.py: the tokens of an evaluation, for one prompt, a file of prompts, a chat."""

import builtins
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import SMALL, Killed, failing, lines_of, make_tokenizer, succeed

import data
import generate
from deploy import answers
from inputs.errors import InputError

MORE = ("--max_new_tokens", 5)


@pytest.fixture(scope="module")
def runs(wide, suite, tmp_path_factory):
    """The folder runs/ with finished runs of three methods, gainlora's the oldest."""
    root = tmp_path_factory.mktemp("home")
    for method, *more in (("gainlora", "--setting", "sequential"), ("lora", "--base", "int8"),
                          ("badit",)):
        succeed("--model", wide, "--suite", suite, "--method", method, *SMALL, "--epochs", 2,
                "--learning_rate", 0.02, *more, "--output_dir", root / "runs" / method)
    os.utime(root / "runs" / "badit" / "results.json", (2**32, 2**32))
    return root / "runs"


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(capsys, *argv):
    """Call generate.main -> (status, what it prints, lines of stderr without progress bars)."""
    status = generate.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if "%|" not in line]


def rejected(capsys, named, *argv):
    """Refused in one line, with nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    status, out, err = call(capsys, *argv)
    assert (status, out) == (2, "") and sorted(Path.cwd().rglob("*")) == before
    assert err[-1].startswith("error: ") and named in err[-1], err
    assert not any("Traceback" in line for line in err)


def questions_of(run):
    """The last test rows of a run as lines for --prompts, and its predictions."""
    *_, last = sorted((run / "predictions").iterdir())
    rows = lines_of(last)
    parts = [row["prompt"].removesuffix("\nOutput: ").split(
        "\n\nNow complete the following example -\nInput: ") for row in rows]
    return ([{"prompt": text, "definition": definition, "id": row["id"]}
             for (definition, text), row in zip(parts, rows, strict=True)],
            [row["prediction"] for row in rows])


def write_lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n"
                            for row in rows), encoding="utf-8")


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["badit", "lora", "gainlora"])
def test_answers_are_those_of_the_evaluation(runs, capsys, method):
    """In batches and alone, on a quantised base (lora), and the base's are the bare model's."""
    rows, predictions = questions_of(runs / method)
    write_lines(Path("in.jsonl"), ["", *rows])  # blank lines are skipped
    adapter = runs / method / "adapter"
    status, out, _ = call(capsys, "--adapter", adapter, "--prompts", "in.jsonl", "--out",
                          "out.jsonl", "--batch_size", 4, "--compare_base", *MORE)
    assert status == 0 and out == f"{len(rows)} answers in out.jsonl\n"
    got = lines_of(Path("out.jsonl"))
    assert [(row["asked"], row["answer"]) for row in got] == list(
        zip(rows, predictions, strict=True))
    assert [row["base"] for row in got] != predictions
    words = ("--adapter", adapter, rows[0]["prompt"], "--definition", rows[0]["definition"], *MORE)
    _, out, _ = call(capsys, *words)
    assert out.rstrip() == predictions[0]  # no white space before it
    _, out, _ = call(capsys, *words, "--compare_base")
    assert out.split("\n") == ["base:", got[0]["base"], "adapter:", predictions[0], ""]


def test_the_newest_run_is_found_and_named(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    status, _, err = call(capsys, "red cat", *MORE)
    assert status == 0 and "adapter: runs/badit/adapter, of the newest finished run" in err


def test_the_newest_run_may_have_an_adapter_for_each_task(runs, tmp_path, capsys, monkeypatch):
    for task in ("a", "b"):
        shutil.copytree(runs / "badit" / "adapter", tmp_path / "runs" / "x" / "adapter" / task)
    (tmp_path / "runs" / "x" / "results.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    rejected(capsys, "name one with --adapter: runs/x/adapter/a, runs/x/adapter/b", "red cat")


@pytest.mark.parametrize("name, named", [
    (None, "give --model"),
    ("moved", "names its base model 'moved', a folder that is missing: give --model")])
def test_a_base_that_is_not_found_is_asked_for(runs, capsys, wide, name, named):
    shutil.copytree(runs / "badit" / "adapter", "old")
    file = Path("old/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": name}))
    rejected(capsys, named, "cat", "--adapter", "old")
    assert call(capsys, "cat", "--adapter", "old", "--model", wide, *MORE)[0] == 0


def test_sampling_follows_its_seed(runs, capsys):
    def draw(*more):
        return call(capsys, "the sky", "--adapter", runs / "badit" / "adapter",
                    "--max_new_tokens", 20, *more)[1]

    hot = ("--temperature", 5)
    assert draw(*hot) == draw(*hot, "--seed", 1) != draw(*hot, "--seed", 2)
    assert draw("--temperature", 1e-6) == draw() == draw(*hot, "--top_p", 1e-9)


# --- a chat -------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, runs, *lines, terminal=True):
    """Chat, where each of `lines` is typed or raised -> (status, lines, lines of stderr)."""
    typed = iter(lines)

    def type_next(_):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(builtins, "input", type_next)
    status, out, err = call(capsys, "--chat", "--adapter", runs / "badit" / "adapter", *MORE)
    return status, out.splitlines(), err


def test_a_chat(monkeypatch, capsys, runs):
    """Later turns see the earlier ones until /reset; a refused prompt changes nothing."""
    real, seen = answers.evaluation.generate, []

    def spy(model, tokenizer, batch, *more, **options):
        seen.append(batch["input_ids"][0].tolist())
        return real(model, tokenizer, batch, *more, **options)

    monkeypatch.setattr(answers.evaluation, "generate", spy)
    status, out, _ = talk(monkeypatch, capsys, runs, "red cat", "", "red cat", "w1 " * 300,
                          "\udcff", "/reset", "red cat", "/quit")
    assert status == 0 and out[0] == "/reset forgets the chat so far, /quit ends"
    first, _, long, odd, again = out[1:]
    assert first == again and "256 positions; /reset forgets" in long and "not UTF-8" in odd
    both = [data.build_prompt("", "red cat"), first, data.build_prompt("", "red cat")]
    text, ids = data.Framer(make_tokenizer()).turns(both)
    assert text == f"{both[0]}{first}\n\n{both[2]}"
    assert seen[1] == ids and seen[0] == seen[2]


def test_the_ends_of_a_chat(monkeypatch, capsys, runs):
    status, _, err = talk(monkeypatch, capsys, runs, terminal=False)
    assert status == 2 and "--chat needs a terminal" in err[-1]
    assert talk(monkeypatch, capsys, runs, EOFError())[0] == 0
    status, _, err = talk(monkeypatch, capsys, runs, KeyboardInterrupt())
    assert status == 130 and err[-1] == "stopped"


def test_turns_in_a_chat_template():
    """A dialogue is formatted by the roles of its turns."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }} : {{ m.content }} . "
                               "{% endfor %}answer")
    assert data.Framer(tokenizer, True).turns(["a", "b", "c"])[0] == (
        "user : a . assistant : b . user : c . answer")
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(InputError, match="template fails"):
        data.Framer(tokenizer, True).turns(["a"])


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["{", "5", '{"text": "a"}', '{"prompt": ""}',
                                  json.dumps({"prompt": "w1 " * 300}),
                                  '{"prompt": "dog", "definition": 5}'])
def test_a_broken_line_is_named(runs, capsys, line):
    """Before anything is answered."""
    write_lines(Path("in.jsonl"), [{"prompt": "cat"}, "", line])
    rejected(capsys, "in.jsonl, line 3", "--adapter", runs / "badit" / "adapter", "--prompts",
             "in.jsonl", "--out", "out.jsonl")


def test_a_file_without_prompts(runs, capsys):
    write_lines(Path("in.jsonl"), [""])
    rejected(capsys, "in.jsonl holds no prompts", "--adapter", runs / "badit" / "adapter",
             "--prompts", "in.jsonl", "--out", "out.jsonl")


def test_a_stopped_call_writes_nothing(runs, capsys):
    write_lines(Path("in.jsonl"), [{"prompt": "cat"}] * 3)
    words = ("--adapter", runs / "badit" / "adapter", "--prompts", "in.jsonl", "--out",
             "out.jsonl", "--batch_size", 1)
    with failing(answers.evaluation, "generate", 2, Killed), pytest.raises(Killed):
        call(capsys, *words)
    assert os.listdir() == ["in.jsonl"]


@pytest.mark.parametrize("words, named", [
    ((), "give one of"), (("a", "--chat"), "give one of"), (("",), "the prompt is empty"),
    ((" \n",), "the prompt is empty"), (("--prompts", "a"), "--out"),
    (("a", "--out", "b"), "--out"), (("--prompts", "a", "--out", "."), "exists"),
    (("--chat", "--compare_base"), "--compare_base"), (("a", "--top_p", "0.5"), "--temperature"),
    (("a", "--seed", "3"), "--temperature"), (("a", "--temperature", "0"), "above 0"),
    (("a", "--adapter", "nowhere"), "no adapter at nowhere"), (("a", "b"), "unrecognized"),
    (("--prompts", "nothing.jsonl", "--out", "out"), "nothing.jsonl"),
    (("--prompts", "nothing.jsonl", "--out", "no/out"), "there is no folder"),
    (("w1 " * 300,), "exceeds the model's 256 positions"),
    (("a", "--model", "nowhere"), "nowhere"), (("h\udcff",), "not UTF-8"),
    (("hot", "--definition", "\udcff"), "not UTF-8"),
], ids=lambda part: ascii(" ".join(part)[:20]) if isinstance(part, tuple) else None)
def test_bad_input_is_one_line(runs, capsys, words, named):
    adapter = () if "--adapter" in words else ("--adapter", runs / "badit" / "adapter")
    rejected(capsys, named, *words, *adapter)


def test_another_adapter_or_base(runs, capsys, checkpoints):
    rejected(capsys, f"there is one at {runs / 'badit' / 'adapter'}", "a", "--adapter",
             runs / "badit")
    rejected(capsys, "no finished run in runs/", "a")
    rejected(capsys, "another base model", "a", "--adapter", runs / "badit" / "adapter", "--model",
             checkpoints["qwen3"])
