"""What train.py does before it loads the libraries that take seconds: --help, and wrong flags."""

import io
import os
import sys

from harness import output_folder
from harness.arguments import parse_flags
from inputs.errors import InputError, error_lines


def print_anything():
    """Let no run end at what it prints: an odd name is escaped, a closed stream is no other file.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a log would take its place
        pass
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_on_bad_flags(argv):
    """Exit with status 2 and one line where train.py would refuse its flags; after --help, with 0.

    Of several processes one says why.
    """
    print_anything()
    if sys.platform == "win32":
        sys.exit("error: badit needs Linux or macOS (on Windows: WSL), for its checkpoints rely on "
                 "their signals, locks and renames")
    try:
        args, _ = parse_flags(argv)
        output_folder.check(args)
    except (InputError, OSError) as error:
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        if several:
            from harness.processes import FirstToSay  # not above: it takes torch
        if not several or FirstToSay()():
            print(error_lines(error), file=sys.stderr)
        sys.exit(2)
