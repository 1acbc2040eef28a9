"""Run a study: every method on every model, seed and setting. scripts/sweep.sh calls this.

    python scripts/study.py --dry-run              # the paper's 360 runs, then the single-task ones
    python scripts/study.py --models smollm2-135m --seeds 1 2 -- --epochs 1
    python report.py runs/study --out report      # tables and figures of what has finished

Flags after -- go to train.py in every run. Each run has its own folder. After a stop the same
command continues: it skips finished runs and resumes the one that was stopped.
"""

import contextlib
import hashlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import filelock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.arguments import (  # noqa: E402
    ALL_FLAGS,
    STUDY_FLAGS,
    TRAINING_FLAGS,
    names,
    parse_flags,
)
from harness.output_folder import LOCK  # noqa: E402
from inputs import formats  # noqa: E402
from inputs.errors import InputError, exit_status, one_line  # noqa: E402
from inputs.numbers import Seed  # noqa: E402
from inputs.settings import Flag, did_you_mean, program_parser  # noqa: E402
from inputs.suites import NAMED, suite_folder  # noqa: E402
from inputs.task_files import resolve_names, task_folders  # noqa: E402
from registry import (  # noqa: E402
    ADDED,
    EMBEDDED,
    METHODS,
    MODELS,
    VARIANTS,
    LoraSettings,
    present_variant,
)

PAPER_METHODS = ("lora", "pissa", "olora_qr", "loramoe", "gainlora", "badit")
PAPER_MODELS = tuple(name for name in MODELS if name != EMBEDDED)
SETTINGS = ("mixed", "sequential", "single")
RATE = "learning_rate"  # the only training flag that a method may set for itself

FLAGS = (
    Flag("models", tuple[str, ...], PAPER_MODELS, f"models: {', '.join(MODELS)}, or "
         "checkpoint folders (default: the paper's six)", metavar="MODEL"),
    Flag("methods", tuple[str, ...], PAPER_METHODS, f"methods: {', '.join(VARIANTS)}. X-matched: "
         "X with as many trainable parameters as BADIT; half: PiSSA of half of BADIT's rank; "
         "badit-initial: experts that a token does not select act on it as pre-trained; badit-K2: "
         "2 experts, 1 of them active; badit-r2: experts of rank 2. Flags of a method go with its "
         "name in quotes, such as 'badit-random --regroup_every 30 --learning_rate 5e-4' (default: "
         "the paper's six)", metavar="METHOD"),
    Flag("seeds", tuple[Seed, ...], (1, 2, 3, 4, 5), "seeds (default: 1 2 3 4 5)", metavar="SEED"),
    Flag("settings", tuple[Literal[SETTINGS], ...], SETTINGS, "settings: mixed, sequential, "
         "and single, a run for each task alone, which Forward needs (default: all)",
         metavar="SETTING"),
    Flag("suite", str, "superni", f"suite: mini, {', '.join(NAMED)}, or a folder (default: "
         "superni)"),
    Flag("tasks", tuple[str, ...] | None, None, "tasks to use, by name or T-number "
         "(default: all)", metavar="TASK"),
    Flag("runs", Path, Path("runs/study"), "folder for all runs (default: runs/study)"),
    Flag("launcher", str, "accelerate launch --config_file scripts/accelerate/one_gpu.yaml",
         "command that starts train.py: python, or accelerate launch with another file of "
         "scripts/accelerate (default: accelerate launch with one_gpu.yaml)", check=shlex.split),
    Flag("dry-run", bool, False, "print the commands, one per line, and on stderr their "
         "number, without running them"),
    Flag("nth", int | None, None, "run only command I of the --dry-run list, counted from 0: for "
         "the jobs of a SLURM array (scripts/slurm_array.sh)", metavar="I"),
)


class PlannedRun(NamedTuple):
    """One run of the list."""

    folder: Path
    command: list[str]

    def flags(self):
        """Return the run's flags as train.py reads them."""
        return parse_flags(self.command[self.command.index("train.py") + 1:])[0]


