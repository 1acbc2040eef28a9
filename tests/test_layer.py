"""BaditLinear against a loop over tokens, experts and components, and what it must never do."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import data
from badit import BaditLinear
from decomposition import decompose
from grouping import component_gradients, group_components
from method import Stage
from regrouping import Regrouper

IN, OUT, K, R = 20, 24, 4, 3
TOKEN_CASES = [(top_k, inactive) for top_k in (1, 2, 3, 4) for inactive in ("keep", "drop")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(seed, *shape):
    """Fixed float64 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed=0, n=IN, m=OUT, bias=True, dtype=torch.float64):
    """A base layer with fixed weights."""
    torch.manual_seed(seed)
    return nn.Linear(n, m, bias=bias).to(dtype)


def fresh(base, num_experts=K, rank=R, alpha=6, dropout=0.0, top_k=2, **options):
    """A layer at init; s = alpha / rank = 2 by default."""
    return BaditLinear(base, num_experts, rank, alpha, dropout, top_k, **options)


@torch.no_grad()
def trained(base, seed=0, regrouped=True, **options):
    """A layer away from init: moved bank, non-zero router or alpha in 0.5..2, mixed grouping."""
    layer = fresh(base, **options)
    N = layer.lora_A.shape[0]
    layer.lora_A.add_(0.3 * randn(seed + 1, *layer.lora_A.shape))
    layer.lora_B.add_(0.3 * randn(seed + 2, *layer.lora_B.shape))
    if options.get("routing") == "static":
        layer.alpha.copy_(0.5 + 1.5 * randn(seed + 3, len(layer.alpha)).sigmoid())
    else:
        layer.router.copy_(0.4 * randn(seed + 3, *layer.router.shape))
    if regrouped:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        layer.expert_of.copy_(layer.expert_of[order])
    return layer


def gate(layer):
    """The parameter that Eq. 7's alpha_k comes from, and its name."""
    static = "alpha" in dict(layer.named_parameters())
    return ("alpha", layer.alpha) if static else ("router", layer.router)


def selected(logits, top_k):
    """Section 3: the top_k experts by logit, the lowest index on ties."""
    return sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[:top_k]


def token_output(x, residual, bias, A, B, gates, expert_of, s, top_k, inactive, static):
    """Section 3's formula for one token, expert by expert and component by component."""
    y = residual @ x + (0 if bias is None else bias)
    num_experts = len(gates)
    if static:
        alpha, chosen = gates, range(num_experts)
    else:
        z = torch.stack([x @ gates[k] for k in range(num_experts)])
        alpha = num_experts * z.exp() / z.exp().sum()
        chosen = selected(z.tolist(), top_k)
    for i, k in enumerate(expert_of.tolist()):
        if k in chosen:
            y = y + s * alpha[k] * B[:, i] * (A[i] @ x)
        elif inactive == "keep":
            y = y + s * B[:, i].detach() * (A[i].detach() @ x)
    return y


