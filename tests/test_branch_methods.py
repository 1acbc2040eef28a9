"""Check O-LoRA and GainLoRA: their equations, and what new tasks must not change."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import NO_EVAL, SMALL, adapter_of, complaint, lines_of, settings_of, succeed, wrapped
from tiny import (
    PROMPTS,
    assert_same,
    base_model,
    continuations,
    learn,
    linear,
    loader_of,
    logits_of,
    projector,
    randn,
    rows_of,
    stage_of,
    start,
    train,
    weights_of,
)
from torch.testing import assert_close

import adapter
import data
import subspaces
from baselines import gainlora, olora
from inputs.errors import InputError
from method import method_of, observe
from registry import method_class

# Thresholds that leave room in 32 dimensions for several tasks.
ROOM = dict(threshold=0.7)
VARIANTS = {
    "inflora": ROOM,
    "gain_olora": dict(branches="olora", **ROOM),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


# --- helpers ------------------------------------------------------------------------------------


def orthonormal(seed, d, k):
    """Return a fixed basis (d, k) in float64."""
    return torch.linalg.qr(randn(seed, d, k)).Q


def moment(seed, d, samples=60):
    """Return H (d, samples) of decaying strength, and H H' (d, d)."""
    H = (0.7 ** torch.arange(d)).sqrt()[:, None] * randn(seed, d, samples)
    H = orthonormal(seed + 1, d, d) @ H
    return H, H @ H.T


@torch.no_grad()
def branches_of(layer, count=3, seed=50):
    """Give `layer` `count` branches with random A and B."""
    while len(layer.lora_A) < count:
        layer.add_branch()
    for i, tensor in enumerate([*layer.lora_A, *layer.lora_B]):
        tensor.copy_(randn(seed + i, *tensor.shape))
    return layer


def adapt(variant="inflora", architecture="llama", dtype=torch.float32, **changed):
    """Wrap a tiny model with a fresh GainLoRA and return the method."""
    settings = settings_of("gainlora", **VARIANTS[variant] | changed)
    model = base_model(architecture, dtype)
    torch.manual_seed(0)
    method_class("gainlora")(settings).wrap(model)
    return method_of(model)


def gated(*args, **changed):
    """Return a method after two tasks."""
    method = adapt(*args, **changed)
    learn(method, 0, 1)
    return method


# --- O-LoRA: equations --------------------------------------------------------------------------


def naive_penalty(layers, lambda1):
    """Compute Sec. 3.2, as in the authors' code, by loops over modules, tasks and entries."""
    total = 0.0
    for layer in layers:
        *pasts, last = (tensor.detach() for tensor in layer.lora_A)
        for past in pasts:
            for old, new in itertools.product(past, last):
                inner = sum(float(a) * float(b) for a, b in zip(old, new, strict=True))
                total += lambda1 * abs(inner)
    return total


def test_penalty_is_the_sum_over_modules_tasks_and_entries():
    """Only the current branch gets a gradient."""
    layers = [branches_of(olora.OloraLinear(linear(m=m), 2, 6), seed=m) for m in (8, 24)]
    penalty = olora.branch_penalty(layers, 0.7)
    assert_close(penalty.item(), naive_penalty(layers, 0.7), rtol=1e-6, atol=0)
    penalty.backward()
    for layer in layers:
        assert all(A.grad is None for A in list(layer.lora_A)[:-1])
        assert layer.lora_A[-1].grad.abs().max() > 0


def test_olora_layer_is_the_sum_of_its_branches():
    """y = x (W0 + s sum B_i A_i)' + bias, and one dropout mask for all branches."""
    base, x = linear(), randn(3, 2, 5, 20)
    layer = branches_of(olora.OloraLinear(base, rank=2, alpha=6, dropout=0.4))
    delta = sum(3 * B @ A for A, B in zip(layer.lora_A, layer.lora_B, strict=True))
    assert_close(layer.eval()(x), F.linear(x, base.weight + delta, base.bias), atol=1e-5, rtol=0)
    torch.manual_seed(7)
    y = layer.train()(x)
    torch.manual_seed(7)
    u = F.dropout(x, 0.4)
    assert_close(y, base(x) + u @ delta.T, atol=1e-5, rtol=0)
    assert (u == 0).any()


