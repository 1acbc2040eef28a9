"""Stop and resume: the result is exact after any kill, and another run is refused."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
from pathlib import Path

import filelock
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from conftest import (
    QUIET,
    SMALL,
    TRAINED,
    Killed,
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
from torch._dynamo.utils import counters

import adapter
import data
import evaluation
import models
import train
from harness import checkpoint, identity, output_folder, results_file, signals
from harness.arguments import OVERRIDABLE, PATH_FLAGS, parse_flags
from harness.run import Recorder

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


@pytest.fixture
def argv(flags, tmp_path):
    """The flags of a run of BADIT, its folder last."""
    return (*flags, *DOG, "--output_dir", tmp_path / "out")


@pytest.fixture(scope="module")
def whole(trained_run):
    """Return the folder of an undisturbed run of a method, made once."""
    return lambda method="badit": trained_run(
        *FLAGS, "--checkpoint_every", 1, "--method", method, *MORE.get(method, ()))


def kill(*argv, at=(Recorder, "add_step", 9)):
    """Run, and raise Killed at `at`: (owner, name, number of its call)."""
    with failing(*at), pytest.raises(Killed):
        run(*argv)
        pytest.fail(f"not killed at {at[1]}")


@pytest.fixture(scope="module")
def killed(flags, tmp_path_factory):
    """The folder of a BADIT run that was killed after its ninth step, made once."""
    folder = tmp_path_factory.mktemp("killed") / "out"
    kill(*flags, *DOG, "--output_dir", folder)
    return folder


@pytest.fixture
def stopped(argv, killed):
    """Flags and folder of a copy of the killed run."""
    return argv, shutil.copytree(killed, argv[-1])


def assert_resumes(argv, folder, step=8):
    """Assert that a run killed in this step and resumed equals the undisturbed one."""
    succeed(*argv, "--output_dir", folder / "whole")
    kill(*argv, "--output_dir", folder / "out", at=(Recorder, "add_step", step))
    succeed(*argv, "--output_dir", folder / "out", "--resume")
    assert_equal_runs(folder / "out", folder / "whole")


def assert_same_training(one, other):
    """Assert equal logs and adapters; results.json may differ."""
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

# The moments at which a method has state that only a checkpoint holds.
DURING_METHOD = ("between update and checkpoint", "at the end of a stage", "in the second stage",
                 "before the results")


@pytest.mark.parametrize("method", TRAINED)
def test_a_resumed_run_is_the_undisturbed_one(method, flags, whole, tmp_path):
    """Killed at one moment after another: equal to the last byte. BADIT goes through all ten."""
    argv = (*flags, "--method", method, *MORE.get(method, ()), "--output_dir", tmp_path / "out",
            "--resume")
    for name, moment in MOMENTS.items():
        if method == "badit" or name in DURING_METHOD:
            kill(*argv, at=moment)
    outcome = succeed(*argv)
    assert any("resuming at step 12" in line for line in outcome.out)
    assert_equal_runs(tmp_path / "out", whole(method))


@pytest.mark.parametrize("more, step", [
    ("--setting single --eval_loss --routing energy", 8),
    ("--setting mixed --eval_before --regroup_every 1 --grouping random --no_bad", 8),
    ("--routing static --gradient_checkpointing --eval_tasks none", 8),
    ("--method gainlora --branches olora", 8),
    ("--protect 0.9 --routing energy", 8),
    ("--method lora --protect 0.9", 8),
    ("--method gainlora --eval_before", 1)])  # its first task then trains the first branch
def test_variants_resume(more, step, flags, tmp_path):
    """The settings, BADIT's ablations, and a method with other parts."""
    dog = () if "--method" in more else DOG
    assert_resumes((*flags, *dog, *more.split()), tmp_path, step)


