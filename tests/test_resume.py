"""Runs that are stopped and go on: exactly, after any kill, and never as another experiment."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import SMALL, lines_of, results_of, run, snapshot, succeed

import adapter
import data
import evaluation
import models
import train
from harness import arguments, checkpoint, identity, output_folder, recorder, results_file, signals
from registry import METHODS

TRAINED = [name for name, method in METHODS.items() if method.trains]
# Two tasks; three micro-batches of two rows in a step, regrouping in the middle of an epoch.
FLAGS = (*SMALL, "--setting", "sequential", "--tasks", "colour_name", "say_both", "--epochs", 3,
         "--learning_rate", "1e-2", "--batch_size", 2, "--gradient_accumulation_steps", 3,
         "--eval_batch_size", 2, "--max_new_tokens", 3, "--checkpoint_every", 1)
DOG = ("--regroup_every", 3)
MORE = {"badit": DOG, "loramoe": (*DOG, "--balance_weight", "0.1", "--balance_types",
                                  "colour_name=0", "say_both=1")}


class Killed(BaseException):
    """What a kill does, as far as one process can do it to itself."""


@pytest.fixture(scope="module")
def flags(llama, suite):
    return ("--model", llama, "--suite", suite, *FLAGS)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of an undisturbed run of a method."""
    folders = {}

    def call(method, *more):
        key = method, *more
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole") / "out"
            succeed(*flags, "--method", method, *MORE.get(method, ()), *more, "--output_dir",
                    folders[key])
        return folders[key]

    return call


