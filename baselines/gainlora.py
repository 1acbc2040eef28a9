"""GainLoRA (Liang et al. 2025): a branch and a gate per task; new gates stay shut on old inputs.

Branches are InfLoRA's (Liang and Li 2024): their A is frozen, orthogonal to what old tasks fed into
the layer; or O-LoRA's. Old subspaces are found as in GPM (Saha et al. 2021). Where paper, T5 code
and LLaMA code of the authors differ, this follows the LLaMA code unless a comment says otherwise.

Axis names as in decomposition.py, and
    r, t   rank of one branch, number of branches (tasks so far)
    d, h   a vector space: inputs of a layer, or embeddings; hidden size of a gate
    c, k   blocks into which d is split (--chunk), and directions in one block's basis

A subspace of a space d is a list of c orthonormal bases (d/c, k), one for each block; one that is
larger than half of its block is held by its `Complement`, which is smaller.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from baselines.olora import BranchMethod, OloraLinear, branch_penalty
from inputs.errors import InputError
from method import find_targets, frozen
from quantized import frozen_linear

MAX_INSTANCES = 1000  # of a task, in one pass over its data; the published code takes 1002 batches
SCHEDULE_TASKS = 15  # over which the published thresholds rise towards 1
GATE_STD = 0.02  # of a new linear layer in transformers' LLaMA
DATA_KEYS = ("input_ids", "attention_mask", "position_ids")


# --- the gate -----------------------------------------------------------------------------------


def prompt_mask(batch):
    """Where the prompt's tokens are, bool (batch, seq): neither padding nor targets.

    `labels` (batch, n), if any, cover the last n columns and are -100 outside targets.
    """
    mask = batch["attention_mask"].bool()  # (batch, seq)
    if "labels" in batch:
        mask = mask.clone()
        mask[:, -batch["labels"].shape[1]:] &= batch["labels"] == -100
    return mask


def same_start(ids, others):
    """Whether two (batch, seq) have as many rows, and equal columns as far as both go."""
    if others is None or ids is others or len(ids) != len(others):
        return ids is others
    length = min(ids.shape[1], others.shape[1])
    return torch.equal(ids[:, :length], others[:, :length])


def pooled_prompt(embeddings, mask):
    """p0: the mean over the prompt of embeddings (batch, seq, d), mask (batch, seq) -> (batch, d).

    A row without any prompt gives zero.
    """
    # Deviation: the code divides by the padded length, so that its gate depends on batch mates.
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)  # (batch, 1)
    return (embeddings * mask[:, :, None]).sum(dim=1) / count


def gate_features(p0, W1, W2):
    """The gate's two layers: p0 (batch, d), W1 (h, d), W2 (d, h) -> p1 (batch, h), p2 (batch, d).

    The paper, and the code for T5, put a SiLU after W1 as well; the LLaMA code does not.
    """
    p1 = F.linear(p0, W1)  # (batch, h)
    return p1, F.silu(F.linear(p1, W2))  # (batch, d)


def gate_coefficient(b):
    """f(b) = |2 sigmoid(b) - 1| = |tanh(b / 2)|: zero at zero, even, below 1."""
    return torch.tanh(b / 2).abs()


def gate(p0, W1, W2, k):
    """The factor a of one branch for each sequence: p0 (batch, d), key k (d,) -> (batch,).

    b = 4 cos(p2, k) as in the code; the paper has b = k'p2. Without a prompt a = 0.
    """
    _, p2 = gate_features(p0, W1, W2)
    return gate_coefficient(4 * F.cosine_similarity(p2, k[None], dim=1))


# --- subspaces ----------------------------------------------------------------------------------


class Complement(NamedTuple):
    """A subspace of one block by what is outside of it: N (d, d - k), orthonormal."""

    N: torch.Tensor


def room(block):
    """How many directions of its space a basis, or a Complement, leaves."""
    return block.N.shape[1] if isinstance(block, Complement) else block.shape[0] - block.shape[1]


def size(block):
    """d, of the space of a basis or a Complement."""
    return len(block.N if isinstance(block, Complement) else block)


def outside(v, block):
    """(I - P P') v for vectors v (..., d) in float64, with P or with its Complement: N N' v."""
    if isinstance(block, Complement):
        N = block.N.double()
        return (v @ N) @ N.T
    P = block.double()
    return v - (v @ P) @ P.T


def second_moment(v, c):
    """Sum of v v' over the rows of v (n, d), by block: (c, d/c, d/c), in float32 or better."""
    v = v.to(torch.promote_types(v.dtype, torch.float32)).unflatten(1, (c, -1))  # (n, c, d/c)
    return torch.einsum("nci,ncj->cij", v, v)


def project_out(v, bases):
    """(I - P P') v for each vector in the last axis of v (..., d); P the `bases` of a subspace.

    Computed in float64: the keys and rows that it makes are as orthogonal as their type allows.
    """
    parts = v.double().split([size(block) for block in bases], dim=-1)
    left = [outside(part, block) for part, block in zip(parts, bases, strict=True)]
    return torch.cat(left, dim=-1).to(v.dtype)


def constrain_update(W, W_start, bases):
    """GainLoRA's updating constraint: W_start + (W - W_start)(I - P P'), W (..., d)."""
    # Deviation: W_start is the task's first W, not the last step's: equal but for rounding, which
    # would add up. And rows are not rescaled, as T5's code does: that undoes the constraint.
    return W_start + project_out(W - W_start, bases)


def directions_outside(E, block):
    """Eigenvectors of E (d, d) within what `block`, a basis P (d, k) or a Complement, leaves.

    Returns eigenvalues (d - k,), descending, and orthonormal columns (d, d - k), in float64. They
    are the singular vectors of (I - P P') H where E = H H', but orthogonal to P even for a singular
    value of zero.
    """
    if isinstance(block, Complement):
        N = block.N.double()
    else:
        N = torch.linalg.qr(block.double(), mode="complete").Q[:, block.shape[1]:]  # (d, d - k)
    values, V = torch.linalg.eigh(N.T @ E.double() @ N)
    return values.flip(0).clamp_min(0), (N @ V).flip(1)


def energy_matrix(C, energy):
    """E (d, d) whose trace GPM's threshold shares out, for second moments C (d, d).

    "eig": C, the paper's ||H||_F^2; "eig2": C C', since the code squares C's singular values.
    """
    C = C.double()
    return C if energy == "eig" else C @ C.T


def new_directions(C, block, eps, energy):
    """GPM: the directions outside `block` (d, d - k), and how many C (d, d) needs to keep `eps`.

    eps is the share of the energy to be inside the new basis. The first task's rule differs from
    the later ones', as in the code: it stops before the share is reached, but keeps one at least.
    """
    E = energy_matrix(C, energy)
    values, U = directions_outside(E, block)
    gained = values.cumsum(0) / E.trace()  # (d - k,)
    if len(values) == len(E):
        return U, max(1, int((gained < eps).sum()))
    inside = 1 - values.sum() / E.trace()
    return U, int((inside + F.pad(gained, (1, 0))[:-1] < eps).sum())


def extend_basis(C, P, eps, energy):
    """P (d, k) with its `new_directions` (d, k + q)."""
    U, q = new_directions(C, P, eps, energy)
    return torch.cat([P, U[:, :q].to(P.dtype)], dim=1)


def extend_block(C, block, eps, energy):
    """`extend_basis` of a basis or a Complement, as whichever is the smaller afterwards."""
    U, q = new_directions(C, block, eps, energy)
    held = block.N if isinstance(block, Complement) else block
    if 2 * (U.shape[1] - q) < len(U):
        return Complement(U[:, q:].to(held.dtype).contiguous())
    return torch.cat([held, U[:, :q].to(held.dtype)], dim=1)  # never more than half: a basis


def scheduled_threshold(eps, t):
    """The threshold after task t = 1, 2, ...: it rises from eps towards 1."""
    # Deviation: the code lets it reach 1 at task 16, which would leave no room for any more.
    return eps + (1 - eps) * min(t - 1, SCHEDULE_TASKS - 1) / SCHEDULE_TASKS


def rows_from_moment(C, bases, r):
    """InfLoRA's A_t (r, d): leading left singular vectors of (I - P P') C, by block, / sqrt(3).

    C (c, d/c, d/c). Rows for which a block has no direction left are zero there.
    """
    blocks = []
    for C_block, block in zip(C, bases, strict=True):
        _, U = directions_outside(energy_matrix(C_block, "eig2"), block)
        rows = U[:, :r].T / math.sqrt(3 * len(C))  # (<= r, d/c)
        blocks.append(F.pad(rows, (0, 0, 0, r - len(rows))))
    return torch.cat(blocks, dim=1)


def rows_from_random(A, bases):
    """The LLaMA code's A_t: rows A (r, d) outside the subspace, each of norm 1 / sqrt(3)."""
    if not any(map(room, bases)):
        return torch.zeros_like(A)  # no direction is left
    return F.normalize(project_out(A, bases), dim=1) / math.sqrt(3)


def key_outside(k, bases):
    """GainLoRA's initialisation constraint: k (d,) outside the subspace, of norm sqrt(d / 3)."""
    if not any(map(room, bases)):
        raise InputError("gainlora: what old tasks gave their gates fills all of its space, so a "
                         "new one would be shut on everything: lower --gate_threshold")
    return F.normalize(project_out(k, bases), dim=0) * math.sqrt(len(k) / 3)


class Subspace(nn.Module):
    """c bases or complements as frozen parameters: `0` or `outside_0`, and so on.

    Empty at first, of the type and device of `like`.
    """

    def __init__(self, d, c, like):
        super().__init__()
        self.c = c
        for index in range(c):
            self[index] = like.new_zeros(d // c, 0)

    def __len__(self):
        return self.c

    def __getitem__(self, index):
        if not 0 <= index < self.c:
            raise IndexError(index)  # what ends an iteration
        held = self._parameters.get(f"outside_{index}")
        return self._parameters[f"{index}"] if held is None else Complement(held)

    def __setitem__(self, index, block):
        for name in (f"{index}", f"outside_{index}"):
            self._parameters.pop(name, None)
        if isinstance(block, Complement):
            self.register_parameter(f"outside_{index}", frozen(block.N))
        else:
            self.register_parameter(f"{index}", frozen(block))

    @torch.no_grad()
    def extend(self, C, eps, energy):
        """`extend_block` for each; C (c, d/c, d/c)."""
        for index, (block, C_block) in enumerate(zip(list(self), C, strict=True)):
            self[index] = extend_block(C_block, block, eps, energy)

    def resize(self, state, prefix):
        """Take the form and the columns of the tensors in `state`, as far as they make sense."""
        for index, block in enumerate(list(self)):
            like = block.N if isinstance(block, Complement) else block
            for name, kind in ((f"{index}", torch.Tensor), (f"outside_{index}", Complement)):
                saved = state.get(f"{prefix}.{name}", torch.empty(()))
                if saved.dim() == 2 and saved.shape[1] <= len(like):
                    zeros = like.new_zeros(len(like), saved.shape[1])
                    self[index] = Complement(zeros) if kind is Complement else zeros


# --- layers and gates ---------------------------------------------------------------------------


class GainLinear(OloraLinear):
    """y = base(x) + s sum_i a_i B_i A_i dropout(x), where a_i is the gate of task i.

    `gain` (batch, t) holds the a_i of the sequences in x (batch, seq, in); GainLora sets it before
    the forward pass, and a decode step finds that of its prompt. With `chunk` the branches are
    InfLoRA's, which train B only, and `basis` is the subspace of old inputs; else O-LoRA's.
    """

    constant_update = None  # gates differ from prompt to prompt

    def __init__(self, base, rank=4, alpha=32, dropout=0.05, chunk=None):
        self.trains_A = chunk is None
        super().__init__(base, rank, alpha, dropout)
        self.gain = None
        if chunk is not None:
            self.basis = Subspace(base.in_features, chunk, self.lora_A[0])

    def add_branch(self):
        super().add_branch()
        self.lora_A[-1].requires_grad_(self.trains_A)

    def forward(self, x):
        """(batch, seq, in) -> (batch, seq, out)."""
        if self.gain is None or len(self.gain) != len(x):
            raise InputError("gainlora: the gates of these sequences are not computed: call the "
                             "method's before_forward(batch) before the model")
        y = frozen_linear(x, self.residual, self.bias)  # (batch, seq, out)
        u = self.dropout(x).to(y.dtype)
        A = torch.cat(list(self.lora_A)).to(y.dtype)  # (t * r, in)
        B = torch.cat(list(self.lora_B), dim=1).to(y.dtype)  # (out, t * r)
        a = (self.scaling * self.gain).repeat_interleave(self.rank, dim=1)  # (batch, t * r)
        return y + F.linear(a[:, None].to(y.dtype) * F.linear(u, A), B)


class Gate(nn.Module):
    """One task's gate: W1 (h, d), W2 (d, h) and key k (d,)."""

    def __init__(self, W1, W2, k):
        super().__init__()
        self.W1, self.W2, self.k = nn.Parameter(W1), nn.Parameter(W2), nn.Parameter(k)


class Gates(nn.Module):
    """The gates of all tasks, of which the last is trained, and the subspaces of their inputs.

    P1, P2 and P3 hold what old tasks fed into W1, W2 and the comparison with k.
    """

    def __init__(self, d, h, chunk, like):
        super().__init__()
        W1, W2 = (GATE_STD * torch.randn(*shape, dtype=like.dtype, device=like.device)
                  for shape in ((h, d), (d, h)))
        self.tasks = nn.ModuleList([Gate(W1, W2, self.random_key(W1))])
        self.P1, self.P3 = (Subspace(d, chunk, like) for _ in range(2))
        self.P2 = Subspace(h, 1, like)  # never split

    @staticmethod
    def random_key(W1):
        return 2 * torch.rand(W1.shape[1], dtype=W1.dtype, device=W1.device) - 1  # (d,)

    @torch.no_grad()
    def add_gate(self):
        """Freeze the gates so far and append a trainable one: their last, with a key of its own."""
        self.requires_grad_(False)
        last = self.tasks[-1]
        k = key_outside(self.random_key(last.W1), self.P3)
        self.tasks.append(Gate(last.W1.clone(), last.W2.clone(), k))

    def forward(self, p0):
        """p0 (batch, d) -> a (batch, t)."""
        return torch.stack([gate(p0, task.W1, task.W2, task.k) for task in self.tasks], dim=1)

    def features(self, p0):
        """The inputs of the last gate's W1, W2 and comparison with k, by name of subspace."""
        p1, p2 = gate_features(p0, self.tasks[-1].W1, self.tasks[-1].W2)
        return {"P1": p0, "P2": p1, "P3": p2}

    @torch.no_grad()
    def constrain(self):
        """Take from this task's update of the last gate what old inputs would notice."""
        if len(self.tasks) == 1:
            return
        *_, old, new = self.tasks
        new.W1.copy_(constrain_update(new.W1, old.W1, self.P1))
        new.W2.copy_(constrain_update(new.W2, old.W2, self.P2))
        new.k.copy_(project_out(new.k, self.P3))  # k starts outside P3


class GainLora(BranchMethod):
    """A gated branch for every task; the gates are computed once per sequence from its prompt."""

    name = "gainlora"

    def export_obstacle(self):
        return "its gates depend on the prompt"

    @property
    def has_memory(self):
        """Whether layers keep the subspace of old inputs, as InfLoRA's branches do."""
        return self.settings.branches == "inflora"

    def check_model(self, model):
        super().check_model(model)
        chunk, rank = self.settings.chunk, self.settings.rank
        sizes = {model.get_input_embeddings().weight.shape[1]}
        if self.has_memory:
            targets = find_targets(model, self.settings.target_modules).values()
            sizes |= {linear.in_features for linear in targets}
        for size in sorted(sizes):
            if size % chunk or self.has_memory and rank > size // chunk:
                raise InputError(f"--chunk {chunk} does not split {size} inputs into equal blocks "
                                 f"of at least --rank {rank}")

    def wrap(self, model, fresh=True):
        super().wrap(model, fresh)
        embeddings = model.get_input_embeddings().weight
        like = embeddings.new_empty(0, dtype=torch.promote_types(embeddings.dtype, torch.float32))
        self.gates = Gates(embeddings.shape[1], self.settings.gate_hidden,
                           self.settings.chunk, like)
        model.add_module("gainlora_gates", self.gates)  # among the parameters that DDP sees
        self.gated = None  # the input_ids (batch, seq) that before_forward has seen last
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)

    def build_layer(self, linear, fresh):
        return GainLinear(linear, self.settings.rank, self.settings.alpha,
                          self.settings.dropout,
                          self.settings.chunk if self.has_memory else None)

    def add_branch(self):
        super().add_branch()
        self.gates.add_gate()

    # --- hooks ----------------------------------------------------------------------------------

    def start_stage(self, stage, loader):
        super().start_stage(stage, loader)
        if self.has_memory:
            self._warn_if_full()
            self._start_rows(loader)

    @torch.no_grad()
    def _start_rows(self, loader):
        """Set the new branch's frozen lora_A."""
        if self.settings.a_init == "cov_svd":
            moments = self._observe(loader, with_gates=False)
            for name, layer in self.layers.items():
                rows = rows_from_moment(moments[name], layer.basis, layer.rank)
                layer.lora_A[-1].copy_(rows)
        elif len(self.gates.tasks) > 1:  # the first task's rows stay as they were drawn
            for layer in self.layers.values():
                layer.lora_A[-1].copy_(rows_from_random(layer.lora_A[-1], layer.basis))

    def _warn_if_full(self):
        rank, layers = self.settings.rank, self.layers.values()
        over = min if self.settings.a_init == "cov_svd" else sum  # the blocks of a row
        full = sum(over(map(room, layer.basis)) < rank for layer in layers)
        if full:
            PartialState().print(f"gainlora: old inputs leave a new branch less than rank {rank} "
                                 f"in {full} of {len(layers)} layers: lower --threshold")

    def before_forward(self, batch):
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            a = self.gates(self._pool(batch))  # (batch, t), float32 always
        for layer in self.layers.values():
            layer.gain = a
        self.gated = batch["input_ids"]

    @torch.compiler.disable
    def _before_model(self, model, inputs, options):
        """Compute the gates where nobody called before_forward: generate, or another's harness.

        A step with a cache that is not empty, and one on the sequences of the last before_forward,
        go on with the gates of their prompts.
        """
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return
        ids = inputs[0] if inputs else options.get("input_ids")
        if ids is None:
            raise InputError("gainlora: its gates read the tokens of the prompt: call the model "
                             "with input_ids")
        if same_start(ids, self.gated):
            return
        mask = options.get("attention_mask")
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        if batch["attention_mask"].shape != ids.shape:
            raise InputError(f"gainlora: an attention_mask of shape {list(mask.shape)} does not "
                             f"fit input_ids of shape {list(ids.shape)}")
        if options.get("labels") is not None:
            batch["labels"] = options["labels"]
        self.before_forward(batch)
        self.gated = None  # the next call may have another mask

    def _pool(self, batch):
        """p0 of a batch, (batch, d)."""
        # The bare table: Gemma's embedding layer would multiply by sqrt(d), as its model does.
        rows = F.embedding(batch["input_ids"], self.model.get_input_embeddings().weight)
        rows = rows.to(self.gates.tasks[0].k.dtype)  # (batch, seq, d)
        return pooled_prompt(rows, prompt_mask(batch))

    def penalty(self, batch):
        if self.has_memory:
            return 0.0
        read = self.settings
        return branch_penalty(self.layers.values(), read.orth_weight, read.l2_weight,
                              read.orth_norm)

    def after_step(self, batch):
        self.gates.constrain()
        return ()

    def end_stage(self, stage, loader):
        moments = self._observe(loader, with_gates=True)
        t, read = len(self.gates.tasks), self.settings
        for name, layer in self.layers.items():
            if self.has_memory:
                eps = scheduled_threshold(read.threshold, t)
                layer.basis.extend(moments[name], eps, read.energy)
        for name in ("P1", "P2", "P3"):
            eps = scheduled_threshold(read.gate_threshold, t)
            getattr(self.gates, name).extend(moments[name], eps, read.energy)

    @torch.no_grad()
    def _observe(self, loader, with_gates):
        """One pass over a task's data: second moments of what layers, and gates, are given.

        By name of layer and subspace, (c, d/c, d/c), summed over all processes and not divided by
        their number: only directions and shares of energy are read from them.
        """
        bases = {name: layer.basis for name, layer in self.layers.items() if self.has_memory}
        if with_gates:
            bases |= {name: getattr(self.gates, name) for name in ("P1", "P2", "P3")}
        like = self.gates.tasks[0].k
        sums = {name: torch.stack([like.new_zeros(size(block), size(block)) for block in each])
                for name, each in bases.items()}
        tokens = None  # (batch, seq) of the batch under way

        def add(name, v):
            sums[name] += second_moment(v, len(sums[name]))

        # Deviation: the code counts padding as well, and runs in whatever mode it was left in.
        handles = [layer.register_forward_pre_hook(
                       lambda _, inputs, name=name: add(name, inputs[0][tokens]))
                   for name, layer in self.layers.items() if self.has_memory]
        training = self.model.training
        self.model.eval()
        left = math.ceil(MAX_INSTANCES / PartialState().num_processes)
        for batch in loader:  # to its end: Accelerate's loaders must not be left half-way
            tokens = batch["attention_mask"].bool()
            if left <= 0:
                continue
            left -= len(tokens)  # with fillers: as many passes in every process
            if self.has_memory:
                self.before_forward(batch)
                self.model(**{key: batch[key] for key in DATA_KEYS}, logits_to_keep=1,
                           use_cache=False)
            if with_gates:
                # Fillers have no prompt: their zeros add nothing.
                for name, v in self.gates.features(self._pool(batch)).items():
                    add(name, v)
        self.model.train(training)
        for handle in handles:
            handle.remove()
        for name in sums:  # in place, since all layers' together are large
            sums[name] = reduce(sums[name], "sum")
        return sums

    # --- adapter state --------------------------------------------------------------------------

    def state_dict(self):
        gates = {f"gates.{key}": tensor.detach() for key, tensor in self.gates.state_dict().items()}
        return super().state_dict() | gates

    def grow(self, state):
        super().grow(state)
        for name, layer in self.layers.items():
            if self.has_memory:
                layer.basis.resize(state, f"{name}.basis")
        for name in ("P1", "P2", "P3"):
            getattr(self.gates, name).resize(state, f"gates.{name}")

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.gates.load_state_dict({key: state[f"gates.{key}"] for key in self.gates.state_dict()})
