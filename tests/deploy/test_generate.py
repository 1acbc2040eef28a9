"""generate.py: the tokens of an evaluation, to one prompt, to a file of them, in a dialogue."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
from conftest import SMALL, Killed, failing, lines_of, make_tokenizer, succeed, write_json

import data
import generate
from deploy import answers
from inputs.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MORE = ("--max_new_tokens", 5)


@pytest.fixture(scope="module")
def runs(llama, suite, tmp_path_factory):
    """The folder runs/ with a finished run of two methods; the names of a second one are stale."""
    root = tmp_path_factory.mktemp("home")
    for method in ("gainlora", "badit"):
        more = ("--setting", "sequential") if method == "gainlora" else ()
        succeed("--model", llama, "--suite", suite, "--method", method, *SMALL, "--epochs", 2,
                "--learning_rate", 0.02, *more, "--output_dir", root / "runs" / method)
    os.utime(root / "runs" / "gainlora" / "results.json", (1, 1))
    return root / "runs"


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(capsys, *argv):
    """generate.main -> (status, what it prints, its lines to stderr without bars)."""
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
    """Lines for --prompts of what a run was tested on last, and what it predicted."""
    *_, last = sorted((run / "predictions").iterdir())
    rows = lines_of(last)
    frame = [row["prompt"].removesuffix("\nOutput: ").split(
        "\n\nNow complete the following example -\nInput: ") for row in rows]
    return ([{"prompt": text, "definition": definition, "id": row["id"]}
             for (definition, text), row in zip(frame, rows, strict=True)],
            [row["prediction"] for row in rows])


def write_lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n"
                            for row in rows), encoding="utf-8")
    return path


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["badit", "gainlora"])
def test_answers_are_those_of_the_evaluation(runs, capsys, method):
    """In batches of other prompts, and one alone; the base's are those of the bare model."""
    rows, predictions = questions_of(runs / method)
    write_lines(Path("in.jsonl"), rows)
    adapter = runs / method / "adapter"
    status, out, _ = call(capsys, "--adapter", adapter, "--prompts", "in.jsonl", "--out",
                          "out.jsonl", "--batch_size", 4, "--base", *MORE)
    assert status == 0 and out == f"{len(rows)} answers in out.jsonl\n"
    got = lines_of(Path("out.jsonl"))
    assert [row["answer"] for row in got] == predictions
    assert [row["asked"] for row in got] == rows
    assert [row["line"] for row in got] == list(range(1, len(rows) + 1))
    base = [row["base"] for row in got]
    assert base != predictions and sorted(map(str, Path.cwd().iterdir())) == [
        str(Path.cwd() / name) for name in ("in.jsonl", "out.jsonl")]
    for number in (0, len(rows) - 1):
        words = (rows[number]["prompt"], "--definition", rows[number]["definition"], *MORE)
        _, out, _ = call(capsys, "--adapter", adapter, *words)
        assert out.rstrip() == predictions[number]  # nothing before it
        _, out, _ = call(capsys, "--adapter", adapter, "--base", *words)
        _, first, second = out.replace("adapter:\n", "base:\n").split("base:\n")
        assert (first.strip(), second.strip()) == (base[number], predictions[number])


