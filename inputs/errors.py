"""What ends a run with one clear line instead of a traceback."""

import contextlib


class InputError(ValueError):
    """Bad input. The message names the offending value and what is allowed instead.

    `example` holds further lines that show how it should look.
    """

    def __init__(self, message, example=()):
        super().__init__(message)
        self.example = tuple(example)


class Interrupted(Exception):
    """The run was asked to stop, and has saved all that it needs to go on."""


def one_line(text):
    """`text` as a terminal can show it in one line, whatever names and values it quotes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode()
                   for char in text)


def error_lines(error):
    """What is printed of an InputError or OSError: one line, and perhaps an example below it."""
    return "\n".join(map(one_line, (f"error: {error}", *getattr(error, "example", ()))))


@contextlib.contextmanager
def library_errors(what, advice=""):
    """Turn all that a library raises on bad files into an InputError: what, the reason, advice."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # noqa: BLE001 (the libraries raise anything on a damaged file)
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # only a panic of Rust code is as good as an Exception
        reason = one_line(" ".join(str(error).split())) or type(error).__name__
        raise InputError(f"{what} ({reason:.300}){advice}") from error