def naive(layer, bias, x, top_k, inactive="keep", s=2.0):
    """Outputs and float64 leaves (x, lora_A, lora_B, gate) of the loop over tokens."""
    name, gates = gate(layer)
    leaves = [t.detach().double().clone().requires_grad_()
              for t in (x, layer.lora_A, layer.lora_B, gates)]
    x64, A, B, gates64 = leaves
    rows = [token_output(t, layer.residual.detach().double(), bias, A, B, gates64,
                         layer.expert_of, s, top_k, inactive, name == "alpha")
            for t in x64.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(*x.shape[:-1], -1), leaves


def bias_of(base):
    return None if base.bias is None else base.bias.detach().double().clone()


def gradients_of(layer, x, weights):
    """Gradients of sum(weights * y) for x, lora_A, lora_B and the gate."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weights).sum().backward()
    return y.detach(), [x.grad, layer.lora_A.grad, layer.lora_B.grad, gate(layer)[1].grad]


def touched_experts(layer):
    """Experts any of whose components has a non-zero gradient in lora_A or lora_B."""
    touched = layer.lora_A.grad.abs().sum(1) + layer.lora_B.grad.abs().sum(0)
    return {k for k, t in zip(layer.expert_of.tolist(), touched.tolist(), strict=True) if t != 0}


def crossing_gradients(layer, seed=0):
    """Gradients with planted groups that take one member of every expert each (K = r = 4)."""
    N, D = layer.lora_A.shape[0], layer.lora_A.shape[1] + layer.lora_B.shape[0]
    directions = torch.linalg.qr(randn(seed, D, 4)).Q.T
    truth = torch.zeros(N, dtype=torch.int64)
    for k in range(4):
        truth[layer.expert_of == k] = torch.arange(4)
    noisy = directions[truth] + 0.3 * randn(seed + 1, N, D) / D**0.5
    return (noisy * randn(seed + 2, N, 1).exp()).to(layer.lora_A.dtype), truth


class Lookup(nn.Module):
    """The smallest model whose layers can be measured: one layer on a table of tokens."""

    def __init__(self, layer):
        super().__init__()
        self.table = randn(7, 5, layer.lora_A.shape[1]).to(layer.residual.dtype)
        self.layer = layer

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, use_cache):
        return self.layer(self.table[input_ids])


def regroup(layer, gradients):
    """DOG on one layer, from gradients (N, in + out) -> its line of regroup.jsonl."""
    regrouper = Regrouper({"layer": layer}, 1, "dog", False, 1)
    regrouper.start(Stage("task", ("task",), 1, 2))
    columns = layer.lora_A.shape[1]
    regrouper.sums = {"layer": (gradients[:, :columns], gradients[:, columns:].T)}
    regrouper.count = 1
    model = Lookup(layer).train(layer.training)
    (line,) = regrouper.regroup(model, data.pad_left([[1, 2, 3], [4]], 0), "dog")
    return line


def snapshot(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def changed(layer, before):
    """Names of parameters and buffers that are no longer bit-identical."""
    return {name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])}


# Construction


@pytest.mark.parametrize("routing", ["token", "static"])
def test_parameters_and_buffers(routing):
    """Sections 2, 3: shapes, what trains, what is frozen, contiguous first grouping."""
    layer = fresh(linear(bias=False, dtype=torch.float32), routing=routing)
    N = K * R
    parameters = dict(layer.named_parameters())
    name, start = gate(layer)
    assert {n for n, p in parameters.items() if p.requires_grad} == {"lora_A", "lora_B", name}
    assert name == {"token": "router", "static": "alpha"}[routing]
    assert torch.equal(start, torch.zeros(K, IN) if routing == "token" else torch.ones(K))
    assert {"residual", "lora_A0", "lora_B0"} <= set(parameters)
    assert layer.lora_A.shape == (N, IN) and layer.lora_B.shape == (OUT, N)
    assert layer.residual.shape == (OUT, IN) and layer.scaling == 2.0
    assert dict(layer.named_buffers())["expert_of"].dtype == torch.int64
    assert layer.expert_of.tolist() == [i // R for i in range(N)]
    assert "expert_of" in layer.state_dict()


def test_the_initial_bank_is_a_frozen_copy():
    """Section 2: residual = W0 - s B0 A0 still holds after lora_A and lora_B have moved."""
    base = linear(1)
    weight = base.weight.detach().clone()
    layer = fresh(base)
    bad = decompose(weight, K, R, 2.0)
    with torch.no_grad():
        layer.lora_A.mul_(3)
        layer.lora_B.add_(1)
    assert_close(layer.lora_A0.detach().double(), bad.lora_A)
    assert_close(layer.lora_B0.detach().double(), bad.lora_B)
    assert_close(layer.residual.detach() + 2 * layer.lora_B0 @ layer.lora_A0, weight)


@pytest.mark.parametrize(("options", "named"), [
    (dict(num_experts=8, rank=4), "(?s)(?=.*20)((?=.*32)|(?=.*8)(?=.*4))"),
    (dict(num_experts=7, rank=3), "(?s)(?=.*20)((?=.*21)|(?=.*7)(?=.*3))"),
    (dict(top_k=5), "(?s)(?=.*5)(?=.*4)"),
])
def test_impossible_sizes_are_refused(options, named):
    """Section 2: N > min(m, n), and top_k > K, are errors that name the values."""
    with pytest.raises(ValueError, match=named):
        fresh(linear(), **options)


# The output at init


@pytest.mark.parametrize(("dtype", "tolerance"),
                         [(torch.float32, 1e-4), (torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("routing", "top_k"),
                         [("token", 1), ("token", 2), ("token", 4), ("static", 4)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_at_init_is_the_base_layers(dtype, tolerance, routing, top_k, training, bias):
    """Section 3: alpha = 1 at init, so the model starts as the pre-trained model."""
    base = linear(2, bias=bias, dtype=dtype)
    x = randn(3, 2, 5, IN).to(dtype)
    expected = base(x).detach()
    for svd in ("exact", "fast"):
        layer = fresh(base, routing=routing, top_k=top_k, svd=svd).train(training)
        y = layer(x)
        assert y.dtype == dtype and y.shape == expected.shape
        error = (y.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max()


def test_dropping_the_inactive_experts_is_not_the_base_layer():
    """Section 3: the literal reading changes the model at init; that is why keep is the default."""
    base, x = linear(4), randn(5, 6, IN)
    assert (fresh(base, inactive="drop").eval()(x) - base(x)).abs().max() > 0.1
    default = BaditLinear(base, num_experts=4, rank=3, top_k=2)
    assert_close(default.eval()(x), base(x))


# Eq. 7 and the formula of section 3 against the loop


@pytest.mark.parametrize(("top_k", "inactive"), TOKEN_CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_token_routing_is_the_formula(top_k, inactive, bias):
    """Section 3: outputs and all gradients equal the loop's with its explicit detach."""
    base = linear(6, bias=bias)
    b = bias_of(base)
    layer = trained(base, 7, top_k=top_k, inactive=inactive, router_noise=0.0)
    x, weights = randn(8, 2, 4, IN), randn(9, 2, 4, OUT)
    expected, leaves = naive(layer, b, x, top_k, inactive)
    (expected * weights).sum().backward()
    y, gradients = gradients_of(layer.train(), x, weights)
    assert_close(y, expected.detach())
    for got, leaf in zip(gradients, leaves, strict=True):
        assert_close(got, leaf.grad)
    assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_static_routing_is_the_formula(bias):
    """Eq. 7 to the letter: one alpha_k per expert, all active; gradients too."""
    base = linear(10, bias=bias)
    b = bias_of(base)
    layer = trained(base, 11, routing="static")
    x, weights = randn(12, 3, 3, IN), randn(13, 3, 3, OUT)
    expected, leaves = naive(layer, b, x, K)
    (expected * weights).sum().backward()
    y, gradients = gradients_of(layer.train(), x, weights)
    assert_close(y, expected.detach())
    for got, leaf in zip(gradients, leaves, strict=True):
        assert_close(got, leaf.grad)
    assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("routing", ["token", "static"])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 2, 2), (0,), (2, 0)])
