"""Beyond the paper: store the frozen base in 8 or 4.5 bits a weight, in plain Parameters.

In an adapted layer only the frozen part is quantised. In BADIT and PiSSA that is the residual: the
bank, the leading singular directions of W0, stays exact. nf4 is the format of QLoRA (Dettmers et
al. 2023): the codes equal those of bitsandbytes, the scales are not quantised a second time.

Axis names as in decomposition.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from inputs.errors import InputError
from method import find_blocks, find_linears, frozen, method_of

BLOCK = 64  # weights of a row that share one scale, in nf4
# Quantiles of a normal distribution, scaled to -1 .. 1, with an exact zero.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])


def to_nf4(weight):
    """Return uint8 codes (out, in / 2), two in a byte, and scales (out, in / 64) of a weight."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))  # (out, in / 64, 64)
    scale = blocks.abs().amax(-1)  # (out, in / 64)
    unit = (blocks / scale.where(scale > 0, 1)[..., None]).flatten(1)  # (out, in), -1 to 1
    codes = torch.bucketize(unit, ((NF4[1:] + NF4[:-1]) / 2).to(unit.device), out_int32=True)
    codes = codes.to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def to_int8(weight):
    """Return int8 codes (out, in), 127ths of a row's maximum, and scales (out, 1) of a weight."""
    weight = weight.float()
    scale = weight.abs().amax(-1, keepdim=True)  # (out, 1)
    return (127 * weight / scale.where(scale > 0, 1)).round().to(torch.int8), scale


def dequantise(codes, scale, dtype):
    """Return the weight (out, in) of `codes` and `scale`, computed in float32, as `dtype`."""
    if codes.dtype == torch.int8:
        return (codes * (scale / 127)).to(dtype)
    pair = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1)  # (256, 2), by byte
    values = F.embedding(codes.int(), pair.to(codes.device)).flatten(1)  # (out, in)
    return (values.unflatten(1, (-1, BLOCK)) * scale[..., None]).flatten(1).to(dtype)


class Quantised(nn.Module):
    """Hold a frozen weight (out, in) as `codes` and `scale`, which FSDP2 shards by rows."""

    def __init__(self, weight, kind):
        super().__init__()
        codes, scale = {"nf4": to_nf4, "int8": to_int8}[kind](weight)
        self.codes, self.scale = frozen(codes), frozen(scale)


class QuantisedProduct(torch.autograd.Function):
    """Compute x W' + bias; the backward pass dequantises W again, so the graph does not hold it."""

    @staticmethod
    def forward(ctx, x, codes, scale, bias):
        ctx.save_for_backward(codes, scale)
        return F.linear(x, dequantise(codes, scale, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        return grad_y @ dequantise(*ctx.saved_tensors, grad_y.dtype), None, None, None


def frozen_linear(x, weight, bias):
    """Return F.linear(x, weight, bias), (..., out), for a frozen weight: a tensor or Quantised.

    Only x (..., in) gets a gradient, bitwise equal to the one under the dense dequantised weight.
    """
    if not isinstance(weight, Quantised):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    return QuantisedProduct.apply(x, weight.codes, weight.scale, bias)


class QuantisedLinear(nn.Module):
    """Compute a linear layer that is not adapted, with a Quantised weight."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return frozen_linear(x, self.weight, self.bias)


def find_experts(model):
    """Return {name: weight (experts, ..., ...)} of the weights that hold all experts of a layer."""
    return {f"{name}.{key}": weight for name, module in model.named_modules()
            if "Expert" in type(module).__name__
            for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


def check_experts(model, kind):
    """Raise InputError where a quantised base would leave most of a bare model dense."""
    experts = find_experts(model)
    inside, total = (sum(weight.numel() for weight in weights)
                     for weights in (experts.values(), model.parameters()))
    if kind != "dense" and 2 * inside > total:
        raise InputError(f"--base {kind} quantises linear layers only: the experts of model type "
                         f"{model.config.model_type}, such as {next(iter(experts))}, hold "
                         f"{inside / total:.0%} of its weights and would stay dense; give --base "
                         "dense")


@torch.no_grad()
def quantise(model, kind, device=None):
    """Quantise the linear layers in the blocks of a wrapped model, in place.

    An adapted layer keeps a quantised residual; call this after `load_state_dict`, which needs the
    dense one. Quantised weights end up on `device`, by default where they are. A second call
    changes nothing. Returns the names of the weights that stay dense: experts, layers whose input
    width is not a multiple of BLOCK, and layers whose weight the model reads directly. Raises
    InputError for a model without blocks.
    """
    method = method_of(model)
    method.base = kind
    if kind == "dense":
        return []
    inside, adapted = (tuple(f"{name}." for name in names)
                       for names in (find_blocks(model), method.layers))
    linears, left = find_linears(model), []
    for name, module in list(model.named_modules()):
        if not name.startswith(inside) or name.startswith(adapted):
            continue
        weight = module.residual if name in method.layers else (
            module.weight if isinstance(module, nn.Linear) else None)
        if weight is None or isinstance(weight, Quantised):
            continue
        if weight.shape[1] % BLOCK or name not in (*linears, *method.layers):
            left.append(name)
            continue
        weight = Quantised(weight.to(device), kind)
        if name in method.layers:
            del module.residual
            module.residual = weight
        else:
            model.set_submodule(name, QuantisedLinear(weight, module.bias))
    return left + list(find_experts(model))
