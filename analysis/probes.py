"""What a row does inside a model: its activations, and the gradient of every weight.

Axis names
    B, S      rows, tokens of the longest
    m         intermediate size of the MLP
    out, in   features of a linear layer
Gradients are those of one row each: squares of means over rows are another quantity (Fig. 1, H.1).
"""

import torch

import data
from inputs.errors import InputError

# Where a neuron's value is read: the module below the MLP, and whether at its input or output.
NEURONS = {"gate": ("act_fn", "output"), "pre": ("act_fn", "input"),
           "intermediate": ("down_proj", "input")}


def batch_of(rows, pad_token_id, device):
    """Left-padded tensors of training rows on a device, with their tasks."""
    batch = data.collate(rows, pad_token_id, sum(row["num_targets"] for row in rows))
    moved = {key: value.to(device) if torch.is_tensor(value) else value
             for key, value in batch.items()}
    return moved | {"tasks": [row["task"] for row in rows]}


def positions(batch):
    """Which tokens count, (2, B, S): all of a row; those that predict its target."""
    everything = batch["attention_mask"].bool()
    predicting = torch.zeros_like(everything)
    labels = batch["labels"]  # (B, k): those of the last k tokens, each predicted one before
    k = labels.shape[1]
    predicting[:, -k:-1] = labels[:, 1:] != -100
    return torch.stack([everything, predicting])


def row_means(values, where):
    """Means over the tokens of each row: values (B, S, n), where (..., B, S) -> (..., B, n)."""
    where = where.to(values.dtype)
    return torch.einsum("...bs,bsn->...bn", where, values) / where.sum(-1, keepdim=True)


def refuse_non_finite(tensor, rows, what):
    """Raise InputError for a number that is NaN or infinite, naming what it is and the rows."""
    if not torch.isfinite(tensor).all():
        names = ", ".join(row["id"] for row in rows)
        raise InputError(f"{rows[0]['task']}, row {names}: {what} is NaN or infinite: the model's "
                         "weights, or the adapter's, make it overflow")


class Probe:
    """A context with hooks on a model, the `handles`; at its end they are removed."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


class NeuronProbe(Probe):
    """A context in which every forward pass leaves `values` {layer: (B, S, m)}.

    `mlps` are the names of the modules that hold a gate_proj, by layer; `where` a key of NEURONS.
    """

    def __init__(self, model, mlps, where="gate"):
        self.values, (child, side) = {}, NEURONS[where]

        def hook_of(layer):
            def hook(_, inputs, output):
                self.values[layer] = (output if side == "output" else inputs[0]).detach()
            return hook

        self.handles = [
            model.get_submodule(f"{name}.{child}").register_forward_hook(hook_of(layer))
            for layer, name in mlps.items()]


def ask_for_gradients(_, _inputs, output):
    """A forward hook on the embedding, all whose weights may be frozen."""
    if output.is_leaf:
        output.requires_grad_()


class GradientProbe(Probe):
    """A context in which a forward and a backward pass of summed row losses give row gradients.

    Of y = W h the gradient of row d is G_d = sum_p delta_p h_p', delta = dl_d / dy: hooks keep h
    and delta, so no weight needs a gradient, and an adapted layer's is that of the effective
    weight at its place. Padding has delta = 0.
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
        """G (B, out, in) of every row, in float32 at least: squares in half precision vanish."""
        kind = torch.promote_types(self.delta[name].dtype, torch.float32)
        return torch.einsum("bso,bsi->boi", self.delta[name].to(kind), self.h[name].to(kind))


def mlp_names(names):
    """{layer: name of its MLP} from names of gate_proj layers {layer: name}."""
    return {layer: name.rpartition(".")[0] for layer, name in names.items()}
