"""BADIT: experts from a decomposed weight (BAD), routed by token and regrouped by gradient (DOG).

The method in four files: decomposition.py splits a weight into rank-1 components and a residual
(Eq. 5, 6), experts.py is a linear layer with a bank of them, grouping.py groups them by the
direction of their gradients (Eq. 8 to 14), regrouping.py says when. Here are the routing (Eq. 7),
the layer and the method. Axis names as in those files.
"""

import torch
import torch.nn.functional as F
from torch import nn

from baselines.loramoe import LoraMoeLinear
from decomposition import InitialBank, check_bank_size, decompose
from energy import activation_energy, measure_energies, relative_energy
from experts import Bank, BankLinear, RoutedBank, Routing, select_experts
from grouping import group_components
from inputs.errors import InputError
from regrouping import ExpertMethod, Regrouper

__all__ = ["Badit", "BaditLinear", "decompose", "group_components", "routing_weights"]
ALPHA_RATIO = (0.1, 10.0)  # static routing: |alpha_p / alpha_q| outside it is not compensated


def routing_weights(logits):
    """Eq. (7) with alpha = K softmax(z): logits (..., K) -> (..., K), all 1 for equal logits."""
    return logits.shape[-1] * logits.softmax(dim=-1)


class BaditLinear(InitialBank, BankLinear):
    """A linear layer as K basic abilities plus a frozen residual (Eq. 7).

    Token routing, alpha = K softmax(z) and S = the top_k experts by z, u = dropout(x):

        y = residual x + s sum_{k in S} alpha_k B_k A_k u + s sum_{k not in S} sg(B_k A_k) u

    `router` (K, in) starts at zero, so alpha = 1 and the layer starts as `base`. In training the
    selection sees Gaussian noise of std `router_noise` (default 1 / K) on z. `inactive="drop"`
    leaves the last sum out; "initial" takes it over the initial components, B0_k A0_k x: then what
    an expert has learnt acts on no token that does not select it. Energy routing does that with
    alpha = 1 and S by `relative_energy`, over `mean_energy` (N,) of some training tokens, 1 until
    it is measured. Static routing: all experts act, weighted by the Parameter `alpha` (K,).
    `svd=None` decomposes nothing and awaits `restore`. Raises InputError for bad values.
    """

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4,
                 routing="token", inactive="keep", router_noise=None, svd="exact"):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        if routing not in ("token", "static", "energy") or inactive not in (
                "keep", "drop", "initial"):
            raise InputError(f"routing {routing!r} must be token, static or energy, "
                             f"inactive {inactive!r} must be keep, drop or initial")
        self.routing, self.inactive = routing, "initial" if routing == "energy" else inactive
        self.router_noise = 1 / num_experts if router_noise is None else router_noise
        if routing == "token":
            self.router = nn.Parameter(self.lora_A.new_zeros(num_experts, base.in_features))
        elif routing == "static":
            self.alpha = nn.Parameter(self.lora_A.new_ones(num_experts))
        else:
            self.register_buffer("mean_energy", self.lora_A.new_ones(len(self.lora_A)))
        self.add_initial_bank()
        if svd is not None:
            bank = decompose(base.weight.detach(), num_experts, rank, self.scaling, svd)
            self.start_from(bank.lora_A, bank.lora_B, bank.residual)

    def route(self, x, expert_of=None):
        """x (..., in) -> Routing over (..., K), under a grouping (N,), by default its own."""
        if self.routing == "static":
            alpha = self.alpha.expand(*x.shape[:-1], -1)  # (..., K)
            return Routing(alpha, alpha, None)
        if self.routing == "energy":
            scores = self.energies(x, self.expert_of if expert_of is None else expert_of)
            alpha = torch.ones_like(scores)
        else:
            with torch.autocast(x.device.type, enabled=False):  # the router is float32 always
                scores = F.linear(x.to(self.router.dtype), self.router)  # (..., K)
                alpha = routing_weights(scores)
        if self.top_k == self.num_experts:
            return Routing(alpha, alpha, None, scores)
        if self.training and self.routing == "token" and self.router_noise > 0:
            # Equal logits at init would always pick the same experts; from the global generator,
            # so that gradient checkpointing draws the same noise again.
            scores = scores + self.router_noise * torch.randn_like(scores)
        active = select_experts(scores, self.top_k)
        kept = 1.0 if self.inactive == "keep" else 0.0
        return Routing(alpha, torch.where(active, alpha, kept), active, scores)

    @property
    def depends_on_token(self):
        return self.routing != "static"

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """As `InitialBank`; static routing needs no `mixing`, as its factors are constant."""
        if mixing is None:
            factors = self.scaling * self.alpha.double()[self.expert_of]  # (N,)
            mixing = torch.diag(factors)
        return super().constant_update(mixing)

    @torch.no_grad()
    def energies(self, x, expert_of):
        """`relative_energy` of tokens x (..., in): (..., K), float32 always."""
        with torch.autocast(x.device.type, enabled=False):
            energy = activation_energy(x.to(self.lora_A0.dtype), self.lora_A0, self.lora_B0)
            return relative_energy(energy, self.mean_energy, expert_of, self.num_experts)

    def add_inactive(self, y, x, routing, expert_of):
        """y (tokens, out) plus the initial components of the experts that a token leaves out."""
        if self.inactive != "initial" or routing.active is None:
            return y
        left_out = ~routing.active.reshape(-1, self.num_experts).index_select(1, expert_of)
        weight = self.scaling * left_out.to(self.lora_A0.dtype)  # (tokens, N)
        return RoutedBank.apply(y, x.reshape(-1, x.shape[-1]), self.lora_A0, self.lora_B0, weight,
                                None)

    def _ratios(self, grouping):
        """rho (N,): alpha of each component's expert now, over that of its expert to be."""
        old, new = self.expert_of, grouping.to(self.expert_of.device)
        return torch.where(new == old, 1, self.alpha[old] / self.alpha[new])

    def obstacle(self, grouping):
        """Why this layer cannot adopt a grouping (N,), or None."""
        low, high = ALPHA_RATIO
        if self.routing == "static":
            size = self._ratios(grouping).abs()
            if not ((size >= low) & (size <= high)).all():  # also for NaN: 0 / 0
                return f"a ratio of routing weights is outside {low} to {high}"
        return None

    def regrouped(self, grouping):
        """The Bank under a grouping (N,); under static routing what moves is rescaled (Prop. C.3).

        With rho = alpha_p / alpha_q for a move from p to q: b *= sign(rho) sqrt|rho| and
        a *= sqrt|rho| leave the output as it was.
        """
        bank = super().regrouped(grouping)
        if self.routing != "static":
            return bank
        rho = self._ratios(grouping)
        root = rho.abs().sqrt()
        return Bank(bank.lora_A * root[:, None], bank.lora_B * (rho.sign() * root), bank.expert_of)


