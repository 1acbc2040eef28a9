"""The README's claims: its table, its commands and its example method are run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import study
from conftest import succeed

import data
from harness.arguments import parse_flags
from registry import METHODS, Entry, Targets

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = README + "".join(file.read_text(encoding="utf-8")
                         for file in sorted((ROOT / "docs").glob("*.md")))
# Folders that may be deleted, with the programs that go with them.
WINGS = {"deploy": {"generate.py", "export.py"}, "analysis": {"analyze.py"}}


def section(title):
    """The text under one heading."""
    return re.split(rf"\n##+ {title}\n", README)[1].split("\n## ")[0]


def table_rows():
    """(paper, functions, tests) of the equation table."""
    for line in section("From equation to code to test").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and "`" in cells[1]:
            yield cells[0], re.findall(r"`([\w.]+)`", cells[1]), re.findall(r"`([\w.]+)`", cells[2])


@pytest.mark.parametrize(("paper", "functions", "tests"), list(table_rows()))
def test_equation_table(paper, functions, tests):
    """Every function named exists, one of them cites its equation, every test file is there."""
    documented = []
    for dotted in functions:
        parts = dotted.split(".")
        depth = 2 if parts[0] == "baselines" else 1
        found = importlib.import_module(".".join(parts[:depth]))
        for name in parts[depth:]:
            found = getattr(found, name)
        documented.append(found.__doc__)
    number = re.match(r"Eq\. (\d+)", paper)
    if number:
        assert any(f"({number[1]})" in text or f"({number[1]})," in text for text in documented)
    assert all(documented) and tests
    for file in tests:
        assert (ROOT / "tests" / file).is_file()


def test_tree():
    """The tree names every Python file of the top folder, and folders that exist."""
    named = set(re.findall(r"`(\w+(?:\.py|/))`", section("The tree")))
    deleted = {name for wing in WINGS if not (ROOT / wing).is_dir()
               for name in (f"{wing}/", *WINGS[wing])}
    wings = set().union(*WINGS.values())
    assert {file.name for file in ROOT.glob("*.py")} - wings == {
        name for name in named - deleted if name.endswith(".py")}
    for name in named - deleted:
        assert (ROOT / name).exists(), name


def commands_of(program):
    """The flags of every command of a program in a code block."""
    for block in re.findall(r"```bash\n(.*?)```", TEXTS, flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if program in words:
                yield words[words.index(program) + 1:]


def test_study_commands_parse():
    """The README's sweeps are accepted, in code blocks and in the text."""
    text = " ".join(TEXTS.split())
    commands = [shlex.split(words) for words in re.findall(r"`(--m[^`]*seq[^`]*)`", text)]
    commands += [shlex.split(line, comments=True)[2:] for line in TEXTS.splitlines()
                 if line.startswith("bash scripts/sweep.sh")]
    assert commands
    for words in commands:
        args, _ = study.parse(words)
        assert study.plan(args, [])


@pytest.mark.parametrize("flags", [c for c in commands_of("train.py") if c and "--help" not in c
                                   and "--adapter" not in c], ids=" ".join)
def test_commands_parse(flags):
    """The README's training commands are accepted."""
    args, typed = parse_flags(flags)
    assert args.method in METHODS and typed


def test_example_task_loads(tmp_path):
    """The file under "Your own data" is a whole one, and needs no more."""
    text = re.search(r"```json\n(.*?)```", section("Your own data"), flags=re.DOTALL)[1]
    for split in ("train", "test"):
        file = tmp_path / "suite" / "reviews" / f"{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (task,) = data.load_suite(tmp_path / "suite").tasks.values()
    assert task.metric == "accuracy" and task.test[1]["outputs"] == ["bad", "poor"]


def test_example_method_trains(llama, suite, tmp_path, monkeypatch):
    """The example of CONTRIBUTING.md trains, saves and loads through train.py."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# baselines/scale.py.*?)```", text, flags=re.DOTALL)[1]
    (tmp_path / "scale_example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "scale", Entry("scale_example:Scale", Targets))
    common = ["--model", llama, "--suite", suite, "--max_length", 128, "--max_new_tokens", 4]
    succeed("--method", "scale", "--epochs", 1, "--learning_rate", 0.5, "--eval_before",
            "--output_dir", tmp_path / "run", *common)
    succeed("--eval_only", "--adapter", tmp_path / "run" / "adapter", "--output_dir",
            tmp_path / "eval", *common)
    before, after = sorted((tmp_path / "run" / "predictions").iterdir())
    (loaded,) = (tmp_path / "eval" / "predictions").iterdir()
    assert after.read_bytes() == loaded.read_bytes() != before.read_bytes()