def content_of(folder):
    """All that equal runs must have in common: every file's bytes, results.json but its `run`."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes()
             for path in sorted(folder.rglob("*")) if path.is_file()}
    content = json.loads(files.pop("results.json"))
    content.pop("run")
    return files | {"results.json": content}


def assert_equal_runs(one, other):
    mine, theirs = content_of(one), content_of(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name] == theirs[name], name


def stop_at(monkeypatch, owner, name, count, error=Killed):
    """Let the `count`-th call of owner.name raise `error`."""
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


# Twelve steps in two stages of six; two evaluations of five batches.
MOMENTS = {
    "before the first checkpoint": (recorder.Recorder, "add_step", 1),
    "in an accumulation": (data, "model_inputs", 3 + 2),
    "between update and checkpoint": (recorder.Recorder, "add_regrouping", 2),
    "while a checkpoint is written": (checkpoint.os, "rename", 1),
    "at the end of a stage": (adapter, "save", 1),
    "in an evaluation": (evaluation, "generate", 3),
    "between stages": (train, "make_stages", 1),
    "in the second stage": (recorder.Recorder, "add_step", 3),
    "in its evaluation": (evaluation, "generate", 4),
    "before the results": (results_file, "write_results", 1),
}


@pytest.mark.parametrize("method", TRAINED)
def test_a_resumed_run_is_the_undisturbed_one(method, flags, whole, tmp_path, monkeypatch):
    """Killed ten times in a row, at another kind of moment each time: equal to the last byte."""
    argv = (*flags, "--method", method, *MORE.get(method, ()), "--output_dir", tmp_path / "out")
    for moment, (owner, name, count) in MOMENTS.items():
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, count)
            with pytest.raises(Killed):
                run(*argv, "--resume")
                pytest.fail(f"not killed {moment}")
    outcome = succeed(*argv, "--resume")
    assert any("resuming at step 12" in line for line in outcome.out)
    assert_equal_runs(tmp_path / "out", whole(method))


@pytest.mark.parametrize("more", [
    ("--setting", "single"), ("--setting", "mixed", "--eval_before", "--regroup_every", 1),
    ("--routing", "static", "--no_dog"), ("--grouping", "random"), ("--no_bad",),
    ("--gradient_checkpointing", "--eval_tasks", "none"), ("--svd", "fast")])
def test_variants_resume(more, flags, tmp_path, monkeypatch):
    """The settings and BADIT's ablations, killed in the eighth step."""
    succeed(*flags, *DOG, *more, "--output_dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 8)
        with pytest.raises(Killed):
            run(*flags, *DOG, *more, "--output_dir", tmp_path / "out")
    succeed(*flags, *DOG, *more, "--output_dir", tmp_path / "out", "--resume")
    assert_equal_runs(tmp_path / "out", tmp_path / "whole")


def test_bf16_resumes(flags, tmp_path, monkeypatch):
    """Autocast, with weights of the adapter in float32; and never in another precision."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    succeed(*flags, *DOG, "--output_dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 8)
        with pytest.raises(Killed):
            run(*flags, *DOG, "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        outcome = run(*flags, *DOG, "--output_dir", tmp_path / "out", "--resume")
        assert outcome.status == 2 and "precision (then 'bf16', now 'no')" in outcome.err[0]
    succeed(*flags, *DOG, "--output_dir", tmp_path / "out", "--resume")
    assert_equal_runs(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_compiled_runs_resume(method, flags, whole, tmp_path, monkeypatch):
    """In the second stage; what is compiled depends on what it has seen, so not to the last bit."""
    argv = (*flags, "--method", method, *MORE.get(method, ()), "--output_dir", tmp_path / "out")
    uncompiled = whole(method)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 9)
        with pytest.raises(Killed):
            run(*argv)
    torch.compiler.reset()
    succeed(*argv, "--resume")
    torch.compiler.reset()
    assert results_of(tmp_path / "out")["compiler"] == "eager"
    losses = [[record["loss"] for record in lines_of(folder / "log.jsonl")]
              for folder in (tmp_path / "out", uncompiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_gainlora_with_olora_branches_resumes(flags, tmp_path, monkeypatch):
    more = ("--method", "gainlora", "--branches", "olora")
    succeed(*flags, *more, "--output_dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 9)
        with pytest.raises(Killed):
            run(*flags, *more, "--output_dir", tmp_path / "out")
    succeed(*flags, *more, "--output_dir", tmp_path / "out", "--resume")
    assert_equal_runs(tmp_path / "out", tmp_path / "whole")


# --- real kills ---------------------------------------------------------------------------------


def test_twenty_kills(flags, whole, forks, tmp_path):
    """SIGKILL at random moments, in saves and in evaluations: the result is the undisturbed one."""
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out", "--resume")
    seconds = forks(*argv[:-3], "--output_dir", tmp_path / "timed", out=tmp_path / "o")["seconds"]
    chance, killed, kinds = random.Random(0), 0, {"after": 0, "save": 0, "evaluation": 0}
    while killed < 20:
        kind = min(kinds, key=kinds.get)
        moment = {"after": {"after": chance.uniform(0.2, 0.9) * seconds},
                  "save": {"seen": f"{tmp_path}/out/checkpoints/.*.tmp"},
                  "evaluation": {"seen": f"{tmp_path}/out/predictions/*.partial"}}[kind]
        answer = forks(*argv, out=tmp_path / f"out-{killed}", signal=signal.SIGKILL, **moment)
        if answer["statuses"] == [0]:  # it was faster
            shutil.rmtree(tmp_path / "out")
            continue
        assert answer["statuses"] == [-signal.SIGKILL], answer["lines"][-5:]
        killed += 1
        kinds[kind] += 1
    assert forks(*argv, out=tmp_path / "last")["statuses"] == [0]
    assert_equal_runs(tmp_path / "out", whole("badit"))
    assert min(kinds.values()) >= 6


@pytest.mark.parametrize("method", [name for name in TRAINED if name != "badit"])
def test_a_kill_of_every_method(method, flags, whole, forks, tmp_path):
    """One SIGKILL after the third checkpoint."""
    argv = (*flags, "--method", method, *MORE.get(method, ()), "--output_dir", tmp_path / "out")
    answer = forks(*argv, out=tmp_path / "a", signal=signal.SIGKILL,
                   seen=f"{tmp_path}/out/checkpoints/000003")
    assert answer["statuses"] == [-signal.SIGKILL], answer["lines"][-5:]
    assert forks(*argv, "--resume", out=tmp_path / "b")["statuses"] == [0]
    assert_equal_runs(tmp_path / "out", whole(method))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["checkpoints/000002", "predictions/*.partial"])
def test_a_signal_saves_and_stops(number, moment, flags, whole, forks, tmp_path):
    """One line with the command that goes on, a status of its own, and an exact resume."""
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out")
    answer = forks(*argv, out=tmp_path / "a", signal=number, seen=f"{tmp_path}/out/{moment}")
    assert answer["statuses"] == [128 + number], answer["lines"][-5:]
    last = answer["lines"][-1]
    assert last.startswith(f"stopped by {number.name}, saved; go on with: OMP_NUM_THREADS=1 "
                           "python train.py ")
    assert last.endswith("--resume") and not any("Traceback" in line for line in answer["lines"])
    assert forks(*argv, "--resume", out=tmp_path / "b")["statuses"] == [0]
    assert_equal_runs(tmp_path / "out", whole("badit"))


def test_a_signal_between_checkpoints_saves_one(flags, forks, tmp_path):
    """No --checkpoint_every: the signal alone makes the checkpoint."""
    argv = (*flags[:-2], *DOG, "--epochs", 200, "--output_dir", tmp_path / "out")
    answer = forks(*argv, out=tmp_path / "a", signal=signal.SIGTERM,
                   seen=f"{tmp_path}/out/log.jsonl")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    state = checkpoint.read(tmp_path / "out/checkpoints/000001").state
    assert 0 < state["position"][1] == len(lines_of(tmp_path / "out/log.jsonl")) < 400


def test_a_signal_that_a_launcher_passes_on_counts_once(flags, forks, tmp_path):
    """The process group's SIGTERM, and the launcher's own a moment later."""
    argv = (*flags[:-2], *DOG, "--epochs", 200, "--output_dir", tmp_path / "out")
    answer = forks(*argv, out=tmp_path / "a", signal=signal.SIGTERM, times=2, sabotage="slow_steps",
                   seen=f"{tmp_path}/out/log.jsonl")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    assert ", saved; go on with" in answer["lines"][-1], answer["lines"][-5:]
    assert names_in(tmp_path / "out") == ["000001"]


def test_a_second_signal_stops_at_once(monkeypatch):
    """If it comes later than an echo does."""
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with signals.StopSignals() as stop:
        stop.deferred = True
        stop.note(signal.SIGTERM)  # of another process of the run
        clock[0] += signals.ECHO - 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        clock[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected():
    """A signal that is ignored when the program starts stays ignored: SIGHUP alone."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignals() as stop:
            stop.deferred = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_has_not_begun_is_started_again(flags, forks, tmp_path):
    """--overwrite stays in the command until the folder was cleared; nothing was touched."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text("an older run\n")
    answer = forks(*flags, "--output_dir", tmp_path / "out", "--overwrite", out=tmp_path / "a",
                   sabotage="stop_while_loading")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    last = answer["lines"][-1]
    assert "nothing more was saved" in last and last.endswith("--overwrite")
    assert (tmp_path / "out/log.jsonl").read_text() == "an older run\n"


@pytest.mark.parametrize("more", [("--method", "zero_shot"), ("--eval_before",)])
def test_an_evaluation_says_that_nothing_is_saved(more, flags, forks, tmp_path):
    """Of the base model, as a run of its own or before the training."""
    argv = (*flags[:4], *more, "--max_length", 64, "--eval_batch_size", 1)
    argv += () if "zero_shot" in more else SMALL[:4]
    answer = forks(*argv, "--output_dir", tmp_path / "out", out=tmp_path / "a",
                   signal=signal.SIGTERM, seen=f"{tmp_path}/out/predictions/*.partial")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    assert "nothing more was saved; go on with" in answer["lines"][-1]


# --- what a checkpoint is -----------------------------------------------------------------------


@pytest.fixture
def stopped(flags, tmp_path, monkeypatch):
    """Flags and folder of a BADIT run that was killed after its ninth step."""
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 9)
        with pytest.raises(Killed):
            run(*argv)
    return argv, tmp_path / "out"


def names_in(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_seconds_are_not_lost(stopped):
    """A checkpoint in the middle of a stage has the time that the stage has taken so far."""
    _, folder = stopped
    before, after = (checkpoint.read(folder / "checkpoints" / name).state["seconds"]["train"]
                     for name in ("000008", "000009"))
    assert 0 < before < after


def test_the_last_two_are_kept_until_the_end(stopped, whole):
    """Whole ones under numbers that rise; none is left of a finished run."""
    argv, folder = stopped
    assert names_in(folder) == ["000008", "000009"]  # six steps, two between stages, two steps
    succeed(*argv, "--resume")
    assert not (folder / "checkpoints").exists()


def test_what_is_in_a_checkpoint(stopped, llama):
    """No tensor of the base, nothing but safetensors and JSON, checksums that a shell can check."""
    _, folder = stopped
    path = folder / "checkpoints" / "000009"
    assert {file.name for file in path.iterdir()} == {"tensors.safetensors", "state.json",
                                                      "SHA256SUMS"}
    tensors = safetensors.torch.load_file(path / "tensors.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"adapter", "method", "optimizer"}
    assert not any("residual" in name for name in tensors)
    largest = safetensors.torch.load_file(llama / "model.safetensors")
    bank = 2 * (16 * 32 + 64 * 16)  # of two layers
    router = 2 * 8 * 32
    # The bank, the initial one, two moments, and Eq. 8's sums; the router with its moments.
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers < 5 * bank + 3 * router + 200 < sum(t.numel() for t in largest.values())
    os.system(f"cd {path} && sha256sum --quiet -c SHA256SUMS > sums")
    assert (path / "sums").read_text() == ""


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "tensors flipped": lambda path: flip_a_bit(path / "tensors.safetensors"),
    "state flipped": lambda path: flip_a_bit(path / "state.json"),
    "sums flipped": lambda path: flip_a_bit(path / "SHA256SUMS"),
    "tensors cut": lambda path: os.truncate(path / "tensors.safetensors", 100),
    "state empty": lambda path: os.truncate(path / "state.json", 0),
    "sums empty": lambda path: os.truncate(path / "SHA256SUMS", 0),
    "sums gone": lambda path: (path / "SHA256SUMS").unlink(),
    "folder empty": lambda path: [file.unlink() for file in path.iterdir()],
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_skipped(damage, stopped, whole):
    """By name, for the one before; and the run is the same."""
    argv, folder = stopped
    damage(folder / "checkpoints" / "000009")
    outcome = succeed(*argv, "--resume")
    assert any("checkpoints/000009 is damaged" in line for line in outcome.out)
    assert any("resuming at step 7, after checkpoint 000008" in line for line in outcome.out)
    assert_equal_runs(folder, whole("badit"))


def test_no_whole_checkpoint_starts_from_the_beginning(stopped, whole, flags, tmp_path):
    """And says so; also where there is no folder yet."""
    argv, folder = stopped
    for name in names_in(folder):
        flip_a_bit(folder / "checkpoints" / name / "state.json")
    outcome = succeed(*argv, "--resume")
    assert f"no whole checkpoint in {folder}: starting from the beginning" in outcome.out
    assert_equal_runs(folder, whole("badit"))
    outcome = succeed(*flags, *DOG, "--resume", "--output_dir", tmp_path / "new")
    assert any("starting from the beginning" in line for line in outcome.out)
    assert_equal_runs(tmp_path / "new", whole("badit"))


def test_a_finished_run_prints_its_result(flags, whole):
    """Status 0, the same table, and not a byte or a time of change in its folder is another."""
    folder = whole("badit")
    before = snapshot(folder)
    outcome = succeed(*flags, *DOG, "--output_dir", folder, "--resume")
    assert f"{folder} is finished already" in outcome.out
    rouge = results_of(folder)["metrics"]["rouge"]
    assert f"rouge: {rouge:.2f}" in outcome.out and snapshot(folder) == before


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused(finished, stopped, flags, whole):
    """Other arguments, all of them named, whether the run is finished or not."""
    argv, folder = stopped
    if finished:
        folder = whole("badit")
    before = snapshot(folder)
    outcome = run(*flags, *DOG, "--output_dir", folder, "--resume", "--learning_rate", "3e-3",
                  "--epochs", 4)
    assert outcome.status == 2 and len(outcome.err) == 1 and snapshot(folder) == before
    for part in ("--learning_rate (then 0.01, now 0.003)", "--epochs (then 3, now 4)"):
        assert part in outcome.err[0]


def test_other_data_is_refused(stopped, suite, tmp_path):
    """One changed word in one training instance."""
    argv, folder = stopped
    copy = shutil.copytree(suite, tmp_path / "suite" / suite.name)
    file = copy / "say_both" / "train.json"
    file.write_text(file.read_text().replace('["both', '["bath', 1))
    argv = [copy if part == suite else part for part in argv]
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and "data of say_both" in outcome.err[0]


@pytest.mark.parametrize("what", ["code", "versions", "threads", "device"])
def test_what_may_be_another(what, stopped, whole, monkeypatch):
    """Refused by default, gone on with where the flag says so."""
    argv, folder = stopped
    undisturbed = whole("badit")  # before anything is replaced
    replace = {"code": (identity, "code_sha256", lambda: "0" * 64),
               "versions": (identity, "versions", lambda: {"torch": "1.0"}),
               "threads": (torch, "get_num_threads", lambda: 7),
               "device": (identity, "device_name", lambda run: "abacus")}
    monkeypatch.setattr(*replace[what])
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and f" {what} (then" in outcome.err[0]
    others = [name for name in arguments.OVERRIDABLE if name != what]
    assert run(*argv, "--resume", "--allow_other", *others).status == 2
    succeed(*argv, "--resume", "--allow_other", what)
    assert results_of(folder)["run"]["allow_other"] == [what]
    assert results_of(folder)["overruled"] == [what]
    same = ("adapter/adapter_model.safetensors", "log.jsonl", "regroup.jsonl")
    for name in same:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_what_was_another_is_remembered(stopped, monkeypatch, tmp_path):
    """Through a second stop: the run is of two kinds, and nothing repeats it exactly."""
    argv, folder = stopped
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 2)
        with pytest.raises(Killed):
            run(*argv, "--resume", "--allow_other", "threads")
    succeed(*argv, "--resume")
    assert results_of(folder)["overruled"] == ["threads"]
    again = ("--from_results", folder / "results.json", "--output_dir")
    outcome = run(*again, tmp_path / "again")
    assert outcome.status == 2 and "resumed with other threads" in outcome.err[-1]
    succeed(*again, tmp_path / "again", "--allow_other", "threads")
    assert results_of(tmp_path / "again")["overruled"] == []


def test_model_and_suite_may_have_moved(stopped, flags, whole, llama, suite, tmp_path):
    """Their content is what counts: to the last byte with --allow_other paths, refused without."""
    argv, folder = stopped
    shutil.copytree(llama, tmp_path / "a")
    shutil.copytree(suite, tmp_path / "b")
    moved = {llama: tmp_path / "a", suite: tmp_path / "b"}
    argv = [moved.get(part, part) for part in argv]
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and "--model (then" in outcome.err[-1]
    succeed(*argv, "--resume", "--allow_other", "paths")
    assert results_of(folder)["overruled"] == []
    succeed("--from_results", whole("badit") / "results.json", "--allow_other", "paths",
            "--model", tmp_path / "a", "--suite", tmp_path / "b", "--output_dir", tmp_path / "c")
    for one in (folder, tmp_path / "c"):
        for name in ("adapter/adapter_model.safetensors", "log.jsonl", "regroup.jsonl"):
            assert (one / name).read_bytes() == (whole("badit") / name).read_bytes()


def test_code_that_changes_during_a_run(flags, tmp_path, monkeypatch):
    """The record names what the run began with."""
    real, calls = identity.code_sha256, []
    monkeypatch.setattr(identity, "code_sha256",
                        lambda: calls.append(None) or (real() if len(calls) == 1 else "changed"))
    succeed(*flags, "--output_dir", tmp_path / "out")
    assert results_of(tmp_path / "out")["code_sha256"] == real()


def change_weights(file):
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def change_json(**values):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name, change, named", [
    ("model.safetensors", change_weights, "weights other than"),
    ("config.json", change_json(rms_norm_eps=1e-3), "a configuration or tokenizer other than"),
    ("generation_config.json", change_json(eos_token_id=[2, 7]), "a configuration or tokenizer"),
    ("tokenizer.json", lambda file: file.write_text(
        file.read_text().replace('"w1"', '"w1x"')), "a configuration or tokenizer")])
def test_another_base_model_is_refused(name, change, named, stopped, llama, whole, tmp_path):
    """The same folder, another file in it: neither gone on with nor repeated."""
    argv, folder = stopped
    file, held = llama / name, (llama / name).read_bytes()
    before = snapshot(folder)
    try:
        change(file)
        outcomes = [run(*argv, "--resume"),
                    run("--from_results", whole("badit") / "results.json", "--output_dir",
                        tmp_path / "again")]
    finally:
        file.write_bytes(held)
    for outcome in outcomes:
        assert outcome.status == 2 and named in outcome.err[-1]
    assert snapshot(folder) == before and not (tmp_path / "again").exists()


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: flip_a_bit(file)])
def test_a_lost_adapter_is_refused(change, flags, tmp_path, monkeypatch):
    """Of a task that is trained: nothing would write it again."""
    argv = (*flags, "--setting", "single", "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 9)
        with pytest.raises(Killed):
            run(*argv)
    (file,) = (tmp_path / "out" / "adapter").glob("*/adapter_model.safetensors")
    change(file)
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and str(file) in outcome.err[-1]


@pytest.mark.parametrize("name", ["log.jsonl", "regroup.jsonl", "predictions"])
def test_a_changed_record_is_refused(name, stopped):
    """A run cannot go on exactly where its records were edited; nothing is cut or deleted."""
    argv, folder = stopped
    file = folder / name
    if file.is_dir():
        (file,) = file.glob("01_*.jsonl")
    flip_a_bit(file)
    before = snapshot(folder)
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and str(file) in outcome.err[-1] and snapshot(folder) == before


def test_contradictions_are_refused(flags, tmp_path):
    for more, named in ((("--resume", "--overwrite"), "--overwrite"),
                        (("--allow_other", "code"), "--allow_other"),
                        (("--resume", "--allow_other", "data"), "data")):
        outcome = run(*flags, *more, "--output_dir", tmp_path / "out")
        assert outcome.status == 2 and named in outcome.err[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "log").mkdir()
    (tmp_path / "log/log.jsonl").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("mine")
    outcome = run(*flags, "--resume", "--output_dir", tmp_path / "log")
    assert outcome.status == 2 and "log.jsonl is a link" in outcome.err[0]
    assert (tmp_path / "elsewhere.txt").read_text() == "mine"


def test_two_runs_in_one_folder_are_refused(stopped, whole, monkeypatch):
    """The second says so and touches nothing; a run that was killed holds the folder no longer."""
    argv, folder = stopped
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = snapshot(folder)
        for how in ("--resume", "--overwrite"):
            outcome = run(*argv, how)
            assert outcome.status == 2 and "another run is writing there" in outcome.err[-1]
            assert snapshot(folder) == before

    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    outcome = succeed(*argv, "--resume")
    assert any("its file system has no locks" in line for line in outcome.out)
    assert_equal_runs(folder, whole("badit"))


def test_a_folder_that_another_run_has_filled_is_refused(flags, tmp_path, monkeypatch):
    """While this one was being prepared; the other's files stay."""
    real = models.load

    def load(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.json").write_text("theirs")
        return real(*args)

    monkeypatch.setattr(models, "load", load)
    outcome = run(*flags, "--output_dir", tmp_path / "out")
    assert outcome.status == 2 and "another run has written there" in outcome.err[-1]
    assert (tmp_path / "out" / "results.json").read_text() == "theirs"


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_what_a_run_reads_is_not_deleted(how, flags, whole, tmp_path):
    """An adapter to evaluate, or results to repeat, in the run's own folder."""
    shutil.copytree(whole("badit"), tmp_path / "out")
    (tmp_path / "out/results.json").rename(tmp_path / "out/old.json")
    before = snapshot(tmp_path / "out")
    argv = [(*flags[:4], "--eval_only", "--adapter", tmp_path / "out/adapter")]
    if how == "--overwrite":
        argv.append(("--from_results", tmp_path / "out/old.json"))
    for words in argv:
        outcome = run(*words, "--output_dir", tmp_path / "out", how)
        assert outcome.status == 2 and "could be deleted" in outcome.err[0]
    assert snapshot(tmp_path / "out") == before


def test_overwriting_forgets_the_results_first(flags, whole, tmp_path, monkeypatch):
    """Killed meanwhile, what is left does not look like a whole run."""
    shutil.copytree(whole("badit"), tmp_path / "out")
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, output_folder.Path, "unlink", 2)
        with pytest.raises(Killed):
            run(*argv, "--overwrite")
    assert not (tmp_path / "out/results.json").exists()
    succeed(*argv, "--resume")
    assert_equal_runs(tmp_path / "out", whole("badit"))


def test_what_is_not_ours_stays(stopped):
    """In the folder of the checkpoints, of a damaged one too."""
    argv, folder = stopped
    mine = [folder / "checkpoints" / name for name in ("notes.txt", "keep-000002/x", "000010/x")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    succeed(*argv, "--resume")
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert sorted(names_in(folder)) == ["000010", "keep-000002", "notes.txt"]


def test_numbers_of_seven_digits(stopped, whole, monkeypatch):
    """Sorted as numbers, and kept until there is a newer one."""
    argv, folder = stopped
    checkpoints = folder / "checkpoints"
    (checkpoints / "000008").rename(checkpoints / "999999")
    (checkpoints / "000009").rename(checkpoints / "1000000")
    with monkeypatch.context() as patch:
        stop_at(patch, recorder.Recorder, "add_step", 1)
        with pytest.raises(Killed):
            run(*argv, "--resume")
    outcome = succeed(*argv, "--resume")
    assert any("after checkpoint 1000000" in line for line in outcome.out)
    assert_equal_runs(folder, whole("badit"))


def test_a_checkpoint_of_another_version_is_refused(stopped):
    """Its sums are right: it is not damaged, and nothing is deleted."""
    argv, folder = stopped
    for name in names_in(folder):
        path = folder / "checkpoints" / name
        state = json.loads((path / "state.json").read_text())
        checkpoint_files = {"state.json": json.dumps(state | {"more": 1}).encode(),
                            "tensors.safetensors": (path / "tensors.safetensors").read_bytes()}
        for file, content in checkpoint_files.items():
            (path / file).write_bytes(content)
        (path / "SHA256SUMS").write_text("".join(
            f"{hashlib.sha256(content).hexdigest()}  {file}\n"
            for file, content in checkpoint_files.items()))
    before = snapshot(folder)
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and "of another version" in outcome.err[-1]
    assert snapshot(folder) == before


def test_a_checkpoint_that_cannot_be_read_now_is_kept(stopped, monkeypatch):
    """It may be the disk's fault, which passes."""
    argv, folder = stopped
    before = snapshot(folder)

    def unreadable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoint, "sha256_file", unreadable)
    outcome = run(*argv, "--resume")
    assert outcome.status == 2 and "Input/output error" in outcome.err[-1]
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", [".lock", "log.jsonl", "results.json"])
def test_a_pipe_in_place_of_a_record_is_refused(name, flags, tmp_path):
    """It would be waited for."""
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    for how in ("--resume", "--overwrite"):
        outcome = run(*flags, "--output_dir", tmp_path / "out", how)
        assert outcome.status == 2 and f"{name} is no file" in outcome.err[0]


# --- a full disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [checkpoint.TENSORS_FILE, checkpoint.STATE_FILE])
def test_a_full_disk_costs_no_checkpoint(file, flags, whole, tmp_path, monkeypatch):
    """One line, status 2, the checkpoints before it whole; it goes on when there is room."""
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out")
    real, saves = checkpoint.fsync, []

    def full(path):
        if path.name == file:
            saves.append(path)
        if len(saves) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fsync", full)
        outcome = run(*argv)
    assert outcome.status == 2 and "No space left on device" in outcome.err[-1]
    assert "--resume" in outcome.err[-1] and not any("Traceback" in x for x in outcome.err)
    assert names_in(tmp_path / "out") == ["000003", "000004"]
    succeed(*argv, "--resume")
    assert_equal_runs(tmp_path / "out", whole("badit"))


@pytest.mark.parametrize("owner, name, count", [
    (recorder.Recorder, "add_step", 3), (adapter, "write_tensors", 1),
    (results_file, "write_json", 1), (evaluation, "scored", 3)])
def test_a_full_disk_while_records_are_written(owner, name, count, flags, whole, tmp_path,
                                               monkeypatch):
    """A step's line, an adapter, results, a prediction: one line each, and nothing is lost."""
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stop_at(patch, owner, name, count, full)
        outcome = run(*argv)
    assert outcome.status == 2 and "No space left on device" in outcome.err[-1]
    assert "--resume" in outcome.err[-1] and not any("Traceback" in x for x in outcome.err)
    succeed(*argv, "--resume")
    assert_equal_runs(tmp_path / "out", whole("badit"))


def test_a_limit_of_the_system_costs_nothing(stopped, whole, forks, tmp_path):
    """A write that really fails, by a limit on the size of files that no checkpoint fits."""
    argv, folder = stopped
    answer = forks(*argv, "--resume", out=tmp_path / "a", sabotage="small_files")
    assert answer["statuses"] == [2], answer["lines"][-3:]
    assert not any("Traceback" in line for line in answer["lines"])
    assert "--resume" in answer["lines"][-1] and names_in(folder) == ["000008", "000009"]
    succeed(*argv, "--resume")
    assert_equal_runs(folder, whole("badit"))


# --- repeating a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_from_results_repeats_a_run(method, whole, tmp_path):
    """All flags from results.json, and the same bytes everywhere."""
    succeed("--from_results", whole(method) / "results.json", "--output_dir", tmp_path / "out")
    assert_equal_runs(tmp_path / "out", whole(method))


def test_from_results_of_a_matched_lora_and_of_an_evaluation(flags, llama, suite, tmp_path):
    """Where a flag was chosen by the model's shape, and where nothing is trained."""
    succeed(*flags, "--method", "lora", "--rank", 1, "--output_dir", tmp_path / "one")
    evaluate = ("--eval_only", "--adapter", tmp_path / "one" / "adapter", "--model", llama,
                "--suite", suite, "--max_length", 64, "--max_new_tokens", 3)
    succeed(*evaluate, "--output_dir", tmp_path / "two")
    again = ("--from_results", tmp_path / "two" / "results.json", "--output_dir")
    succeed(*again, tmp_path / "three")
    assert_equal_runs(tmp_path / "two", tmp_path / "three")
    flip = safetensors.torch.load_file(tmp_path / "one/adapter/adapter_model.safetensors")
    safetensors.torch.save_file({key: tensor + 1 for key, tensor in flip.items()},
                                tmp_path / "one/adapter/adapter_model.safetensors")
    outcome = run(*again, tmp_path / "four")
    assert outcome.status == 2 and "file of --adapter" in outcome.err[0]


def test_from_results_refuses_what_it_cannot_repeat(whole, tmp_path, monkeypatch):
    """Other flags, files that are none, other versions and hostile values."""
    file = whole("badit") / "results.json"
    outcome = run("--from_results", file, "--epochs", 3, "--output_dir", tmp_path / "out")
    assert outcome.status == 2 and "--epochs" in outcome.err[0]
    good = json.loads(file.read_text())
    bad = tmp_path / "bad.json"
    for change in ({"args": None}, {"args": good["args"] | {"epochs": -1}},
                   {"args": good["args"] | {"tasks": ["--help"]}},
                   {"args": good["args"] | {"speed": 1}}, {"tasks": None}, {"versions": {}},
                   {"code_sha256": 5}, {"run": None}):
        bad.write_text(json.dumps(good | change))
        outcome = run("--from_results", bad, "--output_dir", tmp_path / "out")
        assert outcome.status == 2 and len(outcome.err) == 1, change
    for text in ("", "[]", "{", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")):
        bad.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert run("--from_results", bad, "--output_dir", tmp_path / "out").status == 2
    assert not (tmp_path / "out").exists()


def test_repeating_and_resuming_compare_the_model(flags, whole, llama, tmp_path, monkeypatch):
    """A run on other weights is not gone on with, or shown, as the repetition of one."""
    argv = (*flags, *DOG, "--output_dir", tmp_path / "out")
    again = ("--from_results", whole("badit") / "results.json", "--output_dir", tmp_path / "out",
             "--resume")
    file = llama / "model.safetensors"
    held = file.read_bytes()
    try:
        change_weights(file)
        with monkeypatch.context() as patch:
            stop_at(patch, recorder.Recorder, "add_step", 9)
            with pytest.raises(Killed):
                run(*argv)
        outcomes = [run(*again)]
        succeed(*argv, "--resume")
        outcomes.append(run(*again))
    finally:
        file.write_bytes(held)
    for outcome in outcomes:
        assert outcome.status == 2 and "weights other than" in outcome.err[-1]


def test_a_closed_stream_is_no_other_file(tmp_path):
    """What would be printed there does not end up in a log."""
    code = ("import os; from harness import early; early.print_anything(); "
            "open('number', 'w').write(str(os.open('log', os.O_CREAT)))")
    closed = f'{shlex.quote(sys.executable)} -c "$1" <&- >&- 2>&-'
    path = {"PYTHONPATH": os.path.dirname(train.__file__)}
    subprocess.run(["bash", "-c", closed, "", code], cwd=tmp_path, check=True,
                   env=os.environ | path)
    assert int((tmp_path / "number").read_text()) > 2


def test_as_argv_is_the_inverse_of_parsing():
    """Every flag of every kind comes back."""
    argv = ["--epochs=3", "--tasks", "a", "b", "--no_dog", "--learning_rate=0.003"]
    kept = arguments.recorded_args(arguments.parse_flags(argv)[0])
    words = arguments.as_argv(kept)
    assert sorted(words) == sorted(argv)
    assert arguments.recorded_args(arguments.parse_flags(words)[0]) == kept


def test_deterministic_is_asked_for(flags, tmp_path, monkeypatch):
    """The library is asked, for this run alone."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms",
                        lambda mode, warn_only: asked.append(mode))
    assert run(*flags, "--deterministic", "--max_train_per_task", 2, "--epochs", 1,
               "--output_dir", tmp_path / "a").status == 0
    assert run(*flags, "--max_train_per_task", 2, "--epochs", 1,
               "--output_dir", tmp_path / "b").status == 0
    assert asked == [True, False]
