"""Compute the loss of one row, and its gradient by every weight of some linear layers.

Axis names
    S         tokens of the row
    n         target tokens of the row
    out, in   features of a linear layer
The empirical Fisher information needs the square of each row's gradient (Fig. 1, Appendix H.1); the
square of a mean over rows is another quantity.
"""

import contextlib

import torch

import data
from evaluation import row_losses, target_logits
from inputs.errors import InputError
from method import observe

PLACES = ("all", "target")


def loss_of(model, row):
    """Return the loss of one row, and its logits (n, vocabulary) for the targets.

    Raises InputError for a loss that is NaN or infinite.
    """
    batch = data.collate([row], 0, row["num_targets"])  # one row has no padding
    batch = {key: value.to(model.device) if torch.is_tensor(value) else value
             for key, value in batch.items()} | {"tasks": [row["task"]]}
    logits = target_logits(model, batch)  # (1, n, vocabulary)
    loss = row_losses(logits, batch)[0]
    check_finite(loss, row, "the loss")
    return loss, logits[0]


def means_at_places(values, n, last=-1):
    """Average values (S, m) over all tokens, and over those that predict the n targets: (2, m).

    `last` is the end of the second range: -1 for all targets, -n for the first one alone.
    """
    return torch.stack([values.mean(0), values[-n - 1:last].mean(0)])


def check_finite(tensor, row, what):
    """Raise InputError, with the names of quantity and row, for a NaN or infinite value."""
    if not torch.isfinite(tensor).all():
        raise InputError(f"{row['task']}, row {row['id']}: {what} is NaN or infinite: the weights "
                         "of the model or the adapter overflow")


@contextlib.contextmanager
def row_gradients(model, names):
    """Yield a function that returns the gradient (out, in) by the weight of a layer `name`.

    The context encloses the forward and the backward pass of one row. With y = W h the gradient is
    sum_p delta_p h_p' over tokens p, where delta = dl / dy. Hooks store h and delta, so no weight
    needs a gradient. The gradient of an adapted layer belongs to its effective weight.
    """
    h, delta = {}, {}  # (S, in), (S, out) by name

    def look(name, x, y):
        h[name] = x[0].detach()
        y.register_hook(lambda gradient: delta.__setitem__(name, gradient[0]))

    def gradient(name):
        if name not in delta:
            raise InputError(f"{name}: its inputs are flattened, so its gradient is not measured")
        kind = torch.promote_types(delta[name].dtype, torch.float32)  # half squares underflow
        return delta[name].to(kind).T @ h[name].to(kind)

    model.enable_input_require_grads()  # all weights before the layers may be frozen
    try:
        with observe(model, {name: model.get_submodule(name) for name in names}, look):
            yield gradient
    finally:
        model.disable_input_require_grads()
