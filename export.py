"""Make an adapter of a run into a standard LoRA adapter, or into a whole checkpoint.

    python export.py runs/X/adapter --out exported                # for PEFT, transformers, vLLM
    python export.py runs/X/adapter --out exported --approximate  # experts that depend on the token
    python export.py runs/X/adapter --out merged --merged         # a whole checkpoint

Exact for lora, pissa, olora, olora_qr and badit --routing static. Where routing depends on the
token there is no exact form: --approximate fits the nearest constant to training rows. What is
written is measured against the adapter on held-out rows first; the figures stand in its README.md.
"""

import argparse
import sys
from pathlib import Path

from deploy.programs import add_model_flags, base_name, carry_out
from harness.adapter_config import read_adapter_config
from inputs.errors import InputError
from inputs.numbers import NonNegative, PositiveInt, from_text
from inputs.settings import Parser
from inputs.suites import NAMED


def build_parser():
    parser = Parser(prog="export.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, "adapter", help="the adapter folder of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                        help="a new folder, or an empty one")
    parser.add_argument("--approximate", action="store_true", help="where experts depend on the "
                        "token: the nearest constant by least squares")
    parser.add_argument("--rank", type=from_text(PositiveInt), help="cut the update to this rank, "
                        "by its singular values (default: its own)")
    parser.add_argument("--merged", action="store_true", help="a whole checkpoint in the type in "
                        "which the base is stored")
    parser.add_argument("--suite", help=f"mini, {', '.join(NAMED)}, or a folder of tasks: its "
                        "training rows calibrate, its test rows measure (default: that of the run)")
    parser.add_argument("--data_dir", help=f"where {' or '.join(NAMED)} is")
    parser.add_argument("--rows", type=from_text(PositiveInt), default=64, metavar="N",
                        help="at most so many rows of either kind (default: 64)")
    parser.add_argument("--max_new_tokens", type=from_text(PositiveInt), default=50, metavar="N",
                        help="per answer that is scored (default: 50)")
    parser.add_argument("--max_kl", type=from_text(NonNegative), default=0.05, metavar="NATS",
                        help="refuse to write what is further from the adapter (default: 0.05)")
    return parser


def read_flags(argv):
    """The flags, checked. Raises InputError."""
    args = build_parser().parse_args(argv)
    config, settings = read_adapter_config(args.adapter)
    if config.method == "gainlora":
        raise InputError("gainlora's gates depend on the prompt: no constant update has its "
                         "answers, and none is exported; adapter.load and generate.py use it")
    if config.method == "badit" and not settings.no_bad and (
            settings.routing == "energy" or settings.inactive == "initial"):
        raise InputError("experts that act as pre-trained where a token does not select them have "
                         "no constant form here, exact or fitted; adapter.load and generate.py use "
                         "this adapter")
    routed = config.method == "loramoe" or config.method == "badit" and (
        settings.no_bad or settings.routing == "token")
    if routed and not args.approximate:
        raise InputError("this adapter's experts depend on the token, which no LoRA adapter does; "
                         "--approximate exports the nearest constant, and measures how near it is")
    if args.approximate and not routed:
        raise InputError(f"--approximate is not read: this {config.method} adapter has an exact "
                         "form")
    if args.data_dir is not None and args.suite is None:
        raise InputError("--data_dir is read with --suite only")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise InputError(f"--out {args.out} is in use: name a new folder")
    if args.merged and config.base != "dense":
        raise InputError(f"--merged is not read: the adapter was trained on a base that is stored "
                         f"{config.base}, which a merged checkpoint would not be; without --merged "
                         "the update is exported, and measured on the dense base")
    args.model = base_name(args.adapter, args.model)
    return args


def execute(args):
    """Export -> exit status."""
    from deploy import exporting  # not above: --help must not wait for what it loads
    return exporting.export(args)


def main(argv=None):
    return carry_out(argv, read_flags, execute)


if __name__ == "__main__":
    sys.exit(main())
