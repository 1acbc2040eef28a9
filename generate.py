"""Ask a trained adapter something.

    python generate.py "hot" --definition "Give the opposite."  # the newest run's adapter
    python generate.py --adapter runs/X/adapter --prompts FILE --out FILE   # JSON lines in and out
    python generate.py --chat                                   # a dialogue; /reset, /quit

A prompt is framed as in training: a definition, if any, and the prompt as its input; by the model's
chat template if the adapter was trained with it. A line of --prompts is an object with `prompt` and
perhaps `definition`. Greedy, with the tokens that an evaluation gives, unless --temperature is set.
"""

import argparse
import sys
from pathlib import Path

from deploy.programs import add_model_flags, base_name, carry_out, newest_adapter
from inputs.errors import InputError, one_line
from inputs.numbers import Fraction, Positive, PositiveInt, Seed, from_text
from inputs.settings import Parser


def build_parser():
    parser = Parser(prog="generate.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to answer")
    add_model_flags(parser, "--adapter", help="a run's adapter (default: the newest in runs/)")
    parser.add_argument("--definition", default="", metavar="TEXT", help="what to do with a prompt")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="answer all of these")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the answers to --prompts; the "
                        "same command goes on after a stop")
    parser.add_argument("--batch_size", type=from_text(PositiveInt), default=16, metavar="N",
                        help="of --prompts (default: 16)")
    parser.add_argument("--chat", action="store_true", help="a dialogue in this terminal")
    parser.add_argument("--base", action="store_true", help="the bare base model's answer, too")
    parser.add_argument("--max_new_tokens", type=from_text(PositiveInt), default=50, metavar="N",
                        help="per answer (default: 50)")
    parser.add_argument("--bf16", action="store_true", help="hold the base model in bfloat16, as a "
                        "run under --mixed_precision bf16 does")
    parser.add_argument("--temperature", type=from_text(Positive), metavar="T",
                        help="draw tokens with their probabilities, at this temperature")
    parser.add_argument("--top_p", type=from_text(Fraction), metavar="P",
                        help="draw from the likeliest tokens with this share of the probability")
    parser.add_argument("--seed", type=from_text(Seed), help="of what is drawn (default: 1)")
    return parser


def read_flags(argv):
    """The flags, checked. Raises InputError."""
    args = build_parser().parse_args(argv)
    given = [args.prompt is not None, args.prompts is not None, args.chat]
    if sum(given) != 1:
        raise InputError("give a prompt, or --prompts FILE, or --chat: one of them")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("the prompt is empty")
    if (args.prompts is None) != (args.out is None):
        raise InputError("--prompts FILE and --out FILE belong together")
    if args.out is not None and args.out.exists():
        raise InputError(f"--out {args.out} is there already: name another")
    if args.chat and args.base:
        raise InputError("--base is not read with --chat")
    if args.chat and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError("--chat needs a terminal; for prompts from a file give --prompts FILE")
    for name in ("top_p", "seed"):
        if args.temperature is None and getattr(args, name) is not None:
            raise InputError(f"--{name} is read with --temperature only")
    args.seed = 1 if args.seed is None else args.seed
    if args.adapter is None:
        args.adapter = newest_adapter()
        print(one_line(f"adapter: {args.adapter} (of the newest finished run)"), file=sys.stderr)
    args.model = base_name(args.adapter, args.model)
    return args


def execute(args):
    """Answer what is asked -> exit status."""
    from deploy import answers  # not above: --help must not wait for what it loads
    if args.chat:
        return answers.chat(args)
    return answers.answer_file(args) if args.prompts else answers.answer_one(args)


def main(argv=None):
    return carry_out(argv, read_flags, execute)


if __name__ == "__main__":
    sys.exit(main())
