"""Record activations of rows, and the gradient of each row with respect to every weight.

Axis names
    B, S      rows, tokens of the longest
    m         intermediate size of the MLP
    out, in   features of a linear layer
The empirical Fisher information needs the square of each row's gradient (Fig. 1, Appendix H.1); the
square of a mean over rows is another quantity.
"""

import torch

import data
from inputs.errors import InputError


def batch_of(rows, pad_token_id, device):
    """Return left-padded tensors of training rows on a device, with the tasks of the rows."""
    batch = data.collate(rows, pad_token_id, sum(row["num_targets"] for row in rows))
    moved = {key: value.to(device) if torch.is_tensor(value) else value
             for key, value in batch.items()}
    return moved | {"tasks": [row["task"] for row in rows]}


def positions(batch):
    """Return masks (2, B, S): all tokens of a row, and the tokens that predict its target."""
    everything = batch["attention_mask"].bool()
    predicting = torch.zeros_like(everything)
    labels = batch["labels"]  # (B, k): of the last k tokens, each predicted by the token before
    k = labels.shape[1]
    predicting[:, -k:-1] = labels[:, 1:] != -100
    return torch.stack([everything, predicting])


def row_means(values, where):
    """Average values (B, S, n) over the tokens `where` (..., B, S) of each row: (..., B, n)."""
    where = where.to(values.dtype)
    return torch.einsum("...bs,bsn->...bn", where, values) / where.sum(-1, keepdim=True)


def check_finite(tensor, rows, what):
    """Raise InputError with the name of the quantity and the rows for a NaN or infinite value."""
    if not torch.isfinite(tensor).all():
        names = ", ".join(row["id"] for row in rows)
        raise InputError(f"{rows[0]['task']}, row {names}: {what} is NaN or infinite: the weights "
                         "of the model or the adapter overflow")


class Probe:
    """A context that removes its hooks, the `handles`, at its end."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


class NeuronProbe(Probe):
    """A context in which every forward pass stores the gate activations of MLPs.

    `mlps` are the names of the MLPs by layer; `values` {layer: (B, S, m)}, the outputs of act_fn.
    """

    def __init__(self, model, mlps):
        self.values = {}

        def hook_of(layer):
            return lambda _, _inputs, output: self.values.update({layer: output.detach()})

        self.handles = [
            model.get_submodule(f"{name}.act_fn").register_forward_hook(hook_of(layer))
            for layer, name in mlps.items()]


def ask_for_gradients(_, _inputs, output):
    """Make the output of the embedding require gradients: all weights may be frozen."""
    if output.is_leaf:
        output.requires_grad_()


class GradientProbe(Probe):
    """A context in which a forward and a backward pass of summed row losses give row gradients.

    For y = W h the gradient of row d is G_d = sum_p delta_p h_p' with delta = dl_d / dy. Hooks
    store h and delta, so no weight needs a gradient. For an adapted layer G is the gradient of
    its effective weight. Padding has delta = 0.
    """

    def __init__(self, model, names):
        self.h, self.delta = {}, {}

        def hook_of(name):
            def hook(_, inputs, output):
                self.h[name] = inputs[0].detach()
                output.register_hook(lambda delta: self.delta.__setitem__(name, delta))
            return hook

        self.handles = [
            model.get_input_embeddings().register_forward_hook(ask_for_gradients),
            *(model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names)]

    def gradients(self, name):
        """Compute G (B, out, in), in float32 or better: half-precision squares underflow to 0."""
        kind = torch.promote_types(self.delta[name].dtype, torch.float32)
        return torch.einsum("bso,bsi->boi", self.delta[name].to(kind), self.h[name].to(kind))


def mlp_names(names):
    """Return {layer: name of its MLP} from {layer: name of its gate_proj}."""
    return {layer: name.rpartition(".")[0] for layer, name in names.items()}
