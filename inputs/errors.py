"""Define the errors that end a program with one clear line instead of a traceback."""

import contextlib
import io
import sys


class InputError(ValueError):
    """Bad input. The message names the offending value and what is allowed instead.

    `example` holds further lines that show how it should look.
    """

    def __init__(self, message, example=()):
        super().__init__(message)
        self.example = tuple(example)


class Interrupted(Exception):
    """Raised when a run was asked to stop and has saved a checkpoint."""


def one_line(text):
    """Return `text` with unprintable characters escaped, so that it is one line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode()
                   for char in text)


def escape_output():
    """Make printing safe: escape what the terminal's encoding lacks, in place of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def error_lines(error):
    """Return what to print for an InputError or OSError: one line, and its example if any."""
    return "\n".join(map(one_line, (f"error: {error}", *getattr(error, "example", ()))))


def is_out_of_memory(error):
    """Return whether an exception means that a GPU or the machine is out of memory."""
    import torch  # here, because it takes seconds

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error))


def exit_status(function, *args):
    """Return what function(*args) returns (None: 0), 2 after one line on bad input, 130 on Ctrl-C.
    """
    escape_output()
    try:
        return function(*args) or 0
    except (InputError, OSError) as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(one_line(f"error: out of memory ({error})"), file=sys.stderr)
        return 2


@contextlib.contextmanager
def library_errors(what, advice=""):
    """Turn any error of a library into an InputError: what, the reason, advice."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # noqa: BLE001 (the libraries raise anything on a damaged file)
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a panic of Rust code is a BaseException
        reason = one_line(" ".join(str(error).split())) or type(error).__name__
        raise InputError(f"{what} ({reason:.300}){advice}") from error
