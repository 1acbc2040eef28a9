"""BaditLinear against a loop over tokens, experts and components, and what it must never do."""

import itertools

import pytest
import torch
from tiny import randn
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import data
from badit import Badit, BaditLinear, StaticLinear
from decomposition import decompose
from energy import EnergyLinear
from grouping import component_gradients, group_components
from method import Stage
from registry import BaditSettings
from regrouping import Regrouper

IN, OUT, K, R = 20, 24, 4, 3
TOKEN_CASES = [dict(top_k=top_k, inactive=inactive) for top_k in (1, 2, 3, 4)
               for inactive in ("keep", "drop", "initial")]


def linear(seed=0, n=IN, m=OUT, bias=True, dtype=torch.float64):
    """A base layer with fixed weights."""
    torch.manual_seed(seed)
    return nn.Linear(n, m, bias=bias).to(dtype)


def fresh(base, num_experts=K, rank=R, alpha=6, dropout=0.0, top_k=2, routing="token",
          inactive="keep", router_noise=None, svd="exact"):
    """A layer at init; s = alpha / rank = 2 by default."""
    bank = (base, num_experts, rank, alpha, dropout)
    if routing == "static":
        return StaticLinear(*bank, svd)
    if routing == "energy":
        return EnergyLinear(*bank, top_k, svd)
    return BaditLinear(*bank, top_k, inactive, router_noise, svd)


@torch.no_grad()
def trained(base, seed=0, regrouped=True, **options):
    """A layer away from init: moved bank, non-zero router or alpha in 0.5..2, mixed grouping."""
    layer = fresh(base, **options)
    N = layer.lora_A.shape[0]
    layer.lora_A.add_(0.3 * randn(seed + 1, *layer.lora_A.shape))
    layer.lora_B.add_(0.3 * randn(seed + 2, *layer.lora_B.shape))
    if options.get("routing") == "static":
        layer.alpha.copy_(0.5 + 1.5 * randn(seed + 3, len(layer.alpha)).sigmoid())
    elif options.get("routing") == "energy":
        layer.mean_energy.copy_(randn(seed + 3, N).exp())
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
    """The top_k experts by logit, the lowest index on ties."""
    return sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[:top_k]


def energy_output(x, residual, bias, A, B, initial, mean, expert_of, s, top_k):
    """The formula of energy routing for one token: no gate, the others act as pre-trained."""
    A0, B0 = initial
    y = residual @ x + (0 if bias is None else bias)
    size = [float((A0[i] @ x.detach()) ** 2 * (B0[:, i] @ B0[:, i])) for i in range(len(A0))]
    energies = [sum(size[i] for i, k in enumerate(expert_of.tolist()) if k == expert)
                / sum(float(mean[i]) for i, k in enumerate(expert_of.tolist()) if k == expert)
                for expert in range(K)]
    chosen = selected(energies, top_k)
    for i, k in enumerate(expert_of.tolist()):
        a, b = (A[i], B[:, i]) if k in chosen else (A0[i], B0[:, i])
        y = y + s * b * (a @ x)
    return y


def token_output(x, residual, bias, A, B, initial, gates, expert_of, s, top_k, inactive, static):
    """The formula for one token, expert by expert and component by component."""
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
        elif inactive == "initial":
            y = y + s * initial[1][:, i] * (initial[0][i] @ x)
    return y


