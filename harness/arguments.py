"""The command line of train.py: each flag once, and which flags may be combined.

Each row holds a flag's type and help, and whether it affects training, a run's identity, and
comparability in one table. The flags of methods follow from their settings in registry.py.
Nothing here needs torch.
"""

import argparse
import functools
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from harness import output_folder
from harness.adapter_config import base_name, read_adapter_config
from inputs import formats, settings
from inputs.errors import InputError, error_lines, escape_output
from inputs.numbers import Fraction, Positive, PositiveInt, Seed
from inputs.settings import Parser, add_flags, did_you_mean, read_value
from inputs.suites import NAMED, ORDERS
from registry import EMBEDDED, METHODS, MODELS, VARIANTS

PAPER_BATCH = 8
# What --allow_other lets differ. The run then completes, but its last digits may differ.
OVERRIDABLE = ("code", "versions", "threads", "device", "paths")


@dataclass(frozen=True)
class Flag(settings.Flag):
    """A flag of train.py."""

    only_training: bool = False  # refused where nothing is trained
    only_setting: str | None = None  # refused with any other --setting
    not_identity: bool = False  # equal runs may differ in it
    is_path: bool = False  # its content is compared; --allow_other paths lets the path differ
    # Shared by all runs of one table, by its "trained" ones, or "by setting".
    same_in_table: bool | str = False
    ignored_by_single: bool = False  # a study drops it from --setting single
    set_by_study: bool = False  # a study chooses it for each of its runs
    of_method: bool = False