def test_the_newest_run_is_found_and_named(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    status, _, err = call(capsys, "red cat", *MORE)
    assert status == 0 and "adapter: runs/badit/adapter (of the newest finished run)" in err


def test_an_adapter_that_names_no_model(runs, capsys, llama):
    """Of an earlier format: --model says which."""
    shutil.copytree(runs / "badit" / "adapter", "old")
    file = Path("old/adapter_config.json")
    content = json.loads(file.read_text())
    write_json(file, content | {"model": None})
    rejected(capsys, "give --model", "cat", "--adapter", "old")
    assert call(capsys, "cat", "--adapter", "old", "--model", llama, *MORE)[0] == 0


def test_sampling_follows_its_seed(runs, capsys):
    def draw(*more):
        return call(capsys, "the sky", "--adapter", runs / "badit" / "adapter",
                    "--max_new_tokens", 20, *more)[1]

    hot = ("--temperature", 5)
    assert draw(*hot) == draw(*hot, "--seed", 1) != draw(*hot, "--seed", 2)
    assert draw("--temperature", 1e-6) == draw() == draw(*hot, "--top_p", 1e-9)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--temperature", 3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_a_stopped_call_goes_on(runs, capsys, error, more):
    """What was answered is kept, also where a kill cut a line, and the end is the same."""
    write_lines(Path("in.jsonl"), questions_of(runs / "badit")[0])
    words = ("--adapter", runs / "badit" / "adapter", "--prompts", "in.jsonl", "--batch_size", 4,
             "--base", *MORE, *more)
    assert call(capsys, *words, "--out", "whole.jsonl")[0] == 0
    with failing(answers.evaluation, "generate", 6, error):
        if error is Killed:
            with pytest.raises(Killed):
                call(capsys, *words, "--out", "out.jsonl")
        else:
            status, _, err = call(capsys, *words, "--out", "out.jsonl")
            assert status == 130 and err[-1] == ("stopped: 19 of 30 answers are kept in "
                                                 "out.jsonl.partial; the same command goes on")
    assert not Path("out.jsonl").exists()
    with open("out.jsonl.partial", "a", encoding="utf-8") as file:
        file.write('[["answer", 1')
    rejected(capsys, "another --definition", *words, "--out", "out.jsonl", "--definition", "x")
    with failing(answers.evaluation, "generate", 4, Killed):  # three batches are left
        assert call(capsys, *words, "--out", "out.jsonl")[0] == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not Path("out.jsonl.partial").exists()


def test_broken_lines_are_numbered(runs, capsys):
    """The others are answered, and the status says that some were not."""
    write_lines(Path("in.jsonl"), [{"prompt": "cat"}, "{", {"prompt": " "}, {"text": "a"}, "5",
                                   {"prompt": "w1 " * 300}, {"prompt": "dog", "definition": 5},
                                   {"prompt": "dog", "mine": [1]}])
    status, out, err = call(capsys, "--adapter", runs / "badit" / "adapter", "--prompts",
                            "in.jsonl", "--out", "out.jsonl", *MORE)
    assert status == 2 and out == "2 answers in out.jsonl; 6 lines of in.jsonl have none\n"
    named = [line for line in err if line.startswith("left out: in.jsonl, line ")]
    assert [int(line.split("line ")[1].split()[0].strip(":")) for line in named] == [2, 3, 4, 5, 6,
                                                                                     7]
    assert [row["line"] for row in lines_of(Path("out.jsonl"))] == [1, 8]


def test_two_calls_do_not_write_one_file(runs, capsys):
    write_lines(Path("in.jsonl"), [{"prompt": "cat"}])
    with filelock.FileLock("out.jsonl.partial.lock"):
        status, _, err = call(capsys, "--adapter", runs / "badit" / "adapter", "--prompts",
                              "in.jsonl", "--out", "out.jsonl")
    assert status == 2 and "another process" in err[-1]


@pytest.mark.parametrize("content", ["5\n", "[]\n", '{"--base": true}\n[["a", "b", "c"]]\n', "{\n"])
def test_a_damaged_partial_file_is_refused(runs, capsys, content):
    write_lines(Path("in.jsonl"), [{"prompt": "cat"}])
    Path("out.jsonl.partial").write_text(content)
    rejected(capsys, "out.jsonl.partial", "--adapter", runs / "badit" / "adapter", "--prompts",
             "in.jsonl", "--out", "out.jsonl")


# --- a dialogue ---------------------------------------------------------------------------------


def talk(monkeypatch, capsys, runs, *lines, terminal=True):
    """What a dialogue prints -> (status, out)."""
    said = iter(lines)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(builtins, "input", lambda _: next(said))
    status, out, err = call(capsys, "--chat", "--adapter", runs / "badit" / "adapter", *MORE)
    return status, out.splitlines(), err


def test_a_dialogue(monkeypatch, capsys, runs):
    """Later turns see the earlier ones until /reset; one that is too long loses nothing."""
    real, seen = answers.evaluation.generate, []

    def generate(model, tokenizer, batch, *more, **options):
        seen.append(batch["input_ids"][0].tolist())
        return real(model, tokenizer, batch, *more, **options)

    monkeypatch.setattr(answers.evaluation, "generate", generate)
    status, out, _ = talk(monkeypatch, capsys, runs, "red cat", "", "red cat", "w1 " * 300,
                          "/reset", "red cat", "/quit")
    assert status == 0 and out[0] == "/reset begins anew, /quit ends"
    first, _, long, again = out[1:]
    assert first == again and "positions; /reset begins anew" in long
    both = [data.build_prompt("", "red cat"), first, data.build_prompt("", "red cat")]
    text, ids = data.Framer(make_tokenizer()).turns(both)
    assert text == f"{both[0]}{first}\n\n{both[2]}"
    assert seen[1] == ids and seen[0] == seen[2]


def test_a_dialogue_needs_a_terminal(monkeypatch, capsys, runs):
    status, _, err = talk(monkeypatch, capsys, runs, terminal=False)
    assert status == 2 and "--chat needs a terminal" in err[-1]


def test_the_end_of_the_input_and_ctrl_c_end_a_dialogue(monkeypatch, capsys, runs):
    for error, wanted in ((EOFError, 0), (KeyboardInterrupt, 130)):
        def stop(_, error=error):
            raise error

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(builtins, "input", stop)
        status, _, err = call(capsys, "--chat", "--adapter", runs / "badit" / "adapter")
        assert status == wanted and (error is EOFError or err[-1] == "stopped")


def test_turns_in_a_chat_template():
    """A single prompt is framed as in training, a dialogue by the roles of its turns."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }} : {{ m.content }} . "
                               "{% endfor %}answer")
    assert data.Framer(tokenizer, True).turns(["a", "b", "c"])[0] == (
        "user : a . assistant : b . user : c . answer")
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(InputError, match="template fails"):
        data.Framer(tokenizer, True).turns(["a"])


# --- bad input ----------------------------------------------------------------------------------


def test_words_that_are_no_text(monkeypatch, capsys, runs):
    """Refused in one line; in a dialogue the next one is asked for."""
    rejected(capsys, "not UTF-8", "h\udcff", "--adapter", runs / "badit" / "adapter")
    rejected(capsys, "not UTF-8", "hot", "--definition", "\udcff", "--adapter",
             runs / "badit" / "adapter")
    status, out, _ = talk(monkeypatch, capsys, runs, "\udcff", "red cat", "/quit")
    assert status == 0 and "not UTF-8" in out[1] and out[2]


def test_a_base_that_has_moved_is_asked_for(capsys, runs, tmp_path):
    """By its name in the adapter, which a user need not know."""
    shutil.copytree(runs / "badit" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "moved"}))
    rejected(capsys, "names its base model 'moved', a folder that is not here: give --model",
             "red cat", "--adapter", "adapter")


@pytest.mark.parametrize("words, named", [
    ((), "give a prompt"), (("a", "--chat"), "one of them"), (("",), "the prompt is empty"),
    ((" \n",), "the prompt is empty"), (("--prompts", "a"), "--out"),
    (("a", "--out", "b"), "--out"),
    (("--chat", "--base"), "--base"), (("a", "--top_p", "0.5"), "--temperature"),
    (("a", "--seed", "3"), "--temperature"), (("a", "--temperature", "0"), "above 0"),
    (("a", "--adapter", "nowhere"), "no adapter at nowhere"), (("a", "b"), "unrecognized"),
    (("--prompts", "nothing.jsonl", "--out", "out"), "nothing.jsonl"),
    (("--prompts", "nothing.jsonl", "--out", "no/out"), "there is no folder"),
    (("w1 " * 300,), "more than the model's 256 positions"),
    (("a", "--model", "nowhere"), "nowhere"),
], ids=lambda part: " ".join(part)[:20] if isinstance(part, tuple) else None)
def test_bad_input_is_one_line(runs, capsys, words, named):
    adapter = () if "--adapter" in words else ("--adapter", runs / "badit" / "adapter")
    rejected(capsys, named, *words, *adapter)


def test_other_bad_input(runs, capsys, checkpoints):
    rejected(capsys, f"there is one at {runs / 'badit' / 'adapter'}", "a", "--adapter",
             runs / "badit")
    rejected(capsys, "no finished run in runs/", "a")
    rejected(capsys, "another base model", "a", "--adapter", runs / "badit" / "adapter", "--model",
             checkpoints["qwen3"])
    Path("out").touch()
    rejected(capsys, "there already", "--prompts", "in", "--out", "out", "--adapter", "nowhere")


@pytest.mark.parametrize("program", ["generate.py"])
def test_help_and_wrong_flags_wait_for_no_library(program):
    for words, status in ((["--help"], 0), (["--wrong"], 2)):
        done = subprocess.run([sys.executable, "-X", "importtime", ROOT / program, *words],
                              capture_output=True, text=True)
        assert done.returncode == status
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "accelerate", "numpy", "safetensors"}


def test_blank_lines_are_no_prompts(capsys, runs):
    Path("q.jsonl").write_text('\n{"prompt": "red cat"}\n\n')
    status, _, _ = call(capsys, "--prompts", "q.jsonl", "--out", "o.jsonl", "--adapter",
                        runs / "badit" / "adapter", "--max_new_tokens", 3)
    assert status == 0 and [line["line"] for line in lines_of(Path("o.jsonl"))] == [2]
