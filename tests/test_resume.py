"""Runs that are stopped and go on: exactly, after any kill, and never as another experiment."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import filelock
import programs
import pytest
import safetensors.torch
import torch
from conftest import (
    BRIEF,
    SMALL,
    TRAINED,
    Killed,
    adapter_of,
    assert_equal_runs,
    failing,
    files_of,
    lines_of,
    losses_of,
    refused,
    results_of,
    run,
    snapshot,
    succeed,
)

import adapter
import data
import evaluation
import models
import train
from harness import checkpoint, identity, output_folder, results_file, signals
from harness.arguments import OVERRIDABLE
from harness.recorder import Recorder

# Two tasks; three micro-batches of two rows in a step, regrouping in the middle of an epoch.
FLAGS = (*SMALL, "--setting", "sequential", "--tasks", "colour_name", "say_both", "--epochs", 3,
         "--learning_rate", "1e-2", "--batch_size", 2, "--gradient_accumulation_steps", 3,
         "--eval_batch_size", 2, "--max_new_tokens", 3)
DOG = ("--regroup_every", 3)
MORE = {"badit": DOG, "loramoe": (*DOG, "--balance_weight", "0.1", "--balance_types",
                                  "colour_name=0", "say_both=1")}


@pytest.fixture(scope="module")
def flags(tiny):
    return (*tiny, *FLAGS, "--checkpoint_every", 1)


@pytest.fixture(scope="module")
def rare(tiny):
    """The flags of a long run with few checkpoints."""
    return (*tiny, *FLAGS, *DOG, "--epochs", 200)


@pytest.fixture
def argv(flags, tmp_path):
    """The flags of a run of BADIT, its folder last."""
    return (*flags, *DOG, "--output_dir", tmp_path / "out")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of an undisturbed run of a method, once for each."""
    @functools.cache
    def call(method="badit"):
        folder = tmp_path_factory.mktemp("whole") / "out"
        succeed(*flags, "--method", method, *MORE.get(method, ()), "--output_dir", folder)
        return folder

    return call


def kill(*argv, at=(Recorder, "add_step", 9)):
    """Run until the call `at`: (owner, name, count)."""
    with failing(*at), pytest.raises(Killed):
        run(*argv)
        pytest.fail(f"not killed at {at[1]}")


@pytest.fixture
def stopped(argv):
    """Flags and folder of a BADIT run that was killed after its ninth step."""
    kill(*argv)
    return argv, argv[-1]


def assert_resumes(argv, folder):
    """Killed in the eighth step and gone on with, it is the undisturbed run."""
    succeed(*argv, "--output_dir", folder / "whole")
    kill(*argv, "--output_dir", folder / "out", at=(Recorder, "add_step", 8))
    succeed(*argv, "--output_dir", folder / "out", "--resume")
    assert_equal_runs(folder / "out", folder / "whole")


def assert_same_training(one, other):
    """Equal logs and adapters; results.json may say that other things differ."""
    mine, theirs = files_of(one), files_of(other)
    for name in ("adapter/adapter_model.safetensors", "log.jsonl", "regroup.jsonl"):
        assert mine[name] == theirs[name], name


# Twelve steps in two stages of six; two evaluations of five batches.
MOMENTS = {
    "before the first checkpoint": (Recorder, "add_step", 1),
    "in an accumulation": (data, "model_inputs", 3 + 2),
    "between update and checkpoint": (Recorder, "add_regrouping", 2),
    "while a checkpoint is written": (checkpoint.os, "rename", 1),
    "at the end of a stage": (adapter, "save", 1),
    "in an evaluation": (evaluation, "generate", 3),
    "between stages": (train, "make_stages", 1),
    "in the second stage": (Recorder, "add_step", 3),
    "in its evaluation": (evaluation, "generate", 4),
    "before the results": (results_file, "write_results", 1),
}