RUN = (
    Flag("method", str, "badit", f"one of {', '.join(METHODS)} (default: badit)",
         set_by_study=True),
    Flag("model", str, EMBEDDED, f"one of {', '.join(MODELS)}, a checkpoint's folder, or a hub id "
         f"such as Qwen/Qwen3-0.6B (default: {EMBEDDED})", is_path=True, set_by_study=True),
    Flag("base", formats.Base, "dense", "storage of the frozen linear layers of the model's "
         "blocks; dense: unchanged; int8: 8 bits per weight; nf4: 4.5 bits per weight (default: "
         "dense)", same_in_table=True),
    Flag("shard_base", bool, False, "shard the frozen base over the processes (FSDP2); the result "
         "equals DDP's; the same as `accelerate launch --use_fsdp`", not_identity=True),
    Flag("setting", Literal["mixed", "sequential", "single"], "mixed", "mixed: train all tasks "
         "together; sequential: one after another; single: each alone from the base model "
         "(default: mixed)", only_training=True, ignored_by_single=True, set_by_study=True),
    Flag("seed", Seed, 1, "seed of all random draws, and of the order of the tasks (default: 1)",
         set_by_study=True),
    Flag("output_dir", str | None, None, "folder of the run (default: "
         "runs/<method>-<setting>-<model>-seed<seed>)",
         not_identity=True, set_by_study=True),
    Flag("overwrite", bool, False, "delete the run in --output_dir, and start again there",
         not_identity=True, set_by_study=True),
    Flag("resume", bool, False, "continue from the newest checkpoint in --output_dir, with the "
         "same result as without the stop; start from the beginning if there is none",
         not_identity=True, set_by_study=True),
    Flag("checkpoint_every", PositiveInt | None, None, "optimizer steps between checkpoints "
         "(default: only before and after every evaluation); the last two are kept until the run "
         "is finished", metavar="STEPS", only_training=True, not_identity=True),
    Flag("allow_other", tuple[Literal[OVERRIDABLE], ...], (), "with --resume: what may have "
         f"changed since the stop; choices: {', '.join(OVERRIDABLE)}. paths: where models and data "
         "are, whose content is compared. All others may change the last digits of the result",
         metavar="WHAT", not_identity=True),
    Flag("deterministic", bool, False, "use deterministic kernels on a GPU, where they exist"),
    Flag("report_to", Literal["none", "tensorboard", "wandb", "trackio", "mlflow"], "none",
         "experiment tracker, besides the files in --output_dir (default: none)",
         not_identity=True),
)
DATA = (
    Flag("suite", str, "mini", f"mini (shipped), {', '.join(NAMED)}, or a folder of tasks in the "
         "natural-instructions layout (default: mini)", is_path=True, set_by_study=True),
    Flag("data_dir", str | None, None, f"folder of {' or '.join(NAMED)} (default: the folder of "
         "that name in $BADIT_DATA, or the download)", is_path=True),
    Flag("tasks", tuple[str, ...] | None, None, "tasks to use, by name or T-number such as "
         "T363 (default: all)", metavar="TASK", set_by_study=True),
    Flag("task_order", tuple[str, ...] | None, None, "order for --setting sequential: every task "
         f"by name or T-number, or of long_sequence {', '.join(ORDERS)} (default: by the seed, "
         "Table 5)", metavar="TASK", only_training=True, only_setting="sequential",
         ignored_by_single=True),
    Flag("max_train_per_task", PositiveInt | None, None, "number of training rows of each task, "
         "from the first (default: all)", metavar="N", only_training=True, same_in_table="trained"),
    Flag("max_eval_per_task", PositiveInt | None, None, "number of test rows of each task, from "
         "the first (default: all)", metavar="N", same_in_table=True),
    Flag("validation", PositiveInt | None, None, "number of training rows of each task, from "
         "the last, to hold out: they replace the test rows, to choose settings (default: none)",
         metavar="N", same_in_table=True),
    Flag("max_length", PositiveInt, 1024, "largest number of tokens of prompt and target in "
         "training, of the prompt in evaluation (default: 1024)", same_in_table=True),
    Flag("chat_template", bool, False, "wrap prompts in the model's chat template",
         same_in_table=True),
)
TRAINING = (
    Flag("epochs", PositiveInt, 10, "epochs per stage; --setting mixed has one stage, the others "
         "one per task (default: 10)", only_training=True,
         same_in_table="trained"),
    Flag("batch_size", PositiveInt | None, None, f"rows of a micro-batch per process (default: "
         f"{PAPER_BATCH} / (processes * accumulation steps))", metavar="N", only_training=True),
    Flag("gradient_accumulation_steps", PositiveInt, 1, "micro-batches per optimizer step and "
         "process (default: 1)", metavar="N", only_training=True),
    Flag("learning_rate", Positive, 2e-4, "peak learning rate of AdamW (default: 2e-4)",
         only_training=True, same_in_table="trained"),
    Flag("warmup_ratio", Fraction, 0.03, "fraction of a stage's steps for linear warm-up, then "
         "cosine decay (default: 0.03)", only_training=True, same_in_table="trained"),
    Flag("max_grad_norm", Positive, 1.0, "norm to which gradients are clipped (default: 1.0)",
         only_training=True, same_in_table="trained"),
    Flag("gradient_checkpointing", bool, False, "recompute activations in the backward pass: less "
         "memory, about a third slower", only_training=True),
)
EVALUATION = (
    Flag("eval_tasks", Literal["all", "seen", "new", "none"], "all", "tasks evaluated after "
         "each stage; seen: those trained so far; new: only the stage's own tasks, and all tasks "
         "after the last stage, which gives every metric but the Forget Rate; --setting single "
         "always evaluates a stage's own task, or none (default: all)",
         only_training=True, ignored_by_single=True),
    Flag("eval_before", bool, False, "also evaluate before training, as row 0", only_training=True,
         ignored_by_single=True),
    Flag("eval_batch_size", PositiveInt, 16, "rows evaluated at a time per process (default: 16)"),
    Flag("max_new_tokens", PositiveInt, 50, "largest number of tokens of an answer (default: 50)",
         same_in_table=True),
    Flag("eval_loss", bool, False, "also compute the loss of the test answers, in nats per token, "
         "which separates methods where scores cannot; a report judges claims by it"),
    Flag("eval_only", bool, False, "evaluate --adapter DIR; nothing is trained",
         set_by_study=True),
    Flag("adapter", str | None, None, "adapter folder of a finished run: evaluate it with "
         "--eval_only, or train it further with its method and settings", metavar="DIR",
         is_path=True, set_by_study=True),
)


def method_flags():
    """Return {heading: flags} of the methods' settings: shared ones first, then each method's."""
    groups, seen = {"adapters": []}, {"seed"}
    for name, entry in METHODS.items():
        for field in fields(entry.settings):
            if field.name in seen:
                continue
            seen.add(field.name)
            own = field.name in entry.settings.__annotations__
            about = field.metadata
            groups.setdefault(name if own else "adapters", []).append(Flag(
                field.name, field.type, field.default, about["help"], about["metavar"],
                about["check"], same_in_table=about["same_in_table"], of_method=True))
    return groups


GROUPS = {"run": RUN, "data": DATA, "training": TRAINING, "evaluation": EVALUATION,
          **method_flags()}
ALL_FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}


def names(**wanted):
    """Return the names of the flags whose rows have these values, such as is_path=True."""
    return {name for name, flag in ALL_FLAGS.items()
            if all(getattr(flag, key) == value for key, value in wanted.items())}


