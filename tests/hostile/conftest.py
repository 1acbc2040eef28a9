"""What tests of hostile input share: an empty folder to run in, a finished run, and a refusal."""

import re
from pathlib import Path

import pytest
from conftest import run, snapshot

import models
from inputs.task_files import LAYOUT

# tqdm's bars may come before the one line.
BAR = re.compile(r"\d+%\||\dit/s|\?(it|item|step)/s")


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Runs start in an empty folder and see no data folder of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BADIT_DATA", raising=False)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture(scope="session")
def finished(trained_run):
    """The folder of a finished run."""
    return trained_run("--epochs", 1, "--max_train_per_task", 2, "--eval_tasks", "none")


def the_line(err):
    """The one line of a refusal, which a terminal shows as it is; above it nothing but bars.

    Below it a task's layout may stand.
    """
    lines = [line for line in err if line.strip() and not BAR.search(line)]
    if tuple(lines[1:]) == LAYOUT:
        lines, err = lines[:1], err[:-len(LAYOUT)]
    assert len(lines) == 1, lines
    (line,) = lines
    assert line == err[-1] and re.match(r"(\[rank 0\] )?error: ", line) and len(line) > 20
    assert line.isprintable(), ascii(line)
    return line


def rejected(*argv, named=()):
    """Call train.main, which must say why not in one line and change nothing -> that line."""
    before = snapshot(Path.cwd())
    outcome = run(*argv)
    assert outcome.status == 2
    line = the_line(outcome.err)
    for word in [named] if isinstance(named, str) else named:
        assert word in line
    assert snapshot(Path.cwd()) == before
    return line