def naive(layer, bias, x, top_k, inactive="keep", s=2.0):
    """Outputs and float64 leaves (x, lora_A, lora_B, gate) of the loop over tokens."""
    name, gates = gate(layer)
    leaves = [t.detach().double().clone().requires_grad_()
              for t in (x, layer.lora_A, layer.lora_B, gates)]
    x64, A, B, gates64 = leaves
    initial = layer.lora_A0.detach().double(), layer.lora_B0.detach().double()
    rows = [token_output(t, layer.residual.detach().double(), bias, A, B, initial, gates64,
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
    """Experts any of whose components has a non-zero gradient; it has one in A and in B."""
    in_A, in_B = layer.lora_A.grad.any(1), layer.lora_B.grad.any(0)
    assert torch.equal(in_A, in_B)
    return set(layer.expert_of[in_A].tolist())


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


def health(layer, x):
    """What is logged of the router of a layer for tokens x (tokens, in)."""
    name, gates = gate(layer)
    z = x @ gates.detach().T if name == "router" else gates.detach().log().expand(len(x), K)
    alpha = z.exp() if name == "alpha" else K * z.exp() / z.exp().sum(1, keepdim=True)
    chosen = layer.top_k if name == "router" else K
    share = torch.zeros_like(z).scatter(1, z.topk(chosen, dim=1).indices, 1.0)
    p = alpha / alpha.sum(1, keepdim=True)
    return dict(expert_share=share.mean(0).tolist(), alpha_mean=alpha.mean(0).tolist(),
                alpha_max=float(alpha.max()), alpha_entropy=-float((p * p.log()).sum(1).mean()))


def regroup(layer, gradients):
    """DOG on one layer, from gradients (N, in + out) -> its line of regroup.jsonl."""
    regrouper = Regrouper({"layer": layer}, 1, "dog", 1)
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
    """Shapes, what trains, what is frozen, contiguous first grouping."""
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
    assert fresh(linear(), alpha=7).scaling == 7 / 3
    assert dict(layer.named_buffers())["expert_of"].dtype == torch.int64
    assert layer.expert_of.tolist() == [i // R for i in range(N)]
    assert "expert_of" in layer.state_dict()


def test_the_initial_bank_is_a_frozen_copy():
    """residual = W0 - s B0 A0 still holds after lora_A and lora_B have moved."""
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
    """N > min(m, n), and top_k > K, are errors that name the values."""
    with pytest.raises(ValueError, match=named):
        fresh(linear(), **options)


# The output at init


@pytest.mark.parametrize(("dtype", "tolerance"),
                         [(torch.float32, 1e-4), (torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("routing", "top_k"),
                         [("token", 1), ("token", 2), ("token", 4), ("static", 4), ("energy", 1),
                          ("energy", 3), ("energy", 4)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_output_at_init_is_the_base_layers(dtype, tolerance, routing, top_k, training, bias):
    """alpha = 1 at init, so the model starts as the pre-trained model."""
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
    """The literal reading changes the model at init; that is why keep is the default."""
    base, x = linear(4), randn(5, 6, IN)
    assert (fresh(base, inactive="drop").eval()(x) - base(x)).abs().max() > 0.1
    default = BaditLinear(base, num_experts=4, rank=3, top_k=2)
    assert_close(default.eval()(x), base(x))


# The formula, Eq. 7, against the loop


@pytest.mark.parametrize("options", [*TOKEN_CASES, dict(routing="static")])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_formula(options, bias):
    """Outputs and all gradients equal the loop's with its explicit detach."""
    base = linear(6, bias=bias)
    layer = trained(base, 7, router_noise=0.0, **options)
    x, weights = randn(8, 2, 4, IN), randn(9, 2, 4, OUT)
    expected, leaves = naive(layer, bias_of(base), x, options.get("top_k", K),
                             options.get("inactive", "keep"))
    (expected * weights).sum().backward()
    y, gradients = gradients_of(layer.train(), x, weights)
    assert_close(y, expected.detach())
    for got, leaf in zip(gradients, leaves, strict=True):
        assert_close(got, leaf.grad)
    assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_routed_by_energy_is_its_formula(top_k, bias):
    """Outputs and gradients equal the loop's; exactly none for what a token does not select."""
    base = linear(6, bias=bias)
    layer = trained(base, 7, routing="energy", top_k=top_k)
    assert {name for name, weight in layer.named_parameters() if weight.requires_grad} == {
        "lora_A", "lora_B"}
    x, weights = randn(8, 2, 4, IN), randn(9, 2, 4, OUT)
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    rows = [energy_output(t, layer.residual.detach(), bias_of(base), *leaves[1:],
                          (layer.lora_A0.detach(), layer.lora_B0.detach()), layer.mean_energy,
                          layer.expert_of, 2.0, top_k) for t in leaves[0].reshape(-1, IN)]
    expected = torch.stack(rows).reshape(2, 4, OUT)
    (expected * weights).sum().backward()
    mine = x.clone().requires_grad_()
    y = layer.train()(mine)
    (y * weights).sum().backward()
    assert_close(y, expected.detach())
    for got, leaf in zip((mine, layer.lora_A, layer.lora_B), leaves, strict=True):
        assert_close(got.grad, leaf.grad)
    assert_close(layer.eval()(x), expected.detach())
    layer.zero_grad()
    (layer(x[0, 0]) * weights[0, 0]).sum().backward()
    assert len(touched_experts(layer)) == top_k


@pytest.mark.parametrize("options", [dict(routing="energy"), dict(inactive="initial")])
def test_what_is_learnt_acts_on_no_other_token(options):
    """A token whose experts have learnt nothing is treated as the base treats it."""
    base = linear(30)
    layer = fresh(base, **options).eval()
    if "inactive" in options:
        with torch.no_grad():  # the smallest router that tells tokens apart
            layer.router.copy_(1e-9 * randn(31, K, IN))
    x = randn(32, 64, IN)
    active = layer.route(x).active  # (tokens, K)
    with torch.no_grad():
        layer.lora_B[:, layer.expert_of == 0] += 1
        layer.lora_A[layer.expert_of == 0] *= 2
    moved = ~torch.isclose(layer(x), base(x), atol=1e-6).all(1)
    assert torch.equal(moved, active[:, 0]) and moved.any() and not moved.all()


def test_energies_follow_a_regrouping():
    """They are kept by component: who owns one does not change what it is relative to."""
    layer = trained(linear(33), 34, routing="energy", regrouped=False)
    x, grouping = randn(35, 9, IN), layer.expert_of[torch.randperm(K * R)]
    then = layer.route(x, grouping).active
    layer.take_grouping(grouping)
    assert torch.equal(layer.route(x).active, then)


@pytest.mark.parametrize("options", [{}, dict(inactive="drop"), dict(inactive="initial"),
                                     dict(routing="static"), dict(routing="energy")])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 2, 2), (0,), (2, 0)])
def test_tokens_are_independent(options, lead):
    """One token, a batch, sequences, or none at all: each is treated as if alone."""
    layer = trained(linear(14), 15, **options).eval()
    x = randn(16, *lead, IN)
    y = layer(x)
    assert y.shape == (*lead, OUT)
    rows = [layer(row) for row in x.reshape(-1, IN)]
    assert_close(y.reshape(-1, OUT), torch.stack(rows) if rows else y.reshape(-1, OUT))


@pytest.mark.parametrize(("routing", "inactive", "top_k", "leaves"), [
    ("token", "keep", 2, ["x", "router"]),  # stopgrad: a numeric gradient of the bank differs
    ("token", "keep", 3, ["x", "lora_A", "lora_B", "router"]),
    ("token", "drop", 2, ["x", "lora_A", "lora_B", "router"]),
    ("token", "initial", 2, ["x", "lora_A", "lora_B", "router"]),
    ("energy", "keep", 2, ["x", "lora_A", "lora_B"]),
    ("static", "keep", 3, ["x", "lora_A", "lora_B", "alpha"]),
])
def test_gradcheck(routing, inactive, top_k, leaves):
    """Analytic gradients equal numeric ones, in float64 and far from ties."""
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
@pytest.mark.parametrize("inactive", ["keep", "drop", "initial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unselected_experts_get_exactly_no_gradient(top_k, inactive, dtype):
    """Zero in lora_A and lora_B from a token that does not select them."""
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
    """Without noise ties would always pick the same experts."""
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
    """Two forwards agree, under any seed, and equal the clean formula."""
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
    """A training output is the formula with clean alpha and some top_k experts."""
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
    """std 1/K by default; K = 2 and a gap of 0.5 pick the loser that often."""
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
    """Recomputation under activation checkpointing gives the same gradients."""
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
    """Equal experts see equal inputs; the kept entries are scaled by 1 / (1 - p)."""
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
    """Residual and router read x; the experts read u = dropout(x)."""
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


# Precision


@pytest.mark.parametrize("routing", ["token", "static"])
def test_bf16_base_keeps_a_float32_adapter(routing):
    """Residual in the base's dtype, adapter and gate fp32, output bf16."""
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
    """Under bf16 autocast the dtype is the base layer's, gradients stay fp32."""
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
    """Logits that differ by less than bf16 resolves still choose the larger."""
    layer = fresh(linear(65, dtype=dtype), top_k=1, router_noise=0.0)
    x = randn(66, IN).to(dtype)
    x[0] = 1.0
    with torch.no_grad():
        layer.router[:, 0] = 1 + 1e-4 * torch.arange(K)  # all round to 1 in bf16
    with torch.autocast("cpu", torch.bfloat16):
        gradients_of(layer.train(), x, 1.0)
    assert touched_experts(layer) == {K - 1}


# Regrouping


def assert_regrouped(layer, before, line, truth, moved):
    """A balanced grouping by the planted directions, in place; other tensors keep their bits."""
    assert line["skipped"] is None and line["moved"] == 12
    assert changed(layer, before) == {"expert_of", *moved}
    assert layer.expert_of.dtype == torch.int64
    assert sorted(layer.expert_of.tolist()) == [i // 4 for i in range(16)]
    assert torch.equal(layer.expert_of[:, None] == layer.expert_of, truth[:, None] == truth)


@pytest.mark.parametrize("seed", range(3))
def test_regrouping_under_token_routing_moves_only_the_index(seed):
    """A permutation of ownership; parameters and their sum are bit-identical."""
    layer = trained(linear(67, bias=False), seed, rank=4, alpha=8)
    g, truth = crossing_gradients(layer, seed)
    before, objects = snapshot(layer), (layer.lora_A, layer.lora_B, layer.router)
    total = layer.lora_B.detach() @ layer.lora_A.detach()
    new = group_components(g, K, current=layer.expert_of)
    assert_regrouped(layer, before, regroup(layer, g), truth, ())
    assert all(a is b for a, b in zip(objects, (layer.lora_A, layer.lora_B, layer.router),
                                      strict=True))
    assert torch.equal(layer.expert_of, new)
    assert torch.equal(layer.lora_B.detach() @ layer.lora_A.detach(), total)


@pytest.mark.parametrize("routing", ["token", "static"])
def test_a_regrouping_logs_what_it_did(routing):
    """Angles, Eq. 10 before and after, components moved, rounds used."""
    layer = trained(linear(68), 69, rank=4, routing=routing)
    g, _ = crossing_gradients(layer)
    unit, old = g / g.norm(dim=1, keepdim=True), layer.expert_of.clone()
    line = regroup(layer, g)
    for when, labels in (("before", old), ("after", layer.expert_of)):
        C = torch.stack([unit[labels == k].sum(0) for k in range(K)])
        assert line["objective_" + when] == pytest.approx(float((C**2).sum()), rel=1e-6)
        cosines = torch.stack([C[k] @ C[j] / (C[k].norm() * C[j].norm())
                               for k, j in itertools.combinations(range(K), 2)])
        inter = float(cosines.arccos().rad2deg().mean())
        cosines = torch.stack([unit[i] @ unit[j] for i, j in itertools.combinations(range(16), 2)
                               if labels[i] == labels[j]])
        intra = float(cosines.arccos().rad2deg().mean())
        assert line["inter_" + when] == pytest.approx(inter, abs=1e-3)
        assert line["intra_" + when] == pytest.approx(intra, abs=1e-3)
    assert line["moved"] == int((old != layer.expert_of).sum()) == 12
    assert 0 <= line["rounds"] <= 10 and line["skipped"] is None
    assert line["objective_after"] > line["objective_before"]
    assert line["intra_after"] < line["intra_before"]
    again = regroup(layer, g)
    assert again["moved"] == 0
    assert again["objective_before"] == pytest.approx(line["objective_after"])


@pytest.mark.parametrize("routing", ["token", "static"])
def test_what_is_measured(routing):
    """The change of the layer's output, and the router's health, by loops over real tokens."""
    layer = trained(linear(87), 88, rank=4, routing=routing, dropout=0.5)
    g, _ = crossing_gradients(layer)
    x = Lookup(layer).table[[1, 2, 3, 4]]
    before, y, expected = snapshot(layer), layer.eval()(x), health(layer, x)
    line = regroup(layer.train(), g)
    assert layer.training
    with torch.no_grad():
        drift = float((layer.eval()(x) - y).norm() / y.norm())
    assert line["regroup_drift"] == pytest.approx(drift, abs=1e-6)
    assert {key: line[key] for key in expected} == {
        key: pytest.approx(value, rel=1e-5) for key, value in expected.items()}
    norms = [float(g[before["expert_of"] == k].norm()) for k in range(K)]
    assert line["gradient_norm"] == pytest.approx(norms)


def test_a_bf16_layer_is_measured_in_float32():
    """In bf16 the change that a regrouping makes would be rounded away in part."""
    layer = trained(linear(87, dtype=torch.bfloat16), 88, rank=4)
    g, _ = crossing_gradients(layer)
    x = Lookup(layer).table[[1, 2, 3, 4]]
    with torch.no_grad():
        y = layer.eval()(x).float()
        now = layer.add_bank(torch.zeros_like(y), x)
        line = regroup(layer, g)
        drift = float((layer.add_bank(torch.zeros_like(y), x) - now).norm() / y.norm())
    assert line["moved"] > 0 and line["regroup_drift"] == pytest.approx(drift, rel=1e-5)


def test_static_routing_reads_no_top_k():
    """All experts act, so fewer of them than the default top_k make a layer as well."""
    for settings in (BaditSettings(routing="static", num_experts=2),
                     BaditSettings(routing="static", num_experts=2, top_k=2)):
        layer = Badit(settings).build_layer(linear(92), fresh=True)
        assert isinstance(layer, StaticLinear) and layer.top_k == 2


@pytest.mark.parametrize("routing", ["token", "static"])
def test_measuring_changes_nothing(routing):
    """What a layer is after a regrouping, and what is drawn next, is as without a measurement."""
    layers = [trained(linear(89), 90, rank=4, routing=routing, dropout=0.5) for _ in range(2)]
    g, _ = crossing_gradients(layers[0])
    torch.manual_seed(91)
    state = torch.get_rng_state()
    regroup(layers[0].train(), g)
    assert torch.equal(torch.get_rng_state(), state)
    layers[1].take_grouping(group_components(g, K, current=layers[1].expert_of))
    assert changed(layers[0], snapshot(layers[1])) == set()
    assert all(weight.grad is None for weight in layers[0].parameters())


@pytest.mark.parametrize("routing", ["token", "static"])
def test_regrouping_with_the_layers_own_gradients(routing):
    """Eq. 8 to 14 on real gradients: a balanced grouping, output unchanged where alpha = 1."""
    base, x = linear(70), randn(71, 32, IN)
    layer = fresh(base, rank=4, routing=routing, top_k=4)
    gradients_of(layer.train(), x, randn(72, 32, OUT))
    g = component_gradients(layer.lora_A.grad, layer.lora_B.grad)
    line = regroup(layer, g)
    assert sorted(layer.expert_of.tolist()) == [i // 4 for i in range(16)]
    assert line["moved"] > 0
    assert_close(layer.eval()(x), base(x))


@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, 1, -1), (-1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_static_regrouping_keeps_the_output(signs, dtype):
    """b_i by sign(rho) sqrt|rho| and a_i by sqrt|rho| keep the output to 1e-5."""
    layer = trained(linear(73, dtype=dtype), 74, rank=4, routing="static")
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.5, 2.0, 1.3, 0.8]) * torch.tensor(signs))
    g, truth = crossing_gradients(layer)
    x = randn(75, 40, IN).to(dtype)
    before, objects, y = snapshot(layer), (layer.lora_A, layer.lora_B, layer.alpha), layer(x)
    assert_regrouped(layer, before, regroup(layer, g), truth, ("lora_A", "lora_B"))
    assert all(a is b for a, b in zip(objects, (layer.lora_A, layer.lora_B, layer.alpha),
                                      strict=True))
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()
    for i in range(16):
        rho = before["alpha"][before["expert_of"][i]] / layer.alpha[layer.expert_of[i]].detach()
        assert_close(layer.lora_A[i].detach(), rho.abs().sqrt() * before["lora_A"][i])
        assert_close(layer.lora_B[:, i].detach(),
                     rho.sign() * rho.abs().sqrt() * before["lora_B"][:, i])


@pytest.mark.parametrize(("alpha", "skipped"), [
    ([1.0, 1.0, 0.05, 1.0], True), ([1.0, -20.0, 1.0, 1.0], True), ([0.0, 1.0, 1.0, 1.0], True),
    ([0.5, 2.0, 1.0, 0.01], True), ([0.01, 0.01, 0.012, 0.02], False),
    ([1.0, 5.0, -2.0, 9.0], False)])
def test_static_regrouping_is_skipped_at_extreme_ratios(alpha, skipped):
    """|rho| outside [0.1, 10] or alpha_q = 0 skips the layer, bit for bit; its size is nothing."""
    layer, x = trained(linear(76), 77, rank=4, routing="static"), randn(80, 20, IN)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor(alpha))
    before, y = snapshot(layer), layer(x)
    line = regroup(layer, crossing_gradients(layer)[0])
    assert (changed(layer, before) == set()) == skipped == bool(line["skipped"])
    assert line["moved"] == (0 if skipped else 12)
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()


# What a grouping can change


def mean_gradient(layer, grouping, x, weights, draws=4000):
    """The bank's gradient under a grouping, mean over draws of the selection noise."""
    layer.take_grouping(grouping)
    layer.zero_grad()
    (layer(x.expand(draws, *x.shape)) * weights).sum().backward()
    return torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()]) / draws


@pytest.mark.parametrize("routing", ["token", "energy"])
def test_a_grouping_changes_the_mean_gradient_under_energy_alone(routing):
    """While alpha is 1 and noise selects, each component learns from k / K of the tokens.

    So two groupings have one expected gradient by token, whatever they group.
    """
    base, x, weights = linear(93, 16, 12), randn(94, 40, 16), randn(95, 40, 12)
    layer = fresh(base, 4, 2, routing=routing).train()
    first, other = layer.expert_of.clone(), torch.tensor([0, 1, 2, 3, 1, 0, 3, 2])
    one, again, two = (mean_gradient(layer, grouping, x, weights)
                       for grouping in (first, first, other))
    error, difference = (one - again).norm() / one.norm(), (one - two).norm() / one.norm()
    assert error < 0.05  # Monte Carlo
    assert difference < 2 * error if routing == "token" else difference > 0.2