PROMPT_FLAGS = ("suite", "data_dir", "tasks", "max_length", "max_new_tokens")
NOT_IDENTITY, PATH_FLAGS = names(not_identity=True), names(is_path=True)
TRAINING_FLAGS, STUDY_FLAGS = names(only_training=True), names(set_by_study=True)


@functools.cache
def build_parser():
    """Return the parser of all flags, with the paper's defaults (Appendix G.4)."""
    parser = Parser(prog="train.py",
                    description="Train and evaluate a method on a suite of tasks.",
                    epilog="Precision and processes come from `accelerate launch`, for example "
                           "`accelerate launch --mixed_precision bf16 train.py --method badit`.")
    for heading, flags in GROUPS.items():
        add_flags(parser, flags, heading)
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
        raise InputError("--resume continues the run that --overwrite deletes: give one of them")
    if args.allow_other and not args.resume:
        raise InputError("--allow_other has no effect without --resume")
    if args.adapter is not None:
        take_adapter(args, typed)
    if args.method not in METHODS:
        variant = (f": it is a variant of scripts/study.py, here --method {VARIANTS[args.method]}"
                   if args.method in VARIANTS else "")
        raise InputError(f"--method {args.method!r} is unknown{variant}; "
                         f"allowed: {', '.join(METHODS)}{did_you_mean(args.method, METHODS)}")
    refuse_flags_without_effect(args, typed)
    if not args.eval_only:
        settings_of(args).refuse_flags_without_effect(typed)
    args.output_dir = Path(args.output_dir or default_output_dir(args))
    return args, typed


def end_on_bad_flags(argv):
    """Exit with status 2 and one line where train.py would refuse its flags; after --help, with 0.

    Called before the libraries that take seconds are loaded.
    """
    escape_output()
    try:
        args, _ = parse_flags(argv)
        output_folder.check(args, PATH_FLAGS)
    except (InputError, OSError) as error:
        print(rank_prefix() + error_lines(error), file=sys.stderr)
        sys.exit(2)


def rank_prefix():
    """Return what a message begins with in a run of several processes: the rank of this one."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"[rank {os.environ.get('RANK', 0)}] " if several else ""


def refuse_odd_words(argv):
    """Raise InputError for a word that is not UTF-8, or that argparse misreads."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!r} is not UTF-8, as every file of a run is") from None
        if re.fullmatch(r"--\w+=--", word):  # argparse would take it for an empty list
            raise InputError(f"{word}: a flag's value cannot be --")


def typed_flags(parser, argv):
    """Return the names of the flags in `argv`."""
    untyped = object()
    probe = argparse.Namespace(**dict.fromkeys(ALL_FLAGS, untyped))
    return {name for name, value in vars(parser.parse_args(argv, probe)).items()
            if value is not untyped}


# --- what an adapter brings along ---------------------------------------------------------------


def take_adapter(args, typed):
    """Set flags in `args` to what --adapter's configuration says: method, base, prompts, settings.

    Raises InputError for a typed flag that contradicts it.
    """
    config, saved = read_adapter_config(args.adapter)
    if args.chat_template and not config.chat_template:
        raise InputError(f"--adapter {args.adapter} was trained without --chat_template: remove it")
    take_prompts(args, typed, config)
    for name in ("method", "base"):
        if name in typed and getattr(args, name) != getattr(config, name):
            raise InputError(f"--{name} {getattr(args, name)}: the adapter was trained with "
                             f"--{name} {getattr(config, name)}")
        setattr(args, name, getattr(config, name))
    if not args.eval_only:
        take_settings(args, typed, saved)


def take_prompts(args, typed, config):
    """Take over an adapter's model and chat template and, with --eval_only, its suite and prompts.

    Typed flags come first. Raises InputError for unknown flags, bad values and missing folders.
    """
    model = None if "model" in typed else base_name(args.adapter, config)
    taken = {"model": model, "chat_template": config.chat_template}
    if args.eval_only:
        taken |= {name: value for name, value in config.trained_on.items() if name != "earlier"}
    unknown = taken.keys() - {"model", "chat_template", *PROMPT_FLAGS}
    if unknown:
        raise InputError(f"{args.adapter}: trained_on has the unknown flag "
                         f"{sorted(unknown)[0]!r:.60}; allowed: {', '.join(PROMPT_FLAGS)}")
    other_suite = {"data_dir", "tasks"} if "suite" in typed else set()
    for name, value in taken.items():
        if name in typed | other_suite or name == "model" and value is None:
            continue
        read = read_value(ALL_FLAGS[name], value, args.adapter)
        setattr(args, name, list(read) if isinstance(read, tuple) else read)
        folder = name == "data_dir" and value or name == "suite" and "/" in value and value
        if folder and not Path(folder).is_dir():
            raise InputError(f"{args.adapter} was trained on --{name} {value}, which is not "
                             f"there: give --{name}")