def test_one_task_of_olora_is_lora_bit_for_bit():
    """It draws the same random numbers, and the penalty is 0."""
    states, losses = [], []
    for name in ("olora", "lora"):
        torch.manual_seed(5)
        method = method_class(name)(settings_of(name, dropout=0.2))
        method.wrap(base_model())
        losses.append(learn(method, 0, steps=3))
        assert method.penalty({}) == 0
        states.append([tensor for _, tensor in sorted(method.state_dict().items())])
    assert losses[0] == losses[1]
    assert len(states[0]) == len(states[1]) and all(map(torch.equal, *states))


# --- GainLoRA: the gate -------------------------------------------------------------------------


def test_gate_is_that_of_the_llama_code():
    """a = |tanh(2 cos(SiLU(W2 W1 p0), k))|, written out; no activation after W1."""
    W1, W2, k, p0 = randn(1, 3, 6), randn(2, 6, 3), randn(3, 6), randn(4, 5, 6)
    expected = []
    for p in p0:
        hidden = [sum(float(w * v) for w, v in zip(row, p, strict=True)) for row in W1]
        inner = [sum(float(w) * v for w, v in zip(row, hidden, strict=True)) for row in W2]
        p2 = [v / (1 + math.exp(-v)) for v in inner]
        cosine = (sum(v * float(w) for v, w in zip(p2, k, strict=True))
                  / math.sqrt(sum(v * v for v in p2)) / float(k.norm()))
        expected.append(abs(math.tanh(2 * cosine)))
    found = gainlora.gate(p0, W1, W2, k)
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert found.max() <= 0.9641 and found.min() > 0


def test_prompt_is_pooled_without_padding_and_targets():
    """p0 equals a loop's; a filler row has a gate of zero and finite gradients."""
    rows = rows_of(0, 3)
    batch = data.collate([*rows, None], 2, 5)
    table = randn(5, 300, 6)
    p0 = gainlora.pooled_prompt(table[batch["input_ids"]], gainlora.prompt_mask(batch))
    for found, row in zip(p0, rows, strict=False):
        prompt = row["input_ids"][:len(row["input_ids"]) - row["num_targets"]]
        assert_close(found, sum(table[token] for token in prompt) / len(prompt))
    W1, W2, k = (randn(i, *shape).requires_grad_() for i, shape in
                 enumerate([(3, 6), (6, 3), (6,)]))
    a = gainlora.gate(p0, W1, W2, k)
    a.sum().backward()
    assert a[-1] == 0 and (a[:-1] > 0).all()
    assert all(torch.isfinite(weight.grad).all() and weight.grad.any() for weight in (W1, W2, k))


@torch.no_grad()
def filled_gates(d=24, h=10, q=5):
    """Return gates after one task with q known prompts, and these prompts (q, d)."""
    torch.manual_seed(1)
    gates = gainlora.Gates(d, h, torch.zeros(()))
    old = randn(2, q, d).float()
    for name, inputs in gates.features(old).items():
        getattr(gates, name).put(torch.linalg.qr(inputs.double().T).Q.float())
    return gates, old