@pytest.mark.parametrize("method", TRAINED)
def test_a_resumed_run_is_the_undisturbed_one(method, flags, whole, tmp_path):
    """Killed ten times in a row, at another kind of moment each time: equal to the last byte."""
    argv = (*flags, "--method", method, *MORE.get(method, ()), "--output_dir", tmp_path / "out",
            "--resume")
    for moment in MOMENTS.values():
        kill(*argv, at=moment)
    outcome = succeed(*argv)
    assert any("resuming at step 12" in line for line in outcome.out)
    assert_equal_runs(tmp_path / "out", whole(method))


@pytest.mark.parametrize("more", [
    "--setting single", "--setting mixed --eval_before --regroup_every 1", "--eval_loss",
    "--routing static --no_dog", "--routing energy", "--inactive initial", "--grouping random",
    "--no_bad", "--svd fast",
    "--gradient_checkpointing --eval_tasks none", "--method gainlora --branches olora"])
def test_variants_resume(more, flags, tmp_path):
    """The settings, BADIT's ablations, and a method with other parts."""
    dog = () if "gainlora" in more else DOG
    assert_resumes((*flags, *dog, *more.split()), tmp_path)


def test_bf16_resumes(flags, tmp_path, monkeypatch):
    """Autocast, with weights of the adapter in float32; and never in another precision."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_resumes((*flags, *DOG), tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    refused("precision (then 'bf16', now 'no')", *flags, *DOG, "--output_dir", tmp_path / "out",
            "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_compiled_runs_resume(method, flags, whole, tmp_path, monkeypatch):
    """In the second stage; what is compiled depends on what it has seen, so not to the last bit."""
    argv = (*flags, "--method", method, *MORE.get(method, ()), "--output_dir", tmp_path / "out")
    uncompiled = whole(method)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    kill(*argv)
    torch.compiler.reset()
    succeed(*argv, "--resume")
    torch.compiler.reset()
    assert results_of(tmp_path / "out")["compiler"] == "eager"
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(uncompiled), abs=1e-4)


# --- real kills ---------------------------------------------------------------------------------


def test_twenty_kills(argv, whole, forks, tmp_path):
    """SIGKILL at random moments, in saves and in evaluations: the result is the undisturbed one."""
    folder = argv[-1]
    seconds = forks(*argv[:-1], tmp_path / "timed", out=tmp_path / "o")["seconds"]
    chance, killed, kinds = random.Random(0), 0, {"after": 0, "save": 0, "evaluation": 0}
    while killed < 20:
        kind = min(kinds, key=kinds.get)
        moment = {"after": {"after": chance.uniform(0.2, 0.9) * seconds},
                  "save": {"seen": f"{folder}/checkpoints/.*.tmp"},
                  "evaluation": {"seen": f"{folder}/predictions/*.partial"}}[kind]
        answer = forks(*argv, "--resume", out=tmp_path / f"out-{killed}", signal=signal.SIGKILL,
                       **moment)
        if answer["statuses"] == [0]:  # it was faster
            shutil.rmtree(folder)
            continue
        assert answer["statuses"] == [-signal.SIGKILL], answer["lines"][-5:]
        killed += 1
        kinds[kind] += 1
    assert forks(*argv, "--resume", out=tmp_path / "last")["statuses"] == [0]
    assert_equal_runs(folder, whole())
    assert min(kinds.values()) >= 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["checkpoints/000002", "predictions/*.partial"])
def test_a_signal_saves_and_stops(number, moment, argv, whole, forks, tmp_path):
    """One line with the command that goes on, a status of its own, and an exact resume."""
    answer = forks(*argv, out=tmp_path / "a", signal=number, seen=f"{tmp_path}/out/{moment}")
    assert answer["statuses"] == [128 + number], answer["lines"][-5:]
    last = answer["lines"][-1]
    assert last.startswith(f"stopped by {number.name}, saved; go on with: OMP_NUM_THREADS=1 "
                           "python train.py ")
    assert last.endswith("--resume") and not any("Traceback" in line for line in answer["lines"])
    assert forks(*argv, "--resume", out=tmp_path / "b")["statuses"] == [0]
    assert_equal_runs(tmp_path / "out", whole())


@pytest.mark.parametrize("more", [{}, {"times": 2, "sabotage": "slow_steps"}])
def test_a_signal_between_checkpoints_saves_one(more, rare, forks, tmp_path):
    """No --checkpoint_every: the signal alone makes the checkpoint; a launcher may pass it on
    a moment later."""
    folder = tmp_path / "out"
    answer = forks(*rare, "--output_dir", folder, out=tmp_path / "a", signal=signal.SIGTERM,
                   seen=f"{folder}/log.jsonl", **more)
    assert answer["statuses"] == [128 + signal.SIGTERM]
    assert ", saved; go on with" in answer["lines"][-1], answer["lines"][-5:]
    assert names_in(folder) == ["000001"]
    state = checkpoint.read(folder / "checkpoints/000001").state
    assert 0 < state["position"][1] == len(lines_of(folder / "log.jsonl")) < 400


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


def test_a_closed_terminal(rare, tmp_path):
    """SIGHUP, and nobody reads what is printed from then on: the run saves and ends."""
    folder = tmp_path / "out"
    words = programs.words("train_in_terminal", folder / "log.jsonl", *rare, "--output_dir", folder)
    assert subprocess.run(words).returncode == 128 + signal.SIGHUP
    assert names_in(folder) == ["000001"]


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


@pytest.mark.parametrize("more", [("--method", "zero_shot"), ("--eval_before", *SMALL[:4])])
def test_an_evaluation_says_that_nothing_is_saved(more, tiny, forks, tmp_path):
    """Of the base model, as a run of its own or before the training."""
    answer = forks(*tiny, *more, "--max_length", 64, "--eval_batch_size", 1,
                   "--output_dir", tmp_path / "out", out=tmp_path / "a",
                   signal=signal.SIGTERM, seen=f"{tmp_path}/out/predictions/*.partial")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    assert "nothing more was saved; go on with" in answer["lines"][-1]


# --- what a checkpoint is -----------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_two_are_kept_until_the_end(stopped):
    """Under numbers that rise, with the time that the stage has taken so far."""
    argv, folder = stopped
    assert names_in(folder) == ["000008", "000009"]  # six steps, two between stages, two steps
    before, after = (checkpoint.read(folder / "checkpoints" / name).state["seconds"]["train"]
                     for name in names_in(folder))
    assert 0 < before < after
    succeed(*argv, "--resume")
    assert not (folder / "checkpoints").exists()


def test_what_is_in_a_checkpoint(stopped, llama):
    """No tensor of the base, nothing but safetensors and JSON, checksums that a shell can check."""
    path = stopped[1] / "checkpoints" / "000009"
    assert files_of(path).keys() == {"tensors.safetensors", "state.json", "SHA256SUMS"}
    tensors = safetensors.torch.load_file(path / "tensors.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"adapter", "method", "optimizer"}
    assert not any("residual" in name for name in tensors)
    base = safetensors.torch.load_file(llama / "model.safetensors")
    bank = 2 * (16 * 32 + 64 * 16)  # of two layers
    router = 2 * 8 * 32
    # The bank, the initial one, two moments, and Eq. 8's sums; the router with its moments.
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers < 5 * bank + 3 * router + 200 < sum(each.numel() for each in base.values())
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=path, check=True)


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
    assert_equal_runs(folder, whole())


def test_no_whole_checkpoint_starts_from_the_beginning(stopped, whole, tmp_path):
    """And says so; also where there is no folder yet."""
    argv, folder = stopped
    for name in names_in(folder):
        flip_a_bit(folder / "checkpoints" / name / "state.json")
    for place in (folder, tmp_path / "new"):
        outcome = succeed(*argv[:-1], place, "--resume")
        assert f"no whole checkpoint in {place}: starting from the beginning" in outcome.out
        assert_equal_runs(place, whole())


def test_a_finished_run_prints_its_result(flags, whole):
    """Status 0, the same table, and not a byte or a time of change in its folder is another."""
    before = snapshot(whole())
    outcome = succeed(*flags, *DOG, "--output_dir", whole(), "--resume")
    assert f"{whole()} is finished already" in outcome.out
    rouge = results_of(whole())["metrics"]["rouge"]
    assert f"mean score: {rouge:.2f}" in outcome.out and snapshot(whole()) == before


def test_numbers_of_seven_digits(stopped, whole):
    """Sorted as numbers, and kept until there is a newer one."""
    argv, folder = stopped
    (folder / "checkpoints/000008").rename(folder / "checkpoints/999999")
    (folder / "checkpoints/000009").rename(folder / "checkpoints/1000000")
    kill(*argv, "--resume", at=(Recorder, "add_step", 1))
    outcome = succeed(*argv, "--resume")
    assert any("after checkpoint 1000000" in line for line in outcome.out)
    assert_equal_runs(folder, whole())


def test_a_checkpoint_of_another_version_is_refused(stopped):
    """Its sums are right: it is not damaged, and nothing is deleted."""
    argv, folder = stopped
    for name in names_in(folder):
        path = folder / "checkpoints" / name
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"more": 1}))
        (path / "SHA256SUMS").write_text("".join(
            f"{hashlib.sha256(files_of(path)[file]).hexdigest()}  {file}\n"
            for file in ("state.json", "tensors.safetensors")))
    before = snapshot(folder)
    refused("of another version", *argv, "--resume")
    assert snapshot(folder) == before


def test_a_checkpoint_that_cannot_be_read_now_is_kept(stopped):
    """It may be the disk's fault, which passes."""
    argv, folder = stopped
    before = snapshot(folder)
    with failing(checkpoint, "sha256_file", 1, OSError(errno.EIO, os.strerror(errno.EIO))):
        refused("Input/output error", *argv, "--resume")
    assert snapshot(folder) == before


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused(finished, stopped, whole):
    """Other arguments, all of them named, whether the run is finished or not."""
    argv, folder = stopped
    folder = whole() if finished else folder
    before = snapshot(folder)
    line = refused("--learning_rate (then 0.01, now 0.003)", *argv[:-1], folder, "--resume",
                   "--learning_rate", "3e-3", "--epochs", 4)
    assert "--epochs (then 3, now 4)" in line and snapshot(folder) == before


