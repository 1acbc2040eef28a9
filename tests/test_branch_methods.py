"""O-LoRA and GainLoRA: their equations, and what a sequence of tasks must leave alone."""

import itertools
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, CONFIGS, SMALL, lines_of, run, settings_of, succeed
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import adapter
import data
from baselines import gainlora, olora
from inputs.errors import InputError
from method import Stage, fingerprint, method_of
from registry import method_class

# Thresholds that leave room in 32 dimensions for several tasks.
ROOM = dict(threshold=0.7, gate_threshold=0.7)
VARIANTS = {
    "olora": ("olora", {}),
    "olora_l2": ("olora", dict(orth_norm="fro2", l2_weight=0.1)),
    "inflora": ("gainlora", ROOM),
    "random_proj": ("gainlora", ROOM | dict(a_init="random_proj", energy="eig2", chunk=2)),
    "gain_olora": ("gainlora", dict(branches="olora", gate_threshold=0.7)),
}
GATED = [name for name, (method, _) in VARIANTS.items() if method == "gainlora"]
PROMPTS = [[1, 40, 17, 5, 9, 33], [1, 8], [1, *range(30, 55)], [1, 21, 22, 21]]


# --- helpers ------------------------------------------------------------------------------------


def randn(seed, *shape):
    """Fixed float64 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed, d, k):
    """A fixed basis (d, k) in float64."""
    return torch.linalg.qr(randn(seed, d, k)).Q


def moment(seed, d, samples=60):
    """Vectors H (d, samples) of decaying strength, and their second moments H H' (d, d)."""
    H = (0.7 ** torch.arange(d)).sqrt()[:, None] * randn(seed, d, samples)
    H = orthonormal(seed + 1, d, d) @ H
    return H, H @ H.T


def base_layer(n=20, m=24, bias=True, dtype=torch.float64):
    """A linear layer with fixed weights."""
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=bias).to(dtype)


@torch.no_grad()
def branches_of(layer, count=3, seed=50):
    """`layer` with `count` branches, all with random A and B."""
    while len(layer.lora_A) < count:
        layer.add_branch()
    for i, tensor in enumerate([*layer.lora_A, *layer.lora_B]):
        tensor.copy_(randn(seed + i, *tensor.shape))
    return layer


def base_model(architecture="llama", dtype=torch.float32):
    """A tiny random model."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype).eval()


def adapt(model, variant, **changed):
    """`model` with a fresh adapter of a variant -> its method."""
    name, settings = VARIANTS[variant]
    torch.manual_seed(0)
    method_class(name)(settings_of(name, **settings | changed)).wrap(model)
    return method_of(model)


def instances(task, count=8):
    """Random rows as data.encode_suite makes them; each task has words of its own."""
    generator = torch.Generator().manual_seed(task)
    rows = []
    for i in range(count):
        ids = torch.randint(20 + 60 * task, 80 + 60 * task, (5 + 2 * i,), generator=generator)
        rows.append({"input_ids": [1, *ids.tolist()], "num_targets": 1 + i % 3})
    return rows


def batches(rows, size=4, filler=True):
    """What train.py's loader gives for `rows`, the last batch with a filler."""
    parts = [rows[first:first + size] for first in range(0, len(rows), size)]
    if filler:
        parts[-1] = [*parts[-1], None]
    count = sum(row["num_targets"] for row in rows)
    return [data.collate(part, 2, count) | {"num_tokens": 99} for part in parts]


def stage_of(task):
    return Stage(f"task{task}", (f"task{task}",), 1, 4)


def start(method, task):
    """A task's first hook."""
    torch.manual_seed(task)
    method.start_stage(stage_of(task), batches(instances(task)))


def train(method, task, steps=4, started=False, finish=True, learning_rate=3e-2):
    """One task through the hooks, in the order of the loop -> the losses."""
    loader, losses = batches(instances(task)), []
    if not started:
        start(method, task)
    weights = [weight for weight in method.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    method.model.train()
    for batch in itertools.islice(itertools.cycle(loader), steps):
        batch = {key: value for key, value in batch.items() if key != "num_tokens"}
        method.before_forward(batch)
        loss = method.model(**batch, use_cache=False).loss + method.penalty(batch)
        loss.backward()
        method.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        assert list(method.after_step(batch)) == []
        losses.append(loss.item())
    if finish:
        method.end_stage(stage_of(task), loader)
    method.model.eval()
    return losses


@torch.no_grad()
def logits_of(model, prompts=PROMPTS):
    """Logits of left-padded prompts at their real tokens."""
    batch = data.pad_left(prompts, 2)
    if hasattr(model, "adapted_by"):
        model.adapted_by.before_forward(batch)
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def weights_of(module):
    """A copy of all parameters by name."""
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def assert_same(left, right):
    """Two dicts of tensors are bitwise equal."""
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


# --- O-LoRA: equations --------------------------------------------------------------------------


def naive_penalty(layers, lambda1, lambda2, norm):
    """Sec. 3.2 and the code's L2 term by loops over modules, tasks and entries."""
    total = 0.0
    for layer in layers:
        A, B = [tensor.detach() for tensor in layer.lora_A], layer.lora_B[-1].detach()
        for past in A[:-1]:
            for old, new in itertools.product(past, A[-1]):
                inner = sum(float(a) * float(b) for a, b in zip(old, new, strict=True))
                total += lambda1 * (abs(inner) if norm == "l1" else inner**2)
        for tensor in (A[-1], B):
            total += lambda2 * math.sqrt(sum(float(value) ** 2 for value in tensor.flatten()))
    return total


@pytest.mark.parametrize("norm", ["l1", "fro2"])
@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 0.3), (0.7, 0.2)])
def test_penalty_is_the_sum_over_modules_tasks_and_entries(norm, weights):
    """3.9(d): to 1e-6, and only the current branch gets a gradient."""
    layers = [branches_of(olora.OloraLinear(base_layer(m=m), 2, 6), seed=m) for m in (8, 24)]
    penalty = olora.branch_penalty(layers, *weights, norm)
    assert_close(penalty.item(), naive_penalty(layers, *weights, norm), rtol=1e-6, atol=0)
    penalty.backward()
    for layer in layers:
        assert all(A.grad is None for A in list(layer.lora_A)[:-1])
        assert layer.lora_A[-1].grad.abs().max() > 0


