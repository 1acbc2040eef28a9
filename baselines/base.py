"""The untrained model, for the zero-shot row."""

from method import Method


class Base(Method):
    """Nothing is adapted and nothing is trained."""

    name = "base"
    trains = False
