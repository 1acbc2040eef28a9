"""The command line of train.py: every flag in one row, and which may be combined.

A row says what the flag takes and means, and once what else depends on it: whether it matters
without training, whether equal runs may differ in it, whether runs of one table may. Flags of
methods follow from their settings in registry.py. Nothing here needs torch.
"""

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from harness.adapter_config import base_name, read_adapter_config
from inputs import formats
from inputs.errors import InputError
from inputs.numbers import Fraction, Positive, PositiveInt, Seed
from inputs.settings import Parser, add_argument, check_each
from inputs.suites import NAMED, ORDERS
from registry import EMBEDDED, METHODS, MODELS

PAPER_BATCH = 8
# What --allow_other lets differ: such a run completes, but may differ in its last digits.
OVERRIDABLE = ("code", "versions", "threads", "device", "paths")


@dataclass(frozen=True)
class Flag:
    """One row."""

    group: str  # its heading in --help
    name: str
    type: Any  # as in inputs/settings.py
    default: Any
    help: str
    metavar: str | None = None
    check: Any = None
    of_training: bool = False  # not read where nothing is trained
    of_run: bool = False  # equal runs may differ in it; can be given beside --from_results
    is_path: bool = False  # names what is compared by its content; --allow_other paths frees it
    needs_setting: tuple[str, ...] = ()  # read with these alone
    table: bool | str = False  # must be equal in one table of a report: True, or "trained" runs
    alone: str = "equal"  # for a run on one task alone: equal, may "differ", means "nothing"
    of_study: bool = False  # chosen by a study for each of its runs
    of_method: bool = False

    @property
    def metadata(self):
        return {"check": self.check}


