"""O-LoRA (Wang et al. 2023a): one LoRA branch per task, kept orthogonal to those of past tasks.

Not the QR initialisation that PEFT calls "olora". Axis names as in decomposition.py; r is the rank
of one branch, t the number of branches. The paper writes a branch as A B with A on the output's
side; here `lora_A` reads the input, and the penalty is on it, as in the authors' code.
"""

import math

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from baselines.lora import check_rank, low_rank_update
from method import Method, frozen
from quantized import frozen_linear


def orthogonality(A_t, A_old):
    """Sec. 3.2: return sum |O_jk| of O = A_old A_t', for A_t (r, in) and A_old (r * past, in).

    It is 0 where the current branch is orthogonal to all past ones.
    """
    # Deviation: the paper sums O_jk^2; this is what its code runs.
    return (A_old @ A_t.T).abs().sum()


def mean_cosine(A_t, A_old):
    """Mean |cosine| between rows of A_t (r, in) and of A_old (r * past, in).

    The penalty can also be lowered by shrinking A_t; this cannot.
    """
    return (F.normalize(A_old, dim=1) @ F.normalize(A_t, dim=1).T).abs().mean()


def branch_penalty(layers, orth_weight):
    """Return lambda1 * orthogonality, summed over `layers`; 0.0 without past branches."""
    total = 0.0
    for layer in layers:
        *past, A_t = layer.lora_A
        if past and orth_weight:
            total = total + orth_weight * orthogonality(A_t, torch.cat(past))
    return total


class OloraLinear(nn.Module):
    """y = base(x) + s sum_i B_i A_i dropout(x), s = alpha / rank, with one mask for all branches.

    `lora_A` and `lora_B` hold a branch (r, in), (out, r) per task, of which the last is trained. A
    branch starts with Kaiming-uniform A and zero B, so adding one changes no output. Raises
    InputError for a rank outside 1 .. min(in, out).
    """

    base_tensors = ("residual", "bias")
    depends_on_token = False

    def __init__(self, base, rank=4, alpha=32, dropout=0.05):
        super().__init__()
        check_rank(rank, base.weight.shape)
        self.rank, self.scaling = rank, alpha / rank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropout = nn.Dropout(dropout)
        self.residual = frozen(base.weight)  # (out, in), all of W0
        self.bias = None if base.bias is None else frozen(base.bias)
        self.lora_A, self.lora_B = nn.ParameterList(), nn.ParameterList()
        self.add_branch()

    def add_branch(self):
        """Freeze the branches so far and append a trainable one."""
        self.requires_grad_(False)
        like = self.lora_B[-1] if len(self.lora_B) else self.residual  # which may be quantised
        kind = dict(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.lora_A.append(nn.Parameter(torch.empty(self.rank, self.in_features, **kind)))
        self.lora_B.append(nn.Parameter(torch.zeros(self.out_features, self.rank, **kind)))
        nn.init.kaiming_uniform_(self.lora_A[-1], a=math.sqrt(5))

    def forward(self, x):
        """(..., in) -> (..., out)."""
        y = frozen_linear(x, self.residual, self.bias)  # (..., out)
        u = self.dropout(x).to(y.dtype)
        A = torch.cat(list(self.lora_A)).to(y.dtype)  # (t * r, in)
        B = torch.cat(list(self.lora_B), dim=1).to(y.dtype)  # (out, t * r)
        return y + low_rank_update(u, A, B, self.scaling)

    @torch.no_grad()
    def constant_update(self, mixing=None):
        """Return the branches side by side in float64: A (t * r, in) and s B (out, t * r)."""
        A, B = torch.cat(list(self.lora_A)), torch.cat(list(self.lora_B), dim=1)
        return A.double(), self.scaling * B.double()

    def restore(self, tensors):
        """Take over saved adapter tensors, named as in this layer's state_dict."""
        self.load_state_dict(tensors, strict=False)  # all but `base_tensors`: those are in place


class BranchMethod(Method):
    """What methods with a branch per task share: when branches are added, and how they load.

    The first branch is there from the start, so that a single task needs no random numbers beyond
    LoRA's; `started` says whether a task has trained (on) the last one.
    """

    def check_layer(self, linear):
        check_rank(self.settings.rank, linear.weight.shape)

    def wrap(self, model, fresh=True):
        self.started = False
        super().wrap(model, fresh)

    def add_branch(self):
        """Freeze all branches and append one per layer.

        Processes draw different numbers here; DDP gives all of them the first one's.
        """
        for layer in self.layers.values():
            layer.add_branch()

    def active_parameters(self):
        past = sum(weight.numel() for layer in self.layers.values()
                   for branches in (layer.lora_A, layer.lora_B) for weight in branches
                   if not weight.requires_grad)
        return super().active_parameters() + past

    def start_stage(self, stage, loader):
        if self.started:
            self.add_branch()
        elif stage.name == "mixed":
            PartialState().print(f"{self.name}: mixed training is one task: one branch, and no "
                                 "past one to protect")
        self.started = True

    def grow(self, state):
        """Add the branches that `state` has, and a fresh adapter does not."""
        name, layer = next(iter(self.layers.items()))
        while f"{name}.lora_A.{len(layer.lora_A)}" in state:
            self.add_branch()

    def load_state_dict(self, state):
        """As in Method; the next task to start adds a branch."""
        super().load_state_dict(state)
        self.started = True


class Olora(BranchMethod):
    """A new branch for every task; all of them act on every input, whatever its task."""

    name = "olora"

    def build_layer(self, linear, fresh):
        return OloraLinear(linear, self.settings.rank, self.settings.alpha,
                           self.settings.dropout)

    def penalty(self, batch):
        # Deviation: the loop divides this among micro-batches; the code adds it to each in full.
        return branch_penalty(self.layers.values(), self.settings.orth_weight)

    @torch.no_grad()
    def end_stage(self, stage, loader):
        layers = self.layers.values()
        cosines = [mean_cosine(layer.lora_A[-1], torch.cat(list(layer.lora_A)[:-1]))
                   for layer in layers if len(layer.lora_A) > 1]
        if cosines:
            PartialState().print(f"olora: mean |cosine| of rows of lora_A to past branches' after "
                                 f"{stage.name}: {torch.stack(cosines).mean():.4f}")
