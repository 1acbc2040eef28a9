"""Analyse what tasks activate in a model, which experts they use, and whether they conflict.

    python analyze.py sharing                                  # neurons and weights (Fig. 1)
    python analyze.py experts --adapter runs/X/adapter         # experts (Fig. 2)
    python analyze.py mmlu --adapter runs/X/adapter --mmlu questions.jsonl    # Fig. 13
    python analyze.py conflict --adapter runs/X/adapter        # gradients of tasks

Writes analysis.json, analysis.md and figures/ into --out. docs/analyses.md explains every number.
"""

import sys
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from analysis.mmlu import FAMILY
from inputs.errors import InputError, exit_status, one_line
from inputs.files import check_free
from inputs.numbers import Positive, PositiveInt, Seed
from inputs.settings import REQUIRED, Flag, add_flags, program_parser
from inputs.suites import NAMED
from registry import EMBEDDED, MODELS

Count = Index = Annotated[int, Meta(ge=0, le=10**6, description="a whole number from 0 to 1000000")]
Several = Annotated[int, Meta(ge=2, le=10**6, description="a whole number from 2 to 1000000")]
Share = Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")]
MODULES = ("gate_proj", "q_proj", "k_proj", "v_proj")

COMMON = (
    Flag("model", str, EMBEDDED, f"one of {', '.join(MODELS)}, or the folder of a checkpoint "
         f"(default: {EMBEDDED})"),
    Flag("out", Path, None, "an empty or new folder (default: runs/analysis-<command>)", "DIR"),
    Flag("rows", PositiveInt, 16, "rows of each task (default: 16)"),
    Flag("max_length", PositiveInt, 384, "tokens of prompt and target (default: 384)"),
    Flag("seed", Seed, 1, "draws the rows and all permutations (default: 1)"),
    Flag("bf16", bool, False, "load the weights in bf16; gradients are still squared in float32"),
)
SUITE = (
    Flag("suite", str, "mini", f"mini, {', '.join(NAMED)}, or a folder of tasks (default: mini)"),
    Flag("data_dir", str, None, f"the folder of {' or '.join(NAMED)}"),
    Flag("tasks", tuple[str, ...], None, "only these tasks, by name or T-number", "TASK"),
)
ADAPTERS = Flag("adapter", tuple[Path, ...], (), "adapter folders of finished runs", "DIR")
LAYERS = Flag("layers", tuple[Index, ...], (), "decoder layers from 0 (default: the second, the "
              "middle and the last)", "LAYER")
COMMANDS = {  # command: (help, flags)
    "sharing": ("find the neurons and weights that tasks activate and share", (
        *SUITE, LAYERS,
        Flag("target_modules", tuple[str, ...], MODULES, "linear layers to analyse (default: "
             f"{' '.join(MODULES)})", "NAME"),
        Flag("share", Share, 0.1, "share of the units of a layer that count as active "
             "for each task: those with the highest values (default: 0.1)"))),
    "experts": ("measure which experts tasks are routed to, and in which they learn", (
        *SUITE, ADAPTERS)),
    "mmlu": ("measure routing and accuracy on MMLU's questions", (
        ADAPTERS,
        Flag("mmlu", Path, REQUIRED, "questions as JSON lines (docs/analyses.md)", "FILE"),
        Flag("subjects", tuple[str, ...], tuple(FAMILY), "subjects of MMLU (default: 20 in five "
             "families)", "SUBJECT"))),
    "conflict": ("measure whether tasks' gradients conflict, and whether steps harm other tasks", (
        *SUITE, ADAPTERS, LAYERS,
        Flag("folds", Several, 8, "folds of the rows of each task, to estimate noise (default: 8)"),
        Flag("lookahead", Count, 3, "held-out rows of each task for the losses after a step; 0: no "
             "steps (default: 3)", "ROWS"),
        Flag("learning_rate", Positive, None, "learning rate of the step (default: the run's, "
             "2e-4 where unknown)"))),
}


def build_parser():
    parser = program_parser("analyze.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (text, flags) in COMMANDS.items():
        add_flags(commands.add_parser(command, help=text, description=text),
                  (*COMMON, *flags))
    return parser


def parse_flags(argv):
    """Read the flags in `argv`. Raises InputError for values that contradict each other."""
    args = build_parser().parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, list(value) if isinstance(value, tuple) else value)
    args.out = args.out or Path(f"runs/analysis-{args.command}")
    for name in ("layers", "target_modules", "adapter", "subjects"):
        values = getattr(args, name, None)
        if isinstance(values, list) and len(set(values)) < len(values):
            raise InputError(f"--{name}: {' '.join(map(str, values))} has a repeated value")
    if args.command != "sharing" and not args.adapter:
        raise InputError(f"{args.command} needs --adapter: the adapter folder of a finished run")
    if args.command == "conflict" and args.lookahead == 0 and args.learning_rate is not None:
        raise InputError("--learning_rate has no effect with --lookahead 0: remove it")
    return args


def analyse(argv):
    """Carry out the command in `argv`, and write its result. Raises InputError."""
    args = parse_flags(argv)
    # Imported late: torch takes seconds, which --help and wrong flags should not wait for.
    from analysis import gradients, routing, units
    check_free(args.out, "out")
    {"sharing": units.run, "experts": routing.run_experts, "mmlu": routing.run_mmlu,
     "conflict": gradients.run}[args.command](args)
    from analysis import report  # imported late: matplotlib takes a second
    report.write(args.out)
    print(one_line(f"{args.out / 'analysis.md'}"))


def main(argv=None):
    """Run with the flags `argv`; return 0, 2 for bad input, or 130 after Ctrl-C."""
    return exit_status(analyse, argv)


if __name__ == "__main__":
    sys.exit(main())