FLAGS = (
    Flag("run", "method", str, "badit", f"one of {', '.join(METHODS)} (default: badit)",
         of_study=True),
    Flag("run", "model", str, EMBEDDED, f"one of {', '.join(MODELS)}, a checkpoint's folder, or a "
         f"hub id such as Qwen/Qwen3-0.6B (default: {EMBEDDED})", is_path=True, of_study=True),
    Flag("run", "base", formats.Base, "dense", "store the frozen linear layers of the model's "
         "blocks as they are, in 8 bits a weight or in 4.5 (default: dense)", table=True),
    Flag("run", "shard_base", bool, False, "share the frozen base out over the processes (FSDP2); "
         "the result is that of DDP; as by `accelerate launch --use_fsdp`",
         of_run=True),
    Flag("run", "plan", bool, False, "only say what it takes of a device's memory, with every "
         "--base, on one to eight processes; loads no weights", of_training=True, of_run=True,
         of_study=True),
    Flag("run", "setting", Literal["mixed", "sequential", "single"], "mixed",
         "train all tasks together, one after the other, or each alone from the base model "
         "(default: mixed)", of_training=True, alone="nothing", of_study=True),
    Flag("run", "seed", Seed, 1, "also decides the task order (default: 1)", of_study=True),
    Flag("run", "output_dir", str | None, None,
         "default: runs/<method>-<setting>-<model>-seed<seed>", of_run=True, of_study=True),
    Flag("run", "overwrite", bool, False, "reuse an --output_dir that is in use, deleting only "
         "what this program wrote there", of_run=True, of_study=True),
    Flag("run", "resume", bool, False, "go on from the newest whole checkpoint in --output_dir, "
         "exactly as if the run had never been stopped; from the beginning where there is none",
         of_run=True, of_study=True),
    Flag("run", "checkpoint_every", PositiveInt | None, None, "optimizer steps between "
         "checkpoints (default: only before and after every evaluation); the last two are kept "
         "until the run is finished", metavar="STEPS", of_run=True),
    Flag("run", "from_results", str | None, None, "repeat the run that wrote this results.json, "
         "with all its flags", metavar="FILE", of_run=True, of_study=True),
    Flag("run", "allow_other", tuple[Literal[OVERRIDABLE], ...], (), "for --resume and "
         f"--from_results: what may be another than it was, of {', '.join(OVERRIDABLE)} (of "
         "models and data, whose content is compared); with all but paths the result may differ "
         "in its last digits", metavar="WHAT", of_run=True),
    Flag("run", "deterministic", bool, False, "on a GPU, only kernels that give equal bits in "
         "equal runs, where there is one"),
    Flag("run", "report_to", Literal["none", "tensorboard", "wandb", "trackio", "mlflow"], "none",
         "experiment tracker, besides the files in --output_dir (default: none)", of_run=True),

    Flag("data", "suite", str, "mini", f"mini (shipped), {', '.join(NAMED)}, or a folder of "
         "tasks in the natural-instructions layout (default: mini)", is_path=True, alone="differ",
         of_study=True),
    Flag("data", "data_dir", str | None, None, f"where {' or '.join(NAMED)} is (default: "
         "$BADIT_DATA or its folder of that name, or the download)", is_path=True, alone="differ"),
    Flag("data", "tasks", tuple[str, ...] | None, None, "only these, by name or T-number (T363)",
         metavar="TASK", alone="differ", of_study=True),
    Flag("data", "task_order", tuple[str, ...] | None, None, "order for --setting sequential: "
         f"every task by name or T-number, or of long_sequence {', '.join(ORDERS)} (default: that "
         "of the seed, Table 5)", metavar="TASK", of_training=True,
         needs_setting=("sequential",), alone="nothing"),
    Flag("data", "max_train_per_task", PositiveInt | None, None, "the first N (default: all)",
         metavar="N", of_training=True, table="trained"),
    Flag("data", "sample", bool, False, "of --max_train_per_task: N drawn by the seed, not the "
         "first", of_training=True, table="trained"),
    Flag("data", "max_eval_per_task", PositiveInt | None, None, "the first N (default: all)",
         metavar="N", table=True),
    Flag("data", "validation", PositiveInt | None, None, "to choose settings by: the last N "
         "training rows of every task take the place of its test rows, and are not trained on",
         metavar="N", table=True),
    Flag("data", "max_length", PositiveInt, 1024, "tokens of prompt + target in training, of the "
         "prompt in evaluation (default: 1024)", table=True),
    Flag("data", "chat_template", bool, False, "wrap prompts in the model's chat template",
         table=True),

    Flag("training", "epochs", PositiveInt, 10, "per stage (default: 10)", of_training=True,
         table="trained"),
    Flag("training", "batch_size", PositiveInt | None, None, f"per process (default: {PAPER_BATCH} "
         "/ (processes * accumulation steps))", metavar="N", of_training=True, alone="differ"),
    Flag("training", "gradient_accumulation_steps", PositiveInt, 1, "micro-batches per optimizer "
         "step and process (default: 1)", metavar="N", of_training=True, alone="differ"),
    Flag("training", "learning_rate", Positive, 2e-4, "peak of AdamW (default: 2e-4)",
         of_training=True, table="trained"),
    Flag("training", "warmup_ratio", Fraction, 0.03, "share of a stage's steps before the cosine "
         "(default: 0.03)", of_training=True, table="trained"),
    Flag("training", "max_grad_norm", Positive, 1.0, "clipping (default: 1.0)", of_training=True,
         table="trained"),
    Flag("training", "gradient_checkpointing", bool, False, "less memory, about a third slower",
         of_training=True),

    Flag("evaluation", "eval_tasks", Literal["all", "seen", "new", "none"], "all", "tasks "
         "evaluated after every stage; new: those that it trained, and all after the last, which "
         "gives every metric but the Forget Rate (default: all)", of_training=True,
         alone="nothing"),
    Flag("evaluation", "eval_before", bool, False, "evaluate before training too, as row 0",
         of_training=True, alone="nothing"),
    Flag("evaluation", "eval_batch_size", PositiveInt, 16, "per process (default: 16)",
         alone="differ"),
    Flag("evaluation", "max_new_tokens", PositiveInt, 50, "per answer (default: 50)", table=True),
    Flag("evaluation", "eval_loss", bool, False, "also the mean loss of the test items' answers, "
         "which tells methods apart where few items' scores cannot"),
    Flag("evaluation", "eval_only", bool, False, "evaluate --adapter DIR; nothing is trained",
         of_study=True),
    Flag("evaluation", "adapter", str | None, None, "adapter folder of a finished run: to be "
         "evaluated with --eval_only, or to be trained on, with its method and settings",
         metavar="DIR", is_path=True, of_study=True),
    Flag("evaluation", "single_task_results", str | None, None, "results.json of the same run "
         "with --setting single, for the metric `forward`", metavar="FILE", of_training=True,
         is_path=True, needs_setting=("mixed", "sequential"), alone="nothing"),
    Flag("evaluation", "paper_metrics", bool, False, "also the mean score, Backward and "
         "Forget Rate as the released scripts compute them", of_training=True,
         needs_setting=("mixed", "sequential"), alone="nothing"),
)


def method_flags():
    """The rows that follow from the methods' settings: shared ones first, then each method's."""
    rows, seen = [], {flag.name for flag in FLAGS}
    for name, entry in METHODS.items():
        for field in fields(entry.settings):
            if field.name in seen:
                continue
            seen.add(field.name)
            own = field.name in entry.settings.__annotations__
            about = field.metadata
            rows.append(Flag(name if own else "adapters", field.name, field.type, field.default,
                             about["help"], about["metavar"], about["check"],
                             table=about["table"], of_method=True))
    return sorted(rows, key=lambda flag: flag.group != "adapters")


