"""The untrained model, for the zero-shot row of tables."""

from method import Method


class ZeroShot(Method):
    """Adapt and train nothing."""

    name = "zero_shot"

    def targets(self, model):
        return {}