def test_other_data_is_refused(stopped, suite, tmp_path):
    """One changed word in one training instance."""
    copy = shutil.copytree(suite, tmp_path / "suite" / suite.name)
    file = copy / "say_both" / "train.json"
    file.write_text(file.read_text().replace('["both', '["bath', 1))
    argv = [copy if part == suite else part for part in stopped[0]]
    refused("data of say_both", *argv, "--resume")


REPLACED = {"code": (identity, "code_sha256", lambda: "0" * 64),
            "versions": (identity, "versions", lambda: {"torch": "1.0"}),
            "threads": (torch, "get_num_threads", lambda: 7),
            "device": (identity, "device_name", lambda _: "abacus")}


@pytest.mark.parametrize("what", REPLACED)
def test_what_may_be_another(what, stopped, whole, monkeypatch):
    """Refused by default, gone on with where the flag says so."""
    argv, folder = stopped
    undisturbed = whole()  # before anything is replaced
    monkeypatch.setattr(*REPLACED[what])
    refused(f" {what} (then", *argv, "--resume")
    others = [name for name in OVERRIDABLE if name != what]
    refused(f" {what} (then", *argv, "--resume", "--allow_other", *others)
    succeed(*argv, "--resume", "--allow_other", what)
    assert results_of(folder)["run"]["allow_other"] == [what]
    assert results_of(folder)["overruled"] == [what]
    assert_same_training(folder, undisturbed)


