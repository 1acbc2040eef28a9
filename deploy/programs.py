"""What generate.py and export.py share: flags, the newest adapter, and how they end.

Nothing here needs torch.
"""

import sys
from pathlib import Path

from harness import adapter_config
from harness.adapter_config import ADAPTER_CONFIG, read_adapter_config
from harness.arguments import refuse_odd_words
from harness.early import print_anything
from harness.signals import StopSignals
from inputs.errors import InputError, Interrupted, error_lines, one_line
from registry import MODELS


def add_model_flags(parser, adapter, **options):
    """--model, and the flag or word `adapter`."""
    parser.add_argument(adapter, type=Path, metavar="ADAPTER", **options)
    parser.add_argument("--model", help="its base model, where that has moved, or is not named in "
                        f"it: one of {', '.join(MODELS)}, or a checkpoint's folder")


def newest_adapter(folder=Path("runs")):
    """The adapter of the run in `folder` that finished last. Raises InputError for none."""
    finished = [file for file in folder.rglob("results.json")
                if (file.parent / "adapter" / ADAPTER_CONFIG).is_file()]
    if not finished:
        raise InputError(f"no finished run in {folder}/ has an adapter: name one with --adapter")
    newest = max(finished, key=lambda file: file.stat().st_mtime_ns)
    return newest.parent / "adapter"


def base_name(adapter, model):
    """What to load as the base of an adapter: `model`, or what its configuration names."""
    config, _ = read_adapter_config(adapter)
    model = model or adapter_config.base_name(adapter, config)
    if model is None:
        raise InputError(f"{adapter} does not name its base model: give --model")
    return model


def carry_out(argv, read, execute):
    """Call execute(read(argv)) -> its exit status; 2 after one line on bad input, 130 on Ctrl-C.

    SIGTERM and SIGHUP end it as Ctrl-C does, so nothing temporary is left behind.
    """
    print_anything()
    try:
        refuse_odd_words(sys.argv[1:] if argv is None else argv)
        with StopSignals():
            return execute(read(argv))
    except (InputError, OSError) as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as error:
        print(one_line(f"\rstopped{': ' if str(error) else ''}{error}".lstrip("\r")),
              file=sys.stderr)
        return 130