def test_bf16_resumes(flags, tmp_path, monkeypatch):
    """Under autocast; resuming in another precision is refused."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_resumes((*flags, *DOG), tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    refused("precision (then 'bf16', now 'no')", *flags, *DOG, "--output_dir", tmp_path / "out",
            "--resume")


def test_compiled_runs_resume(argv, tmp_path, monkeypatch):
    """As `accelerate launch --dynamo_backend aot_eager` asks for it: the uncompiled run's losses.

    Not to the last bit, because what is compiled depends on the shapes seen before.
    """
    argv = (*argv, *QUIET, "--tasks", "colour_name", "--eval_tasks", "none")
    succeed(*argv, "--output_dir", tmp_path / "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    kill(*argv, at=(Recorder, "add_step", 4))
    torch.compiler.reset()
    counters.clear()
    succeed(*argv, "--resume")
    assert counters["frames"]["ok"] > 0  # it is compiled
    torch.compiler.reset()
    assert results_of(tmp_path / "out")["compiler"] == "aot_eager"
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(tmp_path / "eager"), abs=1e-5)


# --- real kills ---------------------------------------------------------------------------------


def test_kills(argv, whole, forks, tmp_path):
    """SIGKILL at random moments, in saves and in evaluations: the result is the undisturbed one."""
    folder = argv[-1]
    seconds = forks(*argv[:-1], tmp_path / "timed", out=tmp_path / "o")["seconds"]
    chance, killed, kinds = random.Random(0), 0, {"after": 0, "save": 0, "evaluation": 0}
    while killed < 6:
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
    assert min(kinds.values()) == 2


@pytest.mark.parametrize("number, moment", [(signal.SIGTERM, "checkpoints/000002"),
                                            (signal.SIGINT, "predictions/*.partial")])
def test_a_signal_saves_and_stops(number, moment, argv, whole, forks, tmp_path):
    """One line with the command that continues, its own exit status, and an exact resume."""
    answer = forks(*argv, out=tmp_path / "a", signal=number, seen=f"{tmp_path}/out/{moment}")
    assert answer["statuses"] == [128 + number], answer["lines"][-5:]
    last = answer["lines"][-1]
    assert last.startswith(f"stopped by {number.name}, saved; continue with: OMP_NUM_THREADS=1 "
                           "ACCELERATE_USE_CPU=true python train.py ")
    assert last.endswith("--resume") and not any("Traceback" in line for line in answer["lines"])
    assert forks(*argv, "--resume", out=tmp_path / "b")["statuses"] == [0]
    assert_equal_runs(tmp_path / "out", whole())


def test_a_signal_between_checkpoints_saves_one(tiny, forks, tmp_path):
    """No --checkpoint_every: the signal alone makes the checkpoint; a launcher may pass it on
    a moment later."""
    folder = tmp_path / "out"
    answer = forks(*tiny, *FLAGS, *DOG, "--epochs", 200, "--output_dir", folder, out=tmp_path / "a",
                   signal=signal.SIGTERM, seen=f"{folder}/log.jsonl", times=2,
                   sabotage="slow_steps")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    assert ", saved; continue with" in answer["lines"][-1], answer["lines"][-5:]
    assert names_in(folder) == ["000001"]
    state = checkpoint.read(folder / "checkpoints/000001").state
    assert 0 < state["position"][1] == len(lines_of(folder / "log.jsonl")) < 400


def test_a_second_signal_stops_at_once(monkeypatch):
    """Unless it is an echo, the launcher's copy of the first."""
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