def parse(argv):
    """Read `argv` -> (args, flags for train.py). Raises InputError for what train.py refuses."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = program_parser("scripts/study.py", __doc__, FLAGS)
    for word in argv[:cut]:
        if word.split("=")[0].removeprefix("--") in ALL_FLAGS.keys() - STUDY_FLAGS:
            raise InputError(f"{word} is a flag of train.py: these go after --, as in `python "
                             f"scripts/study.py -- {word} ...`")
    args, passed_on = parser.parse_args(argv[:cut]), argv[cut + 1:]
    for model in args.models:
        if model not in MODELS and not os.path.isdir(model):
            raise InputError(f"--models {model!r} is not a folder; allowed: {', '.join(MODELS)}, "
                             f"or a folder{did_you_mean(model, MODELS)}")
    if args.runs.exists() and not args.runs.is_dir():
        raise InputError(f"--runs {args.runs} is not a folder")
    for word in passed_on:
        if word.split("=")[0].removeprefix("--") in STUDY_FLAGS:
            raise InputError(f"{word} after --: the study chooses it for each run")
    for method in args.methods:
        check_method(method)
        for setting in args.settings:  # a wrong flag ends the study now, not each of its runs
            parse_flags(flags_of(args, passed_on, method, args.models[0], args.seeds[0], setting))
    return args, passed_on


def check_method(method):
    """Raise InputError unless `method` is a known name, alone or with flags of its own."""
    name, *words = method.split() or [""]
    if name not in VARIANTS:
        raise InputError(f"--methods {method!r} is unknown; allowed: {', '.join(VARIANTS)}, or one "
                         f"of them and its flags in quotes{did_you_mean(name, VARIANTS)}")
    name = VARIANTS[name].split()[0]
    own = {*METHODS[name].settings.names(), RATE} - {"seed"}
    for word in words:
        flag = word.removeprefix("--").split("=")[0]
        if word.startswith("--") and flag not in own:
            raise InputError(f"--methods {method!r}: {name} has no flag --{flag}; give flags for "
                             "all runs after --")


# --- the list of runs ---------------------------------------------------------------------------


def words_of(method):
    """Return the method's name in train.py and its flags, for one value of --methods."""
    name, *flags = method.split()
    return [*VARIANTS[name].split(), *flags]


def flags_of(args, passed_on, method, model, seed, setting, tasks=None):
    """Return train.py's flags for one run, without its folder."""
    name, *flags = words_of(method)
    words = ["--method", name, *flags, "--model", model, "--suite", args.suite,
             *(["--tasks", *tasks] if tasks else []), "--seed", str(seed)]
    if not METHODS[name].trains:
        return words + without(passed_on, TRAINING_FLAGS)
    ignored = names(ignored_by_single=True) if setting == "single" else ()
    return [*words, "--setting", setting, *without(passed_on, ignored)]


def without(words, dropped):
    """Return the words of a command line without the `dropped` flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = word.removeprefix("--").split("=")[0] not in dropped
        if keep:
            kept.append(word)
    return kept


def task_names(args):
    """Return the names of the tasks to train on; those of a named suite need no data."""
    known = (list(NAMED[args.suite].tasks) if args.suite in NAMED
             else task_folders(suite_folder(args.suite)))
    return resolve_names(args.tasks, known) if args.tasks else known


def plan(args, passed_on):
    """Return all runs: those on all tasks, then the single-task runs that Forward needs."""
    runs, single = [], []  # (name of the folder, flags)
    for model, method in itertools.product(args.models, args.methods):
        trains = METHODS[words_of(method)[0]].trains
        slug = "-".join(word.lstrip("-") for word in method.split())
        end = f"{Path(model).name}-seed"
        # An untrained model scores the same for every seed and setting.
        for seed, setting in itertools.product(args.seeds, args.settings) if trains else [(1, "")]:
            if setting != "single":
                words = flags_of(args, passed_on, method, model, seed, setting, args.tasks)
                runs.append((f"{slug}-{setting or 'eval'}-{end}{seed}", words))
                continue
            for task in task_names(args):
                words = flags_of(args, passed_on, method, model, seed, setting, [task])
                digest = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
                name = f"single/{slug}-{task.split('_')[0]}-{end}{seed}-{digest}"
                single.append((name, words))
    planned = {}
    for name, words in runs + single:
        if name in planned:
            raise InputError(f"two runs would share the folder {args.runs / name}: "
                             f"{shlex.join(words)} and {shlex.join(planned[name])}")
        planned[name] = words
    return [PlannedRun(args.runs / name, [*args.launcher, "train.py", *words, "--output_dir",
                                          str(args.runs / name), "--resume"])
            for name, words in planned.items()]


BILLIONS = {"qwen3-8b": 8.2, "qwen3-4b": 4.0, "llama3-8b": 8.0, "llama3-3b": 3.2,
            "gemma2-9b": 9.2, "gemma2-2b": 2.6, "smollm2-135m": 0.135}  # of parameters


def gpu_hours(flags):
    """Estimate a run's GPU hours on SuperNI, at an assumed 200 TFLOP/s and 30 ms a generated token.

    Operations per weight and token: 4 in training, as frozen weights get no gradients, 2 for a
    prompt. The tokens of SuperNI are counted with SmolLM2's tokenizer.
    """
    rounds = 15 if flags.setting == "sequential" else 1  # an evaluation after every task
    tokens = 4 * 2_773_992 * flags.epochs * METHODS[flags.method].trains + 2 * 266_650 * rounds
    steps = 1_197 / flags.eval_batch_size * flags.max_new_tokens * rounds
    seconds = 1e9 * BILLIONS[flags.model] * tokens / 200e12 + steps * 0.03
    return seconds / 3600 / (15 if flags.setting == "single" else 1)


def print_dry_run(runs, args):
    """Print the commands on stdout, and their number and cost on stderr."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for --dry-run | head
    flags = [run.flags() for run in runs]
    single = sum(each.setting == "single" for each in flags)
    note = f"{len(runs) - single} runs, {single} on one task alone"
    cut = any(each.max_train_per_task or each.max_eval_per_task for each in flags)
    if {*args.models} <= BILLIONS.keys() and args.suite == "superni" and not (args.tasks or cut):
        note += f"; about {sum(map(gpu_hours, flags)):,.1f} GPU hours (assuming 200 TFLOP/s)"
    print(note, file=sys.stderr, flush=True)
    print("\n".join(shlex.join(run.command) for run in runs))


