"""Export a run's adapter as a standard LoRA adapter, or merged into a whole checkpoint.

    python export.py runs/X/adapter --out exported                # for PEFT, transformers, vLLM
    python export.py runs/X/adapter --out exported --approximate  # experts that depend on the token
    python export.py runs/X/adapter --out merged --merged         # a whole checkpoint

The export is exact for lora, pissa, olora, olora_qr and badit --routing static. If experts depend
on the token, no LoRA adapter is equal: --approximate fits the nearest one to training rows. Every
export is compared with the adapter on held-out rows before it is written; its README.md holds the
figures.
"""

import sys
from pathlib import Path

from deploy.programs import MODEL, base_name, carry_out
from harness.adapter_config import read_adapter_config
from inputs.errors import InputError
from inputs.files import check_free
from inputs.numbers import NonNegative, PositiveInt
from inputs.settings import REQUIRED, Flag, program_parser
from inputs.suites import NAMED

FLAGS = (
    Flag("adapter", Path, REQUIRED, "the adapter folder of a run", "ADAPTER", positional=True),
    Flag("out", Path, REQUIRED, "a new folder, or an empty one", "FOLDER"),
    Flag("approximate", bool, False, "fit a constant update, by least squares, to experts that "
         "depend on the token"),
    Flag("rank", PositiveInt | None, None, "cut the update to this rank, by its singular values "
         "(default: its own)"),
    Flag("merged", bool, False, "write a whole checkpoint, in the dtype of the base's checkpoint"),
    Flag("suite", str | None, None, f"mini, {', '.join(NAMED)}, or a folder of tasks: fit to its "
         "training rows, compare on its test rows (default: the suite of the run)"),
    Flag("data_dir", str | None, None, f"where {' or '.join(NAMED)} is"),
    Flag("rows", PositiveInt, 64, "rows to fit to, and rows to compare on, at most (default: 64)",
         "N"),
    Flag("max_kl", NonNegative, 0.05, "largest KL(adapter || export) per token, on the rows to "
         "compare on, at which the export is written (default: 0.05)", "NATS"),
    MODEL)


def read_flags(argv):
    """Return the flags, checked. Raises InputError."""
    args = program_parser("export.py", __doc__, FLAGS).parse_args(argv)
    config, _ = read_adapter_config(args.adapter)
    if args.data_dir is not None and args.suite is None:
        raise InputError("--data_dir has no effect without --suite")
    check_free(args.out, "out")
    if args.merged and config.base != "dense":
        raise InputError(f"--merged: this adapter was trained on a base stored as {config.base}, "
                         "but a merged checkpoint is dense; without --merged the update is "
                         "exported, and measured on the dense base")
    args.model = base_name(args.adapter, args.model)
    return args


def execute(argv):
    args = read_flags(argv)
    from deploy import exporting  # late: it loads torch, which --help does not need
    exporting.export(args)


def main(argv=None):
    """Export -> exit status."""
    return carry_out(argv, execute)


if __name__ == "__main__":
    sys.exit(main())
