"""GainLoRA (Liang et al. 2025): a branch and a gate per task; new gates are 0 on old inputs.

Branches are InfLoRA's (Liang and Li 2024), whose A is frozen and orthogonal to the layer's inputs
in old tasks, or O-LoRA's. Subspaces of old inputs are found as in GPM (Saha et al. 2021). Where the
authors' paper, T5 code and LLaMA code differ, this is the LLaMA code unless a comment says
otherwise.

Axis names as in decomposition.py, and
    r, t   rank of one branch, number of branches (tasks so far)
    d, h   dimension of a layer's inputs or of embeddings, hidden size of a gate
    k      dimension of a subspace (subspaces.py)
"""

import math

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from baselines.olora import BranchMethod, OloraLinear, branch_penalty
from inputs.errors import InputError
from method import INPUTS, first_rows, observe
from subspaces import (
    MAX_INSTANCES,
    Subspace,
    constrain_update,
    directions_outside,
    free_directions,
    project_out,
    second_moment,
)

SCHEDULE_TASKS = 15  # the published thresholds rise towards 1 over so many tasks
GATE_HIDDEN = 50  # hidden size of a gate in the published scripts for LLaMA
GATE_STD = 0.02  # std of a new linear layer in transformers' LLaMA


# --- the gate -----------------------------------------------------------------------------------


def prompt_mask(batch):
    """Return where the prompt is, bool (batch, seq), without padding and targets.

    `labels` (batch, n), if any, cover the last n columns and are -100 outside targets.
    """
    mask = batch["attention_mask"].bool()  # (batch, seq)
    if "labels" in batch:
        mask = mask.clone()
        mask[:, -batch["labels"].shape[1]:] &= batch["labels"] == -100
    return mask


def same_start(ids, others):
    """Return whether ids and others (batch, seq) agree on all columns that both have."""
    if others is None or ids is others or len(ids) != len(others):
        return ids is others
    length = min(ids.shape[1], others.shape[1])
    return torch.equal(ids[:, :length], others[:, :length])


def pooled_prompt(embeddings, mask):
    """Return p0 (batch, d), the mean embedding of each prompt; zero without a prompt.

    embeddings (batch, seq, d), mask (batch, seq).
    """
    # Deviation: the code divides by the padded length, so gates depend on the rest of the batch.
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)  # (batch, 1)
    return (embeddings * mask[:, :, None]).sum(dim=1) / count


def gate_features(p0, W1, W2):
    """Apply the gate's two layers to p0 (batch, d): p1 (batch, h) and p2 (batch, d).

    W1 (h, d), W2 (d, h). The paper and the T5 code also apply a SiLU after W1.
    """
    p1 = F.linear(p0, W1)  # (batch, h)
    return p1, F.silu(F.linear(p1, W2))  # (batch, d)


def gate(p0, W1, W2, k):
    """Return the factor a (batch,) of one branch for prompts p0 (batch, d), with key k (d,).

    b = 4 cos(p2, k) as in the code; the paper has b = k'p2. An empty prompt has a = 0.
    """
    _, p2 = gate_features(p0, W1, W2)
    b = 4 * F.cosine_similarity(p2, k[None], dim=1)
    return torch.tanh(b / 2).abs()  # |2 sigmoid(b) - 1|


# --- InfLoRA's rows, keys and thresholds ----------------------------------------------------------


def scheduled_threshold(eps, t):
    """Return the threshold after task t = 1, 2, ..., which rises from eps towards 1."""
    # Deviation: the code reaches 1 at task 16, which leaves no direction for later tasks.
    return eps + (1 - eps) * min(t - 1, SCHEDULE_TASKS - 1) / SCHEDULE_TASKS


def rows_from_moment(C, space, r):
    """Return InfLoRA's A_t (r, d): r leading left singular vectors of (I - P P') C, / sqrt(3).

    C (d, d). Rows without a free direction are zero.
    """
    # Deviation: the LLaMA code takes random rows outside the subspace instead.
    C = C.double()
    _, U = directions_outside(C @ C.T, space)
    rows = U[:, :r].T / math.sqrt(3)  # (<= r, d)
    return F.pad(rows, (0, 0, 0, r - len(rows)))


def key_outside(k, space):
    """Return k (d,) projected out of the subspace, with norm sqrt(d / 3), to start a key."""
    if not free_directions(space):
        raise InputError("gainlora: the inputs of old gates fill their whole space, so a new gate "
                         "would be 0 on every input: lower --threshold")
    return F.normalize(project_out(k, space), dim=0) * math.sqrt(len(k) / 3)


