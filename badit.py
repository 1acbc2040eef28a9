"""BADIT: experts from a decomposed weight (BAD), routed by token and regrouped by gradient (DOG).

The method has five files: decomposition.py splits a weight into rank-1 components and a residual
(Eq. 5, 6); experts.py defines a linear layer with a bank of components; badit.py adds the routing
weights (Eq. 7) and the method; grouping.py groups components by gradient direction (Eq. 8 to 14);
regrouping.py applies that on a schedule. Axis names as in those files.
"""

import torch
import torch.nn.functional as F
from torch import nn

from baselines.loramoe import LoraMoeLinear
from decomposition import InitialBank
from energy import EnergyLinear, measure_energies
from experts import Bank, BankLinear, Routing, select_experts
from inputs.errors import InputError
from protection import ProtectedMethod
from regrouping import ExpertMethod

ALPHA_RATIO = (0.1, 10.0)  # static routing: layers with |alpha_p / alpha_q| outside do not regroup


def routing_weights(logits):
    """Return alpha = K softmax(z) of Eq. (7), (..., K) for logits (..., K); 1 for equal logits."""
    return logits.shape[-1] * logits.softmax(dim=-1)


class BaditLinear(InitialBank, BankLinear):
    """Replace a linear layer by K experts plus a frozen residual, routed by token (Eq. 7).

    With alpha = K softmax(z), S = the top_k experts by z, and u = dropout(x):

        y = residual x + s sum_{k in S} alpha_k B_k A_k u + s sum_{k not in S} sg(B_k A_k) u

    sg stops the gradient. `router` (K, in) starts at zero, so alpha = 1 and the layer starts equal
    to `base`. In training, z gets Gaussian noise of std `router_noise` (default 1 / K) for the
    selection only. `inactive="drop"` removes the last sum; "initial" computes it from the initial
    components, B0_k A0_k x, so that training an expert changes only the tokens that select it.
    `svd=None` leaves the bank to `restore`. Raises InputError for values that do not fit the layer.
    """

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4,
                 inactive="keep", router_noise=None, svd="exact"):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        if inactive not in ("keep", "drop", "initial"):
            raise InputError(f"inactive {inactive!r} must be keep, drop or initial")
        self.inactive = inactive
        self.router_noise = 1 / num_experts if router_noise is None else router_noise
        self.router = nn.Parameter(self.lora_A.new_zeros(num_experts, base.in_features))
        self.add_initial_bank(base, svd)

    def route(self, x, expert_of=None):
        """Route x (..., in), independently of the grouping."""
        with torch.autocast(x.device.type, enabled=False):  # the router is always float32
            scores = F.linear(x.to(self.router.dtype), self.router)  # (..., K)
            alpha = routing_weights(scores)
        if self.top_k == self.num_experts:
            return Routing(alpha, alpha, None, scores)
        if self.training and self.router_noise > 0:
            # Without noise, equal logits at init would always select the same experts. Gradient
            # checkpointing repeats the noise, since it restores the global generator.
            scores = scores + self.router_noise * torch.randn_like(scores)
        active = select_experts(scores, self.top_k)
        kept = 1.0 if self.inactive == "keep" else 0.0
        return Routing(alpha, torch.where(active, alpha, kept), active, scores)


class StaticLinear(InitialBank, BankLinear):
    """Implement Eq. (7) literally: y = residual x + s sum_k alpha_k B_k A_k u, alpha (K,) trained.

    alpha starts at 1, so the layer starts equal to `base`. Arguments as in BaditLinear.
    """

    depends_on_token = False

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, svd="exact"):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k=num_experts)
        self.alpha = nn.Parameter(self.lora_A.new_ones(num_experts))
        self.add_initial_bank(base, svd)

    def route(self, x, expert_of=None):
        """Route x (..., in), all tokens alike."""
        alpha = self.alpha.expand(*x.shape[:-1], -1)  # (..., K)
        return Routing(alpha, alpha, None)

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """As `InitialBank`, with this layer's own constant factors."""
        return super().constant_update(
            torch.diag(self.scaling * self.alpha.double()[self.expert_of]))  # (N, N)

    def _ratios(self, grouping):
        """Return rho (N,): alpha of each component's current expert over alpha of its next one."""
        old, new = self.expert_of, grouping.to(self.expert_of.device)
        return torch.where(new == old, 1, self.alpha[old] / self.alpha[new])

    def obstacle(self, grouping):
        """Return why this layer cannot adopt a grouping (N,), or None."""
        low, high = ALPHA_RATIO
        size = self._ratios(grouping).abs()
        if not ((size >= low) & (size <= high)).all():  # also for NaN: 0 / 0
            return f"a ratio of routing weights is outside {low} to {high}"
        return None

    def regrouped(self, grouping):
        """Return the Bank under a grouping (N,), with moved components rescaled (Prop. C.3).

        For a move from p to q with rho = alpha_p / alpha_q, b *= sign(rho) sqrt|rho| and
        a *= sqrt|rho| keep the output.
        """
        bank = super().regrouped(grouping)
        rho = self._ratios(grouping)
        root = rho.abs().sqrt()
        return Bank(bank.lora_A * root[:, None], bank.lora_B * (rho.sign() * root), bank.expert_of)


class Badit(ProtectedMethod, ExpertMethod):
    """BADIT and its ablations: `no_bad` regroups LoRAMoE's layers, `no_dog` never regroups."""

    name = "badit"

    def build_layer(self, linear, fresh):
        read = self.settings
        bank = (linear, read.num_experts, read.rank, read.alpha, read.dropout)
        if read.no_bad:
            return LoraMoeLinear(*bank, read.top_k)
        svd = read.svd if fresh else None
        if read.routing == "static":
            return StaticLinear(*bank, svd)
        if read.routing == "energy":
            return EnergyLinear(*bank, read.top_k, svd)
        return BaditLinear(*bank, read.top_k, read.inactive, read.router_noise, svd)

    def export_obstacle(self):
        read = self.settings
        initial = read.routing == "energy" or read.inactive == "initial"
        if initial and not read.no_bad and read.top_k < read.num_experts:
            return "experts that a token does not select act on it as pre-trained"
        return None

    def wrap(self, model, fresh=True):
        read = self.settings
        super().wrap(model, fresh, "fixed" if read.no_dog else read.grouping, read.seed)

    def start_stage(self, stage, loader):
        if self.settings.routing == "energy" and not self.settings.no_bad:
            measure_energies(self.model, self.layers, loader)
        super().start_stage(stage, loader)

    def after_step(self, batch):
        if self.protects_old_tasks():
            self.regrouper.grouping = "fixed"  # other groups would act on old tokens
        return super().after_step(batch)