ALL_FLAGS = {flag.name: flag for flag in (*FLAGS, *method_flags())}


def names(**wanted):
    """The names of the flags whose rows have these values, such as of_run=True."""
    return {name for name, flag in ALL_FLAGS.items()
            if all(getattr(flag, key) == value for key, value in wanted.items())}


PROMPT_FLAGS = ("suite", "data_dir", "tasks", "max_length", "max_new_tokens")
RUN_FLAGS, PATH_FLAGS = names(of_run=True), names(is_path=True)
TRAINING_FLAGS, STUDY_FLAGS = names(of_training=True), names(of_study=True)


def build_parser():
    """All flags with the paper's defaults (Appendix G.4)."""
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="Train and evaluate a method on a suite of tasks.",
                    epilog="Precision and processes come from `accelerate launch`, for example "
                           "`accelerate launch --mixed_precision bf16 train.py --method badit`.")
    groups = {}
    for flag in ALL_FLAGS.values():
        group = groups.get(flag.group) or parser.add_argument_group(flag.group)
        groups[flag.group] = group
        add_argument(group, flag.name, flag.type, flag.default, flag.help, flag.metavar, flag.check)
    return parser


def parse_flags(argv):
    """Parse and cross-check `argv` -> (args, names of the flags that were typed)."""
    refuse_odd_words(argv)
    parser = build_parser()
    typed = typed_flags(parser, argv)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, list(value) if isinstance(value, tuple) else value)
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with what --overwrite would delete: give one of them")
    if args.allow_other and not (args.resume or args.from_results is not None):
        raise InputError("--allow_other is read with --resume or --from_results only")
    if args.from_results is not None:
        args, typed = repeated_flags(args, typed), set()
    if args.adapter is not None:
        config, settings = read_adapter_config(args.adapter)
        if args.from_results is None:
            take_frame(args, typed, config)
        if "method" in typed and args.method != config.method:
            raise InputError(f"--method {args.method}: the adapter was made by {config.method}")
        if "base" in typed and args.base != config.base:
            raise InputError(f"--base {args.base}: the adapter was made on a base that is stored "
                             f"{config.base}, which is another model")
        args.method, args.base = config.method, config.base
        if not args.eval_only:
            take_settings(args, typed, settings)
    if args.method not in METHODS:
        raise InputError(f"--method {args.method!r} is unknown; allowed: {', '.join(METHODS)}")
    refuse_unread_flags(args, typed)
    if not args.eval_only:
        settings_of(args).refuse_unread(typed)
    args.output_dir = Path(args.output_dir or default_output_dir(args))
    return args, typed


def trained_on(args):
    """The flags of PROMPT_FLAGS, as adapter_config.json has them."""
    return {name: getattr(args, name) for name in PROMPT_FLAGS}


def take_frame(args, typed, config):
    """Take over the model and frame of an adapter and, to evaluate it, its suite and prompts.

    Typed flags count more. Raises InputError for values that no such flag takes.
    """
    model = None if "model" in typed else base_name(args.adapter, config)
    taken = {"model": model, "chat_template": config.chat_template}
    taken |= config.trained_on if args.eval_only else {}
    unknown = taken.keys() - {"model", "chat_template", *PROMPT_FLAGS}
    if unknown:
        raise InputError(f"{args.adapter}: {sorted(unknown)[0]!r:.60} is no flag that says on "
                         f"which prompts an adapter was trained: {', '.join(PROMPT_FLAGS)}")
    other_suite = {"data_dir", "tasks"} if "suite" in typed else set()
    for name, value in taken.items():
        if name not in typed | other_suite and (name != "model" or value is not None):
            setattr(args, name, read_value(name, value, args.adapter))


def take_settings(args, typed, settings):
    """Go on with the `settings` of an adapter; the seed is the run's own.

    Raises InputError for a typed flag that says otherwise.
    """
    for name in sorted(set(settings.names()) & names(of_method=True)):
        value = getattr(settings, name)
        value = list(value) if isinstance(value, tuple) else value
        if name in typed and getattr(args, name) != value:
            raise InputError(f"--{name} {getattr(args, name)}: the adapter goes on with the "
                             f"settings that it was made with, here {value}")
        setattr(args, name, value)


def refuse_odd_words(argv):
    """Raise InputError for a word that no file of a run could hold."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!r} is not UTF-8, which every file of a run is") from None
        if re.fullmatch(r"--\w+=--", word):  # argparse would take it for an empty list
            raise InputError(f"{word}: a flag's value cannot be --")


def typed_flags(parser, argv):
    """The names of the flags that stand in `argv`."""
    untyped = object()
    probe = argparse.Namespace(**dict.fromkeys(ALL_FLAGS, untyped))
    return {name for name, value in vars(parser.parse_args(argv, probe)).items()
            if value is not untyped}


def settings_of(args):
    """The settings of the run's method. Raises InputError where they contradict each other."""
    cls = METHODS[args.method].settings
    values = {name: getattr(args, name) for name in cls.names()}
    return cls(**{name: tuple(value) if isinstance(value, list) else value
                  for name, value in values.items()})


