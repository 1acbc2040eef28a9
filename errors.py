"""What ends a run with one clear line instead of a traceback."""


class InputError(ValueError):
    """Bad input. The message names the offending value and what is allowed instead."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved all that it needs to go on."""
