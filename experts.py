"""Define a frozen linear layer with a routed bank of rank-1 components, and its backward pass.

Axis names as in decomposition.py, and
    ...       any leading axes, such as (batch, seq)

All N components of a layer form one bank, `lora_A` (N, in) and `lora_B` (out, N); `expert_of` (N,)
is the expert that owns each. Regrouping rewrites `expert_of` and moves no weight.
"""

from typing import NamedTuple

import torch
from torch import nn

from decomposition import check_bank_size
from inputs.errors import InputError
from method import frozen, of_base
from quantized import frozen_linear


def select_experts(logits, top_k):
    """Return a bool mask of the `top_k` largest logits (..., K); ties go to the lowest index."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices  # (..., K)
    selected = torch.zeros_like(logits, dtype=torch.bool)
    return selected.scatter_(-1, order[..., :top_k], True)


def add_components(y, u, A, B, w):
    """Add B (w * (A u)) to y in place and return A u.

    y (tokens, out), u (tokens, in), A (N, in), B (out, N), w (tokens, N). A u and its weighting use
    the bank's precision, the product with B that of y. In bf16 the former would double the rounding
    error, since the bank holds the leading singular values.
    """
    with torch.autocast(u.device.type, enabled=False):
        h = u.to(A.dtype) @ A.T  # (tokens, N)
        y.addmm_((h * w).to(y.dtype), B.to(y.dtype).T)  # (tokens, out)
        return h


class RoutedBank(torch.autograd.Function):
    """Run `add_components` with a backward pass; `active` is (tokens, N) bool, or None for all.

    Where `active` is False the component acts on u, but A and B get no gradient from the token.
    """

    @staticmethod
    def forward(ctx, y, u, A, B, w, active):
        h = add_components(y, u, A, B, w)
        ctx.mark_dirty(y)
        ctx.save_for_backward(u, A, B, w, active, h)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        u, A, B, w, active, h = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            grad_c = (grad_y @ B.to(grad_y.dtype)).to(A.dtype)  # (tokens, N), c = w * h
            grad_u = grad_w = None
            if ctx.needs_input_grad[1]:
                grad_u = (grad_c * w).to(u.dtype) @ A.to(u.dtype)  # (tokens, in)
            if ctx.needs_input_grad[4]:
                grad_w = grad_c * h
            trained_w = w if active is None else w * active
            grad_A = grad_B = None
            if ctx.needs_input_grad[2]:  # an initial bank needs none
                grad_A = (grad_c * trained_w).T @ u.to(A.dtype)  # (N, in)
                grad_B = (grad_y.T @ (h * trained_w).to(grad_y.dtype)).to(B.dtype)  # (out, N)
        return grad_y, grad_u, grad_A, grad_B, grad_w, None


def add_to(y, u, A, B, w, active):
    """Add a weighted bank's output to y in place and return y; arguments as in RoutedBank."""
    if torch.is_grad_enabled():
        return RoutedBank.apply(y, u, A, B, w, active)
    add_components(y, u, A, B, w)
    return y


class Routing(NamedTuple):
    """The routing of one layer's tokens."""

    alpha: torch.Tensor  # (..., K) routing weights
    weight: torch.Tensor  # (..., K) factor of each expert's output
    active: torch.Tensor | None  # (..., K) bool, experts that learn from the token; None for all
    scores: torch.Tensor | None = None  # (..., K) logits or relative energies; the largest select


class Bank(NamedTuple):
    """The rank-1 components of one layer and their grouping."""

    lora_A: torch.Tensor  # (N, in)
    lora_B: torch.Tensor  # (out, N)
    expert_of: torch.Tensor  # (N,) int64: the expert that owns each component


