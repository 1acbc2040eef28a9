"""Run a whole study: every method on every model, seed and setting. scripts/sweep.sh calls this.

    python scripts/study.py --dry-run              # the paper's 360 runs, then the single-task ones
    python scripts/study.py --models smollm2-135m --seeds 1 2 -- --epochs 1
    python report.py runs/study --out report      # tables and figures of what has finished

Words after -- go to train.py in every run. Each run has a folder of its own, so the same command
goes on with whatever was stopped; --nth runs one line of the list, for a cluster.
"""

import argparse
import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.arguments import (  # noqa: E402
    STUDY_FLAGS,
    TRAINING_FLAGS,
    Parser,
    names,
    parse_flags,
)
from harness.signals import STOPPING, leave_terminal, receive_stops  # noqa: E402
from inputs import formats  # noqa: E402
from inputs.errors import InputError, one_line  # noqa: E402
from inputs.numbers import NonNegative, Positive, Seed, from_text  # noqa: E402
from inputs.suites import NAMED, suite_folder  # noqa: E402
from inputs.task_files import resolve_names, task_folders  # noqa: E402
from registry import EMBEDDED, METHODS, MODELS, VARIANTS  # noqa: E402

PAPER_METHODS = ("lora", "pissa", "olora", "loramoe", "gainlora", "badit")
SETTINGS = ("mixed", "sequential")
RATE = "learning_rate"  # of all flags of training the one that each method may have its own of

# For the estimate of cost alone. Parameters in billions, by the models' cards.
BILLIONS = {"qwen3-8b": 8.2, "qwen3-4b": 4.0, "llama3-8b": 8.0, "llama3-3b": 3.2,
            "gemma2-9b": 9.2, "gemma2-2b": 2.6, "smollm2-135m": 0.135}
# SuperNI, counted by data.encode_suite with SmolLM2's tokenizer at --max_length 1024.
TRAIN_TOKENS, PROMPT_TOKENS, TEST_ITEMS, TASKS = 2_773_992, 266_650, 1_197, 15


class PlannedRun(NamedTuple):
    """One line of the list."""

    folder: Path
    words: list[str]  # its whole command
    model: str
    setting: str
    trains: bool


def build_parser():
    parser = Parser(prog="study.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=[name for name in MODELS if name != EMBEDDED],
        metavar="MODEL", help=f"of {', '.join(MODELS)}, or checkpoint folders (default: the six "
                              "of the paper)")
    add("--methods", nargs="+", default=list(PAPER_METHODS), metavar="METHOD",
        help=f"of {', '.join(VARIANTS)}, or one of them and its flags in quotes, such as "
             "'badit-random --regroup_every 30 --learning_rate 5e-4' (default: the paper's six)")
    add("--seeds", nargs="+", type=from_text(Seed), default=[1, 2, 3, 4, 5], metavar="SEED",
        help="(default: 1 2 3 4 5)")
    add("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="SETTING",
        help="of mixed, sequential (default: both)")
    add("--no_single", action="store_true",
        help="without the runs on one task each, which the metric Forward needs")
    add("--suite", default="superni", help=f"mini, {', '.join(NAMED)}, or a folder "
        "(default: superni)")
    add("--tasks", nargs="+", metavar="TASK", help="only these, by name or T-number")
    add("--runs", type=Path, default=Path("runs/study"),
        help="where every run gets its folder (default: runs/study)")
    add("--launcher", default="accelerate launch --config_file scripts/accelerate/one_gpu.yaml",
        help="what starts train.py: python, or accelerate launch with another file of "
             "scripts/accelerate (default: %(default)s)")
    add("--launcher_of", nargs=2, action="append", default=[], metavar=("MODEL", "LINE"),
        help="another launcher for one of --models, such as a large one that processes share; may "
             "be given several times")
    add("--dry-run", action="store_true", dest="dry_run",
        help="print the commands, one a line; and on stderr their number and a rough cost")
    add("--nth", type=int, metavar="I", help="only line I of the list, from 0")
    add("--stop_after", type=from_text(NonNegative), metavar="SECONDS",
        help="ask the run under way to save and stop after so long; the same command goes on")
    add("--tflops", type=from_text(Positive), default=200.0,
        help="for the cost: 10^12 operations per second that a GPU sustains in training (default: "
             "200, assumed, not measured)")
    add("--step_ms", type=from_text(Positive), default=30.0,
        help="for the cost: milliseconds to generate one token for a batch (default: 30, assumed)")
    return parser