def take_settings(args, typed, saved):
    """Continue with the `saved` settings of an adapter; the seed is the run's own.

    Raises InputError for a typed flag with another value.
    """
    for name in sorted(set(saved.names()) & names(of_method=True)):
        value = getattr(saved, name)
        value = list(value) if isinstance(value, tuple) else value
        if name in typed and getattr(args, name) != value:
            raise InputError(f"--{name} {getattr(args, name)}: the adapter keeps the settings it "
                             f"was made with, here {value}")
        setattr(args, name, value)


def trained_on(args, tasks):
    """Return what adapter_config.json says of the training data: {flag: value}.

    `tasks` are the names of the trained tasks, None for all of the suite. A run that trains an
    adapter further adds its earlier tasks; if those are of another suite, under `earlier`.
    """
    here = {name: getattr(args, name) for name in PROMPT_FLAGS} | {"tasks": tasks}
    if args.adapter is None or args.eval_only:
        return here
    earlier = read_adapter_config(args.adapter)[0].trained_on
    if any(earlier.get(name) != here[name] for name in ("suite", "data_dir")):
        return here | {"earlier": earlier}
    whole = earlier.get("tasks") is None or tasks is None
    return earlier | here | {
        "tasks": None if whole else list(dict.fromkeys([*earlier["tasks"], *tasks]))}


# --- what follows from the flags ----------------------------------------------------------------


def settings_of(args):
    """Return the settings of the run's method. Raises InputError where they contradict."""
    cls = METHODS[args.method].settings
    values = {name: getattr(args, name) for name in cls.names()}
    return cls(**{name: tuple(value) if isinstance(value, list) else value
                  for name, value in values.items()})


def recorded_args(args):
    """Return the flags that equal runs share, as results.json holds them."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in NOT_IDENTITY}


def comparable(args, trained):
    """Return {name: value} of the flags that the runs of one table must share."""
    values = {}
    read = METHODS[args.method].settings.names()
    for name, flag in ALL_FLAGS.items():
        if flag.same_in_table is True and not flag.of_method:
            values[f"--{name}"] = getattr(args, name)
        elif flag.same_in_table and trained and (not flag.of_method or name in read):
            place = f", {args.setting}" if flag.same_in_table == "by setting" else ""
            values[f"--{name}{place}"] = getattr(args, name)
    if trained and args.setting == "sequential":
        values["--task_order"] = args.task_order
    if trained and args.adapter is not None:
        values["--adapter"] = args.adapter
    return values


def refuse_flags_without_effect(args, typed):
    """Raise InputError for a typed flag that this method or setting would ignore."""
    entry = METHODS[args.method]
    of_methods = names(of_method=True)
    if args.eval_only:
        ignored, cause = TRAINING_FLAGS | of_methods, "--eval_only"
        if entry.trains and args.adapter is None:
            raise InputError("--eval_only needs --adapter DIR (or --method zero_shot)")
    else:
        ignored = of_methods - set(entry.settings.names())
        ignored |= set() if entry.trains else TRAINING_FLAGS
        cause = f"--method {args.method}"
    for flag in sorted(typed & ignored):
        read_by = [name for name, each in METHODS.items() if flag in each.settings.names()]
        only = f"; only {', '.join(read_by)} read it" if flag in of_methods else ""
        raise InputError(f"--{flag} has no effect with {cause}: remove it{only}")
    if args.eval_tasks == "none" and not args.eval_before:
        for flag in sorted(typed & {"eval_loss", "max_eval_per_task"}):
            raise InputError(f"--{flag} has no effect with --eval_tasks none: remove it")
    for name in sorted(typed):
        only = ALL_FLAGS[name].only_setting
        if only and args.setting != only:
            raise InputError(f"--{name} has no effect with --setting {args.setting}, only with "
                             f"--setting {only}")


def default_output_dir(args):
    """Return the folder of a run without --output_dir: its name tells runs apart."""
    if args.eval_only and args.adapter is not None:
        folder = Path(args.adapter).resolve()
        run = folder.parent.name if folder.name == "adapter" else (
            f"{folder.parent.parent.name}-{folder.name}")
        return f"runs/eval-{run}-{Path(args.suite).name}-seed{args.seed}"
    setting = args.setting if METHODS[args.method].trains else "eval"
    setting += "-on" if args.adapter is not None else ""
    return f"runs/{args.method}-{setting}-{Path(args.model).name}-seed{args.seed}"
