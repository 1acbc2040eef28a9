"""Check BADIT's layers and their regrouping against loops over tokens and components."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import IN, OUT, linear, randn, weights_of
from torch import nn
from torch.testing import assert_close

import data
from badit import Badit, BaditLinear, StaticLinear
from decomposition import decompose
from energy import EnergyLinear
from grouping import gradient_angles, group_components, grouping_objective
from method import Stage
from registry import BaditSettings
from regrouping import Regrouper

K, R = 4, 3
CASES = [dict(routing="static"), *(dict(routing="energy", top_k=top_k) for top_k in (1, 2, 4)),
         *(dict(top_k=top_k, inactive=inactive) for top_k in (1, 2, 3, 4)
           for inactive in ("keep", "drop", "initial"))]


def fresh(base, num_experts=K, rank=R, alpha=6, dropout=0.0, top_k=2, routing="token",
          inactive="keep", router_noise=None, svd="exact"):
    """Return a layer at its start; s = alpha / rank = 2 by default."""
    bank = (base, num_experts, rank, alpha, dropout)
    if routing == "static":
        return StaticLinear(*bank, svd)
    if routing == "energy":
        return EnergyLinear(*bank, top_k, svd)
    return BaditLinear(*bank, top_k, inactive, router_noise, svd)


@torch.no_grad()
def trained(base, seed=0, regrouped=True, **options):
    """Return a layer with a moved bank, router or alpha, and by default a mixed grouping."""
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


def trained_weights(layer):
    """Return lora_A, lora_B and, where the layer has one, router or alpha."""
    return [weight for weight in layer.parameters() if weight.requires_grad]


def choose(layer, x, gates=None):
    """Return the experts that one token x selects, and alpha (K,), by the formulas."""
    if isinstance(layer, StaticLinear):
        return list(range(K)), gates
    if isinstance(layer, EnergyLinear):
        A0, B0 = layer.lora_A0.detach(), layer.lora_B0.detach()
        size, mean = torch.zeros(2, K, dtype=torch.float64)
        for i, k in enumerate(layer.expert_of.tolist()):
            size[k] += float((A0[i] @ x.detach()) ** 2 * (B0[:, i] @ B0[:, i]))
            mean[k] += float(layer.mean_energy[i])
        scores, alpha = size / mean, torch.ones(K)
    else:
        scores = torch.stack([x @ row for row in gates])
        alpha = K * scores.exp() / scores.exp().sum()
    return sorted(range(K), key=scores.tolist().__getitem__, reverse=True)[:layer.top_k], alpha


def naive(layer, x, mask=None):
    """Compute outputs by loops; return them and float64 leaves: x and the trained weights.

    `mask` holds dropout's factors for the entries of x.
    """
    leaves = [t.detach().double().clone().requires_grad_() for t in (x, *trained_weights(layer))]
    tokens, A, B, *gates = leaves
    W, A0, B0 = (t.detach().double() for t in (layer.residual, layer.lora_A0, layer.lora_B0))
    masks = torch.ones_like(tokens) if mask is None else mask
    rows, s = [], layer.scaling
    for t, m in zip(tokens.reshape(-1, IN), masks.reshape(-1, IN), strict=True):
        y = W @ t + (0 if layer.bias is None else layer.bias.detach().double())
        chosen, alpha = choose(layer, t, *gates)
        for i, k in enumerate(layer.expert_of.tolist()):
            if k in chosen:
                y = y + s * alpha[k] * B[:, i] * (A[i] @ (m * t))
            elif layer.inactive == "keep":
                y = y + s * B[:, i].detach() * (A[i].detach() @ (m * t))
            elif layer.inactive == "initial":
                y = y + s * B0[:, i] * (A0[i] @ t)
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], OUT), leaves


def gradients_of(layer, x, weights):
    """Return y and the gradients of sum(weights * y) for x and the trained weights."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weights).sum().backward()
    return y.detach(), [x.grad, *(weight.grad for weight in trained_weights(layer))]


def touched_experts(layer):
    """Return the experts with a non-zero gradient, which must be in both A and B."""
    in_A, in_B = layer.lora_A.grad.any(1), layer.lora_B.grad.any(0)
    assert torch.equal(in_A, in_B)
    return set(layer.expert_of[in_A].tolist())