def parse(argv):
    """`argv` -> (args, words for train.py). Raises InputError for what train.py would refuse."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!r} is not UTF-8") from None
    cut = argv.index("--") if "--" in argv else len(argv)
    args, passed_on = build_parser().parse_args(argv[:cut]), argv[cut + 1:]
    for name in ("models", "methods", "seeds", "settings"):
        values = getattr(args, name)
        if len(set(values)) != len(values):
            raise InputError(f"--{name} names one twice: {' '.join(map(str, values))}")
    for model in args.models:
        if model not in MODELS and not os.path.isdir(model):
            raise InputError(f"--models {model!r} is no folder and none of {', '.join(MODELS)}")
    if args.runs.exists() and not args.runs.is_dir():
        raise InputError(f"--runs {args.runs} is no folder")
    args.launcher = launcher_words(args.launcher)
    for model, _ in args.launcher_of:
        if model not in args.models:
            raise InputError(f"--launcher_of {model}: it is none of --models "
                             f"{' '.join(args.models)}")
    args.launcher_of = {model: launcher_words(line) for model, line in args.launcher_of}
    for word in passed_on:
        if word.split("=")[0].removeprefix("--") in STUDY_FLAGS:
            raise InputError(f"{word} after -- is what the study chooses for each run")
    for method in args.methods:
        check_method(method)
        for setting in args.settings:  # a bad flag ends the study here, not each of its runs
            parse_flags(flags_of(args, passed_on, method, args.models[0], args.seeds[0], setting))
    return args, passed_on


def launcher_words(text):
    """The words of --launcher. Raises InputError where there are none."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--launcher {text!r}: {error}") from None
    if not words:
        raise InputError(f"--launcher {text!r} starts no program that is here")
    return words


def check_method(method):
    """Raise InputError unless it is a name, or one with flags that its method reads."""
    name, *words = method.split() or [""]
    if name not in VARIANTS:
        raise InputError(f"--methods {method!r} is unknown; allowed: {', '.join(VARIANTS)}, or one "
                         "of them and its flags in quotes")
    name = VARIANTS[name].split()[0]
    own = {*METHODS[name].settings.names(), RATE} - {"seed"}
    for word in words:
        flag = word.removeprefix("--").split("=")[0]
        if word.startswith("--") and flag not in own:
            raise InputError(f"--methods {method!r}: {name} has no flag --{flag} of its own; those "
                             "for all runs stand after --")


# --- the list of runs ---------------------------------------------------------------------------


def words_of(method):
    """The words of one of --methods: the method's name, then flags."""
    name, *flags = method.split()
    return [*VARIANTS[name].split(), *flags]


def flags_of(args, passed_on, method, model, seed, setting, task=None):
    """The words for train.py of one run, but for its folder."""
    name, *flags = words_of(method)
    tasks = [task] if task else args.tasks
    words = ["--method", name, *flags, "--model", model, "--suite", args.suite,
             *(["--tasks", *tasks] if tasks else []), "--seed", str(seed)]
    if not METHODS[name].trains:
        return words + untrained(passed_on)
    return [*words, "--setting", setting, *(for_one_task(passed_on) if task else passed_on)]


def groups(words):
    """Words in groups, each a flag with its values."""
    found = []
    for word in words:
        if word.startswith("--") or not found:
            found.append([])
        found[-1].append(word)
    return found


def without(words, dropped):
    return [word for group in groups(words)
            if group[0].removeprefix("--").split("=")[0] not in dropped for word in group]


def untrained(passed_on):
    """The flags that mean something to a model that is not trained."""
    return without(passed_on, TRAINING_FLAGS)


def for_one_task(passed_on):
    """The flags that mean something to a run on one task alone."""
    return without(passed_on, names(alone="nothing"))


