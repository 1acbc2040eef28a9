"""Ask a trained adapter.

    python generate.py "hot" --definition "Give the opposite."  # the newest run's adapter
    python generate.py --adapter runs/X/adapter --prompts FILE --out FILE   # JSON lines in and out
    python generate.py --chat                                   # a chat; /reset, /quit

Prompts have the format of training: the definition, if any, then the prompt as its input; in the
chat template if the adapter was trained with it. A line of --prompts is an object with `prompt`
and, optionally, `definition`. Decoding is greedy, as in an evaluation, unless --temperature is set.
"""

import sys
from pathlib import Path

from deploy.programs import MODEL, base_name, carry_out, newest_adapter
from inputs.errors import InputError, one_line
from inputs.numbers import Fraction, Positive, PositiveInt, Seed
from inputs.settings import Flag, program_parser

FLAGS = (
    Flag("prompt", str | None, None, "a prompt to answer", positional=True),
    Flag("adapter", Path | None, None, "an adapter folder (default: the newest in runs/)"),
    Flag("definition", str, "", "the instruction before each prompt", "TEXT"),
    Flag("prompts", Path | None, None, "a file of prompts to answer", "FILE"),
    Flag("out", Path | None, None, "a new file for the answers to --prompts", "FILE"),
    Flag("batch_size", PositiveInt, 16, "prompts of --prompts at a time (default: 16)", "N"),
    Flag("chat", bool, False, "chat in this terminal"),
    Flag("compare_base", bool, False, "also give the base model's answer, without the adapter"),
    Flag("bf16", bool, False, "hold the base model in bfloat16, as a run under --mixed_precision "
         "bf16 does"),
    Flag("temperature", Positive | None, None, "sample tokens at this temperature", "T"),
    Flag("top_p", Fraction | None, None, "sample from the most likely tokens, which together have "
         "this probability", "P"),
    Flag("seed", Seed | None, None, "seed of the samples (default: 1)"),
    Flag("max_new_tokens", PositiveInt, 50, "tokens per answer at most (default: 50)", "N"),
    MODEL)


def read_flags(argv):
    """Return the flags, checked. Raises InputError."""
    args = program_parser("generate.py", __doc__, FLAGS).parse_args(argv)
    if (args.prompt is not None) + (args.prompts is not None) + args.chat != 1:
        raise InputError("give one of: a prompt, --prompts FILE, --chat")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("the prompt is empty")
    if (args.prompts is None) != (args.out is None):
        raise InputError("--prompts FILE and --out FILE are given together")
    if args.out is not None and args.out.exists():
        raise InputError(f"--out {args.out} exists: name another file")
    if args.chat and args.compare_base:
        raise InputError("--compare_base has no effect with --chat")
    if args.chat and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError("--chat needs a terminal; for prompts from a file give --prompts FILE")
    for name in ("top_p", "seed"):
        if args.temperature is None and getattr(args, name) is not None:
            raise InputError(f"--{name} has no effect without --temperature")
    args.seed = 1 if args.seed is None else args.seed
    if args.adapter is None:
        args.adapter = newest_adapter()
        print(one_line(f"adapter: {args.adapter}, of the newest finished run"), file=sys.stderr)
    args.model = base_name(args.adapter, args.model)
    return args


def execute(argv):
    args = read_flags(argv)
    from deploy import answers  # late: it loads torch, which --help does not need
    if args.chat:
        answers.chat(args)
    elif args.prompts:
        answers.answer_file(args)
    else:
        answers.answer_one(args)


def main(argv=None):
    """Answer -> exit status."""
    return carry_out(argv, execute)


if __name__ == "__main__":
    sys.exit(main())