# --- layers and gates ---------------------------------------------------------------------------


class GainLinear(OloraLinear):
    """Compute y = base(x) + s sum_i a_i B_i A_i dropout(x), where a_i is the gate of task i.

    `gain` (batch, t) holds the a_i of the sequences in x (batch, seq, in). GainLora sets it before
    the forward pass; decoding steps reuse the prompt's gates. With `memory`, branches are
    InfLoRA's, which train only B, and `basis` is the subspace of old inputs; otherwise they are
    O-LoRA's.
    """

    constant_update = None  # gates depend on the prompt

    def __init__(self, base, rank=4, alpha=32, dropout=0.05, memory=True):
        self.trains_A = not memory
        super().__init__(base, rank, alpha, dropout)
        self.gain = None
        if memory:
            self.basis = Subspace(base.in_features, self.lora_A[0])

    def add_branch(self):
        super().add_branch()
        self.lora_A[-1].requires_grad_(self.trains_A)

    def factors(self, y):
        """Return s a, (batch, 1, t * r). Raises InputError without the gates of this batch."""
        if self.gain is None or len(self.gain) != len(y):
            raise InputError("gainlora: the gates of these sequences are not computed: call the "
                             "method's before_forward(batch) before the model")
        a = (self.scaling * self.gain).repeat_interleave(self.rank, dim=1)  # (batch, t * r)
        return a[:, None].to(y.dtype)


class Gate(nn.Module):
    """One task's gate: W1 (h, d), W2 (d, h) and key k (d,)."""

    def __init__(self, W1, W2, k):
        super().__init__()
        self.W1, self.W2, self.k = nn.Parameter(W1), nn.Parameter(W2), nn.Parameter(k)


class Gates(nn.Module):
    """The gates of all tasks, of which only the last is trained, and the subspaces of their inputs.

    P1, P2 and P3 hold the inputs of W1, W2 and the comparison with k in old tasks.
    """

    def __init__(self, d, h, like):
        super().__init__()
        W1, W2 = (GATE_STD * torch.randn(*shape, dtype=like.dtype, device=like.device)
                  for shape in ((h, d), (d, h)))
        self.tasks = nn.ModuleList([Gate(W1, W2, self.random_key(W1))])
        self.P1, self.P2, self.P3 = (Subspace(size, like) for size in (d, h, d))

    @staticmethod
    def random_key(W1):
        return 2 * torch.rand(W1.shape[1], dtype=W1.dtype, device=W1.device) - 1  # (d,)

    @torch.no_grad()
    def add_gate(self):
        """Freeze all gates and append a trainable copy of the last one, with a new key."""
        self.requires_grad_(False)
        last = self.tasks[-1]
        k = key_outside(self.random_key(last.W1), self.P3.get())
        self.tasks.append(Gate(last.W1.clone(), last.W2.clone(), k))

    def forward(self, p0):
        """Map p0 (batch, d) to a (batch, t)."""
        return torch.stack([gate(p0, task.W1, task.W2, task.k) for task in self.tasks], dim=1)

    def features(self, p0):
        """Return the inputs of the last gate's W1, W2 and comparison with k, by subspace."""
        p1, p2 = gate_features(p0, self.tasks[-1].W1, self.tasks[-1].W2)
        return {"P1": p0, "P2": p1, "P3": p2}

    @torch.no_grad()
    def constrain(self):
        """Remove from the last gate's update what would change it on old inputs."""
        if len(self.tasks) == 1:
            return
        *_, old, new = self.tasks
        new.W1.copy_(constrain_update(new.W1, old.W1, self.P1.get()))
        new.W2.copy_(constrain_update(new.W2, old.W2, self.P2.get()))
        new.k.copy_(project_out(new.k, self.P3.get()))  # k starts outside P3


