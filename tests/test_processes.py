"""Several processes: their result equals that of one, they hold the same, and end together."""

import signal

import pytest
import torch
from conftest import (
    QUIET,
    SMALL,
    TRAINED,
    assert_close_runs,
    files_of,
    groupings_of,
    losses_of,
    results_of,
    succeed,
)

import models
from harness.processes import launcher

STARTS = ("pissa", "olora_qr")  # LoRA with another start; BADIT also decomposes in two processes
# Two tasks of twelve rows: the second of two steps is short in both epochs.
FLAGS = (*SMALL, "--setting", "sequential", "--tasks", "colour_name", "say_both", "--epochs", 2,
         "--learning_rate", "1e-2", "--max_new_tokens", 3, "--eval_batch_size", 2)


@pytest.fixture
def flags(tiny, tmp_path):
    """The flags of a run, its folder last."""
    return (*tiny, *FLAGS, "--output_dir", tmp_path / "out")


@pytest.fixture
def two(forks, tmp_path):
    """Call train.main in two processes -> the answer of Forks."""
    return lambda *argv, **order: forks(*argv, out=tmp_path / "printed", processes=2, **order)


@pytest.mark.parametrize("method", [*(name for name in TRAINED if name not in STARTS),
                                    "badit --routing energy", "badit --protect 0.9"])
def test_two_processes_are_one(method, flags, two, tmp_path, monkeypatch):
    """In float64, sequentially: every loss, the adapter, all groupings and all predictions."""
    noise = QUIET if method in ("badit", "badit --protect 0.9") else QUIET[:2]
    argv = (*flags[:-1], tmp_path / "one", *noise, "--method", *method.split())
    real = models.load
    monkeypatch.setattr(models, "load", lambda name, dtype=None, **more: real(
        name, torch.float64, **more))
    succeed(*argv)
    answer = two(*argv, "--output_dir", tmp_path / "two", sabotage="double_precision")
    assert answer["statuses"] == [0, 0], answer["lines"][-20:]
    assert results_of(tmp_path / "two")["processes"] == 2
    assert_close_runs(tmp_path / "one", tmp_path / "two", weights=1e-5)
    assert files_of(tmp_path / "one/predictions") == files_of(tmp_path / "two/predictions")


@pytest.mark.parametrize("variables, words", [
    ({"WORLD_SIZE": "1"}, "OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true python"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "OMP_NUM_THREADS=1 accelerate launch --cpu "
     "--num_processes 1 --mixed_precision bf16 --dynamo_backend no"),
    ({"WORLD_SIZE": "2"}, "OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
     "--num_processes 2 --mixed_precision no --dynamo_backend no"),
    ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "(on each machine, its launcher as before)"),
    ({"ACCELERATE_USE_CPU": "false"}, "OMP_NUM_THREADS=1 python")], ids=str)