def test_a_run_that_has_not_begun_is_started_again(flags, forks, tmp_path):
    """--overwrite stays in the command until the folder is cleared; nothing was touched."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text("an older run\n")
    answer = forks(*flags, "--output_dir", tmp_path / "out", "--overwrite", out=tmp_path / "a",
                   sabotage="stop_while_loading")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    last = answer["lines"][-1]
    assert "nothing more was saved" in last and last.endswith("--overwrite")
    assert (tmp_path / "out/log.jsonl").read_text() == "an older run\n"


def test_an_evaluation_says_that_nothing_is_saved(tiny, forks, tmp_path):
    """It evaluates the base model before training."""
    answer = forks(*tiny, *SMALL, "--eval_before", "--eval_batch_size", 1,
                   "--output_dir", tmp_path / "out", out=tmp_path / "a",
                   signal=signal.SIGTERM, seen=f"{tmp_path}/out/predictions/*.partial")
    assert answer["statuses"] == [128 + signal.SIGTERM]
    assert "nothing more was saved; continue with" in answer["lines"][-1]


# --- what a checkpoint is -----------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_two_are_kept_until_the_end(stopped):
    """Their numbers rise, and each holds the seconds trained so far."""
    argv, folder = stopped
    assert names_in(folder) == ["000008", "000009"]  # six steps, two between stages, two steps
    before, after = (checkpoint.read(folder / "checkpoints" / name).state["seconds"]["train"]
                     for name in names_in(folder))
    assert 0 < before < after
    succeed(*argv, "--resume")
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path / "tensors.safetensors", 100),
    lambda path: os.truncate(path / "state.json", 100),
    lambda path: [file.unlink() for file in path.iterdir()]], ids=["tensors", "state", "both"])
def test_an_unreadable_checkpoint_is_skipped(damage, stopped, whole):
    """It is named, the one before is taken, and the run is the same."""
    argv, folder = stopped
    damage(folder / "checkpoints" / "000009")
    outcome = succeed(*argv, "--resume")
    assert any("checkpoints/000009 is skipped" in line for line in outcome.out)
    assert any("resuming at step 7, after checkpoint 000008" in line for line in outcome.out)
    assert_equal_runs(folder, whole())


def test_no_checkpoint_is_lost(stopped):
    """If none can be used, the run does not start again over them."""
    argv, folder = stopped
    for change, named in (
            (lambda file: file.write_text("{}"), "of another version"),
            (Path.unlink, "give --overwrite in place of --resume")):
        for name in names_in(folder):
            change(folder / "checkpoints" / name / "state.json")
        before = snapshot(folder)
        refused(named, *argv, "--resume")
        assert snapshot(folder) == before


def test_checkpoints_are_sorted_by_number(tmp_path):
    """Also with seven digits; other names are left out."""
    for name in ("1000000", "999999", ".000007.tmp", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["999999", "1000000"]


def test_what_is_in_a_checkpoint(stopped, llama):
    """Safetensors and JSON, without any tensor of the base."""
    path = stopped[1] / "checkpoints" / "000009"
    assert files_of(path).keys() == {"tensors.safetensors", "state.json"}
    tensors = safetensors.torch.load_file(path / "tensors.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"adapter", "method", "optimizer"}
    base = safetensors.torch.load_file(llama / "model.safetensors")
    bank, router = 2 * (16 * 32 + 64 * 16), 2 * 8 * 32  # of two layers
    # The bank, the initial one, two moments, and Eq. 8's sums; the router with its moments.
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers < 5 * bank + 3 * router + 200 < sum(each.numel() for each in base.values())


def test_a_finished_run_prints_its_result(flags, whole):
    """Status 0 and the same table; no file of its folder changes."""
    before = snapshot(whole())
    outcome = succeed(*flags, *DOG, "--output_dir", whole(), "--resume")
    assert f"{whole()} is finished already" in outcome.out
    rouge = results_of(whole())["metrics"]["rouge"]
    assert f"mean score: {rouge:.2f}" in outcome.out and snapshot(whole()) == before


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


def test_a_cpu_with_other_instructions_is_another_device(monkeypatch):
    """Kernels of bfloat16 that use AMX round in another way."""
    names = set()
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        names.add(identity.device_name(Accelerator(cpu=True)))
    assert len(names) == 2 and {name.endswith(", AMX)") for name in names} == {False, True}


def test_allowed_differences(stopped, whole, monkeypatch):
    """Refused by default, accepted where the flag says so, and remembered through a second stop."""
    argv, folder = stopped
    undisturbed = whole()  # before anything is replaced
    for what, change in REPLACED.items():
        monkeypatch.setattr(*change)
        others = [name for name in OVERRIDABLE if name != what]
        refused(f" {what} (then", *argv, "--resume", "--allow_other", *others)
    kill(*argv, "--resume", "--allow_other", *REPLACED, at=(Recorder, "add_step", 2))
    succeed(*argv, "--resume", "--allow_other", *REPLACED)
    assert results_of(folder)["allowed_differences"] == sorted(REPLACED)
    assert_same_training(folder, undisturbed)


def test_model_and_suite_may_have_moved(stopped, whole, llama, suite, tmp_path):
    """Their content counts: --allow_other paths accepts other folders."""
    argv, folder = stopped
    moved = {llama: shutil.copytree(llama, tmp_path / "a"),
             suite: shutil.copytree(suite, tmp_path / "b")}
    argv = [moved.get(part, part) for part in argv]
    refused("--model (then", *argv, "--resume")
    succeed(*argv, "--resume", "--allow_other", "paths")
    assert results_of(folder)["allowed_differences"] == []
    assert_same_training(folder, whole())


def test_what_counts_as_other_code(tmp_path):
    """Every file that trains, whatever its name; none that shows or starts a run."""
    for pattern in ("*.py", "[a-z]*/*.py"):
        for path in identity.ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(identity.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    seen = [identity.code_sha256(tmp_path)]
    for name in ("report.py", "reporting/figures.py", "scripts/study.py", "tests/conftest.py",
                 "reporting/new.py", "train.py", "decomposition.py", "inputs/files.py",
                 "harness/checkpoint.py", "baselines/new.py", "inputs/new.py", "harness/new.py"):
        with open(tmp_path / name, "a") as file:
            file.write("# another line\n")
        seen.append(identity.code_sha256(tmp_path))
    assert len(set(seen[:6])) == 1 and len(set(seen)) == 8


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
    ("model.safetensors", change_weights, "weights changed"),
    ("config.json", change_json(rms_norm_eps=1e-3), "a configuration or tokenizer changed"),
    ("tokenizer.json", lambda file: file.write_text(
        file.read_text().replace('"w1"', '"w1x"')), "a configuration or tokenizer changed")])
def test_another_base_model_is_refused(name, change, named, stopped, change_model):
    """The same folder, with another file in it."""
    argv, folder = stopped
    before = snapshot(folder)
    change_model(name, change)
    refused(named, *argv, "--resume")
    assert snapshot(folder) == before


@pytest.mark.parametrize("words, named", [
    ("--resume --overwrite", "--overwrite"), ("--allow_other code", "without --resume"),
    ("--resume --allow_other data", "data")])
def test_contradictions_are_refused(words, named, argv):
    refused(named, *argv, *words.split())


# --- the folder of a run ------------------------------------------------------------------------


def test_a_lost_file_is_refused(flags, tmp_path):
    """Nothing would write a lost log or a finished adapter again."""
    argv = (*flags, "--setting", "single", "--output_dir", tmp_path / "out")
    kill(*argv)
    log, weights = (tmp_path / "out" / name for name in (
        "log.jsonl", "adapter/say_both/adapter_model.safetensors"))
    for file, lose in ((weights, Path.unlink), (log, lambda path: os.truncate(path, 1)),
                       (log, Path.unlink)):
        content = file.read_bytes()
        lose(file)
        refused(str(file), *argv, "--resume")
        file.write_bytes(content)


def test_overwriting(argv, whole, tmp_path):
    """It deletes the results first, so that a kill leaves no folder that looks finished."""
    folder = shutil.copytree(whole(), argv[-1])
    (folder / "notes.txt").write_text("mine")
    (folder / "items.json").write_text("{}")  # as report.py --unpack writes
    kill(*argv, "--overwrite", at=(output_folder.shutil, "rmtree", 1))
    assert not (folder / "results.json").exists()
    succeed(*argv, "--overwrite")
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert_equal_runs(folder, whole())


def test_what_a_run_reads_is_not_deleted(tiny, whole, tmp_path):
    """Neither the adapter to evaluate, nor a folder that holds no run."""
    folder = shutil.copytree(whole(), tmp_path / "out")
    before = snapshot(folder)
    for how in ("--overwrite", "--resume"):
        refused("could delete it", *tiny, "--eval_only", "--adapter", folder / "adapter",
                "--output_dir", folder, how)
        assert snapshot(folder) == before
    args, _ = parse_flags([*map(str, tiny), "--output_dir", str(folder), "--resume"])
    args.suite = shutil.copytree(tiny[3], folder / "data")  # a run deletes no such folder
    output_folder.check(args, PATH_FLAGS)
    refused("holds no run", *tiny, "--output_dir", tiny[1], "--overwrite")


def test_two_runs_in_one_folder_are_refused(stopped, whole):
    """The second touches nothing; a killed run's lock is free."""
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
def test_a_file_system_without_locks(number, tiny, tmp_path, monkeypatch):
    """One line says that two runs could write there."""
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    outcome = succeed(*tiny, "--method", "zero_shot", *SMALL[4:], "--max_eval_per_task", 1,
                      "--output_dir", tmp_path / "out")
    (line,) = (line for line in outcome.out if "its file system has no locks" in line)
    assert os.strerror(number) in line and not (tmp_path / "out" / ".lock").exists()