def test_a_new_gate_is_shut_on_old_prompts():
    """Through 50 steps of Adam from a copy with a new key; the old gate keeps its bits."""
    gates, old = filled_gates()
    old_gates = gates(old).detach()
    gates.add_gate()
    before, after = gates.tasks
    assert torch.equal(after.W1, before.W1) and torch.equal(after.W2, before.W2)
    assert_close(after.k.norm().item(), math.sqrt(24 / 3), rtol=1e-5, atol=0)
    assert not any(weight.requires_grad for weight in before.parameters())
    assert gates(old)[:, 1].max() <= 1e-5
    first = weights_of(gates.tasks[1])
    optimizer = torch.optim.Adam(gates.tasks[1].parameters(), lr=1e-2)
    new = randn(3, 12, 24).float()
    opened = gates(new)[:, 1].mean().item()
    for _ in range(50):
        (1 - gates(new)[:, 1]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.constrain()
    assert gates(new)[:, 1].mean() > opened + 0.2
    assert gates(old)[:, 1].max() <= 1e-5
    assert torch.equal(gates(old)[:, 0], old_gates[:, 0])
    assert all((weight - first[name]).abs().max() > 0.05
               for name, weight in gates.tasks[1].named_parameters())


def test_a_gate_without_any_room_is_refused():
    """Without a free direction a new gate would be 0 on every input."""
    gates, _ = filled_gates()
    gates.P3.put(torch.eye(24))
    with pytest.raises(InputError, match="lower --threshold"):
        gates.add_gate()


def test_update_constraint_against_its_formula():
    """Basis and complement agree; an empty subspace constrains nothing."""
    W, W_start, Q = randn(1, 5, 12), randn(2, 5, 12), orthonormal(3, 12, 12)
    P = Q[:, :4]
    expected = W_start + (W - W_start) @ (torch.eye(12) - P @ P.T)
    for space in (P, subspaces.Complement(Q[:, 4:])):
        assert_close(subspaces.constrain_update(W, W_start, space), expected)
    assert torch.equal(subspaces.project_out(W, W.new_zeros(12, 0)), W)


# --- GainLoRA: subspaces ------------------------------------------------------------------------


def naive_gpm(H, M, eps):
    """Apply GPM's rule to vectors H (d, n), one singular value after the other."""
    d = len(H)
    total = float(torch.linalg.svdvals(H).square().sum())
    H_hat = H - M @ (M.T @ H)
    U, S, _ = torch.linalg.svd(H_hat)
    if M.shape[1] == 0:
        share, kept = 0.0, 0
        for value in S:
            share += float(value) ** 2 / total
            kept += share < eps
        return U[:, :max(1, kept)]
    share = (total - float(S.square().sum())) / total
    columns = []
    for i, value in enumerate(S):
        if share >= eps:
            break
        share += float(value) ** 2 / total
        columns.append(U[:, i])
    return torch.stack([*M.T, *columns], dim=1)[:, :d]


@pytest.mark.parametrize("eps", [0.05, 0.6, 0.9, 0.995])
def test_a_subspace_grows_by_gpms_rule(eps):
    """Over three tasks; the smaller of basis and complement is stored, and is orthonormal."""
    d, sizes = 12, []
    space = M = torch.zeros(d, 0, dtype=torch.float64)
    for task in range(3):
        H, C = moment(10 * task, d)
        space, M = subspaces.extend(C, space, eps), naive_gpm(H, M, eps)
        held = space.N if isinstance(space, subspaces.Complement) else space
        assert held.shape[1] <= d // 2
        assert_close(held.T @ held, torch.eye(held.shape[1]).double(), atol=1e-10, rtol=0)
        assert subspaces.free_directions(space) == d - M.shape[1]
        assert_close(projector(space), M @ M.T, atol=1e-8, rtol=0)
        sizes.append(M.shape[1])
    assert 1 <= sizes[0] <= sizes[1] <= sizes[2] <= d
    assert sizes[0] < sizes[2] or eps == 0.05


def test_second_moments_of_bf16_are_float32():
    v = randn(1, 7, 12).bfloat16()
    assert_close(subspaces.second_moment(v), v.float().T @ v.float())


def test_thresholds_rise_as_published():
    """eps_t = eps + (1 - eps)(t - 1) / 15, and never 1."""
    found = [gainlora.scheduled_threshold(0.995, t) for t in (1, 2, 15, 16, 40)]
    assert_close(found[:3], [0.995, 0.995 + 0.005 / 15, 0.995 + 0.005 * 14 / 15])
    assert found[2] == found[3] == found[4] < 1


@pytest.mark.parametrize("k", [0, 7, 24])
def test_rows_from_moments(k):
    """InfLoRA's rows are the leading left singular vectors of (I - M M') C / sqrt(3).

    Without a free direction they are zero.
    """
    C, M = moment(0, 24)[1], orthonormal(20, 24, k)
    A = gainlora.rows_from_moment(C, M, 3)
    if k == 24:
        assert not A.any()
        return
    U = torch.linalg.svd(C - M @ (M.T @ C)).U[:, :3]
    assert_close((A @ U).abs(), torch.eye(3, dtype=torch.float64) / math.sqrt(3))
    assert k == 0 or (A @ M).abs().max() <= 1e-5


# --- GainLoRA: the layer ------------------------------------------------------------------------


def gain_layer(dtype=torch.float64, dropout=0.0):
    layer = branches_of(gainlora.GainLinear(linear(dtype=dtype), 2, 6, dropout))
    layer.gain = randn(9, 4, 3).sigmoid().to(dtype)
    return layer


def test_gain_layer_weighs_each_branch_by_its_gate():
    """y = base(x) + s sum_i a_i B_i A_i dropout(x), sequence by sequence."""
    layer, x = gain_layer(dropout=0.3), randn(3, 4, 5, 20)
    expected = F.linear(x, layer.residual, layer.bias)
    torch.manual_seed(0)
    u = F.dropout(x, 0.3)
    for b, i in itertools.product(range(4), range(3)):
        expected[b] += 3 * layer.gain[b, i] * u[b] @ layer.lora_A[i].T @ layer.lora_B[i].T
    torch.manual_seed(0)
    assert_close(layer.train()(x), expected.detach(), atol=1e-10, rtol=0, check_device=False)


def test_gain_layer_without_gates_is_refused():
    """Missing gates, or those of another batch size, are an error."""
    layer = gain_layer()
    with pytest.raises(InputError, match="before_forward"):
        layer(randn(3, 3, 5, 20))
    layer.gain = None
    with pytest.raises(InputError, match="before_forward"):
        layer(randn(3, 4, 5, 20))


# --- the gates of a model -----------------------------------------------------------------------


def test_the_update_of_a_gate_is_outside_old_inputs(variant):
    """The updates of W1, W2 and k since the start of the task avoid their subspaces."""
    method = adapt(variant, dtype=torch.float64)
    learn(method, 0)
    ended = logits_of(method.model)
    start(method, 1)
    assert_close(logits_of(method.model), ended, atol=1e-6, rtol=0)
    train(method, 1)
    assert {weight.dtype for weight in method.model.parameters()} == {torch.float64}
    gates = method.gates
    old, new = gates.tasks
    for update, space in ((new.W1 - old.W1, gates.P1), (new.W2 - old.W2, gates.P2),
                          (new.k, gates.P3)):
        P = projector(space.get())
        assert P.any() and (update @ P).abs().max() <= 1e-5
        assert update.abs().max() > 1e-2


DAMAGE = {
    "one layer has a branch more": {"{layer}.lora_A.2": (2, 32), "{layer}.lora_B.2": (64, 2)},
    "a basis has too many columns": {"{layer}.basis.0": (32, 33)},
    "a basis is no matrix": {"gates.P1.0": (32,)},
    "a basis is too short": {"gates.P2.0": (49, 1)},
    "a branch has another rank": {"{layer}.lora_A.0": (3, 32)},
    "a gate without the others": {"gates.tasks.7.k": (32,)},
}


def test_a_damaged_state_is_refused():
    """Branches and subspaces of all layers must fit each other."""
    method = adapt()
    learn(method, 0, steps=1)
    method.add_branch()
    adapter.restore(adapt(), method.state_dict())
    for damage in DAMAGE.values():
        state = method.state_dict() | {
            key.format(layer="model.layers.1.mlp.gate_proj"): torch.zeros(shape)
            for key, shape in damage.items()}
        with pytest.raises(InputError, match="does not fit this model"):
            adapter.restore(adapt(), state)


def gains(method, batch):
    """Return the gates (batch, t) of a batch."""
    with torch.no_grad():
        method.before_forward(batch)
    layers = list(method.layers.values())
    assert all(layer.gain is layers[0].gain for layer in layers)
    return layers[0].gain


def test_gates_read_the_prompt_and_nothing_else():
    """Padding, other rows and targets do not matter."""
    method = gated()
    together = gains(method, data.pad_left(PROMPTS, 2))
    assert together.shape == (4, 2) and together.std(dim=0).min() > 1e-4
    for prompt, expected in zip(PROMPTS, together, strict=True):
        for pad, token in ((0, 2), (9, 2), (3, 77)):
            batch = data.pad_left([prompt, prompt[:1] + [9] * (len(prompt) + pad - 1)], token)
            assert_close(gains(method, batch)[0], expected, atol=1e-6, rtol=0)
        for targets in (1, 4):  # training sees prompt and target, generation the prompt alone
            row = {"input_ids": prompt + [60] * targets, "num_targets": targets}
            other = {"input_ids": [1] * 40, "num_targets": 9}
            batch = data.collate([row, other, None], 2, 5)
            assert_close(gains(method, batch)[0], expected, atol=1e-6, rtol=0)


def test_gates_read_the_bare_embedding_table():
    """Gemma's embedding layer multiplies by sqrt(d), the gates' inputs do not."""
    method = gated(architecture="gemma2")
    table = method.model.get_input_embeddings()
    ids = torch.tensor([PROMPTS[0]])
    scaled = table(ids) / table.weight[ids]
    assert_close(scaled, torch.full_like(scaled, 32**0.5))
    gate = method.gates.tasks[1]
    p0 = table.weight[PROMPTS[0]].mean(0, keepdim=True)
    assert_close(gains(method, data.pad_left(PROMPTS[:1], 2))[:, 1],
                 gainlora.gate(p0, gate.W1, gate.W2, gate.k).detach())


# --- the passes over a task's data --------------------------------------------------------------


def test_pass_over_the_data(variant):
    """Moments of tokens and prompts equal those of single rows; nothing else changes."""
    method = gated(variant, dropout=0.4)
    rows = rows_of(2)
    expected = naive_moments(method, rows)
    model = method.model.train()
    state, before = torch.get_rng_state(), method.state_dict()
    found = method._observe(loader_of(rows), with_gates=True)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert_same(method.state_dict(), before)
    assert found.keys() == expected.keys()
    for name, total in found.items():
        assert_close(total.double(), expected[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def naive_moments(method, rows):
    """Compute the sums of `_observe` in float64 from one unpadded row after the other."""
    inputs, total = {}, {}
    layers = method.layers if method.has_memory else {}
    for row in rows:
        batch = data.collate([row], 2, 1)
        method.before_forward(batch)
        with observe(method.model, layers, lambda name, x, _: inputs.update({name: x[0]})):
            method.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        prompt = row["input_ids"][:len(row["input_ids"]) - row["num_targets"]]
        p0 = method.model.get_input_embeddings().weight[prompt].mean(0)
        gate = method.gates.tasks[-1]
        p1 = gate.W1 @ p0
        inputs.update(P1=p0[None], P2=p1[None], P3=F.silu(gate.W2 @ p1)[None])
        for name, v in inputs.items():
            total[name] = total.get(name, 0) + v.double().T @ v.double()
    return total


def test_a_pass_stops_looking_after_its_share_of_instances(monkeypatch):
    """The loader is read to its end; rows count, with fillers."""
    method = gated()
    rows, read = rows_of(3), []

    def loader():
        for batch in loader_of(rows, size=2):
            read.append(batch)
            yield batch

    monkeypatch.setattr(gainlora, "MAX_INSTANCES", 3)
    found = method._observe(loader(), with_gates=True)
    expected = naive_moments(method, rows[:4])  # the batch in which the limit is reached is used
    assert len(read) == 4
    assert_close(found["P1"].double(), expected["P1"], rtol=1e-4, atol=1e-5)


def test_subspaces_after_a_task_are_those_of_its_moments():
    """Every subspace grows by its own moments and threshold."""
    method = adapt(threshold=0.6)
    learn(method, 0)
    start(method, 1)
    train(method, 1)
    layer = "model.layers.1.mlp.gate_proj"
    moments = naive_moments(method, rows_of(1))
    before = method.state_dict()
    method.end_stage(stage_of(1), loader_of(rows_of(1)))
    after = method.state_dict()
    for key, name in ((f"{layer}.basis.0", layer), ("gates.P1.0", "P1"), ("gates.P2.0", "P2"),
                      ("gates.P3.0", "P3")):
        old = before[key].double()
        U, S, _ = torch.linalg.svd(moments[name])
        M = naive_gpm(U * S.sqrt(), old, 0.6 + 0.4 / 15)
        P = after[key].double()
        assert old.shape[1] <= P.shape[1] == M.shape[1]
        assert torch.equal(P[:, :old.shape[1]], old)
        assert_close(P @ P.T, M @ M.T, atol=1e-4, rtol=0)
    assert after[f"{layer}.basis.0"].shape[1] > before[f"{layer}.basis.0"].shape[1]


def test_gates_without_the_hook_are_those_with_it():
    """Also with padding, beam search and labels."""
    model = wrapped(base_model(), "gainlora")
    learn(model.adapted_by, 0, 1)
    method, batch = model.adapted_by, data.pad_left(PROMPTS, 2)
    hooked = logits_of(model)
    gates = [layer.gain for layer in method.layers.values()]
    method.before_forward({key: tensor[:2] for key, tensor in batch.items()})  # of another batch
    with torch.no_grad():
        bare = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        assert torch.equal(bare, hooked)
        model(batch["input_ids"], use_cache=False, labels=batch["input_ids"],
              attention_mask=batch["attention_mask"])  # all are targets: an empty prompt
    for layer, gate in zip(method.layers.values(), gates, strict=True):
        assert not torch.equal(layer.gain, gate) and layer.gain.shape == gate.shape
    alone = [continuations(model, [prompt], num_beams=2)[0] for prompt in PROMPTS]
    for got, wanted in zip(continuations(model, num_beams=2), alone, strict=True):
        assert got[:len(wanted)] == wanted


@pytest.mark.parametrize("options, named", [
    ({"inputs_embeds": torch.zeros(1, 3, 32)}, "input_ids"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long),
      "attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask")], ids=["embeds", "mask"])
def test_gates_that_cannot_be_computed_are_refused(options, named):
    model = wrapped(base_model(), "gainlora")
    assert re.search(named, complaint(model, **options))


def test_new_rows_follow_the_data_of_their_task():
    """They span the inputs' leading directions outside old tasks' subspaces."""
    method = adapt()
    for task in range(2):
        moments = naive_moments(method, rows_of(task))
        start(method, task)
        for name, layer in method.layers.items():
            M = projector(layer.basis.get()).double()
            assert M.any() == bool(task)
            U = torch.linalg.svd(moments[name] - M @ moments[name]).U[:, :2].float()
            A = math.sqrt(3) * layer.lora_A[task]
            assert (A @ M.float()).abs().max() <= 1e-4
            assert_close((A @ U).abs(), torch.eye(2), atol=1e-2, rtol=0)
        train(method, task)
        method.end_stage(stage_of(task), loader_of(rows_of(task)))


def test_a_full_subspace_is_said(capsys):
    """One line says that old tasks leave a new branch fewer directions than its rank."""
    method = adapt()
    learn(method, 0, steps=1)
    for layer in method.layers.values():
        layer.basis.put(torch.eye(32)[:, :31])
    capsys.readouterr()
    learn(method, 1, steps=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "less than rank 2 in 2 of 2 layers: lower --threshold" in line
    rows = method.layers["model.layers.0.mlp.gate_proj"].lora_A[1]
    assert not rows[1].any() and torch.equal(rows[0].nonzero().flatten(), torch.tensor([31]))


# --- whole runs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["olora", "gainlora --threshold 0.8"])
def test_two_tasks_in_sequence(tiny, tmp_path, flags):
    """Old branches keep their bits; only O-LoRA has a penalty, in the second task."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = (*tiny, *SMALL, *NO_EVAL, "--epochs", 1, "--learning_rate", "1e-2", "--setting",
              "sequential", "--batch_size", 2, "--gradient_accumulation_steps", 2, "--method",
              *flags.split())
    succeed(*common, "--tasks", "say_both", "--output_dir", one)
    succeed(*common, "--tasks", "colour_name", "say_both", "--task_order", "say_both",
            "colour_name", "--output_dir", two)
    log = lines_of(two / "log.jsonl")
    for task, penalised in (("say_both", False), ("colour_name", flags == "olora")):
        penalties = [record["penalty"] for record in log if record["stage"] == task]
        assert penalties and all((value > 0) == penalised for value in penalties)
    old, new = adapter_of(one), adapter_of(two)
    assert "model.layers.0.mlp.gate_proj.lora_B.1" in new
    for key in old:  # subspaces only grow
        kept = new[key][:, :old[key].shape[1]] if "basis" in key or ".P" in key else new[key]
        assert torch.equal(kept, old[key]), key


def test_mixed_training_is_one_task(tiny, tmp_path):
    """One branch, no penalty, and one line that says so."""
    outcome = succeed(*tiny, *SMALL, *NO_EVAL, "--epochs", 1, "--method", "gainlora",
                      "--branches", "olora", "--output_dir", tmp_path / "out")
    (said,) = (line for line in outcome.out if "mixed training is one task" in line)
    assert said.startswith("gainlora")
    assert {key.rpartition(".")[2] for key in adapter_of(tmp_path / "out") if "lora" in key} == {
        "0"}
    assert {line["penalty"] for line in lines_of(tmp_path / "out" / "log.jsonl")} == {0}