def test_any_leading_dimensions(routing, lead):
    """Section 3: one token, a batch, sequences, or none at all."""
    layer = trained(linear(14), 15, routing=routing).eval()
    x = randn(16, *lead, IN)
    y = layer(x)
    assert y.shape == (*lead, OUT)
    rows = [layer(row) for row in x.reshape(-1, IN)]
    assert_close(y.reshape(-1, OUT), torch.stack(rows) if rows else y.reshape(-1, OUT))


@pytest.mark.parametrize(("routing", "inactive", "top_k", "leaves"), [
    ("token", "keep", 2, ["x", "router"]),  # stopgrad: a numeric gradient of the bank differs
    ("token", "keep", 3, ["x", "lora_A", "lora_B", "router"]),
    ("token", "drop", 2, ["x", "lora_A", "lora_B", "router"]),
    ("static", "keep", 3, ["x", "lora_A", "lora_B", "alpha"]),
])
def test_gradcheck(routing, inactive, top_k, leaves):
    """Section 3: analytic gradients equal numeric ones, in float64 and far from ties."""
    layer = trained(linear(17, n=7, m=6), 18, num_experts=3, rank=2, top_k=top_k,
                    routing=routing, inactive=inactive, router_noise=0.0).double()
    x = randn(20, 3, 7)
    if routing == "token":
        z = (x @ layer.router.detach().T).sort(-1).values
        assert (z[:, 1:] - z[:, :-1]).min() > 1e-2, "choose another seed for this test"
    values = {"x": x, **{n: p.detach() for n, p in layer.named_parameters()}}

    def call(*tensors):
        parameters = dict(zip(leaves, tensors, strict=True))
        inputs = parameters.pop("x")
        return torch.func.functional_call(layer, parameters, (inputs,))

    assert torch.autograd.gradcheck(call, [values[n].clone().requires_grad_() for n in leaves])