def task_names(args):
    """The tasks of the suite that are to be trained on, in no particular order."""
    if args.suite in NAMED:  # known, wherever the data may be
        known = list(NAMED[args.suite].tasks)
    else:
        known = task_folders(suite_folder(args.suite))
    return resolve_names(args.tasks, known) if args.tasks else known


def plan(args, passed_on):
    """All runs: those of the settings, then those on one task alone that their Forward needs."""

    def planned(name, words, model, setting, trains):
        folder = args.runs / name
        launcher = args.launcher_of.get(model, args.launcher)
        command = [*launcher, "train.py", *words, "--output_dir", str(folder), "--resume"]
        return PlannedRun(folder, command, model, setting, trains)

    runs, single = [], []
    for model in args.models:
        for method in args.methods:
            trains = METHODS[words_of(method)[0]].trains
            slug = "-".join(word.lstrip("-") for word in method.split())
            stem = f"{slug}-{{}}-{Path(model).name}-seed{{}}"
            # An untrained model scores the same under every seed and setting.
            for seed in args.seeds if trains else [1]:
                for setting in args.settings if trains else ["mixed"]:
                    words = flags_of(args, passed_on, method, model, seed, setting)
                    name = stem.format(setting if trains else "eval", seed)
                    runs.append(planned(name, words, model, setting, trains))
                for task in task_names(args) if trains and not args.no_single else []:
                    words = flags_of(args, passed_on, method, model, seed, "single", task)
                    digest = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]
                    name = f"single/{stem.format(task.split('_')[0], seed)}-{digest}"
                    single.append(planned(name, words, model, "single", trains))
    folders = {}
    for run in runs + single:
        if run.folder in folders:
            raise InputError(f"two runs would share the folder {run.folder}: "
                             f"{shlex.join(run.words)} and {shlex.join(folders[run.folder])}")
        folders[run.folder] = run.words
    return runs + single


def hours(run, args):
    """A rough estimate of a run's GPU hours on SuperNI, from `--tflops` and `--step_ms`.

    Training takes 4 operations per weight and token (forward, and backward without the gradients
    of frozen weights), reading a prompt 2; generation is bound by its steps.
    """
    flags, _ = parse_flags(run.words[run.words.index("train.py") + 1:])
    weights = 1e9 * BILLIONS[run.model]
    share = 1 / TASKS if run.setting == "single" else 1
    train = 4 * weights * TRAIN_TOKENS * flags.epochs * share if run.trains else 0
    rounds = TASKS if run.setting == "sequential" and run.trains else 1
    read = 2 * weights * PROMPT_TOKENS * share * rounds
    steps = TEST_ITEMS * share / flags.eval_batch_size * flags.max_new_tokens * rounds
    return ((train + read) / (1e12 * args.tflops) + steps * args.step_ms / 1000) / 3600