def crossing_gradients(layer, seed=0):
    """Plant groups with one component of every expert each (K = r = 4): (gradients, truth)."""
    N, D = layer.lora_A.shape[0], layer.lora_A.shape[1] + layer.lora_B.shape[0]
    directions = torch.linalg.qr(randn(seed, D, 4)).Q.T
    truth = torch.zeros(N, dtype=torch.int64)
    for k in range(4):
        truth[layer.expert_of == k] = torch.arange(4)
    noisy = directions[truth] + 0.3 * randn(seed + 1, N, D) / D**0.5
    return (noisy * randn(seed + 2, N, 1).exp()).to(layer.lora_A.dtype), truth


class Lookup(nn.Module):
    """A minimal model to measure: one layer on a table of tokens."""

    def __init__(self, layer):
        super().__init__()
        self.table = randn(7, 5, layer.lora_A.shape[1]).to(layer.residual.dtype)
        self.layer = layer

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, use_cache):
        return self.layer(self.table[input_ids])


def health(layer, x):
    """Compute what is logged of a layer's router for tokens x (tokens, in)."""
    *_, gates = (weight.detach() for weight in trained_weights(layer))
    chosen, alpha = zip(*(choose(layer, token, gates) for token in x), strict=True)
    alpha = torch.stack(alpha)  # (tokens, K)
    share = [sum(k in experts for experts in chosen) / len(x) for k in range(K)]
    p = alpha / alpha.sum(1, keepdim=True)
    return dict(expert_share=share, alpha_mean=alpha.mean(0).tolist(),
                alpha_max=float(alpha.max()), alpha_entropy=-float((p * p.log()).sum(1).mean()))


def regroup(layer, gradients):
    """Regroup one layer by DOG from gradients (N, in + out); return its line of regroup.jsonl."""
    regrouper = Regrouper({"layer": layer}, 1, "dog", 1)
    regrouper.start(Stage("task", ("task",), 1, 2))
    columns = layer.lora_A.shape[1]
    regrouper.sums = {"layer": (gradients[:, :columns], gradients[:, columns:].T)}
    regrouper.count = 1
    model = Lookup(layer).train(layer.training)
    (line,) = regrouper.regroup(model, data.pad_left([[1, 2, 3], [4]], 0), "dog")
    return line


def changed(layer, before):
    """Return the names of parameters and buffers that are no longer bit-identical."""
    return {name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])}


# Construction