# Who gets a gradient


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("inactive", ["keep", "drop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unselected_experts_get_exactly_no_gradient(top_k, inactive, dtype):
    """Section 3: zero in lora_A and lora_B from a token that does not select them."""
    layer = trained(linear(20, dtype=dtype), 21, top_k=top_k, inactive=inactive, router_noise=0.0)
    seen = set()
    for x in randn(22, 6, IN).to(dtype):
        z = [float(x.double() @ row.double()) for row in layer.router.detach()]
        _, gradients = gradients_of(layer.train(), x, randn(23, OUT).to(dtype))
        assert touched_experts(layer) == set(selected(z, top_k))
        assert gradients[3].abs().sum(1).min() > 0  # every router row, through the softmax
        seen |= touched_experts(layer)
    assert len(seen) > top_k  # the tokens did not all agree


@pytest.mark.parametrize("top_k", [1, 4])
def test_noise_gives_every_expert_a_gradient_at_init(top_k):
    """Section 3: without noise ties would always pick the same experts."""
    layer = fresh(linear(24, n=16, m=16, dtype=torch.float32), 8, 2, top_k=top_k)
    torch.manual_seed(25)
    seen = set()
    for step in range(5):
        gradients_of(layer.train(), randn(26 + step, 16, 16).float(), 1.0)
        seen |= touched_experts(layer)
    assert seen == set(range(8))
    gradients_of(layer.eval(), randn(31, 16, 16).float(), 1.0)
    assert touched_experts(layer) == set(range(top_k))  # evaluation: lowest index wins


# Selection noise and dropout


def test_evaluation_has_no_noise_and_no_dropout():
    """Section 3: two forwards agree, under any seed, and equal the clean formula."""
    base = linear(32)
    layer = trained(base, 33, dropout=0.5, router_noise=5.0).eval()
    x = randn(34, 8, IN)
    expected = naive(layer, bias_of(base), x, 2)[0]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert torch.equal(layer(x), layer(x))
        assert_close(layer(x), expected)


@pytest.mark.parametrize("inactive", ["keep", "drop"])
def test_noise_moves_the_selection_and_not_the_weights(inactive):
    """Section 3: a training output is the formula with clean alpha and some top_k experts."""
    base = linear(35)
    layer = trained(base, 36, inactive=inactive, router_noise=3.0).train()
    x, b = randn(37, IN), bias_of(base)
    with torch.no_grad():
        z = layer.router.double() @ x
        alpha = K * z.exp() / z.exp().sum()
        part = torch.stack([2 * layer.lora_B[:, layer.expert_of == k]
                            @ (layer.lora_A[layer.expert_of == k] @ x) for k in range(K)])
        fixed = layer.residual @ x + b
        idle = 1.0 if inactive == "keep" else 0.0
        possible = [fixed + sum((alpha[k] if k in S else idle) * part[k] for k in range(K))
                    for S in itertools.combinations(range(K), 2)]
        torch.manual_seed(38)
        found = set()
        for y in layer(x.expand(200, IN)):
            errors = [float((y - p).abs().max()) for p in possible]
            assert min(errors) < 1e-9
            found.add(errors.index(min(errors)))
    assert len(found) >= 4


@pytest.mark.parametrize(("noise", "std"), [(None, 0.5), (2.0, 2.0), (0.0, 1e-9)])
def test_noise_has_the_promised_size(noise, std):
    """Section 3: std 1/K by default; K = 2 and a gap of 0.5 pick the loser that often."""
    layer = fresh(linear(39, n=6, m=5), 2, 1, top_k=1, inactive="drop", router_noise=noise)
    x = randn(40, 6)
    with torch.no_grad():
        layer.router[1] = -0.5 * x / (x @ x)
        torch.manual_seed(41)
        y = layer.train()(x.expand(4000, 6))
        winner = layer.eval()(x)
        share = float(((y - winner).abs().amax(1) > 1e-9).double().mean())
    expected = float(torch.special.ndtr(torch.tensor(-0.5 / (std * 2**0.5))))
    assert abs(share - expected) < 0.035  # 4.4 standard errors or more


def test_noise_and_dropout_come_from_the_global_generator():
    """Section 3: recomputation under activation checkpointing gives the same gradients."""
    layer = trained(linear(42), 43, dropout=0.3, router_noise=1.0).train()
    x, weights, results = randn(44, 12, IN).requires_grad_(), randn(45, 12, OUT), []
    for use in (False, True):
        layer.zero_grad()
        torch.manual_seed(46)
        y = checkpoint(layer, x, use_reentrant=False) if use else layer(x)
        (y * weights).sum().backward()
        results.append((y.detach(), layer.lora_A.grad.clone(), layer.router.grad.clone()))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(plain, recomputed)
    torch.manual_seed(47)
    assert not torch.allclose(layer(x), results[0][0])


@pytest.mark.parametrize("routing", ["token", "static"])
def test_one_dropout_mask_for_all_experts(routing):
    """Section 3: equal experts see equal inputs; the kept entries are scaled by 1 / (1 - p)."""
    layer = fresh(linear(48, bias=False), dropout=0.5, routing=routing).train()
    with torch.no_grad():
        layer.residual.zero_()
        layer.lora_A.zero_()
        layer.lora_B.zero_()
        for i in range(K * R):  # every expert maps entries 0..R-1 to themselves
            layer.lora_A[i, i % R] = layer.lora_B[i % R, i] = 1.0
        torch.manual_seed(49)
        x = 1 + randn(50, 100, IN).abs()
        ratio = layer(x)[:, :R] / (2 * K * x[:, :R])
    kept = ratio > 1e-9
    assert_close(ratio[kept], torch.full_like(ratio[kept], 2.0))
    assert_close(ratio[~kept], torch.zeros_like(ratio[~kept]))
    assert 0.4 < float(kept.double().mean()) < 0.6
    assert len({tuple(row) for row in kept.tolist()}) == 2**R  # a mask per token and entry


def test_dropout_reaches_the_adapter_only():
    """Section 3: residual and router read x; the experts read u = dropout(x)."""
    layer = fresh(linear(51), dropout=0.5, router_noise=0.0, inactive="drop").train()
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_A[:, 0] = 1.0  # the experts read entry 0, the router the others
        layer.router[:, 1:] = 0.3 * randn(52, K, IN - 1)
        x = randn(53, IN)
        torch.manual_seed(54)
        y = layer(x.expand(64, IN))
        full = layer.eval()(x)
        layer.lora_A.zero_()
        none = layer(x)
    kept = none + 2 * (full - none)  # one entry, kept: scaled by 1 / (1 - p)
    is_kept = (y - kept).abs().amax(1) < 1e-9
    is_dropped = (y - none).abs().amax(1) < 1e-9
    assert (is_kept ^ is_dropped).all() and is_kept.any() and is_dropped.any()


# Tokens are independent


@pytest.mark.parametrize("inactive", ["keep", "drop"])
def test_routing_ignores_padding_and_batch_mates(inactive):
    """Section 3: a token's output does not depend on its neighbours, padding included."""
    layer = trained(linear(55), 56, inactive=inactive).eval()
    tokens = randn(57, 6, IN)
    alone = torch.stack([layer(t[None])[0] for t in tokens])
    padding, mates = torch.zeros(3, IN).double(), 100 * randn(58, 4, IN)
    for left, right in [(padding, padding[:0]), (mates, padding), (padding, mates)]:
        together = layer(torch.cat([left, tokens, right])[None])[0]
        assert_close(together[len(left):len(left) + 6], alone)
    assert_close(layer(tokens.reshape(2, 3, IN)).reshape(6, OUT), alone)


# Precision


@pytest.mark.parametrize("routing", ["token", "static"])
def test_bf16_base_keeps_a_float32_adapter(routing):
    """Section 6: residual in the base's dtype, adapter and gate fp32, output bf16."""
    base = linear(59, dtype=torch.bfloat16)
    layer = trained(base, 60, routing=routing, router_noise=0.0)
    name, gates = gate(layer)
    assert layer.residual.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == gates.dtype == torch.float32
    x, weights = randn(61, 2, 4, IN).bfloat16(), randn(62, 2, 4, OUT).bfloat16()
    expected, leaves = naive(layer, bias_of(base), x, 2)
    (expected * weights).sum().backward()
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y, gradients = gradients_of(layer.train(), x, weights)
        assert y.dtype == gradients[0].dtype == torch.bfloat16
        assert (y - expected).abs().max() <= 3e-2 * expected.abs().max()
        assert all(g.dtype == torch.float32 for g in gradients[1:])
        for got, leaf in zip(gradients, leaves, strict=True):
            assert (got - leaf.grad).norm() <= 5e-2 * leaf.grad.norm()


@pytest.mark.parametrize("routing", ["token", "static"])
def test_autocast_with_a_float32_base(routing):
    """Section 6: under bf16 autocast the dtype is the base layer's, gradients stay fp32."""
    base = linear(63, dtype=torch.float32)
    layer, x = fresh(base, routing=routing), randn(64, 2, 4, IN).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = base(x)
        y, gradients = gradients_of(layer.train(), x, 1.0)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_stay_out_of_autocast(dtype):
    """Section 3: logits that differ by less than bf16 resolves still choose the larger."""
    layer = fresh(linear(65, dtype=dtype), top_k=1, router_noise=0.0)
    x = randn(66, IN).to(dtype)
    x[0] = 1.0
    with torch.no_grad():
        layer.router[:, 0] = 1 + 1e-4 * torch.arange(K)  # all round to 1 in bf16
    with torch.autocast("cpu", torch.bfloat16):
        gradients_of(layer.train(), x, 1.0)
    assert touched_experts(layer) == {K - 1}


# Regrouping


@pytest.mark.parametrize("seed", range(3))
def test_regroup_under_token_routing_moves_only_the_index(seed):
    """Section 4, C.1: a permutation of ownership; parameters and their sum bit-identical."""
    layer = trained(linear(67, bias=False), seed, rank=4, alpha=8)
    g, truth = crossing_gradients(layer, seed)
    before, current = snapshot(layer), layer.expert_of.clone()
    objects = [layer.lora_A, layer.lora_B, layer.router]
    total = layer.lora_B.detach() @ layer.lora_A.detach()
    report = regroup(layer, g)
    assert not report["skipped"] and changed(layer, before) == {"expert_of"}
    assert all(a is b for a, b in zip(objects, (layer.lora_A, layer.lora_B, layer.router),
                                      strict=True))
    assert layer.expert_of.dtype == torch.int64
    assert sorted(layer.expert_of.tolist()) == [i // 4 for i in range(16)]
    assert torch.equal(layer.expert_of[:, None] == layer.expert_of, truth[:, None] == truth)
    assert torch.equal(layer.expert_of, group_components(g, K, current=current))
    assert torch.equal(layer.lora_B.detach() @ layer.lora_A.detach(), total)


@pytest.mark.parametrize("routing", ["token", "static"])
def test_regroup_reports_what_it_did(routing):
    """Section 4, log: angles, Eq. 10 before and after, components moved, rounds used."""
    layer = trained(linear(68), 69, rank=4, routing=routing)
    g, _ = crossing_gradients(layer)
    unit, old = g / g.norm(dim=1, keepdim=True), layer.expert_of.clone()
    report = regroup(layer, g)
    for when, labels in (("before", old), ("after", layer.expert_of)):
        C = torch.stack([unit[labels == k].sum(0) for k in range(K)])
        assert float(report["objective_" + when]) == pytest.approx(float((C**2).sum()), rel=1e-6)
        pairs = list(itertools.combinations(range(K), 2))
        cosines = torch.stack([C[k] @ C[j] / (C[k].norm() * C[j].norm()) for k, j in pairs])
        inter = float(cosines.arccos().rad2deg().mean())
        cosines = torch.stack([unit[i] @ unit[j] for i, j in itertools.combinations(range(16), 2)
                               if labels[i] == labels[j]])
        intra = float(cosines.arccos().rad2deg().mean())
        assert float(report["inter_" + when]) == pytest.approx(inter, abs=1e-3)
        assert float(report["intra_" + when]) == pytest.approx(intra, abs=1e-3)
    assert report["moved"] == int((old != layer.expert_of).sum()) == 12
    assert 0 <= report["rounds"] <= 10 and not report["skipped"]
    assert report["objective_after"] > report["objective_before"]
    assert report["intra_after"] < report["intra_before"]
    again = regroup(layer, g)
    assert again["moved"] == 0
    assert float(again["objective_before"]) == pytest.approx(float(report["objective_after"]))


@pytest.mark.parametrize("routing", ["token", "static"])
def test_regroup_with_the_layers_own_gradients(routing):
    """Eq. 8 to 14 on real gradients: a balanced grouping, output unchanged where alpha = 1."""
    base, x = linear(70), randn(71, 32, IN)
    layer = fresh(base, rank=4, routing=routing, top_k=4)
    gradients_of(layer.train(), x, randn(72, 32, OUT))
    g = component_gradients(layer.lora_A.grad, layer.lora_B.grad)
    report = regroup(layer, g)
    assert sorted(layer.expert_of.tolist()) == [i // 4 for i in range(16)]
    assert report["moved"] > 0
    assert_close(layer.eval()(x), base(x))


@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, 1, -1), (-1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_static_regroup_keeps_the_output(signs, dtype):
    """C.3: b_i by sign(rho) sqrt|rho| and a_i by sqrt|rho| keep the output to 1e-5."""
    layer = trained(linear(73, dtype=dtype), 74, rank=4, routing="static")
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.5, 2.0, 1.3, 0.8]) * torch.tensor(signs))
    g, truth = crossing_gradients(layer)
    x = randn(75, 40, IN).to(dtype)
    before, objects, y = snapshot(layer), (layer.lora_A, layer.lora_B, layer.alpha), layer(x)
    report = regroup(layer, g)
    assert not report["skipped"] and report["moved"] == 12
    assert changed(layer, before) == {"expert_of", "lora_A", "lora_B"}
    assert all(a is b for a, b in zip(objects, (layer.lora_A, layer.lora_B, layer.alpha),
                                      strict=True))
    assert sorted(layer.expert_of.tolist()) == [i // 4 for i in range(16)]
    assert torch.equal(layer.expert_of[:, None] == layer.expert_of, truth[:, None] == truth)
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()
    for i in range(16):
        rho = before["alpha"][before["expert_of"][i]] / layer.alpha[layer.expert_of[i]].detach()
        assert_close(layer.lora_A[i].detach(), rho.abs().sqrt() * before["lora_A"][i])
        assert_close(layer.lora_B[:, i].detach(),
                     rho.sign() * rho.abs().sqrt() * before["lora_B"][:, i])


@pytest.mark.parametrize("alpha", [
    [1.0, 1.0, 0.05, 1.0], [1.0, -20.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.5, 2.0, 1.0, 0.01]])
def test_static_regroup_is_skipped_at_extreme_ratios(alpha):
    """Section 4: |rho| outside [0.1, 10] or alpha_q = 0 skips the whole layer, bit for bit."""
    layer = trained(linear(76), 77, rank=4, routing="static")
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor(alpha))
    before = snapshot(layer)
    report = regroup(layer, crossing_gradients(layer)[0])
    assert report["skipped"] and changed(layer, before) == set()


@pytest.mark.parametrize("alpha", [[0.01, 0.01, 0.012, 0.02], [1.0, 5.0, -2.0, 9.0]])
def test_static_regroup_is_not_skipped_within_the_range(alpha):
    """Section 4: the ratio counts, not the size of alpha."""
    layer, x = trained(linear(78), 79, rank=4, routing="static"), randn(80, 20, IN)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor(alpha))
    y = layer(x)
    report = regroup(layer, crossing_gradients(layer)[0])
    assert not report["skipped"] and report["moved"] == 12
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("routing", ["token", "static"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_regroup_is_skipped_on_a_non_finite_gradient(routing, bad):
    """Eq. 9: the layer's regrouping is skipped and said so; nothing changes."""
    layer = trained(linear(81), 82, rank=4, routing=routing)
    g, _ = crossing_gradients(layer)
    g[5, 7] = bad
    before = snapshot(layer)
    assert regroup(layer, g)["skipped"] and changed(layer, before) == set()


def test_training_moves_only_what_trains():
    """Rule 21: after optimizer steps and a regrouping the frozen tensors are byte-equal."""
    layer = fresh(linear(83, dtype=torch.float32), rank=4, top_k=2, dropout=0.05).train()
    before, x = snapshot(layer), randn(84, 32, IN).float()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(85)
    for step in range(4):
        gradients_of(layer, x, randn(86 + step, 32, OUT).float())
        optimizer.step()
        regroup(layer, component_gradients(layer.lora_A.grad, layer.lora_B.grad))
    assert changed(layer, before) == {"lora_A", "lora_B", "router", "expert_of"}