def test_what_was_another_is_remembered(stopped, monkeypatch, tmp_path):
    """Through a second stop: the run is of two kinds, and nothing repeats it exactly."""
    argv, folder = stopped
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    kill(*argv, "--resume", "--allow_other", "threads", at=(Recorder, "add_step", 2))
    succeed(*argv, "--resume")
    assert results_of(folder)["overruled"] == ["threads"]
    again = ("--from_results", folder / "results.json", "--output_dir", tmp_path / "again")
    refused("resumed with other threads", *again)
    succeed(*again, "--allow_other", "threads")
    assert results_of(tmp_path / "again")["overruled"] == []


def test_model_and_suite_may_have_moved(stopped, whole, llama, suite, tmp_path):
    """Their content is what counts: to the last byte with --allow_other paths, refused without."""
    argv, folder = stopped
    moved = {llama: shutil.copytree(llama, tmp_path / "a"),
             suite: shutil.copytree(suite, tmp_path / "b")}
    argv = [moved.get(part, part) for part in argv]
    refused("--model (then", *argv, "--resume")
    succeed(*argv, "--resume", "--allow_other", "paths")
    assert results_of(folder)["overruled"] == []
    succeed("--from_results", whole() / "results.json", "--allow_other", "paths",
            "--model", moved[llama], "--suite", moved[suite], "--output_dir", tmp_path / "c")
    for one in (folder, tmp_path / "c"):
        assert_same_training(one, whole())


