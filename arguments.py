"""The command line of train.py: all flags with the paper's defaults, and which may be combined."""

import argparse
import json
import re
from pathlib import Path

import models
from baselines import METHODS
from errors import InputError
from flags import fraction, positive, positive_int, seed
from method import read_adapter_config
from utils import read_text

PAPER_BATCH = 8
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
# Flags that no method reads when nothing is trained, and flags that need one of the settings.
TRAINING_FLAGS = {"setting", "task_order", "epochs", "max_train_per_task", "batch_size",
                  "gradient_accumulation_steps", "learning_rate", "warmup_ratio", "max_grad_norm",
                  "gradient_checkpointing", "eval_tasks", "eval_before", "paper_metrics",
                  "single_task_results"}
# Flags of which equal runs may have other values; --from_results can be given with these alone.
RUN_FLAGS = ("from_results", "output_dir", "overwrite", "resume", "checkpoint_every", "allow_other",
             "report_to")
# What --allow_other lets differ: such a run completes, but may differ in its last digits.
OVERRIDABLE = ("code", "versions", "threads", "device", "paths")
# Flags that name what is compared by its content anyway: of them, "paths" lets the names differ.
PATH_FLAGS = ("model", "suite", "data_dir", "adapter", "single_task_results")
PATHS = tuple(f"--{name}" for name in PATH_FLAGS)
SETTING_FLAGS = {"task_order": ("sequential",), "paper_metrics": ("sequential",),
                 "single_task_results": ("mixed", "sequential")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see `python {self.prog} --help`")


def build_parser():
    """All flags with the paper's defaults (Appendix G.4)."""
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="Train and evaluate a method on a suite of tasks.",
                    epilog="Precision and processes come from `accelerate launch`, for example "
                           "`accelerate launch --mixed_precision bf16 train.py --method badit`.")
    add = parser.add_argument_group("run").add_argument
    add("--method", default="badit", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    add("--model", default=models.EMBEDDED,
        help=f"one of {', '.join(models.MODELS)}, or a checkpoint's folder (default: %(default)s)")
    add("--setting", choices=("mixed", "sequential", "single"), default="mixed",
        help="train all tasks together, one after the other, or each alone from the base model "
             "(default: %(default)s)")
    add("--seed", type=seed, default=1, help="also decides the task order (default: 1)")
    add("--output_dir", help="default: runs/<method>-<setting>-<model>-seed<seed>")
    add("--overwrite", action="store_true",
        help="reuse an --output_dir that is in use, deleting only what this program wrote there")
    add("--resume", action="store_true",
        help="go on from the newest whole checkpoint in --output_dir, exactly as if the run had "
             "never been stopped; from the beginning where there is none")
    add("--checkpoint_every", type=positive_int, metavar="STEPS",
        help="optimizer steps between checkpoints (default: only before and after every "
             "evaluation); the last two are kept until the run is finished")
    add("--from_results", metavar="FILE",
        help="repeat the run that wrote this results.json, with all its flags")
    add("--allow_other", nargs="+", choices=OVERRIDABLE, default=[], metavar="WHAT",
        help="for --resume and --from_results: what may be another than it was, of "
             f"{', '.join(OVERRIDABLE)} (of models and data, whose content is compared); with "
             "all but paths the result may differ in its last digits")
    add("--deterministic", action="store_true",
        help="on a GPU, only kernels that give equal bits in equal runs, where there is one")
    add("--report_to", choices=("none", *TRACKERS), default="none",
        help="experiment tracker, besides the files in --output_dir (default: none)")

    add = parser.add_argument_group("data").add_argument
    add("--suite", default="mini", help="mini (shipped), superni, or a folder of tasks in the "
                                        "natural-instructions layout (default: mini)")
    add("--data_dir", help="where SuperNI is (default: $BADIT_DATA, or the download)")
    add("--tasks", nargs="+", metavar="TASK",
        help="only these, by name or T-number (T363)")
    add("--task_order", nargs="+", metavar="TASK",
        help="order for --setting sequential (default: that of the seed, Table 5)")
    add("--max_train_per_task", type=positive_int, metavar="N", help="the first N (default: all)")
    add("--max_eval_per_task", type=positive_int, metavar="N", help="the first N (default: all)")
    add("--max_length", type=positive_int, default=1024,
        help="tokens of prompt + target in training, of the prompt in evaluation (default: 1024)")
    add("--chat_template", action="store_true", help="wrap prompts in the model's chat template")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=10, help="per stage (default: 10)")
    add("--batch_size", type=positive_int, metavar="N",
        help=f"per process (default: {PAPER_BATCH} / (processes * accumulation steps))")
    add("--gradient_accumulation_steps", type=positive_int, default=1, metavar="N",
        help="micro-batches per optimizer step and process (default: 1)")
    add("--learning_rate", type=positive, default=2e-4, help="peak of AdamW (default: 2e-4)")
    add("--warmup_ratio", type=fraction, default=0.03,
        help="share of a stage's steps before the cosine (default: 0.03)")
    add("--max_grad_norm", type=positive, default=1.0, help="clipping (default: 1.0)")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_tasks", choices=("all", "seen", "none"), default="all",
        help="tasks evaluated after every stage (default: all)")
    add("--eval_before", action="store_true", help="evaluate before training too, as row 0")
    add("--eval_batch_size", type=positive_int, default=16, help="per process (default: 16)")
    add("--max_new_tokens", type=positive_int, default=50, help="per answer (default: 50)")
    add("--eval_only", action="store_true", help="evaluate --adapter DIR; nothing is trained")
    add("--adapter", metavar="DIR", help="adapter folder of a finished run, for --eval_only")
    add("--single_task_results", metavar="FILE",
        help="results.json of the same run with --setting single, for the metric `forward`")
    add("--paper_metrics", action="store_true",
        help="also Backward and Forget Rate as the released scripts compute them")

    add = parser.add_argument_group("adapters").add_argument
    add("--target_modules", nargs="+", default=["gate_proj"], metavar="NAME",
        help="last name component of the linear layers to adapt (default: gate_proj)")
    add("--rank", type=positive_int, default=4, help="r, of each expert (default: 4)")
    add("--alpha", type=positive, default=32.0, help="scaling is alpha / rank (default: 32)")
    add("--dropout", type=fraction, default=0.05, help="on the adapter's input (default: 0.05)")
    add("--num_experts", type=positive_int, default=8, help="K (default: 8)")
    add("--top_k", type=positive_int, default=4, help="experts per token (default: 4)")
    add("--svd", choices=("exact", "fast"), default="exact",
        help="decomposition: LAPACK's, or a randomised one for large weights (default: exact)")
    for name, method in METHODS.items():
        if "add_flags" in vars(method):  # an inherited one is declared already
            method.add_flags(parser.add_argument_group(name))
    return parser


