"""The list of runs, the scripts around it, and a sweep that is stopped and continued."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import accelerate.commands.config.config_args as accelerate_config
import programs
import pytest
import study
from accelerate.commands.launch import launch_command_parser
from conftest import SMALL, lines_of, modules_in, results_of

import report
from harness.arguments import parse_flags, settings_of
from harness.identity import TRAINS
from registry import VARIANTS, variant_of

ROOT = Path(study.__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
TINY = ("--launcher", "python", "--settings", "mixed")
ONE = ("--models", "smollm2-135m", "--suite", "mini", "--methods", "lora", "--seeds", "1", *TINY)


def dry(capsys, *argv):
    """Return the commands that a dry run prints, as words, and its line on stderr."""
    assert study.main(["--dry-run", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    return [shlex.split(line) for line in out.splitlines()], err


def train_flags(words):
    """Return a command's flags as train.py reads them."""
    args, _ = parse_flags(words[words.index("train.py") + 1:])
    return args


@pytest.fixture(autouse=True)
def handlers():
    """Restore this process's signal handlers, which a study replaces."""
    before = {number: signal.getsignal(number)
              for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- the list -----------------------------------------------------------------------------------


def test_the_papers_study(capsys):
    """6 models x 6 methods x 5 seeds x 2 settings, then 15 single-task runs for each of 180."""
    commands, said = dry(capsys)
    assert len(commands) == 360 + 2700 and "360 runs, 2700 on one task alone; about " in said
    settings = [words[words.index("--setting") + 1] for words in commands]
    assert settings.count("mixed") == settings.count("sequential") == 180
    assert set(settings[360:]) == {"single"}
    folders = [words[words.index("--output_dir") + 1] for words in commands]
    assert len(set(folders)) == len(folders)
    found = {(args.model, args.method, args.seed, args.setting)
             for args in map(train_flags, commands[:360])}
    assert len(found) == 360 and {seed for _, _, seed, _ in found} == {1, 2, 3, 4, 5}
    for words in commands[360::97]:
        args = train_flags(words)
        assert len(args.tasks) == 1 and args.setting == "single" and args.resume


def test_single_task_runs_are_known_by_their_settings(capsys):
    """Another flag gives another folder, unless single-task runs ignore the flag."""
    argv = ("--models", "smollm2-135m", "--methods", "lora", "--seeds", 1, "--tasks", "T363")
    folders = [dry(capsys, *argv, "--", *more)[0][-1][-2] for more in (
        (), ("--epochs", "1"), ("--eval_tasks", "seen"), ("--eval_before",))]
    assert folders[0] == folders[2] == folders[3] != folders[1]
    assert folders[0].startswith("runs/study/single/lora-task363-smollm2-135m-seed1-")


def test_a_model_folder_may_have_any_name(llama, tmp_path, capsys):
    model = tmp_path / "{0} a{b}"
    model.symlink_to(llama)
    ((words,), _) = dry(capsys, "--models", model, "--methods", "lora", "--seeds", 3, *TINY)
    assert "runs/study/lora-mixed-{0} a{b}-seed3" in words


def test_an_untrained_model_runs_once(capsys):
    """It has one run for all seeds and settings, without the flags of training."""
    commands, _ = dry(capsys, "--methods", "zero_shot", "--models", "smollm2-135m", "--",
                      "--epochs", "1", "--max_eval_per_task", "3", "--max_train_per_task=5")
    assert len(commands) == 1 and train_flags(commands[0]).max_eval_per_task == 3
    assert not any("train_per_task" in word for word in commands[0])


def test_flags_of_one_method_stay_with_it(capsys):
    commands, _ = dry(capsys, "--models", "smollm2-135m", "--seeds", 3, "--methods", "lora",
                      "badit-energy-random --learning_rate 5e-4 --regroup_every 30",
                      "lora-matched", *TINY)
    plain, tuned, matched = map(train_flags, commands)
    assert (plain.method, plain.learning_rate, plain.regroup_every) == ("lora", 2e-4, None)
    assert (tuned.method, tuned.routing, tuned.grouping, tuned.learning_rate, tuned.regroup_every
            ) == ("badit", "energy", "random", 5e-4, 30)
    assert (matched.match_parameters, matched.regroup_every) == ("badit", None)
    assert commands[1][:2] == ["python", "train.py"]


def test_variants_have_the_names_that_a_report_gives_them():
    for words in VARIANTS.values():
        args, _ = parse_flags(["--method", *words.split()])
        assert variant_of(args.method, settings_of(args)) == words


@pytest.mark.parametrize("argv, named", [
    (["--models", "gpt"], "gpt"), (["--methods", "badix"], "badix"), (["--methods", ""], "''"),
    (["--methods", "lora --regroup_every 3"], "regroup_every"),
    (["--methods", "lora-matched --top_k 2"], "lora has no flag --top_k"),
    (["--methods", "lora --learning_rate 0"], "'0'"),
    (["--methods", "badit --seed 5"], "--seed"), (["--methods", "lora --epochs 3"], "--epochs"),
    (["--methods", "badit-no_dog", "badit --no_dog"], "share the folder"),
    (["--models", ""], "--models ''"),
    (["--runs", "README.md"], "--runs README.md"),
    (["--runs", "a\x1b\n" * 999], r"a\x1b\n"), (["--launcher", "a 'b"], "a 'b"),
    (["--seeds", "x"], "'x'"), (["--seeds", "1", "1"], "share the folder"),
    (["--settings", "alone"], "'alone'"),
    (["--suite", "nowhere"], "nowhere"), (["--tasks", "T999"], "T999"),
    (["--nth", "3060"], "3060"), (["--nth", "-1"], "-1"),
    (["--", "--learning_rate", "0"], "'0'"), (["--", "--seed", "4"], "--seed"),
    (["--", "--output_dir=x"], "--output_dir=x"), (["--", "--no_such"], "--no_such"),
], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
def test_bad_input_is_one_line(argv, named, capsys):
    assert study.main([*argv, *(["--dry-run"] if "--" not in argv else [])]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and named in err


@pytest.mark.parametrize("launcher", ["/tmp -x", ""])
def test_a_wrong_launcher_is_one_line(launcher, tmp_path, capsys):
    """Nothing is started; commands for another machine can still be listed."""
    argv = [*ONE, "--runs", str(tmp_path / "runs"), "--launcher", launcher]
    assert study.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err == f"error: --launcher {launcher!r}: no such program\n"
    assert dry(capsys, *argv)[0][0][0] == (launcher.split() or ["train.py"])[0]


def test_a_dry_run_may_be_cut():
    """`--dry-run | head` ends without a traceback."""
    done = subprocess.run([f"{sys.executable} scripts/study.py --dry-run | head -n 1"], shell=True,
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr.count("\n") == 1
    assert "360 runs, 2700 on one task alone; about " in done.stderr


# --- running ------------------------------------------------------------------------------------


def planned(folder, *program, flags=()):
    """Return a run of one of programs.py, followed by train.py's flags."""
    words = [*programs.words(*program), "train.py", *flags, "--output_dir", str(folder)]
    return study.PlannedRun(folder, words)


def test_a_study_goes_on_from_committed_records(tmp_path, calls):
    """Its unpacked runs are finished ones, though they have flags that no longer exist."""
    records = ROOT / "results" / "compare-superni" / "records.jsonl.gz"
    assert report.main([str(records), "--unpack", str(tmp_path)]) == 0
    commands = calls("compare.sh", "superni", "--runs", str(tmp_path))
    runs = {run.folder: run for argv in commands for run in study.plan(*study.parse(argv))}
    assert len(runs) == 81 and all(map(study.finished, runs.values()))


def test_a_failed_run_does_not_stop_the_rest(tmp_path, capfd):
    """It is reported at the end. A finished run is skipped; one with other flags is refused."""
    runs = [planned(tmp_path / "a", "fail"), planned(tmp_path / "b", "finish"),
            planned(tmp_path / "c", "do_nothing"), planned(tmp_path / "d", "be_killed")]
    assert study.run_all(runs) == 1
    out, err = capfd.readouterr()
    assert "4 runs: 0 were finished before, 1 finished now, 3 failed" in out
    lines = err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["failed", s] for s in ("3", "0", "-9")]
    assert [line[-1] for line in lines] == ["a", "c", "d"]
    assert study.run_all([runs[1]]) == 0
    assert "1 were finished before" in capfd.readouterr().out
    other = planned(tmp_path / "b", "finish", flags=("--epochs", "1"))
    assert study.run_all([other]) == 1
    assert "another --epochs (10)" in capfd.readouterr().err


def wait_for(condition, sweep):
    deadline = time.monotonic() + 90
    while not condition():
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stop_waits_for_what_a_launcher_has_started(tmp_path):
    """The launcher ends at once, the program saves first; the next run does not start."""
    launcher = shlex.join(programs.words("launch", "save_when_stopped"))
    sweep = subprocess.Popen([sys.executable, "scripts/study.py", *ONE, "--seeds", "1", "2",
                              "--runs", tmp_path, "--launcher", launcher],
                             cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first, second = (tmp_path / f"lora-mixed-smollm2-135m-seed{seed}" for seed in (1, 2))
    wait_for((first / "begun").exists, sweep)
    sweep.send_signal(signal.SIGTERM)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM in run 1 of 2; the same command continues" in said
    assert (first / "saved").exists() and not second.exists()


def test_a_sweep_is_interrupted_and_resumed(llama, suite, tmp_path, monkeypatch, capfd):
    """SIGTERM in a run: it saves; the same command finishes it.

    The run loads no library that training does not need, and no file of ours that code_sha256
    leaves out.
    """
    command = ["bash", ROOT / "scripts" / "sweep.sh", "--models", llama, "--suite", suite,
               "--methods", "badit", "--seeds", "1", *TINY, "--runs", tmp_path / "runs",
               "--", *SMALL, "--epochs", "20", "--eval_batch_size", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = open(tmp_path / "log", "w")
    sweep = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    run = tmp_path / "runs" / "badit-mixed-llama-seed1"
    wait_for(lambda: (run / "log.jsonl").exists() and len(lines_of(run / "log.jsonl")) >= 3,
             sweep)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(60) == 128 + signal.SIGTERM
    assert "the same command continues" in (tmp_path / "log").read_text()
    assert not (run / "results.json").exists() and any((run / "checkpoints").iterdir())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    assert study.main([str(word) for word in command[2:]]) == 0
    again, imports = capfd.readouterr()
    assert "resuming at step" in again
    assert "1 runs: 0 were finished before, 1 finished now, 0 failed" in again
    assert len(lines_of(run / "log.jsonl")) == 100 and results_of(run)["metrics"]
    loaded = modules_in(imports)
    assert not loaded & {"transformers.trainer", "datasets", "evaluate", "matplotlib", "pandas",
                         "peft"}
    own = {file for name in loaded for file in (ROOT / f"{name.replace('.', '/')}.py",
                                                ROOT / name.replace(".", "/") / "__init__.py")
           if file.exists()}
    hashed = {file for pattern in TRAINS for file in ROOT.glob(pattern)}
    assert ROOT / "experts.py" in own and own <= hashed


# --- scripts ------------------------------------------------------------------------------------


def test_scripts_are_sound():
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", "-x", *SCRIPTS], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def calls(tmp_path):
    """Run a script without its exec -> the arguments of each call of study.py."""
    (tmp_path / "env").write_text(
        "exec() { [ \"$1\" != srun ] || shift 3; printf '%q ' \"$@\"; echo; }\n"
        "source() { :; }\n"  # of scripts/setup.sh, which may install
        "scontrol() { echo first; echo second; }\n")

    def call(script, *argv, **environment):
        environment = os.environ | environment | {"BASH_ENV": str(tmp_path / "env")}
        done = subprocess.run(["bash", ROOT / "scripts" / script, *argv], env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [shlex.split(line) for line in done.stdout.splitlines()]
        assert all(Path(words[1]).name in ("study.py", "sweep.sh") for words in lines)
        return [words[2:] for words in lines]
    return call


@pytest.mark.parametrize("script, lines, words", [
    ("sweep.sh", 60 + 450, ()), ("table1.sh", 61 + 450, ("zero_shot",)),
    ("table2_ablations.sh", 50, ("--no_bad", "--no_dog", "random")),
    ("table3_cost.sh", 6, ("pissa", "--no_dog")),
    ("fig12_sensitivity.sh", 80, ("--num_experts", "--rank"))])
def test_experiments_by_name(script, lines, words, calls, capsys):
    """Each experiment has its list, here for one model."""
    (argv,) = calls(script, "--models", "qwen3-4b")
    commands, _ = dry(capsys, *argv)
    assert len(commands) == lines
    assert all(any(word in command for command in commands) for word in words)


@pytest.mark.parametrize("form, setting, held_out, methods, rates", [
    ([], "mixed", 6, 9, (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)),
    (["sequence"], "sequential", 6, 10, (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)),
    (["instrument"], "sequential", 40, 11, (5e-5, 1e-4, 2e-4, 5e-4))], ids=str)
def test_tuning_tries_every_rate_for_every_method(form, setting, held_out, methods, rates, calls,
                                                  capsys):
    """It uses held-out training rows, and a seed that no comparison uses."""
    (argv,) = calls("tune.sh", *form, "--dry-run")
    given = [train_flags(words) for words in dry(capsys, *argv)[0]]
    assert {(args.seed, args.setting, args.validation, args.eval_loss) for args in given} == {
        (101, setting, held_out, True)}
    assert Counter(args.learning_rate for args in given) == dict.fromkeys(rates, methods)


@pytest.mark.parametrize("rows, often", [("24", 3), ("500", 25)])
def test_tuning_with_other_steps(rows, often, calls, capsys):
    """Runs with ROWS lie in a folder of their own and regroup about as often in a task."""
    (argv,) = calls("tune.sh", "instrument", "--dry-run", ROWS=rows)
    given = [train_flags(words) for words in dry(capsys, *argv)[0]]
    assert {args.max_train_per_task for args in given} == {int(rows)}
    assert {args.regroup_every for args in given if args.method == "badit"} == {often}
    assert {args.output_dir.parent.name for args in given} == {f"tune-instrument-{rows}"}


def test_the_instrument_has_all_methods_in_both_settings(calls, capsys):
    """Six tasks, regrouped every ten steps, five seeds, nothing but the method differs.

    Forward needs each method on each task alone, with the same steps between regroupings.
    """
    given = [train_flags(words) for argv in calls("compare.sh", "instrument", "--dry-run")
             for words in dry(capsys, *argv)[0]]
    trained = [args for args in given if args.method != "zero_shot"]
    assert Counter((args.seed, args.setting) for args in trained) == dict.fromkeys(
        itertools.product((1, 2, 3, 4, 5), ("mixed", "sequential")), 14) | dict.fromkeys(
        itertools.product((1, 2, 3, 4, 5), ["single"]), 14 * 6)
    assert {(args.max_train_per_task, args.max_eval_per_task, args.epochs, args.max_length,
             len(args.tasks), args.eval_tasks == "new") for args in trained} == {
        (200, 50, 2, 256, 6, False), (200, 50, 2, 256, 6, True), (200, 50, 2, 256, 1, False)}
    assert {args.regroup_every for args in trained if args.method == "badit"} == {10}


def test_the_short_tasks_in_sequence(calls, capsys):
    """Every task is evaluated after every stage, which the Forget Rate needs."""
    given = [train_flags(words) for argv in calls("compare.sh", "sequence", "--dry-run")
             for words in dry(capsys, *argv)[0]]
    trained = {(args.method, args.learning_rate, args.setting, args.eval_tasks, args.seed)
               for args in given if args.method != "zero_shot"}
    assert trained == {(method, rate, "sequential", "all", seed) for method, rate in
                       (("lora", 1e-3), ("badit", 2e-4), ("pissa", 2e-4)) for seed in range(1, 6)}


def test_new_seeds(calls, capsys):
    given = [train_flags(words) for argv in calls("compare.sh", "new-seeds", "--dry-run")
             for words in dry(capsys, *argv)[0]]
    trained = Counter(args.seed for args in given if args.method != "zero_shot")
    assert trained == dict.fromkeys(range(6, 16), 6)
    assert {args.learning_rate for args in given if args.routing == "energy"} == {5e-4}


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_slurm_runs_one_line_of_the_same_list(nodes, calls, capsys):
    """Job I of the array runs line I; several nodes shard the base over all their GPUs."""
    sweep = ["--models", "qwen3-4b", "--seeds", "2", "--", "--epochs", "3"]
    (argv,) = calls("slurm_array.sh", *sweep, SLURM_SUBMIT_DIR=str(ROOT), SLURM_ARRAY_TASK_ID="7",
                    SLURM_NNODES=nodes, SLURM_GPUS_ON_NODE="4", SLURM_JOB_NODELIST="nodes")
    ((words,), ordinary) = dry(capsys, *argv)[0], dry(capsys, *sweep)[0][7]
    launcher, flags = words[:words.index("train.py")], words[words.index("train.py"):]
    assert flags == ordinary[ordinary.index("train.py"):]
    args = launch_command_parser().parse_args([*launcher[2:], "train.py"])
    wanted = (2, 8, "first", "c10d") if nodes == "2" else (None, None, None, "static")
    assert (args.num_machines, args.num_processes, args.main_process_ip, args.rdzv_backend
            ) == wanted


@pytest.mark.parametrize("script, argv", [
    ("compare.sh", ["tiny"]), ("compare.sh", []), ("slurm_array.sh", []),
    ("compare.sh", ["mini", "--settings", "mixed"]), ("tune.sh", ["--methods=badit"])])
def test_scripts_refuse_in_one_line(script, argv):
    refused = subprocess.run(["bash", ROOT / "scripts" / script, *argv], capture_output=True,
                             text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: ")


def test_accelerate_configurations():
    """Accelerate reads each as its name says."""
    found = {path.stem: accelerate_config.load_config_from_file(str(path))
             for path in (ROOT / "scripts" / "accelerate").glob("*.yaml")}
    described = {name: (config.num_processes, config.mixed_precision,
                        str(config.distributed_type).split(".")[-1])
                 for name, config in found.items()}
    assert described == {"one_gpu": (1, "bf16", "NO"), "eight_gpus": (8, "bf16", "MULTI_GPU"),
                         "sharded": (8, "bf16", "FSDP"), "cpu": (1, "no", "NO")}