def test_what_counts_as_other_code(argv, tmp_path, monkeypatch):
    """What trains, whatever its name; not what shows a run or starts it."""
    root = tmp_path / "code"
    for pattern in ("*.py", "[a-z]*/*.py"):
        for path in identity.ROOT.glob(pattern):
            copy = root / path.relative_to(identity.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    monkeypatch.setattr(identity, "code_sha256", functools.partial(identity.code_sha256, root))

    def change(*names):
        """A line more at the end of some files; of a new one it is the only one."""
        for name in names:
            with open(root / name, "a") as file:
                file.write("# another line\n")

    kill(*argv)
    change("report.py", "reporting/figures.py", "scripts/study.py", "tests/conftest.py",
           "reporting/new.py", "scripts/new.py")
    kill(*argv, "--resume", at=(Recorder, "add_step", 1))
    trains = ("train.py", "decomposition.py", "inputs/files.py", "harness/checkpoint.py",
              "baselines/new.py", "inputs/new.py", "harness/new.py")
    seen = [identity.code_sha256()]
    for name in trains:
        change(name)
        seen.append(identity.code_sha256())
    assert len(set(seen)) == 1 + len(trains)
    refused(" code (then", *argv, "--resume")


def test_code_that_changes_during_a_run(flags, tmp_path, monkeypatch):
    """The record names what the run began with."""
    answers = iter(("first", *["changed"] * 99))
    monkeypatch.setattr(identity, "code_sha256", lambda: next(answers))
    succeed(*flags, "--output_dir", tmp_path / "out")
    assert results_of(tmp_path / "out")["code_sha256"] == "first"


def change_weights(file):
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def change_json(**values):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def change_model(llama):
    """Change a file of the model, until the end of the test."""
    held = {}

    def call(name, change):
        held[name] = (llama / name).read_bytes()
        change(llama / name)

    yield call
    for name, content in held.items():
        (llama / name).write_bytes(content)


@pytest.mark.parametrize("name, change, named", [
    ("model.safetensors", change_weights, "weights other than"),
    ("config.json", change_json(rms_norm_eps=1e-3), "a configuration or tokenizer other than"),
    ("generation_config.json", change_json(eos_token_id=[2, 7]), "a configuration or tokenizer"),
    ("tokenizer.json", lambda file: file.write_text(
        file.read_text().replace('"w1"', '"w1x"')), "a configuration or tokenizer")])
def test_another_base_model_is_refused(name, change, named, stopped, change_model, whole, tmp_path):
    """The same folder, another file in it: neither gone on with nor repeated."""
    argv, folder = stopped
    finished, before = whole(), snapshot(folder)
    change_model(name, change)
    refused(named, *argv, "--resume")
    refused(named, "--from_results", finished / "results.json", "--output_dir", tmp_path / "again")
    assert snapshot(folder) == before and not (tmp_path / "again").exists()


def test_repeating_and_resuming_compare_the_model(argv, whole, change_model):
    """A run on other weights is not gone on with, or shown, as the repetition of one."""
    again = ("--from_results", whole() / "results.json", "--output_dir", argv[-1], "--resume")
    change_model("model.safetensors", change_weights)
    kill(*argv)
    refused("weights other than", *again)
    succeed(*argv, "--resume")
    refused("weights other than", *again)


@pytest.mark.parametrize("change", [Path.unlink, flip_a_bit])
def test_a_lost_adapter_is_refused(change, flags, tmp_path):
    """Of a task that is trained: nothing would write it again."""
    argv = (*flags, "--setting", "single", "--output_dir", tmp_path / "out")
    kill(*argv)
    (file,) = (tmp_path / "out" / "adapter").glob("*/adapter_model.safetensors")
    change(file)
    refused(str(file), *argv, "--resume")


@pytest.mark.parametrize("name", ["log.jsonl", "regroup.jsonl", "predictions/01_say_both.jsonl"])
def test_a_changed_record_is_refused(name, stopped):
    """A run cannot go on exactly where its records were edited; nothing is cut or deleted."""
    argv, folder = stopped
    flip_a_bit(folder / name)
    before = snapshot(folder)
    refused(str(folder / name), *argv, "--resume")
    assert snapshot(folder) == before


@pytest.mark.parametrize("more, named", [
    (("--resume", "--overwrite"), "--overwrite"), (("--allow_other", "code"), "--allow_other"),
    (("--resume", "--allow_other", "data"), "data")])
def test_contradictions_are_refused(more, named, argv):
    refused(named, *argv, *more)


# --- the folder of a run ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", ".lock"])
def test_a_link_is_refused(name, argv, tmp_path):
    """A run writes into its own folder only."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("mine")
    refused(f"{name} is a link", *argv, "--resume")
    assert (tmp_path / "elsewhere.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "log.jsonl", "results.json"])
def test_a_pipe_in_place_of_a_record_is_refused(name, argv):
    """It would be waited for."""
    argv[-1].mkdir()
    os.mkfifo(argv[-1] / name)
    for how in ("--resume", "--overwrite"):
        refused(f"{name} is no file", *argv, how)


def test_two_runs_in_one_folder_are_refused(stopped, whole):
    """The second says so and touches nothing; a run that was killed holds the folder no longer."""
    argv, folder = stopped
    with filelock.FileLock(folder / ".lock"):
        before = snapshot(folder)
        for how in ("--resume", "--overwrite"):
            refused("another run is writing there", *argv, how)
            assert snapshot(folder) == before
    assert (folder / ".lock").exists()
    succeed(*argv, "--resume")
    assert_equal_runs(folder, whole())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(number, argv, monkeypatch):
    """One line says what cannot be prevented there."""
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (line,) = (line for line in succeed(*argv).out if "its file system has no locks" in line)
    assert os.strerror(number) in line and not (argv[-1] / ".lock").exists()


def test_a_folder_that_another_run_has_filled_is_refused(argv, monkeypatch):
    """While this one was being prepared; the other's files stay."""
    real, file = models.load, argv[-1] / "results.json"

    def load(*args):
        file.parent.mkdir()
        file.write_text("theirs")
        return real(*args)

    monkeypatch.setattr(models, "load", load)
    refused("another run has written there", *argv)
    assert file.read_text() == "theirs"


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_what_a_run_reads_is_not_deleted(how, tiny, whole, tmp_path):
    """An adapter to evaluate, or results to repeat, in the run's own folder."""
    folder = shutil.copytree(whole(), tmp_path / "out")
    (folder / "results.json").rename(folder / "old.json")
    before = snapshot(folder)
    argv = [(*tiny, "--eval_only", "--adapter", folder / "adapter")]
    if how == "--overwrite":
        argv.append(("--from_results", folder / "old.json"))
    for words in argv:
        refused("could be deleted", *words, "--output_dir", folder, how)
    assert snapshot(folder) == before


def test_overwriting_forgets_the_results_first(argv, whole):
    """Killed meanwhile, what is left does not look like a whole run."""
    shutil.copytree(whole(), argv[-1])
    kill(*argv, "--overwrite", at=(output_folder.Path, "unlink", 2))
    assert not (argv[-1] / "results.json").exists()
    succeed(*argv, "--resume")
    assert_equal_runs(argv[-1], whole())


def test_what_is_not_ours_stays(stopped):
    """In the folder of the checkpoints, of a damaged one too."""
    argv, folder = stopped
    mine = [folder / "checkpoints" / name for name in ("notes.txt", "keep-000002/x", "000010/x")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    succeed(*argv, "--resume")
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert names_in(folder) == ["000010", "keep-000002", "notes.txt"]


# --- a full disk --------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("owner, name, count", [
    (checkpoint, "write_tensors", 5), (checkpoint.os, "rename", 5), (Recorder, "add_step", 3),
    (adapter, "write_tensors", 1), (results_file, "write_json", 1), (evaluation, "scored", 3)])