def parse_flags(argv):
    """Parse and cross-check `argv` -> (args, names of the flags that were typed)."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!r} is not UTF-8, which every file of a run is") from None
        if re.fullmatch(r"--\w+=--", word):  # argparse would take it for an empty list
            raise InputError(f"{word}: a flag's value cannot be --")
    parser = build_parser()
    untyped = object()
    defaults = vars(parser.parse_args([]))
    probe = argparse.Namespace(**dict.fromkeys(defaults, untyped))
    typed = {name for name, value in vars(parser.parse_args(argv, probe)).items()
             if value is not untyped}
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with what --overwrite would delete: give one of them")
    if args.allow_other and not (args.resume or args.from_results is not None):
        raise InputError("--allow_other is read with --resume or --from_results only")
    if args.from_results is not None:
        args, typed = repeated_flags(args, typed), set()
    if args.eval_only and args.adapter is not None:
        method = read_adapter_config(args.adapter)["method"]
        if "method" in typed and args.method != method:
            raise InputError(f"--method {args.method}: the adapter was made by {method}")
        args.method = method
    if args.method not in METHODS:
        raise InputError(f"--method {args.method!r} is unknown; allowed: {', '.join(METHODS)}")
    refuse_unread_flags(args, typed)
    if not args.eval_only:
        method = METHODS[args.method]
        method.check({name: getattr(args, name) for name in method.reads}, typed)
    args.output_dir = Path(args.output_dir or default_output_dir(args))
    return args, typed


def repeated_flags(args, typed):
    """The flags that results.json recorded, under those of RUN_FLAGS that were typed now."""
    free = {*RUN_FLAGS, *(PATH_FLAGS if "paths" in args.allow_other else ())}
    for flag in sorted(typed - free):
        raise InputError(f"--{flag} is not read with --from_results, which repeats all flags of "
                         f"{args.from_results} (but {', '.join(PATHS)} with --allow_other paths)")
    recorded = read_results(args.from_results)["args"]
    known = set(vars(args)) - set(RUN_FLAGS)
    if not isinstance(recorded, dict) or set(recorded) != known:
        different = sorted(known ^ set(recorded)) if isinstance(recorded, dict) else recorded
        raise InputError(f"--from_results {args.from_results} is of another version of this "
                         f"program, with other flags: {different}")
    repeated = parse_values(recorded, args.from_results)
    for name in (*RUN_FLAGS, *(typed & set(PATH_FLAGS))):
        setattr(repeated, name, getattr(args, name))
    return repeated


def parse_values(values, source):
    """The flags that have these values {flag: value}. Raises InputError for one that none takes.

    `source` is the file that they come from, which may hold anything.
    """
    listed = [item for value in values.values() if isinstance(value, list) for item in value]
    if any(str(item).startswith("-") for item in listed):  # would be read as a flag
        raise InputError(f"{source}: {values!r:.200} holds a value that no flag takes")
    try:
        args = build_parser().parse_args(as_argv(values))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    for name, value in values.items():
        if getattr(args, name) != value or isinstance(value, bool) != isinstance(
                getattr(args, name), bool):
            raise InputError(f"{source}: {value!r:.60} is no value of --{name}")
    return args


def check_settings(settings, method, source):
    """Raise InputError unless `settings`, of the file `source`, are values of `method`'s flags."""
    unknown = set(settings) ^ set(method.reads)
    if unknown:
        raise InputError(f"{source}: settings {sorted(unknown)} do not fit {method.name}, which "
                         f"reads {sorted(method.reads)}")
    parse_values(settings, source)
    method.check(settings, set())