def test_a_folder_that_another_run_has_filled_is_refused(argv, monkeypatch):
    """While this one was being prepared; the other's files stay."""
    real, file = models.load, argv[-1] / "results.json"

    def load(*args, **more):
        file.parent.mkdir()
        file.write_text("theirs")
        return real(*args, **more)

    monkeypatch.setattr(models, "load", load)
    refused("another run has written there", *argv)
    assert file.read_text() == "theirs"


# --- a full disk --------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_nothing(argv, whole):
    """A checkpoint, a step's line, an adapter, a prediction, results: one line each, and the
    checkpoints before it stay whole; it continues when there is room."""
    before = []
    for owner, name, count in (
            (checkpoint, "write_tensors", 3), (checkpoint.os, "rename", 2),
            (Recorder, "add_step", 2), (adapter, "write_tensors", 1), (evaluation, "scored", 3),
            (results_file, "write_json", 1)):
        with failing(owner, name, count, FULL):
            assert "--resume" in refused("No space left on device", *argv, "--resume")
        kept = names_in(argv[-1])
        assert len(kept) == 2 and kept >= before
        before = kept
    succeed(*argv, "--resume")
    assert_equal_runs(argv[-1], whole())


def test_a_limit_of_the_system_costs_nothing(stopped, whole, forks, tmp_path):
    """A write that really fails, because file sizes are limited."""
    argv, folder = stopped
    answer = forks(*argv, "--resume", out=tmp_path / "a", sabotage="small_files")
    assert answer["statuses"] == [2], answer["lines"][-3:]
    assert not any("Traceback" in line for line in answer["lines"])
    assert "--resume" in answer["lines"][-1] and names_in(folder) == ["000008", "000009"]
    succeed(*argv, "--resume")
    assert_equal_runs(folder, whole())


def test_deterministic_is_asked_for(tiny, tmp_path, monkeypatch):
    """PyTorch is asked in runs with --deterministic alone."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms",
                        lambda mode, warn_only: asked.append(mode))
    for more in (("--deterministic",), ()):
        succeed(*tiny, "--method", "zero_shot", *SMALL[4:], "--max_eval_per_task", 1, *more,
                "--output_dir", tmp_path / str(len(asked)))
    assert asked == [True, False]