def test_penalty_of_orthogonal_branches_is_zero():
    """3.9(e): rows of A_t in the null space of A_old."""
    layer = branches_of(olora.OloraLinear(base_layer(), 2, 6))
    A_old = torch.cat(list(layer.lora_A)[:-1]).detach()  # (4, 20)
    outside = torch.linalg.qr(A_old.T, mode="complete").Q[:, 4:6].T
    with torch.no_grad():
        layer.lora_A[-1].copy_(3 * outside)
    for norm in ("l1", "fro2"):
        assert olora.branch_penalty([layer], 1.0, 0.0, norm) <= 1e-6
    assert olora.mean_cosine(layer.lora_A[-1], A_old) <= 1e-6


def test_the_size_term_has_a_finite_gradient_at_zero():
    """B starts at zero, where a norm has no derivative."""
    layer = olora.OloraLinear(base_layer(), 2, 6)
    olora.branch_penalty([layer], 0.5, 0.3, "l1").backward()
    assert not layer.lora_B[0].grad.any()
    assert_close(layer.lora_A[0].grad, 0.3 * layer.lora_A[0] / layer.lora_A[0].norm())


def test_mean_cosine_ignores_length():
    """Against a loop; shrinking a branch lowers its penalty, not its cosine."""
    A_t, A_old = randn(1, 2, 9), randn(2, 4, 9)
    pairs = [abs(float(F.cosine_similarity(a, b, dim=0)))
             for a, b in itertools.product(A_t, A_old)]
    for scale in (1, 1e-3):
        assert_close(float(olora.mean_cosine(scale * A_t, A_old)), sum(pairs) / len(pairs))


@pytest.mark.parametrize("bias", [True, False])
def test_olora_layer_is_the_sum_of_its_branches(bias):
    """3.9(f): y = x (W0 + s sum B_i A_i)' + bias, and one dropout mask for all branches."""
    base, x = base_layer(bias=bias), randn(3, 2, 5, 20)
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
    """3.9(a): the same numbers are drawn, the penalty is exactly 0, and so are all differences."""
    states = []
    for name in ("olora", "lora"):
        model = base_model()
        torch.manual_seed(5)
        method_class(name)(settings_of(name, dropout=0.2)).wrap(model)
        method = method_of(model)
        losses = train(method, task=0, steps=3)
        assert method.penalty({}) == 0
        states.append(([tensor for _, tensor in sorted(method.state_dict().items())], losses))
    (ours, our_losses), (theirs, their_losses) = states
    assert our_losses == their_losses
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# --- GainLoRA: the gate -------------------------------------------------------------------------


def test_gate_coefficient():
    """5.10(b): f(0) = 0, f even, |tanh(b / 2)| = |2 sigmoid(b) - 1|."""
    b = torch.tensor([0.0, 0.3, 1.7, 4.0], dtype=torch.float64)
    f = gainlora.gate_coefficient(b)
    assert f[0] == 0
    assert_close(f, gainlora.gate_coefficient(-b), atol=1e-7, rtol=0)
    expected = torch.tensor([abs(2 / (1 + math.exp(-v)) - 1) for v in b.tolist()])
    assert_close(f, expected.double(), atol=1e-7, rtol=0)


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
    """p0 against a loop; a filler row has no prompt, a gate of zero and finite gradients."""
    rows = instances(0, 3)
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
    """Gates after one task whose q prompts are known exactly -> (gates, the prompts (q, d))."""
    torch.manual_seed(1)
    gates = gainlora.Gates(d, h, 1, torch.zeros(()))
    old = randn(2, q, d).float()
    for name, inputs in gates.features(old).items():
        getattr(gates, name)[0] = gainlora.frozen(torch.linalg.qr(inputs.double().T).Q.float())
    return gates, old


def test_a_new_gate_is_shut_on_old_prompts():
    """5.10(d): at its start and after 50 steps of Adam; the old gate stays bitwise the same."""
    gates, old = filled_gates()
    old_gates = gates(old).detach()
    gates.add_gate()
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


def test_a_new_gate_starts_from_the_last_one():
    """W1 and W2 are copies; the key is random, outside P3, of norm sqrt(d / 3)."""
    gates, _ = filled_gates()
    gates.add_gate()
    old, new = gates.tasks
    assert torch.equal(new.W1, old.W1) and torch.equal(new.W2, old.W2)
    assert new.W1.data_ptr() != old.W1.data_ptr()
    assert (new.k @ gates.P3[0]).abs().max() <= 1e-6
    assert_close(new.k.norm().item(), math.sqrt(24 / 3), rtol=1e-5, atol=0)
    assert not any(weight.requires_grad for weight in old.parameters())
    assert all(weight.requires_grad for weight in new.parameters())
    assert old.k.min() >= -1 and old.k.max() <= 1 and old.k.std() > 0.3


def test_a_gate_without_any_room_is_refused():
    """A key in no free direction would be shut on everything."""
    gates, _ = filled_gates()
    gates.P3[0] = gainlora.frozen(torch.eye(24))
    with pytest.raises(InputError, match="lower --gate_threshold"):
        gates.add_gate()