def repeated_flags(args, typed):
    """The flags that results.json recorded, under those of RUN_FLAGS that were typed now."""
    free = RUN_FLAGS | (PATH_FLAGS if "paths" in args.allow_other else set())
    for flag in sorted(typed - free):
        paths = ", ".join(f"--{name}" for name in sorted(PATH_FLAGS))
        raise InputError(f"--{flag} is not read with --from_results, which repeats all flags of "
                         f"{args.from_results} (but {paths} with --allow_other paths)")
    _, results = formats.read(args.from_results, formats.Results)
    repeated = from_values(results.args, args.from_results)
    for name in RUN_FLAGS | (typed & PATH_FLAGS):
        setattr(repeated, name, getattr(args, name))
    return repeated


def from_values(values, source):
    """The flags, without those of RUN_FLAGS, that have `values` {flag: value}.

    Raises InputError for one that no such flag takes; `source` is the file that holds them.
    """
    wanted = ALL_FLAGS.keys() - RUN_FLAGS
    if values.keys() != wanted:
        raise InputError(f"{source} is of another version of this program, with other flags: "
                         f"{sorted(wanted ^ values.keys())[:5]}")
    return argparse.Namespace(**{name: read_value(name, value, source)
                                 for name, value in values.items()})


def read_value(name, value, source):
    """The value of a flag that stands in a file. Raises InputError for one that it cannot have."""
    try:
        read = msgspec.convert(value, ALL_FLAGS[name].type)
        check_each(ALL_FLAGS[name], read)
    except (msgspec.ValidationError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{source}: {value!r:.60} is no value of --{name} ({error})") from None
    return list(read) if isinstance(read, tuple) else read


def recorded_args(args):
    """Every flag but those in which equal runs may differ, as results.json has them."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in RUN_FLAGS}


def as_argv(values):
    """The command-line words that give these values {flag: value}; defaults are left out."""
    words = []
    for name, value in sorted(values.items()):
        default = ALL_FLAGS[name].default
        if value is None or value == (list(default) if isinstance(default, tuple) else default):
            continue
        if value is True:
            words += [f"--{name}"]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"]
    return words


def comparable(args, trained):
    """{name: value} of the flags that must be equal in runs that stand in one table."""
    values = {}
    read = METHODS[args.method].settings.names()
    for name, flag in ALL_FLAGS.items():
        if flag.table is True and not flag.of_method:
            values[f"--{name}"] = getattr(args, name)
        elif flag.table and trained and (not flag.of_method or name in read):
            place = f", {args.setting}" if flag.table == "by setting" else ""
            values[f"--{name}{place}"] = getattr(args, name)
    if trained and args.setting == "sequential":
        values["--task_order"] = args.task_order
    if trained and args.adapter is not None:  # a run that went on stands in no table with others
        values["--adapter"] = args.adapter
    return values


def refuse_unread_flags(args, typed):
    """Raise InputError for a typed flag that this method or setting would ignore."""
    entry = METHODS[args.method]
    of_methods = names(of_method=True)
    if args.eval_only:
        unread, why = TRAINING_FLAGS | of_methods, "with --eval_only"
        if entry.trains and args.adapter is None:
            raise InputError("--eval_only needs --adapter DIR (or --method zero_shot)")
    else:
        unread = of_methods - set(entry.settings.names())
        why = f"by --method {args.method} in training"
        if not entry.trains:
            unread, why = unread | TRAINING_FLAGS, f"by --method {args.method}"
    for flag in sorted(typed & unread):
        raise InputError(f"--{flag} is not read {why}")
    for name in sorted(typed):
        settings = ALL_FLAGS[name].needs_setting
        if settings and args.setting not in settings:
            raise InputError(f"--{name} is not read with --setting {args.setting}, "
                             f"only with {' or '.join(settings)}")
    if args.sample and args.max_train_per_task is None:
        raise InputError("--sample draws the rows of --max_train_per_task N: give both")
    if args.paper_metrics and args.eval_tasks != "all":
        raise InputError("--paper_metrics needs all rows of the score matrix: --eval_tasks all")


def default_output_dir(args):
    setting = "eval" if args.eval_only or not METHODS[args.method].trains else args.setting
    setting += "-on" if args.adapter is not None and not args.eval_only else ""
    return f"runs/{args.method}-{setting}-{Path(args.model).name}-seed{args.seed}"
