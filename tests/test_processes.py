"""Several processes: they give what one gives, hold the same, and end together."""

import os
import signal
import subprocess

import programs
import pytest
import safetensors.torch
import torch
from conftest import QUIET, SMALL, lines_of, results_of, succeed

import models
from registry import METHODS

TRAINED = [name for name, method in METHODS.items() if method.trains]
# Two tasks of twelve rows: the second of two steps is short in both epochs.
FLAGS = (*SMALL, "--setting", "sequential", "--tasks", "colour_name", "say_both", "--epochs", 2,
         "--learning_rate", "1e-2", "--max_new_tokens", 3, "--eval_batch_size", 2,
         "--dropout", "0")
NO_NOISE = {"badit": QUIET}


@pytest.fixture(scope="module")
def flags(llama, suite):
    return ("--model", llama, "--suite", suite, *FLAGS)


def assert_close(one, two, tolerance):
    """Equal groupings, and losses and adapters as close as `tolerance`."""
    losses = [[record["loss"] for record in lines_of(folder / "log.jsonl")]
              for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    mine, theirs = (safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
                    for folder in (one, two))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if not name.endswith("expert_of"):
            assert (tensor - theirs[name]).abs().max() <= tolerance, name
        else:
            assert tensor.equal(theirs[name]), name


def groupings_of(folder):
    """The final groupings, by layer."""
    state = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    return {key: tensor.tolist() for key, tensor in state.items() if key.endswith("expert_of")}


@pytest.mark.parametrize("method", TRAINED)
def test_two_processes_are_one(method, flags, forks, tmp_path, monkeypatch):
    """In float64, sequentially: every loss, the adapter, all groupings and all predictions."""
    argv = (*flags, *NO_NOISE.get(method, ()), "--method", method)
    real = models.load
    monkeypatch.setattr(models, "load", lambda name, dtype=None: real(name, torch.float64))
    succeed(*argv, "--output_dir", tmp_path / "one")
    answer = forks(*argv, "--output_dir", tmp_path / "two", out=tmp_path / "out", processes=2,
                   sabotage="double_precision")
    assert answer["statuses"] == [0, 0], answer["lines"][-20:]
    assert results_of(tmp_path / "two")["processes"] == 2
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)
    for path in (tmp_path / "one" / "predictions").iterdir():
        assert lines_of(path) == lines_of(tmp_path / "two" / "predictions" / path.name)


def test_two_processes_resume(flags, forks, tmp_path):
    """A signal to one stops both; resumed, they are the undisturbed two, with dropout."""
    argv = (*flags[:-2], "--regroup_every", 1, "--checkpoint_every", 1)
    whole = forks(*argv, "--output_dir", tmp_path / "whole", out=tmp_path / "a", processes=2)
    assert whole["statuses"] == [0, 0]
    stopped = forks(*argv, "--output_dir", tmp_path / "two", out=tmp_path / "b", processes=2,
                    signal=signal.SIGTERM, to=1, seen=f"{tmp_path}/two/checkpoints/000003")
    assert stopped["statuses"] == [128 + signal.SIGTERM] * 2, stopped["lines"][-5:]
    assert sum("stopped by" in line for line in stopped["lines"]) == 1
    resumed = forks(*argv, "--output_dir", tmp_path / "two", "--resume", out=tmp_path / "c",
                    processes=2)
    assert resumed["statuses"] == [0, 0] and any("resuming" in x for x in resumed["lines"])
    assert_close(tmp_path / "whole", tmp_path / "two", 0)
    for name in ("log.jsonl", "regroup.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert results_of(tmp_path / "two")["metrics"] == results_of(tmp_path / "whole")["metrics"]


def test_no_process_ends_before_the_checkpoint_is_written(flags, forks, tmp_path):
    """The launcher would kill the one that writes it."""
    argv = (*flags, "--epochs", 100, "--output_dir", tmp_path / "out")
    answer = forks(*argv, out=tmp_path / "a", processes=2, signal=signal.SIGTERM, to=1,
                   seen=f"{tmp_path}/out/log.jsonl", sabotage="slow_writing")
    assert answer["statuses"] == [128 + signal.SIGTERM] * 2, answer["lines"][-5:]
    sealed = (tmp_path / "out/checkpoints/000001/SHA256SUMS").stat().st_mtime_ns
    assert sealed < (tmp_path / "left-1").stat().st_mtime_ns


def test_another_number_of_processes_is_refused(flags, forks, tmp_path):
    argv = (*flags, "--checkpoint_every", 1, "--output_dir", tmp_path / "out")
    forks(*argv, out=tmp_path / "a", signal=signal.SIGKILL,
          seen=f"{tmp_path}/out/checkpoints/000003")
    answer = forks(*argv, "--resume", "--batch_size", 4, out=tmp_path / "b", processes=2)
    assert answer["statuses"] == [2, 2]
    reasons = [line for line in answer["lines"] if line.startswith("error: ")]
    assert len(reasons) == 1 and "processes (then 1, now 2)" in reasons[0], answer["lines"]


def test_a_run_does_not_outlive_its_launcher():
    """A killed launcher passes nothing on: the run gets a SIGTERM of its own."""
    launcher = subprocess.Popen(
        programs.words("launch", "end_with_launcher"), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"ACCELERATE_DYNAMO_BACKEND": "no"})
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    assert launcher.communicate(timeout=30)[1] == "asked to stop\n"


# Each breaks the second process alone.
BREAKS = {
    "nan_in_the_loss": (2, "training diverged"),
    "another_adapter": (2, "the processes hold different adapters"),
    "other_data": (2, "data or libraries: data of say_both, train rows of say_both"),
    "bad_input": (2, "mine alone"),
    "bug": (1, "ZeroDivisionError"),
}


@pytest.mark.parametrize("sabotage", BREAKS)
def test_a_failure_of_one_process_ends_all_with_one_message(sabotage, flags, forks, tmp_path):
    """Nothing hangs, and the reason stands there once."""
    status, message = BREAKS[sabotage]
    answer = forks(*flags, "--regroup_every", 1, "--output_dir", tmp_path / "out",
                   out=tmp_path / "a", processes=2, sabotage=sabotage)
    assert answer["statuses"][1] == status and answer["statuses"][0] != 0, answer["lines"][-60:]
    reasons = [line for line in answer["lines"] if line.startswith(("error: ", "Zero", "Runtime"))]
    assert len(reasons) == 1 and message in reasons[0], answer["lines"][-30:]
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_two_processes_are_one_on_a_real_model(smollm2, forks, tmp_path):
    """SmolLM2 in float32: 1e-5 for five steps, 1e-3 to the end; equal groupings."""
    argv = ("--model", smollm2, "--suite", "mini", "--max_train_per_task", 3, "--epochs", 1,
            "--eval_tasks", "none", "--max_length", 128, "--regroup_every", 3, *QUIET)
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / f"of-{processes}"
        answer = forks(*argv, "--output_dir", folder, out=tmp_path / f"out-{processes}",
                       processes=processes)
        assert answer["statuses"] == [0] * processes, answer["lines"][-5:]
        losses[processes] = [record["loss"] for record in lines_of(folder / "log.jsonl")]
    assert losses[1][:5] == pytest.approx(losses[2][:5], abs=1e-5)
    assert losses[1] == pytest.approx(losses[2], abs=1e-3) and len(losses[1]) == 6
    assert groupings_of(tmp_path / "of-1") == groupings_of(tmp_path / "of-2")