def test_update_constraint_against_its_formula():
    """W_start + (W - W_start)(I - P P'), block by block; nothing for an empty subspace."""
    W, W_start = randn(1, 5, 12), randn(2, 5, 12)
    bases = [orthonormal(3, 6, 2), orthonormal(4, 6, 3)]
    P = torch.block_diag(*bases)
    expected = W_start + (W - W_start) @ (torch.eye(12) - P @ P.T)
    assert_close(gainlora.constrain_update(W, W_start, bases), expected)
    assert torch.equal(gainlora.project_out(W, [W.new_zeros(12, 0)]), W)


# --- GainLoRA: subspaces ------------------------------------------------------------------------


def naive_gpm(H, M, eps):
    """GPM's rule on vectors H (d, n) by singular values, as the code goes through them."""
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


@pytest.mark.parametrize("energy", ["eig", "eig2"])
@pytest.mark.parametrize("eps", [0.05, 0.6, 0.9, 0.995])
def test_basis_grows_by_gpms_rule(energy, eps):
    """"eig" is GPM on the vectors, "eig2" on their second moments; over three tasks."""
    d = 12
    P, M = torch.zeros(d, 0, dtype=torch.float64), torch.zeros(d, 0, dtype=torch.float64)
    sizes = []
    for task in range(3):
        H, C = moment(10 * task, d)
        P = gainlora.extend_basis(C, P, eps, energy)
        M = naive_gpm(H if energy == "eig" else C, M, eps)
        assert P.shape == M.shape
        assert_close(P @ P.T, M @ M.T, atol=1e-8, rtol=0)
        sizes.append(P.shape[1])
    assert 1 <= sizes[0] <= sizes[1] <= sizes[2] <= d
    assert sizes[0] < sizes[2] or eps == 0.05


def test_the_two_energies_differ():
    """Squared eigenvalues keep fewer directions at the same threshold."""
    _, C = moment(0, 12)
    empty = torch.zeros(12, 0)
    kept = {energy: gainlora.extend_basis(C, empty, 0.95, energy).shape[1]
            for energy in ("eig", "eig2")}
    assert kept["eig2"] < kept["eig"] < 12


@pytest.mark.parametrize("energy", ["eig", "eig2"])
def test_the_smaller_of_basis_and_complement_is_held(energy):
    """Through several tasks: the same subspace as the basis alone, in at most half of the room."""
    d = 40
    P, block, forms = torch.zeros(d, 0, dtype=torch.float64), None, set()
    block = P
    for task, eps in enumerate((0.3, 0.6, 0.8, 0.95, 0.999, 1.0)):
        C = moment(task, d)[1]
        P = gainlora.extend_basis(C, P, eps, energy)
        block = gainlora.extend_block(C, block, eps, energy)
        forms.add(type(block))
        held = block.N if isinstance(block, gainlora.Complement) else block
        assert held.shape[0] == d and held.shape[1] <= d // 2
        assert gainlora.room(block) == d - P.shape[1] and gainlora.size(block) == d
        v = randn(task, 3, d)
        assert_close(gainlora.outside(v, block), v - v @ P @ P.T)
    assert gainlora.Complement in forms and len(forms) == 2


def test_bases_stay_orthonormal():
    """5.10(c): P'P = I to 1e-5 after 5 updates in float32; more than d columns are impossible."""
    P = torch.zeros(40, 0)
    for task in range(5):
        P = gainlora.extend_basis(moment(task, 40)[1].float(), P, 0.8 + 0.04 * task, "eig")
        assert_close(P.T @ P, torch.eye(P.shape[1]), atol=1e-5, rtol=0)
    for task in range(5, 8):
        P = gainlora.extend_basis(moment(task, 40)[1].float(), P, 1.0, "eig")
        assert_close(P.T @ P, torch.eye(P.shape[1]), atol=1e-5, rtol=0)
    assert P.shape == (40, 40)


def test_thresholds_rise_as_published():
    """eps_t = eps + (1 - eps)(t - 1) / 15, and never 1."""
    found = [gainlora.scheduled_threshold(0.995, t) for t in (1, 2, 15, 16, 40)]
    assert_close(found[:3], [0.995, 0.995 + 0.005 / 15, 0.995 + 0.005 * 14 / 15])
    assert found[2] == found[3] == found[4] < 1