class GainLora(BranchMethod):
    """Train a gated branch per task; gates are computed once per sequence, from its prompt."""

    name = "gainlora"

    def export_obstacle(self):
        return "its gates depend on the prompt"

    @property
    def has_memory(self):
        """Whether layers store the subspace of old inputs, as InfLoRA does."""
        return self.settings.branches == "inflora"

    def wrap(self, model, fresh=True):
        super().wrap(model, fresh)
        embeddings = model.get_input_embeddings().weight
        like = embeddings.new_empty(0, dtype=torch.promote_types(embeddings.dtype, torch.float32))
        self.gates = Gates(embeddings.shape[1], GATE_HIDDEN, like)
        model.add_module("gainlora_gates", self.gates)  # among the parameters that DDP sees
        self.gated = None  # input_ids (batch, seq) of the last before_forward
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)

    def build_layer(self, linear, fresh):
        return GainLinear(linear, self.settings.rank, self.settings.alpha,
                          self.settings.dropout, self.has_memory)

    def add_branch(self):
        super().add_branch()
        self.gates.add_gate()

    # --- hooks ----------------------------------------------------------------------------------

    def active_parameters(self):
        """Count the gates of past tasks too: all gates act on every prompt."""
        return super().active_parameters() + sum(
            weight.numel() for gate in self.gates.tasks[:-1] for weight in gate.parameters())

    @torch.no_grad()
    def start_stage(self, stage, loader):
        super().start_stage(stage, loader)
        if not self.has_memory:
            return
        rank, layers = self.settings.rank, self.layers
        full = sum(free_directions(layer.basis.get()) < rank for layer in layers.values())
        if full:
            PartialState().print(f"gainlora: old inputs leave a new branch less than rank {rank} "
                                 f"in {full} of {len(layers)} layers: lower --threshold")
        moments = self._observe(loader, with_gates=False)
        for name, layer in layers.items():  # the new branch's frozen lora_A
            layer.lora_A[-1].copy_(rows_from_moment(moments[name], layer.basis.get(), rank))

    def before_forward(self, batch):
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            a = self.gates(self._pool(batch))  # (batch, t), always float32
        for layer in self.layers.values():
            layer.gain = a
        self.gated = batch["input_ids"]

    @torch.compiler.disable
    def _before_model(self, model, inputs, options):
        """Compute the gates if before_forward was not called, as in model.generate.

        Calls with a filled cache, or on the sequences of the last before_forward, keep their gates.
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
        """Return p0 (batch, d) of a batch."""
        # Use the bare table: Gemma's embedding layer multiplies by sqrt(d).
        rows = F.embedding(batch["input_ids"], self.model.get_input_embeddings().weight)
        rows = rows.to(self.gates.tasks[0].k.dtype)  # (batch, seq, d)
        return pooled_prompt(rows, prompt_mask(batch))

    def penalty(self, batch):
        if self.has_memory:
            return 0.0
        return branch_penalty(self.layers.values(), self.settings.orth_weight)

    def after_step(self, batch):
        self.gates.constrain()
        return ()

    def end_stage(self, stage, loader):
        moments = self._observe(loader, with_gates=True)
        eps = scheduled_threshold(self.settings.threshold, len(self.gates.tasks))
        for name, layer in self.layers.items():
            if self.has_memory:
                layer.basis.extend(moments[name], eps)
        for name in ("P1", "P2", "P3"):
            getattr(self.gates, name).extend(moments[name], eps)

    @torch.no_grad()
    def _observe(self, loader, with_gates):
        """Pass over a task's data and return the second moments (d, d) of inputs, by name.

        Names are of layers and, with gates, of subspaces. Moments are sums over all processes, not
        means: only directions and shares of energy are used.
        """
        layers = self.layers if self.has_memory else {}
        spaces = {name: layer.basis for name, layer in layers.items()}
        if with_gates:
            spaces |= {name: getattr(self.gates, name) for name in ("P1", "P2", "P3")}
        like = self.gates.tasks[0].k
        sizes = {name: len(next(space.parameters())) for name, space in spaces.items()}
        sums = {name: like.new_zeros(d, d) for name, d in sizes.items()}
        tokens = None  # (batch, seq) of the current batch

        def add(name, x, _):
            sums[name] += second_moment(x[tokens])

        # Deviation: the code also counts padding, and does not set evaluation mode.
        with observe(self.model, layers, add):
            for batch in first_rows(loader, MAX_INSTANCES):
                tokens = batch["attention_mask"].bool()
                if self.has_memory:
                    self.before_forward(batch)
                    self.model(**{key: batch[key] for key in INPUTS}, logits_to_keep=1,
                               use_cache=False)
                if with_gates:
                    # Fillers have no prompt and add zeros.
                    for name, v in self.gates.features(self._pool(batch)).items():
                        sums[name] += second_moment(v)
        for name in sums:  # one by one: together they are large
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
