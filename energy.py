"""Select experts by the energy of their initial components, without a router (not in the paper).

Axis names as in experts.py. The energy of a component for a token is |b0 a0 x|^2: the squared norm
of its initial output, without the scaling s.
"""

import torch
import torch.nn.functional as F
from accelerate.utils import reduce

from decomposition import InitialBank
from experts import BankLinear, Routing, select_experts
from method import INPUTS, first_rows, observe

ROWS = 64  # mean energies are measured on these


def activation_energy(x, A0, B0):
    """Return e_i = (a0_i x)^2 |b0_i|^2: x (..., in), A0 (N, in), B0 (out, N) -> (..., N)."""
    return (x @ A0.T).square() * B0.square().sum(0)


def relative_energy(energy, mean_energy, expert_of, K):
    """Divide each expert's energy by its mean: energy (..., N), mean_energy (N,) -> (..., K)."""
    of_expert = F.one_hot(expert_of, K).to(energy.dtype)  # (N, K)
    return (energy @ of_expert) / (mean_energy @ of_expert)


class EnergyLinear(InitialBank, BankLinear):
    """y = residual x + s sum_{k in S} B_k A_k u + s sum_{k not in S} B0_k A0_k x, u = dropout(x).

    S holds the top_k experts by `relative_energy`. `mean_energy` (N,) is kept per component, so
    that it follows a regrouping; it is 1 until `measure_energies`. Arguments as in BaditLinear.
    """

    inactive = "initial"

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4, svd="exact"):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        self.depends_on_token = top_k < num_experts
        self.register_buffer("mean_energy", self.lora_A.new_ones(len(self.lora_A)))
        self.add_initial_bank(base, svd)

    @torch.no_grad()
    def route(self, x, expert_of=None):
        """Route x (..., in) under a grouping (N,), by default the layer's own."""
        expert_of = self.expert_of if expert_of is None else expert_of
        with torch.autocast(x.device.type, enabled=False):  # float32 always
            energy = activation_energy(x.to(self.lora_A0.dtype), self.lora_A0, self.lora_B0)
            scores = relative_energy(energy, self.mean_energy, expert_of, self.num_experts)
        alpha = torch.ones_like(scores)  # (..., K)
        if self.top_k == self.num_experts:
            return Routing(alpha, alpha, None, scores)
        active = select_experts(scores, self.top_k)
        return Routing(alpha, active.to(alpha.dtype), active, scores)

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """As `InitialBank`, for experts that are all active."""
        return super().constant_update(self.scaling * torch.eye(
            len(self.lora_A), dtype=torch.float64, device=self.lora_A.device))


@torch.no_grad()
def measure_energies(model, layers, loader):
    """Set `mean_energy` of all layers to the mean over the first ROWS rows, padding left out.

    Measured once, so that relative energies stay comparable during training.
    """
    if not all((layer.mean_energy == 1).all() for layer in layers.values()):
        return
    sums = {name: torch.zeros_like(layer.mean_energy) for name, layer in layers.items()}
    count, tokens = torch.zeros((), device=model.device), None  # of the batch, (batch, seq)

    def add(name, x, _):
        layer = layers[name]
        x = x[tokens].to(layer.lora_A0.dtype)  # (tokens, in)
        with torch.autocast(x.device.type, enabled=False):
            sums[name] += activation_energy(x, layer.lora_A0, layer.lora_B0).sum(0)

    with observe(model, layers, add):
        for batch in first_rows(loader, ROWS):
            tokens = batch["attention_mask"].bool()
            count += tokens.sum()
            model(**{key: batch[key] for key in INPUTS}, logits_to_keep=1, use_cache=False)
    count = reduce(count, "sum")
    for name, layer in layers.items():
        layer.mean_energy.copy_(reduce(sums[name], "sum") / count)
