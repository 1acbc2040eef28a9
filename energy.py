"""Beyond the paper: experts selected by what a token activates, without a router.

Axis names as in experts.py. The energy of a component is that of what its initial, pre-trained form
adds to the layer's output for a token.
"""

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce

ROWS = 64  # on which mean energies are measured
INPUTS = ("input_ids", "attention_mask", "position_ids")


def activation_energy(x, A0, B0):
    """e_i = (a0_i x)^2 |b0_i|^2: x (..., in), A0 (N, in), B0 (out, N) -> (..., N)."""
    return (x @ A0.T).square() * B0.square().sum(0)


def relative_energy(energy, mean_energy, expert_of, K):
    """That of each expert over its mean: energy (..., N), mean_energy (N,) -> (..., K)."""
    of_expert = F.one_hot(expert_of, K).to(energy.dtype)  # (N, K)
    return (energy @ of_expert) / (mean_energy @ of_expert)


@torch.no_grad()
def measure_energies(model, layers, loader):
    """Set `mean_energy` of all layers by the first rows of the first stage, of all processes.

    Once: what is relative to it must not change its meaning later. Padding is left out.
    """
    if not all((layer.mean_energy == 1).all() for layer in layers.values()):
        return
    sums = {name: torch.zeros_like(layer.mean_energy) for name, layer in layers.items()}
    count, tokens = torch.zeros((), device=model.device), None  # of the batch, (batch, seq)

    def hook_of(name):
        def hook(layer, inputs):
            x = inputs[0][tokens].to(layer.lora_A0.dtype)  # (tokens, in)
            with torch.autocast(x.device.type, enabled=False):
                sums[name] += activation_energy(x, layer.lora_A0, layer.lora_B0).sum(0)
        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    left = ROWS // PartialState().num_processes
    for batch in loader:  # to its end: Accelerate's loaders must not be left half-way
        if left > 0:
            tokens = batch["attention_mask"].bool()
            left -= len(tokens)  # with fillers: as many passes in every process
            count += tokens.sum()
            model(**{key: batch[key] for key in INPUTS}, logits_to_keep=1, use_cache=False)
    model.train(training)
    for handle in handles:
        handle.remove()
    count = reduce(count, "sum")
    for name, layer in layers.items():
        layer.mean_energy.copy_(reduce(sums[name], "sum") / count)