class BankLinear(nn.Module):
    """Add a routed bank of N rank-1 components, owned by K experts, to a frozen linear layer.

    Subclasses define `route(x, expert_of) -> Routing` under a grouping (default: the layer's own).
    Raises InputError if the bank does not fit the layer, or for top_k outside 1 .. num_experts.
    """

    base_tensors = ("residual", "bias")
    depends_on_token = True
    # Unselected experts act as trained ("keep"), not at all ("drop") or as pre-trained ("initial").
    inactive = "keep"

    def __init__(self, base, num_experts, rank, alpha, dropout, top_k):
        super().__init__()
        check_bank_size(num_experts, rank, base.weight.shape)
        if not 1 <= top_k <= num_experts:
            raise InputError(f"top_k {top_k} must be from 1 to num_experts = {num_experts}")
        self.num_experts, self.rank, self.top_k = num_experts, rank, top_k
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.residual = frozen(base.weight)  # (out, in); a buffer would be sent by DDP
        self.bias = None if base.bias is None else frozen(base.bias)
        N, (out_features, in_features) = num_experts * rank, base.weight.shape
        kind = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32),
                    device=base.weight.device)
        self.lora_A = nn.Parameter(torch.zeros(N, in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(out_features, N, **kind))
        first = torch.arange(N, device=base.weight.device) // rank
        self.register_buffer("expert_of", first)  # (N,) int64: the grouping

    def forward(self, x):
        """Map (..., in) to (..., out)."""
        # Flattened first: add_bank changes y in place, which autograd refuses for a view.
        y = frozen_linear(x.reshape(-1, x.shape[-1]), self.residual, self.bias)  # (tokens, out)
        return self.add_bank(y, x).view(*x.shape[:-1], y.shape[-1])

    def add_bank(self, y, x, bank=None):
        """Add the experts' output for x (..., in) to y (tokens, out) in place, and return y.

        `bank` replaces the layer's own Bank.
        """
        A, B, expert_of = bank or self.bank
        routing = self.route(x, expert_of)
        y = self.add_inactive(y, x, routing, expert_of)
        weight, active = self.per_component(routing, expert_of)  # (tokens, N)
        u = self.dropout(x).reshape(-1, x.shape[-1])  # (tokens, in): one mask for all experts
        return add_to(y, u, A, B, weight, active)

    def add_inactive(self, y, x, routing, expert_of):
        """Add unselected experts' initial components to y (tokens, out), for "initial" only."""
        if self.inactive != "initial" or routing.active is None:
            return y
        left_out = ~routing.active.reshape(-1, self.num_experts).index_select(1, expert_of)
        weight = self.scaling * left_out.to(self.lora_A0.dtype)  # (tokens, N)
        return add_to(y, x.reshape(-1, x.shape[-1]), self.lora_A0, self.lora_B0, weight, None)

    def per_component(self, routing, expert_of):
        """Expand a Routing from experts to components: s * weight and active, (tokens, N)."""
        K = self.num_experts
        weight = self.scaling * routing.weight.reshape(-1, K).index_select(1, expert_of)
        if routing.active is None or not torch.is_grad_enabled():
            return weight, None
        return weight, routing.active.reshape(-1, K).index_select(1, expert_of)

    @torch.no_grad()
    def components(self, x):
        """Return h = A x and the factor c of each component, s included, both (tokens, N).

        For x (tokens, in) the bank's output is B (c * h).
        """
        h = x.to(self.lora_A.dtype) @ self.lora_A.T
        return h, self.per_component(self.route(x, self.expert_of), self.expert_of)[0]

    def bank_inputs(self, x):
        """Return c * h (tokens, N), what `lora_B` reads, for x (tokens, in)."""
        h, c = self.components(x)
        return c * h

    @torch.no_grad()
    def constant_update(self, mixing):
        """Return A (N, in) and B M (out, N) in float64; M = `mixing` (N, N): M h replaces c * h."""
        return self.lora_A.double(), self.lora_B.double() @ mixing

    def active_parameters(self):
        """Count the trained weights that act on one token."""
        bank = self.lora_A.numel() + self.lora_B.numel()
        routed = sum(weight.numel() for weight in self.parameters() if weight.requires_grad) - bank
        return routed + (bank * self.top_k // self.num_experts if self.inactive != "keep"
                         else bank)

    def restore(self, tensors):
        """Load saved adapter tensors, named as in this layer's state_dict."""
        owned = tensors["expert_of"].clamp(-1, self.num_experts) + 1  # first and last bin: invalid
        if owned.bincount(minlength=self.num_experts + 2).tolist() != [
                0, *[self.rank] * self.num_experts, 0]:
            raise InputError(f"expert_of of the adapter does not give each of {self.num_experts} "
                             f"experts {self.rank} components")
        for name, tensor in self.state_dict().items():
            if not of_base(self, name):
                tensor.copy_(tensors[name])

    @property
    def bank(self):
        """The tensors that a regrouping may change."""
        return Bank(self.lora_A, self.lora_B, self.expert_of)

    def obstacle(self, grouping):
        """Return why this layer cannot adopt a grouping (N,), or None."""
        return None

    def regrouped(self, grouping):
        """Return the Bank that this layer would have under a grouping (N,)."""
        return Bank(self.lora_A, self.lora_B, grouping.to(self.expert_of.device))

    @torch.no_grad()
    def take_grouping(self, grouping):
        """Adopt a grouping (N,)."""
        for mine, new in zip(self.bank, self.regrouped(grouping), strict=True):
            mine.copy_(new)
