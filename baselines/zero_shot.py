"""The untrained model, for the zero-shot row."""

from method import Method


class ZeroShot(Method):
    """Nothing is adapted and nothing is trained."""

    name = "zero_shot"

    def targets(self, model):
        return {}
