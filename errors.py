"""The one exception that means "the user can fix this": `train.py` prints it as a single line."""


class InputError(ValueError):
    """Bad input. The message names the offending value and what is allowed instead."""