def test_the_words_that_start_a_run_again(variables, words, monkeypatch):
    """accelerate launch takes the device of one process from --cpu, of several from the variable.
    """
    for name, value in ({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables).items():
        monkeypatch.setenv(name, value)
    assert launcher() == words


def test_two_processes_resume(flags, two, tmp_path):
    """A signal to one stops both; resumed, they are the undisturbed two, with dropout."""
    argv = (*flags, "--regroup_every", 1, "--checkpoint_every", 1)
    whole = two(*argv, "--output_dir", tmp_path / "whole")
    assert whole["statuses"] == [0, 0]
    stopped = two(*argv, signal=signal.SIGTERM, to=1, seen=f"{tmp_path}/out/checkpoints/000003")
    assert stopped["statuses"] == [128 + signal.SIGTERM] * 2, stopped["lines"][-5:]
    assert "main returned" not in stopped["lines"]
    assert all(sum(f"[rank {rank}] stopped by" in line for line in stopped["lines"]) == 1
               for rank in (0, 1))
    resumed = two(*argv, "--resume")
    assert resumed["statuses"] == [0, 0] and any("resuming" in line for line in resumed["lines"])
    mine, theirs = (files_of(tmp_path / name) for name in ("out", "whole"))
    for files in (mine, theirs):
        del files["results.json"]
    assert mine == theirs
    assert results_of(tmp_path / "out")["metrics"] == results_of(tmp_path / "whole")["metrics"]


def test_no_process_ends_before_the_checkpoint_is_written(flags, two, tmp_path):
    """The launcher would kill the one that writes it."""
    answer = two(*flags, "--epochs", 100, signal=signal.SIGTERM, to=1,
                 seen=f"{tmp_path}/out/log.jsonl", sabotage="slow_writing")
    assert answer["statuses"] == [128 + signal.SIGTERM] * 2, answer["lines"][-5:]
    written = (tmp_path / "out/checkpoints/000001").stat().st_mtime_ns
    assert written < (tmp_path / "left-1").stat().st_mtime_ns


def test_another_number_of_processes_is_refused(flags, forks, two, tmp_path):
    argv = (*flags, "--checkpoint_every", 1)
    forks(*argv, out=tmp_path / "a", signal=signal.SIGKILL,
          seen=f"{tmp_path}/out/checkpoints/000003")
    answer = two(*argv, "--resume", "--batch_size", 4)
    assert answer["statuses"] == [2, 2]
    reasons = [line for line in answer["lines"] if "error: " in line]
    assert sorted(line[:8] for line in reasons) == ["[rank 0]", "[rank 1]"], answer["lines"]
    assert all("processes (then 1, now 2)" in line for line in reasons)


# Each breaks the second process alone.
BREAKS = {
    "nan_in_the_loss": (2, "training diverged"),
    "another_adapter": (2, "the processes hold different adapters"),
    "other_data": (2, "data or libraries: data of say_both, train rows of say_both"),
    "bad_input": (2, "mine alone"),
    "bug": (1, "ZeroDivisionError"),
}


@pytest.mark.parametrize("sabotage", BREAKS)
def test_a_failure_of_one_process_ends_all(sabotage, flags, two, tmp_path):
    """Nothing hangs, and the process that fails says why.

    It ends inside train.main: what frees the DDP model of a failed run may wait for ever.
    """
    status, message = BREAKS[sabotage]
    answer = two(*flags, "--regroup_every", 1, sabotage=sabotage)
    assert answer["statuses"][1] == status and answer["statuses"][0] != 0, answer["lines"][-60:]
    assert any(message in line and ("[rank 1] error: " in line or status == 1)
               for line in answer["lines"]), answer["lines"][-30:]
    assert "main returned" not in answer["lines"]
    assert not (tmp_path / "out" / "results.json").exists()


def test_two_processes_are_one_on_a_real_model(six_blocks, forks, tmp_path):
    """In float32, three steps, the first two of which train: equal groupings, close losses."""
    argv = ("--model", six_blocks, "--suite", "mini", "--max_train_per_task", 6, "--epochs", 1,
            "--tasks", "capital_city_question", "opposite_word_question", "emotion_word_label",
            "product_review_sentiment", "--eval_tasks", "none", "--warmup_ratio", 0,
            "--regroup_every", 2, *QUIET)
    folders = [tmp_path / "of-1", tmp_path / "of-2"]
    for processes, folder in enumerate(folders, start=1):
        answer = forks(*argv, "--output_dir", folder, out=tmp_path / "printed",
                       processes=processes)
        assert answer["statuses"] == [0] * processes, answer["lines"][-5:]
    one, two = map(losses_of, folders)
    assert one[0] == pytest.approx(two[0], abs=1e-5) and one == pytest.approx(two, abs=1e-3)
    assert len(one) == 3 and one[2] < one[0] - 0.1
    assert groupings_of(folders[0]) == groupings_of(folders[1])
