"""Shared by generate.py and export.py: the newest adapter, its base model, exit status.

Imports no torch, so that --help and wrong flags are answered at once.
"""

import sys
from pathlib import Path

from harness import adapter_config
from harness.adapter_config import ADAPTER_CONFIG, read_adapter_config
from harness.arguments import refuse_odd_words
from harness.signals import StopSignals
from inputs.errors import InputError, exit_status
from inputs.settings import Flag
from inputs.task_files import listed
from registry import MODELS

MODEL = Flag("model", str | None, None, "the base model, where the adapter names none or it has "
             f"moved: one of {', '.join(MODELS)}, or a checkpoint's folder")


def newest_adapter(folder=Path("runs")):
    """Return the adapter of the run in `folder` that finished last.

    Raises InputError for none, and for a run with an adapter for each task.
    """
    finished = {}  # {results.json: its adapters}
    for file in folder.rglob("results.json"):
        place = file.parent / "adapter"
        found = [each.parent for each in (place / ADAPTER_CONFIG,
                                          *sorted(place.glob(f"*/{ADAPTER_CONFIG}")))
                 if each.is_file()]
        if found:
            finished[file] = found
    if not finished:
        raise InputError(f"no finished run in {folder}/ has an adapter: name one with --adapter")
    adapters = finished[max(finished, key=lambda file: file.stat().st_mtime_ns)]
    if len(adapters) > 1:
        raise InputError("the newest finished run has an adapter for each task: name one with "
                         f"--adapter: {listed(list(map(str, adapters)))}")
    return adapters[0]


def base_name(adapter, model):
    """Return the base of an adapter: `model`, or the one that its configuration names."""
    config, _ = read_adapter_config(adapter)
    model = model or adapter_config.base_name(adapter, config)
    if model is None:
        raise InputError(f"{adapter} does not name its base model: give --model")
    return model


def carry_out(argv, execute):
    """Call execute(argv) -> exit status: 0; 2 after one line on bad input; 130 if stopped.

    SIGTERM ends it as Ctrl-C does, so that temporary files are removed.
    """
    argv = sys.argv[1:] if argv is None else argv
    with StopSignals():
        return exit_status(refuse_odd_words, argv) or exit_status(execute, argv)