def test_a_full_disk_costs_nothing(owner, name, count, argv, whole):
    """A checkpoint, a step's line, an adapter, results, a prediction: one line each, and the
    checkpoints before it stay whole; it goes on when there is room."""
    with failing(owner, name, count, FULL):
        line = refused("No space left on device", *argv)
    assert "--resume" in line
    if owner in (checkpoint, checkpoint.os):
        assert names_in(argv[-1]) == ["000003", "000004"]
    succeed(*argv, "--resume")
    assert_equal_runs(argv[-1], whole())


def test_a_limit_of_the_system_costs_nothing(stopped, whole, forks, tmp_path):
    """A write that really fails, by a limit on the size of files that no checkpoint fits."""
    argv, folder = stopped
    answer = forks(*argv, "--resume", out=tmp_path / "a", sabotage="small_files")
    assert answer["statuses"] == [2], answer["lines"][-3:]
    assert not any("Traceback" in line for line in answer["lines"])
    assert "--resume" in answer["lines"][-1] and names_in(folder) == ["000008", "000009"]
    succeed(*argv, "--resume")
    assert_equal_runs(folder, whole())


# --- repeating a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_from_results_repeats_a_run(method, whole, tmp_path):
    """All flags from results.json, and the same bytes everywhere."""
    succeed("--from_results", whole(method) / "results.json", "--output_dir", tmp_path / "out")
    assert_equal_runs(tmp_path / "out", whole(method))


