"""A sharded base: the result equals DDP's, to the bit."""

import signal

import pytest
import torch
from conftest import SMALL, assert_equal_runs, lines_of, results_of, succeed
from test_processes import FLAGS


@pytest.fixture
def two(forks, tmp_path):
    """Call train.main in two processes, which must end well -> their lines."""
    def call(*argv, **order):
        answer = forks(*argv, out=tmp_path / "printed", processes=2, **order)
        assert answer["statuses"] == [0, 0], answer["lines"][-60:]
        return answer["lines"]
    return call


@pytest.mark.parametrize("words", ["gainlora", "badit", "badit --routing energy",
                                   "badit --setting single"])
def test_sharded_is_ddp(words, tiny, two, tmp_path):
    """With dropout and regroupings, sequentially unless said: losses, groupings, adapter, answers.
    """
    argv = (*tiny, *FLAGS, "--method", *words.split())
    two(*argv, "--output_dir", tmp_path / "ddp")
    two(*argv, "--output_dir", tmp_path / "shared", "--shard_base")
    assert_equal_runs(tmp_path / "ddp", tmp_path / "shared")
    assert results_of(tmp_path / "shared")["run"]["shard_base"]


def test_sharded_is_ddp_in_bf16_with_all_that_saves_memory(tiny, two, tmp_path):
    """Asked for by the launcher's --use_fsdp, whose variables no library sees."""
    argv = (*tiny, *FLAGS, "--gradient_checkpointing", "--gradient_accumulation_steps", 2,
            "--batch_size", 2, "--regroup_every", 1)
    two(*argv, "--output_dir", tmp_path / "ddp", sabotage="in_bf16")
    lines = two(*argv, "--output_dir", tmp_path / "shared", sabotage="by_fsdp")
    assert [line for line in lines if line.startswith("left: ")] == ["left: []"] * 2
    assert_equal_runs(tmp_path / "ddp", tmp_path / "shared")
    assert results_of(tmp_path / "shared")["run"]["shard_base"]


def test_a_quantised_base_is_shared(wide, suite, two, tmp_path):
    """nf4: each process holds half of the codes and scales, and the whole adapter."""
    argv = ("--model", wide, "--suite", suite, *FLAGS, "--base", "nf4", "--setting", "mixed")
    two(*argv, "--output_dir", tmp_path / "ddp")
    lines = two(*argv, "--output_dir", tmp_path / "shared", "--shard_base", sabotage="count_bytes")
    assert_equal_runs(tmp_path / "ddp", tmp_path / "shared")
    counts = [list(map(int, line.split()[1:])) for line in lines if line.startswith("bytes: ")]
    assert len(counts) == 2
    for before, base, held in counts:
        assert held == before - base // 2


def test_stopped_and_resumed_the_other_way(tiny, forks, two, tmp_path):
    """Sharded, a signal; as DDP, a signal; sharded to the end: the undisturbed run's bytes."""
    argv = (*tiny, *FLAGS, "--regroup_every", 1, "--checkpoint_every", 1)
    two(*argv, "--output_dir", tmp_path / "whole")
    mine = (*argv, "--output_dir", tmp_path / "out")
    for number, more in ((2, ["--shard_base"]), (5, ["--resume"])):
        answer = forks(*mine, *more, out=tmp_path / f"printed-{number}", processes=2, to=1,
                       signal=signal.SIGTERM, seen=f"{tmp_path}/out/checkpoints/{number:06d}")
        assert answer["statuses"] == [128 + signal.SIGTERM] * 2, answer["lines"][-20:]
        reason = next(line for line in answer["lines"] if "stopped by" in line)
        assert ("--shard_base" in reason) == ("--shard_base" in more)
    lines = two(*mine, "--resume", "--shard_base")
    assert any("resuming" in line for line in lines)
    assert_equal_runs(tmp_path / "whole", tmp_path / "out")


def test_an_idle_process_and_answers_of_unequal_length(tiny, two, tmp_path):
    """Three batches for two processes: neither waits for ever."""
    argv = (*tiny, *SMALL, "--tasks", "say_both", "--eval_batch_size", 2, "--max_new_tokens", 9,
            "--eval_loss")
    two(*argv, "--epochs", 1, "--output_dir", tmp_path / "out", "--shard_base")
    again = ("--eval_only", "--adapter", tmp_path / "out/adapter", "--eval_batch_size", 2,
             "--eval_loss", "--model", tiny[1])
    two(*again, "--output_dir", tmp_path / "shared", "--shard_base")
    succeed(*again, "--output_dir", tmp_path / "alone")
    rows = [lines_of(next((tmp_path / name / "predictions").iterdir()))
            for name in ("out", "shared", "alone")]
    assert len(rows[0]) == 5 and rows[0] == rows[1]
    assert len({len(row["prediction"].split()) for row in rows[0]}) > 1
    assert [row["prediction"] for row in rows[0]] == [row["prediction"] for row in rows[2]]


# --- what is asked for --------------------------------------------------------------------------


def test_one_process_has_nothing_to_share(tiny, tmp_path):
    outcome = succeed(*tiny, *SMALL, "--epochs", 1, "--eval_tasks", "none", "--shard_base",
                      "--output_dir", tmp_path / "out")
    assert any("--shard_base has no effect in one process" in line for line in outcome.out)
    assert results_of(tmp_path / "out")["run"]["shard_base"] is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Accelerate sees both")
def test_processes_that_do_not_see_each_other_are_refused(tiny, forks, tmp_path):
    answer = forks(*tiny, *SMALL, "--output_dir", tmp_path / "out", out=tmp_path / "printed",
                   processes=2, sabotage="expecting_gpus")
    assert answer["statuses"] == [2, 2]
    assert any("the launcher started 2 processes, Accelerate sees 1" in line
               for line in answer["lines"])