def test_a_bank_starts_as_the_leading_components():
    """Expert k owns components r k to r k + r - 1; lora_A0 and lora_B0 are frozen copies."""
    weight = linear(1).weight.detach()
    layer, bad = fresh(linear(1), alpha=7), decompose(weight, K, R, 7 / R)
    with torch.no_grad():
        layer.lora_A.mul_(3)
        layer.lora_B.add_(1)
    assert layer.expert_of.tolist() == [i // R for i in range(K * R)]
    assert_close(layer.lora_A0.detach(), bad.lora_A)
    assert_close(layer.lora_B0.detach(), bad.lora_B)
    assert_close(layer.residual.detach(), bad.residual)


@pytest.mark.parametrize(("options", "named"), [
    (dict(num_experts=7, rank=3), "(?s)(?=.*20)((?=.*21)|(?=.*7)(?=.*3))"),
    (dict(top_k=5), "(?s)(?=.*5)(?=.*4)"),
])
def test_impossible_sizes_are_refused(options, named):
    """N > min(m, n), and top_k > K, are errors that name the values."""
    with pytest.raises(ValueError, match=named):
        fresh(linear(), **options)


# The formula, Eq. 7, against the loop


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_formula(options, bias):
    """Outputs and gradients equal the loop's, with one dropout mask on the bank's input.

    Experts that a token does not select get no gradient at all. Evaluation has no dropout and no
    noise.
    """
    layer = trained(linear(6, bias=bias), 7, dropout=0.4, router_noise=0.0, **options).train()
    x, weights = randn(8, 2, 4, IN), randn(9, 2, 4, OUT)
    torch.manual_seed(10)
    mask = F.dropout(torch.ones_like(x), 0.4)
    expected, leaves = naive(layer, x, mask)
    (expected * weights).sum().backward()
    torch.manual_seed(10)
    y, gradients = gradients_of(layer, x, weights)
    assert_close(y, expected.detach())
    for got, leaf in zip(gradients, leaves, strict=True):
        assert_close(got, leaf.grad)
    chosen, _ = choose(layer, x[0, 0], *(w.detach() for w in trained_weights(layer)[2:]))
    gradients_of(layer, x[0, 0], weights[0, 0])
    assert touched_experts(layer) == set(chosen)
    layer.router_noise = 5.0
    assert_close(layer.eval()(x), naive(layer, x)[0])


@pytest.mark.parametrize("options", [{}, dict(inactive="initial"), dict(routing="static"),
                                     dict(routing="energy")])
def test_any_shape_of_tokens(options):
    """Also one token alone, and none."""
    layer = trained(linear(14), 15, **options).eval()
    for lead in ((), (2, 1, 2, 2), (0,), (2, 0)):
        x = randn(16, *lead, IN)
        assert_close(layer(x), naive(layer, x)[0] if x.numel() else torch.zeros(*lead, OUT).to(x))


# Selection noise and dropout


@pytest.mark.parametrize("inactive", ["keep", "drop"])
def test_noise_moves_the_selection_and_not_the_weights(inactive):
    """Outputs in training use noise-free alpha and any top_k experts."""
    base = linear(35)
    layer = trained(base, 36, inactive=inactive, router_noise=3.0).train()
    x = randn(37, IN)
    with torch.no_grad():
        z = layer.router.double() @ x
        alpha = K * z.exp() / z.exp().sum()
        part = torch.stack([2 * layer.lora_B[:, layer.expert_of == k]
                            @ (layer.lora_A[layer.expert_of == k] @ x) for k in range(K)])
        fixed = layer.residual @ x + base.bias
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
    """The default std is 1 / K; with K = 2 and a gap of 0.5 the loser is picked that often."""
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


# Precision


@pytest.mark.parametrize("routing", ["token", "static"])
def test_bf16_base_keeps_a_float32_adapter(routing):
    """Residual and output are bf16, adapter and router float32."""
    layer = trained(linear(59, dtype=torch.bfloat16), 60, routing=routing, router_noise=0.0)
    assert layer.residual.dtype == torch.bfloat16
    assert {weight.dtype for weight in trained_weights(layer)} == {torch.float32}
    x, weights = randn(61, 2, 4, IN).bfloat16(), randn(62, 2, 4, OUT).bfloat16()
    expected, leaves = naive(layer, x)
    (expected * weights).sum().backward()
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y, gradients = gradients_of(layer.train(), x, weights)
        assert y.dtype == gradients[0].dtype == torch.bfloat16
        assert (y - expected).abs().max() <= 3e-2 * expected.abs().max()
        assert all(g.dtype == torch.float32 for g in gradients[1:])
        for got, leaf in zip(gradients, leaves, strict=True):
            assert (got - leaf.grad).norm() <= 5e-2 * leaf.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_stay_out_of_autocast(dtype):
    """The larger logit is selected even if both are equal in bf16."""
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
    """Assert a balanced grouping by the planted directions, and that only `moved` has changed."""
    assert line["skipped"] is None and line["moved"] == 12
    assert changed(layer, before) == {"expert_of", *moved}
    assert layer.expert_of.dtype == torch.int64
    assert sorted(layer.expert_of.tolist()) == [i // 4 for i in range(16)]
    assert torch.equal(layer.expert_of[:, None] == layer.expert_of, truth[:, None] == truth)


def test_regrouping_under_token_routing_moves_only_the_index():
    """Parameters keep their bits; only expert_of changes."""
    layer = trained(linear(67, bias=False), rank=4, alpha=8)
    g, truth = crossing_gradients(layer)
    before, objects = weights_of(layer), trained_weights(layer)
    new = group_components(g, K, current=layer.expert_of)
    assert_regrouped(layer, before, regroup(layer, g), truth, ())
    assert all(a is b for a, b in zip(objects, trained_weights(layer), strict=True))
    assert torch.equal(layer.expert_of, new)


@pytest.mark.parametrize("routing", ["token", "static", "energy"])
def test_a_regrouping_logs_what_it_did(routing):
    """The line holds angles, Eq. 10, moves, the output's change and the router's health.

    To measure them changes nothing, neither random numbers nor gradients.
    """
    layer = trained(linear(68), 69, rank=4, routing=routing, dropout=0.5)
    g, _ = crossing_gradients(layer)
    unit, old = g / g.norm(dim=1, keepdim=True), layer.expert_of.clone()
    x = Lookup(layer).table[[1, 2, 3, 4]]
    y, expected = layer.eval()(x), health(layer, x)
    unmeasured, state = copy.deepcopy(layer), torch.get_rng_state()
    unmeasured.take_grouping(group_components(g, K, current=old))
    line = regroup(layer.train(), g)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed(layer, weights_of(unmeasured)) == set()
    assert all(weight.grad is None for weight in layer.parameters())
    assert layer.training and line["skipped"] is None and 0 <= line["rounds"] <= 10
    drift = float(((layer.eval()(x) - y).norm() / y.norm()).detach())
    expected |= {"regroup_drift": drift, "moved": int((old != layer.expert_of).sum()),
                 "gradient_norm": [float(g[old == k].norm()) for k in range(K)]}
    for when, labels in (("before", old), ("after", layer.expert_of)):
        inter, intra = gradient_angles(unit @ unit.T, labels, K)
        expected |= {f"inter_{when}": float(inter), f"intra_{when}": float(intra),
                     f"objective_{when}": float(grouping_objective(unit @ unit.T, labels, K))}
    assert {key: line[key] for key in expected} == {
        key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in expected.items()}
    assert line["moved"] == 12 and line["objective_after"] > line["objective_before"]
    assert regroup(layer, g)["moved"] == 0


def test_a_bf16_layer_is_measured_in_float32():
    """In bf16, part of the small change would be rounded away."""
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
    """All experts act, so num_experts may be below the default top_k."""
    layer = Badit(BaditSettings(routing="static", num_experts=2)).build_layer(linear(92), True)
    assert isinstance(layer, StaticLinear) and layer.top_k == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_static_regrouping_keeps_the_output(dtype):
    """Rescaling by sign(rho) sqrt|rho| and sqrt|rho| keeps the output to 1e-5."""
    layer = trained(linear(73, dtype=dtype), 74, rank=4, routing="static")
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.5, -2.0, 1.3, -0.8]))
    g, truth = crossing_gradients(layer)
    x = randn(75, 40, IN).to(dtype)
    before, objects, y = weights_of(layer), trained_weights(layer), layer(x)
    assert_regrouped(layer, before, regroup(layer, g), truth, ("lora_A", "lora_B"))
    assert all(a is b for a, b in zip(objects, trained_weights(layer), strict=True))
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
    """A layer is skipped for |rho| outside [0.1, 10] or alpha_q = 0, not for small alpha."""
    layer, x = trained(linear(76), 77, rank=4, routing="static"), randn(80, 20, IN)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor(alpha))
    before, y = weights_of(layer), layer(x)
    line = regroup(layer, crossing_gradients(layer)[0])
    assert (changed(layer, before) == set()) == skipped == bool(line["skipped"])
    assert line["moved"] == (0 if skipped else 12)
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()


# What a grouping can change


def mean_gradient(layer, grouping, x, weights, draws=4000):
    """Return the bank's gradient under a grouping, averaged over draws of the selection noise."""
    layer.take_grouping(grouping)
    layer.zero_grad()
    (layer(x.expand(draws, *x.shape)) * weights).sum().backward()
    return torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()]) / draws


@pytest.mark.parametrize("routing", ["token", "energy"])
def test_a_grouping_changes_the_mean_gradient_under_energy_alone(routing):
    """With alpha = 1, noise gives each component the gradient of top_k / K of the tokens.

    So under token routing all groupings have the same expected gradient.
    """
    base, x, weights = linear(93, 16, 12), randn(94, 40, 16), randn(95, 40, 12)
    layer = fresh(base, 4, 2, routing=routing).train()
    first, other = layer.expert_of.clone(), torch.tensor([0, 1, 2, 3, 1, 0, 3, 2])
    one, again, two = (mean_gradient(layer, grouping, x, weights)
                       for grouping in (first, first, other))
    error, difference = (one - again).norm() / one.norm(), (one - two).norm() / one.norm()
    assert error < 0.05  # Monte Carlo
    assert difference < 2 * error if routing == "token" else difference > 0.2
