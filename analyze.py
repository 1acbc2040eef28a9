"""The paper's analyses, with the controls that tell a finding from counting.

    python analyze.py sharing                                  # which neurons and weights (Fig. 1)
    python analyze.py experts --adapter runs/X/adapter         # which experts (Fig. 2)
    python analyze.py mmlu --adapter runs/X/adapter            # the same on MMLU (Fig. 13)
    python analyze.py conflict --adapter runs/X/adapter        # do tasks' gradients conflict

Writes analysis.json, analysis.md, arrays.npz and figures/ into --out. The same command again goes
on after a stop. What each number means: docs/analyses.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from analysis.mmlu import FAMILY, PACKAGE
from inputs.errors import InputError, error_lines, one_line
from inputs.numbers import NonNegative, Positive, PositiveInt, Seed
from inputs.settings import Parser, add_argument
from inputs.suites import NAMED
from registry import EMBEDDED, MODELS

Count = Index = Annotated[int, Meta(ge=0, le=10**6, description="a whole number from 0 to 1000000")]
Several = Annotated[int, Meta(ge=2, le=10**6, description="a whole number from 2 to 1000000")]
Share = Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")]
SHARE = 0.1
MODULES = ("gate_proj", "q_proj", "k_proj", "v_proj")

SUITE = (
    ("suite", str, "mini", f"mini, {', '.join(NAMED)}, or a folder of tasks (default: mini)"),
    ("data_dir", str, None, f"where {' or '.join(NAMED)} is"),
    ("tasks", tuple[str, ...], None, "only these, by name or T-number", "TASK"),
)
COMMON = (
    ("model", str, EMBEDDED, f"one of {', '.join(MODELS)}, or a checkpoint's folder (default: "
     f"{EMBEDDED})"),
    ("out", str, None, "default: runs/analysis-<command>", "DIR"),
    ("rows", PositiveInt, 16, "of each task (default: 16)"),
    ("max_length", PositiveInt, 384, "tokens of prompt + target (default: 384)"),
    ("micro_batch", PositiveInt, 1, "rows in one pass (default: 1)"),
    ("seed", Seed, 1, "draws the rows and all permutations (default: 1)"),
    ("bf16", bool, False, "weights in bf16, where float32 does not fit; gradients are squared in "
     "float32 all the same"),
)
ADAPTERS = ("adapter", tuple[Path, ...], (), "adapter folders of finished runs", "DIR")
LAYERS = ("layers", tuple[Index, ...], (), "decoder layers from 0 (default: the second, a middle "
          "one and the last)", "LAYER")
OWN = {
    "sharing": (
        *SUITE, ("adapter", str, None, "analyse the model that this adapter makes", "DIR"), LAYERS,
        ("target_modules", tuple[str, ...], MODULES, "linear layers whose weights are analysed "
         f"(default: {' '.join(MODULES)})", "NAME"),
        ("share", Share, None, f"of units that count as active in a task (default: {SHARE})"),
        ("epsilon", NonNegative, None, "active are units with a larger score instead"),
        ("neurons", Literal["gate", "pre", "intermediate"], "gate", "a neuron's value: output of "
         "the activation, its input, or what reaches down_proj (default: gate)"),
        ("row_loss", Literal["mean", "sum"], "mean", "over a row's target tokens (default: mean)"),
        ("released", bool, False, "for comparison, the released scripts' reading too: averages of "
         "32 neighbouring neurons, of 32 x 32 weights"),
    ),
    "experts": (*SUITE, ADAPTERS),
    "mmlu": (
        ADAPTERS,
        ("mmlu", str, None, f"questions as JSON lines (default: those of the package {PACKAGE}, "
         "else the hub's)", "FILE"),
        ("subjects", tuple[str, ...], tuple(FAMILY), "of MMLU (default: 20, in five families)",
         "SUBJECT"),
    ),
    "conflict": (
        *SUITE, ADAPTERS, LAYERS,
        ("folds", Several, 8, "of the rows of each task, from which noise is told (default: 8)"),
        ("lookahead", Count, 3, "further rows of each task, on which losses after a step are "
         "measured; 0: no steps (default: 3)", "ROWS"),
        ("learning_rate", Positive, None, "of the step (default: that of the run, 2e-4 where it is "
         "not known)"),
        ("step_scale", Positive, 1.0, "times it (default: 1)"),
    ),
}
SUMMARIES = {"sharing": "neurons and weights that tasks activate, and share",
             "experts": "experts that tasks route to, and learn in",
             "mmlu": "experts that MMLU's questions route to, and accuracy",
             "conflict": "whether tasks' gradients conflict, and steps for one hurt another"}


def build_parser():
    parser = Parser(prog="analyze.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, own in OWN.items():
        group = commands.add_parser(command, help=SUMMARIES[command], allow_abbrev=False,
                                    description=SUMMARIES[command])
        for name, kind, default, text, *metavar in (*COMMON, *own):
            add_argument(group, name, kind, default, text, *metavar)
    return parser


def parse_flags(argv):
    """The flags in `argv`. Raises InputError for what contradicts itself."""
    args = build_parser().parse_args(argv)
    for name, value in vars(args).items():
        setattr(args, name, list(value) if isinstance(value, tuple) else value)
    args.out = Path(args.out or f"runs/analysis-{args.command}")
    for name in ("layers", "target_modules", "adapter", "subjects"):
        values = getattr(args, name, None)
        if isinstance(values, list) and len(set(values)) < len(values):
            raise InputError(f"--{name}: {' '.join(map(str, values))} names one twice")
    if args.command != "sharing" and not args.adapter:
        raise InputError(f"{args.command} needs --adapter: the adapter folder of a finished run")
    if args.command == "sharing":
        if args.share and args.epsilon is not None:
            raise InputError("--share is not read with --epsilon: give one of them")
        if args.released and args.epsilon is not None:
            raise InputError("--released compares the largest tenths: --epsilon has none")
        args.share = args.share or (SHARE if args.epsilon is None else None)
    return args


def main(argv=None):
    """Run with the flags `argv` -> exit status: 0, 2 (bad input), 130 (stopped)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse_flags(argv)
        # Not above: torch takes seconds, and --help and wrong flags need none.
        from analysis import gradients, routing, session, units
        session.check_folder(args.out)
        {"sharing": units.run, "experts": routing.run_experts, "mmlu": routing.run_mmlu,
         "conflict": gradients.run}[args.command](args)
        from analysis import report  # not above: matplotlib takes a second
        report.write(args.out)
        print(one_line(f"{args.out / 'analysis.md'}"))
    except (InputError, OSError) as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; tasks that are done are kept: the same command goes on from there",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