def test_second_moment_by_blocks():
    """Against a loop over rows."""
    v = randn(1, 7, 12)
    for c in (1, 3):
        expected = torch.zeros(c, 12 // c, 12 // c, dtype=torch.float64)
        for row in v:
            for b, block in enumerate(row.split(12 // c)):
                expected[b] += torch.outer(block, block)
        assert_close(gainlora.second_moment(v, c), expected)
    assert gainlora.second_moment(v.bfloat16(), 1).dtype == torch.float32


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("k", [0, 7])
def test_rows_from_moments(c, k):
    """5.10(f): InfLoRA's rows are the leading left singular vectors of (I - M M') C / sqrt(3 c)."""
    d, r = 24 // c, 3
    C = torch.stack([moment(b, d)[1] for b in range(c)])
    bases = [orthonormal(20 + b, d, k) for b in range(c)]
    A = gainlora.rows_from_moment(C, bases, r)
    M = torch.block_diag(*bases) if k else torch.zeros(24, 0, dtype=torch.float64)
    assert_close(A @ A.T, torch.eye(r, dtype=torch.float64) / 3, atol=1e-4, rtol=0)
    assert_close(A.norm(dim=1), torch.full((r,), 3**-0.5, dtype=torch.float64), atol=1e-5, rtol=0)
    for b, rows in enumerate(A.split(d, dim=1)):
        U = torch.linalg.svd(C[b] - bases[b] @ (bases[b].T @ C[b])).U[:, :r]
        assert_close((rows @ U).abs(), torch.eye(r, dtype=torch.float64) / math.sqrt(3 * c))
    assert k == 0 or (A @ M).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", ["cov_svd", "random_proj"])
def test_branches_cannot_see_old_inputs(rows):
    """5.10(f): A_t M = 0 to 1e-5; with a random B the branch is silent on span(M)."""
    M = orthonormal(1, 40, 25).float()
    A = (gainlora.rows_from_moment(moment(2, 40)[1].float()[None], [M], 4).float()
         if rows == "cov_svd" else gainlora.rows_from_random(randn(3, 4, 40).float(), [M]))
    assert (A @ M).abs().max() <= 1e-5
    assert_close(A.norm(dim=1), torch.full((4,), 3**-0.5), atol=1e-5, rtol=0)
    layer = gainlora.GainLinear(base_layer(40, 30, dtype=torch.float32), 4, 4, 0.0, chunk=1)
    with torch.no_grad():
        layer.lora_A[0].copy_(A)
        layer.lora_B[0].copy_(randn(4, 30, 4))
    layer.gain = torch.ones(1, 1)
    h = (M @ randn(5, 25, 6).float()).T[None]  # (1, 6, 40) in span(M)
    branch = layer(h) - F.linear(h, layer.residual, layer.bias)
    assert (branch.norm(dim=-1) <= 1e-4 * h.norm(dim=-1)).all()
    assert (layer(randn(6, 1, 6, 40).float()) - layer.bias).abs().max() > 0.1


def test_rows_in_a_full_space_are_zero():
    """Nothing but zero is orthogonal to everything; half a space still gives its share."""
    full, part = torch.eye(6, dtype=torch.float64), orthonormal(1, 6, 5)
    C = torch.stack([moment(0, 6)[1]] * 2)
    assert not gainlora.rows_from_random(randn(1, 2, 6), [full]).any()
    assert not gainlora.rows_from_moment(C[:1], [full], 2).any()
    A = gainlora.rows_from_moment(C, [full, part], 2)
    assert not A[:, :6].any() and not A[1].any() and A[0, 6:].any()
    assert (A[:, 6:] @ part).abs().max() <= 1e-12


# --- GainLoRA: the layer ------------------------------------------------------------------------


def gain_layer(dtype=torch.float64, dropout=0.0):
    layer = branches_of(gainlora.GainLinear(base_layer(dtype=dtype), 2, 6, dropout, chunk=1))
    layer.gain = randn(9, 4, 3).sigmoid().to(dtype)
    return layer


def test_gain_layer_weighs_each_branch_by_its_gate():
    """5.3: y = base(x) + s sum_i a_i B_i A_i x, sequence by sequence, in training with dropout."""
    layer, x = gain_layer(dropout=0.3), randn(3, 4, 5, 20)
    expected = F.linear(x, layer.residual, layer.bias)
    torch.manual_seed(0)
    u = F.dropout(x, 0.3)
    for b, i in itertools.product(range(4), range(3)):
        expected[b] += 3 * layer.gain[b, i] * u[b] @ layer.lora_A[i].T @ layer.lora_B[i].T
    torch.manual_seed(0)
    assert_close(layer.train()(x), expected.detach(), atol=1e-10, rtol=0, check_device=False)


def test_gradients_flow_through_old_branches():
    """5.10(g), (k): to the input, whole; to the frozen parameters, not at all."""
    layer, x = gain_layer(), randn(3, 4, 5, 20).requires_grad_()
    with torch.no_grad():
        layer.lora_B[-1].zero_()  # as at the start of a task: only old branches act
    grad = randn(4, 4, 5, 24)
    layer(x).backward(grad)
    base = grad @ layer.residual
    old = sum(3 * layer.gain[:, i, None, None] * (grad @ layer.lora_B[i] @ layer.lora_A[i])
              for i in range(2))
    assert old.abs().max() > 1
    assert_close(x.grad, (base + old).detach())
    frozen = [*layer.lora_A, *list(layer.lora_B)[:-1], *layer.basis, layer.residual]
    assert all(weight.grad is None for weight in frozen)
    assert layer.lora_B[-1].grad.any()


def test_gain_layer_without_gates_is_refused():
    """Stale or missing gates never act on other sequences."""
    layer = gain_layer()
    with pytest.raises(InputError, match="before_forward"):
        layer(randn(3, 3, 5, 20))
    layer.gain = None
    with pytest.raises(InputError, match="before_forward"):
        layer(randn(3, 4, 5, 20))


# --- on models ----------------------------------------------------------------------------------


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def test_output_at_init_is_the_base_models(architecture, variant):
    """Exactly: B is zero."""
    model = base_model(architecture)
    base = logits_of(model)
    method = adapt(model, variant)
    assert base.abs().max() > 0.1
    assert torch.equal(logits_of(model), base)
    start(method, 0)
    assert torch.equal(logits_of(model.eval()), base)


def test_a_sequence_of_tasks(architecture, variant):
    """3.9(b), (c), 5.10(a), (e), (g), (h): what a task starts from, moves and leaves alone."""
    # Gemma's softmax is in float32 always, where float64's mask is minus infinity: NaN on padding.
    dtype, atol = (torch.float32, 1e-5) if architecture == "gemma2" else (torch.float64, 1e-6)
    model = base_model(architecture, dtype)
    method = adapt(model, variant)
    base = {name: weight.clone() for name, weight in model.named_parameters()
            if not weight.requires_grad and "lora" not in name and "basis" not in name}
    train(method, 0)
    ended = logits_of(model)
    old = {name: weight.clone() for name, weight in method.state_dict().items()
           if "basis" not in name and ".P" not in name}
    start(method, 1)
    assert_close(logits_of(model), ended, atol=atol, rtol=0)
    first = weights_of(model)
    train(method, 1, started=True, finish=False)
    moved = weights_of(model)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert not torch.equal(moved[name], first[name]), name
        else:
            assert weight.grad is None
    frozen = {key: value for key, value in method.state_dict().items() if key in old}
    assert_same(frozen, old)
    assert_same({name: moved[name] for name in base}, base)
    assert (logits_of(model) - ended).abs().max() > 1e-3
    if variant in GATED:
        assert_update_is_constrained(method)


def assert_update_is_constrained(method):
    """5.10(e): the last gate's update, relative to the task's start, is outside P1, P2, P3."""
    gates = method.gates
    old, new = gates.tasks
    P1, P2, P3 = (torch.block_diag(*bases) for bases in (gates.P1, gates.P2, gates.P3))
    assert min(P1.shape[1], P2.shape[1], P3.shape[1]) >= 1
    for update, P in ((new.W1 - old.W1, P1), (new.W2 - old.W2, P2), (new.k, P3)):
        assert (update @ P).abs().max() <= 1e-5
        assert update.abs().max() > 1e-2


def test_every_trainable_parameter_moves_in_three_steps(architecture, variant):
    """Of the first task too; while B is zero the first step gives A and the gates no gradient."""
    model = base_model(architecture)
    method = adapt(model, variant)
    start(method, 0)
    first = weights_of(model)
    train(method, 0, steps=3, started=True, finish=False)
    moved = {name for name, weight in model.named_parameters()
             if not torch.equal(weight, first[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    shapes = {name.rpartition(".mlp.gate_proj.")[2] for name in moved}
    gate = {f"gainlora_gates.tasks.0.{name}" for name in ("W1", "W2", "k")}
    assert shapes == ({"lora_B.0"} if variant in ("inflora", "random_proj") else
                      {"lora_A.0", "lora_B.0"}) | (gate if variant in GATED else set())


def test_first_step_of_a_gate_is_not_constrained():
    """5.10(h): without old tasks the update constraint is the identity."""
    method = adapt(base_model(), "inflora")
    with torch.no_grad():
        for weight in method.gates.tasks[0].parameters():
            weight.add_(torch.randn_like(weight))
    before = weights_of(method.gates)
    method.after_step({})
    assert_same(weights_of(method.gates), before)


def test_trainable_and_stored_counts(variant):
    """Sections 3.7 and 5.8: r (d + m) a layer and task, without r d where A is frozen."""
    model = base_model("qwen3")
    method = adapt(model, variant, **({"gate_hidden": 7} if variant in GATED else {}))
    layers, r, d, m, h = 3, 2, 32, 64, 7
    gate = 2 * d * h + d if variant in GATED else 0
    expected = layers * r * (m if variant in ("inflora", "random_proj") else d + m) + gate
    for task in range(2):
        train(method, task, steps=1)
        assert sum(weight.numel() for weight in model.parameters()
                   if weight.requires_grad) == expected
    stored = {key: value for key, value in method.state_dict().items()
              if "basis" not in key and ".P" not in key}
    assert sum(map(torch.numel, stored.values())) == 2 * (layers * r * (d + m) + gate)


def test_saved_after_two_tasks_and_loaded(architecture, variant, tmp_path):
    """On a fresh base: the same logits, and the same third task."""
    model = base_model(architecture)
    method = adapt(model, variant)
    for task in range(2):
        train(method, task)
    adapter.save(model, tmp_path)
    other = adapter.load(base_model(architecture), tmp_path).eval()
    assert_same(other.adapted_by.state_dict(), method.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
    flags = [{name: weight.requires_grad for name, weight in each.named_parameters()}
             for each in (model, other)]
    assert flags[0] == flags[1]
    assert train(method, 2) == train(other.adapted_by, 2)
    assert_same(other.adapted_by.state_dict(), method.state_dict())
    assert any("lora_A.2" in key for key in method.state_dict())


def test_saved_keys_are_what_a_fresh_base_needs():
    """Branches, gates and subspaces, and nothing of the base."""
    for variant in VARIANTS:
        method = adapt(base_model(), variant)
        train(method, 0, steps=1)
        train(method, 1, steps=1)
        layers = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
        keys = {f"{layer}.lora_{x}.{t}" for layer in layers for x in "AB" for t in range(2)}
        chunk = getattr(method.settings, "chunk", 1)
        if variant in GATED:
            keys |= {f"gates.tasks.{t}.{x}" for t in range(2) for x in ("W1", "W2", "k")}
            keys |= {f"gates.{P}.{i}" for P in ("P1", "P3") for i in range(chunk)} | {"gates.P2.0"}
        if variant in ("inflora", "random_proj"):
            keys |= {f"{layer}.basis.{i}" for layer in layers for i in range(chunk)}
        assert method.state_dict().keys() == keys


DAMAGE = {
    "a branch's B is missing": lambda state, layer: state.pop(f"{layer}.lora_B.1"),
    "a gate is missing": lambda state, layer: state.pop("gates.tasks.1.k"),
    "a basis is missing": lambda state, layer: state.pop(f"{layer}.basis.0"),
    "one layer has a branch more": lambda state, layer: state.update(
        {f"{layer}.lora_A.2": torch.zeros(2, 32), f"{layer}.lora_B.2": torch.zeros(64, 2)}),
    "a basis has too many columns": lambda state, layer: state.update(
        {f"{layer}.basis.0": torch.zeros(32, 33)}),
    "a basis is no matrix": lambda state, layer: state.update({"gates.P1.0": torch.zeros(32)}),
    "a basis is too short": lambda state, layer: state.update({"gates.P2.0": torch.zeros(49, 1)}),
    "a branch has another rank": lambda state, layer: state.update(
        {f"{layer}.lora_A.0": torch.zeros(3, 32)}),
    "an unknown key": lambda state, layer: state.update({"gates.tasks.7.k": torch.zeros(32)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(damage):
    """By name, for any key or shape that does not fit."""
    method = adapt(base_model(), "inflora")
    train(method, 0, steps=1)
    method.add_branch()
    state = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    adapter.restore(adapt(base_model(), "inflora"), state)
    DAMAGE[damage](state, "model.layers.1.mlp.gate_proj")
    with pytest.raises(InputError, match="does not fit this model"):
        adapter.restore(adapt(base_model(), "inflora"), state)


@pytest.mark.parametrize("name", ["olora", "inflora", "gain_olora"])
def test_gradient_checkpointing_changes_nothing(architecture, name):
    """Losses and parameters of two tasks with dropout are bitwise those without it."""
    states, calls = [], [0, 0]
    for checkpointing in (False, True):
        model = base_model(architecture)
        method = adapt(model, name, dropout=0.2)
        next(iter(method.layers.values())).register_forward_pre_hook(
            lambda *_, on=checkpointing: calls.__setitem__(on, calls[on] + 1))
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = [train(method, task, steps=3) for task in range(2)]
        states.append((losses, method.state_dict()))
    assert calls[1] == calls[0] + 6  # each training step runs the layer a second time
    assert states[0][0] == states[1][0]
    assert_same(states[0][1], states[1][1])


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_models_keep_adapter_and_gates_in_float32(name):
    """As --mixed_precision bf16 loads them: the start is exact, subspaces stay orthonormal."""
    model = base_model(dtype=torch.bfloat16)
    base = logits_of(model)
    method = adapt(model, name)
    assert torch.equal(logits_of(model), base)
    train(method, 0)
    ended = logits_of(model)
    assert not torch.equal(ended, base)
    with torch.autocast("cpu", torch.bfloat16):
        train(method, 1, steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in method.state_dict().values())
    for key, P in method.state_dict().items():
        if "basis" in key or ".P" in key:
            assert_close(P.T @ P, torch.eye(P.shape[1]), atol=1e-5, rtol=0)


# --- the gates of a model -----------------------------------------------------------------------


def gated(architecture="llama", variant="inflora", **changed):
    """A model after two tasks -> its method."""
    method = adapt(base_model(architecture), variant, **changed)
    for task in range(2):
        train(method, task)
    return method


def gains(method, batch):
    """The gates (batch, t) that a batch gets."""
    with torch.no_grad():
        method.before_forward(batch)
    layers = list(method.layers.values())
    assert all(layer.gain is layers[0].gain for layer in layers)
    return layers[0].gain


def test_gates_read_the_prompt_and_nothing_else(architecture):
    """5.10(i): neither padding, batch mates nor targets; logits do not depend on them either."""
    method = gated(architecture)
    together = gains(method, data.pad_left(PROMPTS, 2))
    assert together.shape == (4, 2) and together.std(dim=0).min() > 1e-4
    logits = logits_of(method.model).split([len(prompt) for prompt in PROMPTS])
    for prompt, expected, its_logits in zip(PROMPTS, together, logits, strict=True):
        for pad, token in ((0, 2), (9, 2), (3, 77)):
            batch = data.pad_left([prompt, prompt[:1] + [9] * (len(prompt) + pad - 1)], token)
            assert_close(gains(method, batch)[0], expected, atol=1e-6, rtol=0)
        alone = logits_of(method.model, [prompt])
        assert_close(alone, its_logits, atol=1e-4, rtol=1e-4)
        for targets in (1, 4):  # training sees prompt and target, generation the prompt alone
            row = {"input_ids": prompt + [60] * targets, "num_targets": targets}
            other = {"input_ids": [1] * 40, "num_targets": 9}
            batch = data.collate([row, other, None], 2, 5)
            assert_close(gains(method, batch)[0], expected, atol=1e-6, rtol=0)


def test_gates_read_the_bare_embedding_table():
    """Gemma's embedding layer multiplies by sqrt(d); the gates do not see that."""
    method = gated("gemma2")
    table = method.model.get_input_embeddings()
    ids = torch.tensor([PROMPTS[0]])
    scaled = table(ids) / table.weight[ids]
    assert_close(scaled, torch.full_like(scaled, 32**0.5))
    gate = method.gates.tasks[1]
    p0 = table.weight[PROMPTS[0]].mean(0, keepdim=True)
    assert_close(gains(method, data.pad_left(PROMPTS[:1], 2))[:, 1],
                 gainlora.gate(p0, gate.W1, gate.W2, gate.k).detach())


@pytest.mark.parametrize("variant", ["inflora", "gain_olora"])
def test_gates_stay_in_every_decode_step(architecture, variant):
    """5.10(j): equal at every step of cached generation, and the answer is that without a cache."""
    method = gated(architecture, variant)
    model, batch = method.model, data.pad_left(PROMPTS, 2)
    expected, seen, lengths = gains(method, batch), [], []
    for layer in method.layers.values():
        layer.register_forward_pre_hook(lambda layer, inputs: (
            seen.append(layer.gain.clone()), lengths.append(inputs[0].shape[1])) and None)
    tokens = model.generate(**{key: batch[key] for key in ("input_ids", "attention_mask")},
                            max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=2,
                            eos_token_id=299)
    assert all(torch.equal(gain, expected) for gain in seen)
    assert set(lengths) == {1, batch["input_ids"].shape[1]}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                           use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
    assert torch.equal(tokens, ids)


# --- the passes over a task's data --------------------------------------------------------------


@pytest.mark.parametrize("variant", GATED)
def test_pass_over_the_data(variant):
    """Second moments of real tokens and prompts, as of one row at a time; nothing else changes."""
    method = gated(variant=variant, dropout=0.4)
    rows = instances(2)
    expected = naive_moments(method, rows)
    model = method.model.train()
    state, before = torch.get_rng_state(), method.state_dict()
    found = method._observe(batches(rows), with_gates=True)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert_same(method.state_dict(), before)
    assert found.keys() == expected.keys()
    for name, total in found.items():
        c = len(total)
        blocks = expected[name].unflatten(1, (c, -1)).unflatten(0, (c, -1))
        for b in range(c):
            assert_close(total[b].double(), blocks[b, :, b], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def naive_moments(method, rows):
    """What `_observe` sums up, in float64, one unpadded row after the other."""
    inputs, names = {}, list(method.layers) if method.has_memory else []
    handles = [method.layers[name].register_forward_pre_hook(
        lambda _, given, name=name: inputs.update({name: given[0][0]})) for name in names]
    method.model.eval()
    total = {}
    for row in rows:
        batch = data.collate([row], 2, 1)
        method.before_forward(batch)
        method.model(input_ids=batch["input_ids"])
        prompt = row["input_ids"][:len(row["input_ids"]) - row["num_targets"]]
        p0 = method.model.get_input_embeddings().weight[prompt].mean(0)
        gate = method.gates.tasks[-1]
        p1 = gate.W1 @ p0
        inputs |= {"P1": p0[None], "P2": p1[None], "P3": F.silu(gate.W2 @ p1)[None]}
        for name, v in inputs.items():
            total[name] = total.get(name, 0) + v.double().T @ v.double()
    for handle in handles:
        handle.remove()
    return total


def test_a_pass_stops_looking_after_its_share_of_instances(monkeypatch):
    """Loaders are still read to their end; fillers do not count."""
    method = gated()
    rows, read = instances(3), []

    def loader():
        for batch in batches(rows[:1]) + batches(rows[1:], size=2):
            read.append(batch)
            yield batch

    monkeypatch.setattr(gainlora, "MAX_INSTANCES", 2)
    found = method._observe(loader(), with_gates=True)
    expected = naive_moments(method, rows[:3])  # the batch in which the limit is reached is used
    assert len(read) == 5
    assert_close(found["P1"][0].double(), expected["P1"], rtol=1e-4, atol=1e-5)


def test_a_pass_sums_over_all_processes(monkeypatch):
    """Every moment goes through the all-reduce, and its sum is what is used."""
    method = gated()
    alone = method._observe(batches(instances(3)), with_gates=True)
    monkeypatch.setattr(gainlora, "reduce", lambda total, how: {"sum": 3 * total}[how])
    together = method._observe(batches(instances(3)), with_gates=True)
    assert len(alone) == 5
    assert_same(together, {name: 3 * total for name, total in alone.items()})


def test_subspaces_after_a_task_are_those_of_its_moments():
    """Every basis is extended by its own moments at its own scheduled threshold."""
    method = adapt(base_model(), "inflora", threshold=0.6, gate_threshold=0.8)
    train(method, 0)
    train(method, 1, finish=False)
    layer = "model.layers.1.mlp.gate_proj"
    moments = naive_moments(method, instances(1))
    before = method.state_dict()
    method.end_stage(stage_of(1), batches(instances(1)))
    after = method.state_dict()
    for key, name, eps in ((f"{layer}.basis.0", layer, 0.6), ("gates.P1.0", "P1", 0.8),
                           ("gates.P2.0", "P2", 0.8), ("gates.P3.0", "P3", 0.8)):
        old = before[key].double()
        U, S, _ = torch.linalg.svd(moments[name])
        M = naive_gpm(U * S.sqrt(), old, eps + (1 - eps) / 15)
        P = after[key].double()
        assert old.shape[1] <= P.shape[1] == M.shape[1]
        assert torch.equal(P[:, :old.shape[1]], old)
        assert_close(P @ P.T, M @ M.T, atol=1e-4, rtol=0)
    assert after[f"{layer}.basis.0"].shape[1] > before[f"{layer}.basis.0"].shape[1]


@pytest.mark.parametrize("variant", ["inflora", "random_proj"])
def test_new_rows_are_outside_old_inputs(variant):
    """5.10(f) in the model: the second branch's A against the first task's subspace."""
    method = adapt(base_model(), variant)
    drawn = {name: layer.lora_A[0].clone() for name, layer in method.layers.items()}
    train(method, 0)
    start(method, 1)
    for name, layer in method.layers.items():
        M = torch.block_diag(*layer.basis)
        assert M.shape[1] >= 1
        assert (layer.lora_A[1] @ M).abs().max() <= 1e-5
        assert_close(layer.lora_A[1].norm(dim=1), torch.full((2,), 3**-0.5), atol=1e-5, rtol=0)
        # The first task's rows are from its data, or as they were drawn.
        assert torch.equal(layer.lora_A[0], drawn[name]) == (variant == "random_proj")


def test_first_rows_are_the_leading_directions_of_the_data():
    """cov_svd with an empty memory: A_1 spans the top left singular vectors of C."""
    method = adapt(base_model(), "inflora")
    moments = naive_moments(method, instances(0))
    start(method, 0)
    for name, layer in method.layers.items():
        U = torch.linalg.svd(moments[name]).U[:, :2].float()
        assert_close((math.sqrt(3) * layer.lora_A[0] @ U).abs(), torch.eye(2), atol=1e-3, rtol=0)


def test_a_full_subspace_is_said(capsys):
    """Old tasks that use up all directions leave a smaller branch, in one line."""
    method = adapt(base_model(), "inflora")
    train(method, 0, steps=1)
    for layer in method.layers.values():
        layer.basis[0] = gainlora.frozen(torch.eye(32)[:, :31])
    capsys.readouterr()
    train(method, 1, steps=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "less than rank 2 in 2 of 2 layers: lower --threshold" in line
    rows = method.layers["model.layers.0.mlp.gate_proj"].lora_A[1]
    assert not rows[1].any() and torch.equal(rows[0].nonzero().flatten(), torch.tensor([31]))


# --- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [
    (("--orth_weight", "1"), "--orth_weight is not read with --branches inflora"),
    (("--branches", "olora", "--a_init", "cov_svd"), "--a_init is not read with --branches olora"),
    (("--chunk", "5"), "--chunk 5 does not split 32 inputs"),
    (("--chunk", "32"), "--chunk 32 does not split 32 inputs"),
    (("--threshold", "1"), "'1' is not a number from 0 to below 1"),
    (("--num_experts", "4"), "--num_experts is not read by --method gainlora"),
])
def test_flags_that_do_not_fit_gainlora(llama, suite, flags, named):
    """Refused by name, before anything is trained."""
    outcome = run("--method", "gainlora", "--model", llama, "--suite", suite, *SMALL, *flags)
    assert outcome.status == 2
    assert named in outcome.err[-1]


@pytest.mark.parametrize("flags, named", [
    (("--branches", "olora"), "--branches is not read by --method olora"),
    (("--orth_norm", "l2"), "invalid choice: 'l2'"),
    (("--rank", "40"), "rank 40"),
])
def test_flags_that_do_not_fit_olora(llama, suite, flags, named):
    """Refused by name, before anything is trained."""
    outcome = run("--method", "olora", "--model", llama, "--suite", suite, *SMALL, *flags)
    assert outcome.status == 2
    assert named in outcome.err[-1]


# --- whole runs ---------------------------------------------------------------------------------

BRIEF = (*SMALL, "--epochs", "1", "--batch_size", "4", "--learning_rate", "1e-2")
TWO = ("--tasks", "colour_name", "say_both", "--task_order", "say_both", "colour_name")
RUNS = {"olora": ("--method", "olora"),
        "gainlora": ("--method", "gainlora", "--threshold", "0.8", "--gate_threshold", "0.8"),
        "gain_olora": ("--method", "gainlora", "--branches", "olora", "--gate_threshold", "0.8")}


def adapter_of(folder):
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_two_tasks_in_sequence(llama, suite, tmp_path, name):
    """Old branches keep their bits; the saved adapter gives the run's last predictions again."""
    common = ("--model", llama, "--suite", suite, *BRIEF, *RUNS[name])
    first, both = tmp_path / "first", tmp_path / "both"
    # The same first task: the stage's name and the seed fix everything.
    succeed(*common, "--setting", "single", "--tasks", "say_both", "--output_dir", first)
    outcome = succeed(*common, "--setting", "sequential", *TWO, "--output_dir", both,
                      "--gradient_accumulation_steps", "2")
    assert not any("mixed training" in line for line in outcome.out)
    log = lines_of(both / "log.jsonl")
    assert {record["stage"] for record in log} == {"say_both", "colour_name"}
    penalties = [record["penalty"] for record in log if record["stage"] == "colour_name"]
    assert all(value > 0 for value in penalties) == (name != "gainlora")
    assert all(record["penalty"] == 0 for record in log if record["stage"] == "say_both")
    state = adapter_of(both)
    assert "model.layers.0.mlp.gate_proj.lora_B.1" in state
    assert any("mean |cosine|" in line for line in outcome.out) == (name == "olora")

    again = tmp_path / "again"
    succeed("--eval_only", "--adapter", both / "adapter", "--model", llama, "--suite", suite,
            "--tasks", "say_both", "colour_name", "--max_length", "64", "--max_new_tokens", "5",
            "--output_dir", again)
    rows = [sorted(lines_of(next(folder.glob(f"predictions/{number}_*.jsonl"))),
                   key=lambda row: row["id"])
            for folder, number in ((both, "02"), (again, "01"))]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", RUNS)
def test_old_branches_after_a_second_task(llama, suite, tmp_path, name):
    """One task and two tasks from the same start: the first branch and gate are bitwise equal."""
    common = ("--model", llama, "--suite", suite, *BRIEF, *RUNS[name], "--setting", "sequential",
              "--eval_tasks", "none")
    succeed(*common, "--tasks", "say_both", "--output_dir", tmp_path / "one")
    succeed(*common, *TWO, "--output_dir", tmp_path / "two")
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    grown = {key for key in one if "basis" in key or ".P" in key}
    assert_same({key: two[key] for key in one.keys() - grown},
                {key: one[key] for key in one.keys() - grown})
    for key in grown:  # what the first task put into a subspace stays in front
        assert torch.equal(two[key][:, :one[key].shape[1]], one[key])
    assert len(two) > len(one)


@pytest.mark.parametrize("name", RUNS)
def test_mixed_training_is_one_task(llama, suite, tmp_path, name):
    """One branch, no penalty, one line that says so; the batches are LoRA's."""
    common = ("--model", llama, "--suite", suite, *BRIEF, "--eval_tasks", "none")
    outcome = succeed(*common, *RUNS[name], "--output_dir", tmp_path / name)
    said = [line for line in outcome.out if "mixed training is one task" in line]
    assert len(said) == 1 and said[0].startswith(RUNS[name][1])
    state = adapter_of(tmp_path / name)
    assert {key.rpartition(".")[2] for key in state if "lora" in key} == {"0"}
    succeed(*common, "--method", "lora", "--output_dir", tmp_path / "lora")
    ours, theirs = (lines_of(tmp_path / folder / "log.jsonl") for folder in (name, "lora"))
    assert all(record["penalty"] == 0 for record in ours)
    # The passes over the data leave the order of the batches alone.
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs]
    assert len({record["tokens"] for record in ours}) > 1
    if name == "olora":
        lora = adapter_of(tmp_path / "lora")
        assert ours == theirs
        assert_same({key.removesuffix(".0"): tensor for key, tensor in state.items()}, lora)


def test_a_wrapped_models_base_is_told_apart(tmp_path):
    """The gates are the adapter's, not the base's: its fingerprint is that of the bare model."""
    model = base_model()
    sha256 = fingerprint(model)
    method = adapt(model, "inflora")
    assert method.base_sha256 == sha256
    adapter.save(model, tmp_path)
    with pytest.raises(InputError, match="another base model"):
        adapter.load(base_model("qwen3"), tmp_path)