def read_results(path):
    """The content of a finished run's results.json. Raises InputError where it is none."""
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    wanted = {"args": dict, "metrics": dict, "run": dict, "base_sha256": str, "scores": dict}
    if not isinstance(content, dict) or not all(
            isinstance(content.get(key), kind) for key, kind in wanted.items()):
        raise InputError(f"{path} is not the results.json of a finished run")
    return content


def as_argv(values):
    """The command-line words that give these values {flag: value}; defaults are left out."""
    defaults = vars(build_parser().parse_args([]))
    words = []
    for name, value in sorted(values.items()):
        if value == defaults[name] or value is None:
            continue
        if value is True:
            words += [f"--{name}"]
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"]
    return words


def refuse_unread_flags(args, typed):
    """Raise InputError for a typed flag that this method or setting would ignore."""
    method = METHODS[args.method]
    adapter_flags = {name for each in METHODS.values() for name in each.reads} - {"seed"}
    if args.eval_only:
        unread, why = TRAINING_FLAGS | adapter_flags, "with --eval_only"
        if method.trains and args.adapter is None:
            raise InputError("--eval_only needs --adapter DIR (or --method base)")
    else:
        unread = (adapter_flags - set(method.reads)) | {"adapter"}
        why = f"by --method {args.method} in training"
        if not method.trains:
            unread, why = unread | TRAINING_FLAGS, f"by --method {args.method}"
    for flag in sorted(typed & unread):
        raise InputError(f"--{flag} is not read {why}")
    for flag, settings in SETTING_FLAGS.items():
        if flag in typed and args.setting not in settings:
            raise InputError(f"--{flag} is not read with --setting {args.setting}, "
                             f"only with {' or '.join(settings)}")
    if args.paper_metrics and args.eval_tasks != "all":
        raise InputError("--paper_metrics needs all rows of the score matrix: --eval_tasks all")


def default_output_dir(args):
    setting = "eval" if args.eval_only or not METHODS[args.method].trains else args.setting
    return f"runs/{args.method}-{setting}-{Path(args.model).name}-seed{args.seed}"