class Badit(ExpertMethod):
    """BADIT with its ablations: `no_bad` puts DOG on LoRAMoE's layer, `no_dog` never regroups."""

    name = "badit"

    def check_layer(self, linear):
        check_bank_size(self.settings.num_experts, self.settings.rank, linear.weight.shape)

    def build_layer(self, linear, fresh):
        read = self.settings
        static = read.routing == "static" and not read.no_bad
        shared = dict(num_experts=read.num_experts, rank=read.rank, alpha=read.alpha,
                      dropout=read.dropout,
                      top_k=read.num_experts if static else read.top_k)  # static: all experts act
        if read.no_bad:
            return LoraMoeLinear(linear, **shared)
        return BaditLinear(linear, **shared, routing=read.routing, inactive=read.inactive,
                           router_noise=read.router_noise, svd=read.svd if fresh else None)

    @property
    def by_energy(self):
        return self.settings.routing == "energy" and not self.settings.no_bad

    def start_stage(self, stage, loader):
        if self.by_energy:
            measure_energies(self.model, self.layers, loader)
        super().start_stage(stage, loader)

    def export_obstacle(self):
        if not self.settings.no_bad and (self.by_energy or self.settings.inactive == "initial"):
            return "experts that a token does not select act on it as pre-trained"
        return None

    def active_parameters(self):
        drops = self.settings.no_bad or self.by_energy or self.settings.inactive != "keep"
        return sum(layer.active_parameters(drops) for layer in self.layers.values())

    def wrap(self, model, fresh=True):
        super().wrap(model, fresh)
        read = self.settings
        self.regrouper = Regrouper(self.layers, read.regroup_every,
                                   "fixed" if read.no_dog else read.grouping, read.seed)
