"""What ends a run with one clear line instead of a traceback."""


class InputError(ValueError):
    """Bad input. The message names the offending value and what is allowed instead."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved all that it needs to go on."""


def one_line(text):
    """`text` as a terminal can show it in one line, whatever names and values it quotes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode()
                   for char in text)