def test_from_results_of_an_evaluation(whole, tiny, tmp_path):
    """Of the same adapter, and of no other."""
    saved = shutil.copytree(whole("lora") / "adapter", tmp_path / "adapter")
    succeed("--eval_only", "--adapter", saved, *tiny, *BRIEF, "--output_dir", tmp_path / "one")
    again = ("--from_results", tmp_path / "one" / "results.json", "--output_dir")
    succeed(*again, tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    safetensors.torch.save_file(
        {key: tensor + 1 for key, tensor in adapter_of(whole("lora")).items()},
        saved / "adapter_model.safetensors")
    refused("file of --adapter", *again, tmp_path / "three")


def test_from_results_refuses_what_it_cannot_repeat(whole, tmp_path):
    """Other flags beside it, and results that no run of this version has written."""
    file, bad = whole() / "results.json", tmp_path / "bad.json"
    refused("--epochs", "--from_results", file, "--epochs", 3, "--output_dir", tmp_path / "out")
    good = json.loads(file.read_text())
    for change in ({"args": None}, {"args": good["args"] | {"epochs": -1}},
                   {"args": good["args"] | {"tasks": ["--help"]}},
                   {"args": good["args"] | {"speed": 1}}, {"tasks": None}, {"versions": {}},
                   {"code_sha256": 5}, {"run": None}):
        bad.write_text(json.dumps(good | change))
        refused("", "--from_results", bad, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- this process -------------------------------------------------------------------------------


def test_a_closed_stream_is_no_other_file(tmp_path):
    """What would be printed there does not end up in a log."""
    words = programs.words("write_first_free_handle", tmp_path / "number")
    subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *words], check=True)
    assert int((tmp_path / "number").read_text()) > 2


def test_deterministic_is_asked_for(flags, tmp_path, monkeypatch):
    """The library is asked, for this run alone."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms",
                        lambda mode, warn_only: asked.append(mode))
    for more in ((), ("--deterministic",), ()):
        succeed(*flags, "--max_train_per_task", 2, "--epochs", 1, *more, "--output_dir",
                tmp_path / str(len(asked)))
    assert asked == [False, True, False]