def say(text):
    """Print on stdout, at once. Raises OSError where that is closed or full."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Or the interpreter would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "stdout") from None


def print_dry_run(runs, args):
    """The commands on stdout; their number and cost on stderr."""
    with contextlib.suppress(BrokenPipeError):  # of --dry-run | head
        say("\n".join(shlex.join(run.words) for run in runs))
    single = sum(run.setting == "single" for run in runs)
    done = sum((run.folder / "results.json").exists() for run in runs)
    note = f"{len(runs) - single} runs, {single} on one task alone; {done} of them finished"
    if all(run.model in BILLIONS for run in runs) and args.suite == "superni" and not args.tasks:
        kinds = {}  # runs that cost the same
        for run in runs:
            kinds.setdefault((run.model, run.setting, run.trains), []).append(run)
        total = sum(len(same) * hours(same[0], args) for same in kinds.values())
        note += (f"; about {total:,.1f} GPU hours at {args.tflops:g} TFLOP/s and "
                 f"{args.step_ms:g} ms a generated token (both assumed), {total / 8 / 24:,.1f} "
                 "days on 8 GPUs")
    print(note, file=sys.stderr)


# --- running ------------------------------------------------------------------------------------


class Stopper:
    """Passes what asks to stop, or the end of `seconds`, on to the command under way, once.

    A context manager; `asked` is the signal, None until one has come.
    """

    def __init__(self, seconds=None):
        self.asked, self.group, self.told = None, None, False
        self.end = None if seconds is None else time.monotonic() + seconds

    def __enter__(self):
        self.before = receive_stops(self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, _=None):
        self.asked = self.asked or signal.Signals(number)
        if number == signal.SIGHUP:
            leave_terminal()
        self._tell()

    def _tell(self):
        """Pass the signal on, once: a second one would stop a run without saving."""
        if self.group is not None and self.asked and not self.told:
            self.told = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, self.asked)

    def check(self):
        """The signal that asks to stop, or None; the end of time counts as SIGTERM."""
        if self.end is not None and time.monotonic() >= self.end:
            self._ask(signal.SIGTERM)
        return self.asked

    def run(self, words):
        """Run a command in a process group of its own -> its status, once all of it has ended."""
        process = subprocess.Popen(words, start_new_session=True)
        self.group = process.pid
        self._tell()  # a signal may have come in between
        while process.poll() is None or group_lives(self.group):
            self.check()
            time.sleep(0.2)
        self.group = None
        return process.returncode


def group_lives(group):
    """Whether a process group has a member that has not ended: launchers may end first."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def finished(run):
    """Whether the run has its results. Raises InputError where they are of other flags."""
    path = run.folder / "results.json"
    if not path.exists():
        return False
    wanted, _ = parse_flags(run.words[run.words.index("train.py") + 1:])
    there = formats.read(path, formats.Results)[1].args
    different = sorted(name for name, value in there.items()  # the batch follows the processes
                       if name != "batch_size" and vars(wanted).get(name) != value)
    if different:
        raise InputError(f"{path} is of a run with another --{different[0]} "
                         f"({there[different[0]]!r}): name another --runs")
    return True


def ending(status):
    """How a run ended that has no results, in words: one that was killed could not say it."""
    if status < 0:
        return f"ended by signal {-status}, {signal.strsignal(-status)}"
    return f"ended with status {status}"


def run_all(runs, stop_after=None):
    """Run what is not finished -> exit status: 0, 1 after failures, 128 + signal if stopped."""
    failed, done = [], 0
    with Stopper(stop_after) as stopper:
        for number, run in enumerate(runs, start=1):
            try:
                if finished(run):
                    done += 1
                    continue
            except (InputError, OSError) as error:
                print(one_line(f"error: {error}"), file=sys.stderr)
                failed.append((run, "not started"))
                continue
            status = None
            if not stopper.check():
                say(f"\n[{number} of {len(runs)}] {shlex.join(run.words)}")
                status = stopper.run(run.words)
            if status in [128 + number for number in STOPPING]:  # sent to the run alone
                stopper.asked = stopper.asked or signal.Signals(status - 128)
            if stopper.asked:
                print(f"stopped by {stopper.asked.name} in run {number} of {len(runs)}; the same "
                      "command goes on", file=sys.stderr)
                return 128 + stopper.asked
            if status or not (run.folder / "results.json").exists():
                failed.append((run, ending(status)))
    for run, reason in failed:
        print(one_line(f"failed: {reason}: {shlex.join(run.words)}"), file=sys.stderr)
    say(f"\n{len(runs)} runs: {done} were finished before, {len(runs) - done - len(failed)} "
        f"finished now, {len(failed)} failed")
    return 1 if failed else 0


def main(argv=None):
    try:
        args, passed_on = parse(sys.argv[1:] if argv is None else list(argv))
        runs = plan(args, passed_on)
        if args.nth is not None:
            if not 0 <= args.nth < len(runs):
                raise InputError(f"--nth {args.nth} is outside 0 to {len(runs) - 1}")
            runs = [runs[args.nth]]
        if args.dry_run:
            print_dry_run(runs, args)  # perhaps for another machine
            return 0
        for launcher in (args.launcher, *args.launcher_of.values()):
            if shutil.which(launcher[0]) is None:
                raise InputError(f"--launcher {shlex.join(launcher)!r} starts no program that is "
                                 "here")
        return run_all(runs, args.stop_after)
    except (InputError, OSError) as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