# --- running ------------------------------------------------------------------------------------


class Runner:
    """Runs commands, and passes SIGTERM and Ctrl-C on to the one that is running."""

    def __init__(self):
        self.process = self.asked = None  # asked: the signal that asks to stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, number, _=None):
        self.asked = signal.Signals(number)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self.process.pid, number)  # a launcher may not pass a signal on

    def run(self, run):
        """Run a command to its end -> its exit status."""
        self.process = subprocess.Popen(run.command, process_group=0)
        if self.asked:  # the signal came before the process existed
            self.stop(self.asked)
        status = self.process.wait()
        self.process = None
        if self.asked and (run.folder / LOCK).exists():
            with filelock.FileLock(run.folder / LOCK):  # a launcher ends before train.py has saved
                pass
        return status


def finished(run):
    """Return whether the run has its results. Raise InputError if they come from other flags."""
    path = run.folder / "results.json"
    if not path.exists():
        return False
    results = formats.load_keys(path, ("args", "settings", "variant"))
    saved, wanted = ADDED | formats.convert(results["args"], dict, path), vars(run.flags())
    if present_variant(results) != results["variant"] and wanted["alpha"] == LoraSettings.alpha:
        saved["alpha"] = wanted["alpha"]
    # The batch size is that of one process. A record may have flags that no longer exist.
    different = sorted(name for name in (saved.keys() & wanted.keys()) - {"batch_size"}
                       if wanted[name] != saved[name])
    if different:
        raise InputError(f"{path} was made with another --{different[0]} "
                         f"({saved[different[0]]!r}): give another --runs")
    return True


def run_all(runs):
    """Run what is not finished -> exit status: 0, 1 after failures, 128 + signal if stopped."""
    failed, done, runner = [], 0, Runner()
    for number, run in enumerate(runs, start=1):
        try:
            if finished(run):
                done += 1
                continue
            print(f"\n[{number} of {len(runs)}] {shlex.join(run.command)}", flush=True)
            status = runner.run(run)
        except InputError as error:
            status = one_line(str(error))
        if runner.asked:
            print(f"stopped by {runner.asked.name} in run {number} of {len(runs)}; the same "
                  "command continues", file=sys.stderr)
            return 128 + runner.asked
        if status or not (run.folder / "results.json").exists():
            failed.append(f"failed: {status}: {shlex.join(run.command)}")
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    print(f"\n{len(runs)} runs: {done} were finished before, {len(runs) - done - len(failed)} "
          f"finished now, {len(failed)} failed")
    return 1 if failed else 0


def study(argv):
    """Carry out the study that the flags in `argv` ask for -> its exit status."""
    args, passed_on = parse(argv)
    runs = plan(args, passed_on)
    if args.nth is not None:
        if not 0 <= args.nth < len(runs):
            raise InputError(f"--nth {args.nth} is outside 0 to {len(runs) - 1}")
        runs = [runs[args.nth]]
    if args.dry_run:
        print_dry_run(runs, args)  # perhaps for another machine
        return 0
    if shutil.which((args.launcher or [""])[0]) is None:
        raise InputError(f"--launcher {shlex.join(args.launcher)!r}: no such program")
    return run_all(runs)


def main(argv=None):
    return exit_status(study, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
