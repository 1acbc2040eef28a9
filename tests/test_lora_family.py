"""LoRA, PiSSA and LoRAMoE: their equations, PEFT's numbers, and the balancing constraint."""

import copy
import math
import statistics

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, SMALL, lines_of, succeed, wrapped
from tiny import PROMPTS, backward, base_model, batch_of, logits_of, randn, trainable
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import data
from baselines.gainlora import DATA_KEYS
from baselines.lora import LoraLinear, low_rank_update, match_badit
from baselines.loramoe import (
    LoraMoeLinear,
    balancing_loss,
    expert_importance,
    importance_coefficients,
    type_of,
)
from baselines.pissa import PissaLinear
from decomposition import residual_weight
from harness.arguments import parse_flags, settings_of
from inputs.errors import InputError
from method import Stage, method_of
from registry import LoraSettings, method_class

IN, OUT, R, S = 12, 20, 3, 2.0  # of the bare layers; alpha = S * R
ROWS = [{"input_ids": list(range(3 + i, 12 + 4 * i)), "num_targets": 1 + i % 3, "task": task}
        for i, task in enumerate(["qa", "other", "other", "qa", "other"])]
BALANCED = dict(balance_weight=0.7, balance_delta=0.3, balance_types=("qa=0", "other=1"))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def linear(seed=0, bias=True, dtype=torch.float64):
    """A base layer with fixed weights."""
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


@torch.no_grad()
def moved(layer, seed=1, scale=0.3):
    """`layer` with every trainable parameter away from its start."""
    for i, parameter in enumerate(layer.parameters()):
        if parameter.requires_grad:
            parameter.add_(scale * randn(seed + i, *parameter.shape))
    return layer


def lora(base, seed=1, dropout=0.0):
    return moved(LoraLinear(base, R, S * R, dropout), seed)


def balanced(architecture="llama", **changed):
    """A tiny LoRAMoE, balanced, that does something in every part and is about to train."""
    settings = dict(dropout=0.0) | BALANCED | changed
    method = method_of(moved(wrapped(base_model(architecture), "loramoe", **settings), scale=0.2))
    method.start_stage(Stage("mixed", ("qa", "other"), 1, 3), None)
    method.model.train()
    return method


def penalty_of(method, rows=ROWS):
    """The penalty of one micro-batch, whose gradients are added up."""
    torch.manual_seed(3)
    return backward(method, batch_of(rows, targets=20))[1]


def gradients(method):
    return {name: weight.grad for name, weight in trainable(method.model).items()}


# --- LoRA ---------------------------------------------------------------------------------------


def test_the_low_rank_update_is_a_sum_over_ranks():
    """LoRA Eq. (3): the update of every output, summed by hand."""
    u, A, B = randn(1, 2, 3, IN), randn(2, R, IN), randn(3, OUT, R)
    expected = torch.zeros(2, 3, OUT, dtype=torch.float64)
    for b, t, o in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(OUT)):
        expected[b, t, o] = S * sum(B[o, j] * sum(A[j, i] * u[b, t, i] for i in range(IN))
                                    for j in range(R))
    assert_close(low_rank_update(u, A, B, S), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_lora_starts_as_its_base(bias):
    """Exactly, since B = 0; with A = 0 also under dropout, which never touches x."""
    base, x = linear(bias=bias, dtype=torch.float32), randn(1, 2, 5, IN).float()
    layer = LoraLinear(base, R, 6, dropout=0.5)
    bound = 1 / math.sqrt(IN)
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std() > bound / 3
    assert torch.equal(layer.eval()(x), base(x)) and torch.equal(layer.train()(x), base(x))
    moved(layer)
    assert not torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.lora_A.zero_()
    assert torch.equal(layer(x), base(x))


def test_lora_is_one_linear_layer_that_merges_and_unmerges():
    base, x = linear(dtype=torch.float32), randn(1, 7, IN).float()
    layer = lora(base).eval()
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    merged = residual_weight(layer.residual, A, B, -S)
    assert_close(layer(x), x @ (base.weight + S * B @ A).T + base.bias, rtol=0, atol=1e-5)
    assert_close(layer(x), F.linear(x, merged, base.bias), rtol=0, atol=1e-5)
    assert (merged - base.weight).abs().max() > 0.1
    assert_close(residual_weight(merged, A, B, S), base.weight, rtol=0, atol=1e-6)


def test_lora_gradients_at_init():
    """The base has none, A's is exactly zero while B = 0, B's is not."""
    base = linear()
    layer = LoraLinear(base, R, 6, 0.0)
    layer(randn(1, 4, IN)).square().sum().backward()
    assert layer.residual.grad is None and base.weight.grad is None and layer.bias.grad is None
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.norm() > 0.1


def test_dropout_falls_on_the_input_of_a():
    """y = base(x) + s B A dropout(x), one mask over tokens and inputs."""
    base, x = linear(), randn(1, 6, IN)
    layer = lora(base, dropout=0.5).train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    u = F.dropout(x, 0.5)
    assert (u == 0).any() and (u != 0).any()
    assert_close(y, base(x) + S * u @ layer.lora_A.T @ layer.lora_B.T)


@pytest.mark.parametrize("rank", [0, IN + 1])
def test_an_impossible_rank_is_refused(rank):
    """A bank that cannot have that rank is named with its limit."""
    for layer in (LoraLinear, PissaLinear):
        with pytest.raises(InputError, match=f"rank {rank} .*1 to {IN}"):
            layer(linear(), rank)


def smollm2_sizes():
    """One layer of SmolLM2-135M without weights."""
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1,
                         vocab_size=10)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(("flags", "alpha"), [("", 272), ("--alpha 272", 272), ("--alpha 68", 68)])
@pytest.mark.parametrize("name", ["lora", "pissa", "olora_qr"])
def test_match_parameters_gives_badit_s_count_and_scaling(name, flags, alpha):
    """On SmolLM2's sizes, 34 (576 + 1536) is nearest to 32 (576 + 1536) + 8 * 576."""
    model = smollm2_sizes()
    args, _ = parse_flags(["--method", name, "--match_parameters", "badit", *flags.split()])
    method = method_class(name)(settings_of(args))
    for _ in range(2):  # before weights are loaded, and when the model is wrapped
        method.check_model(model)
        assert (method.settings.rank, method.settings.alpha) == (34, alpha)


def test_match_parameters_reads_no_rank_and_no_default_alpha():
    """Saved settings of a matched rank keep the scaling that they were trained with."""
    for flag, value in (("--rank", 4), ("--alpha", 32)):
        with pytest.raises(InputError, match=f"{flag} has no effect with --match_parameters"):
            parse_flags(["--method=lora", "--match_parameters=badit", f"{flag}={value}"])
    saved = LoraSettings(rank=34, alpha=32.0, match_parameters="badit")
    assert match_badit(saved, smollm2_sizes()) == saved


# --- PiSSA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["exact", "fast"])
def test_pissa_starts_as_its_base(svd):
    """For any accuracy of the SVD and any alpha; the residual is not W0."""
    base, x = linear(dtype=torch.float32), randn(1, 9, IN).float()
    W0, y0 = base.weight.detach().clone(), base(x).detach()
    for alpha in (1, 6, 32):
        layer = PissaLinear(base, R, alpha, 0.0, svd).eval()
        total = layer.residual + alpha / R * layer.lora_B @ layer.lora_A
        assert (total - W0).norm() <= 1e-6 * W0.norm()
        assert (layer(x) - y0).abs().max() <= 1e-4 * y0.abs().max()
        assert (layer.residual - W0).norm() > 0.2 * W0.norm()
    assert torch.equal(base.weight, W0)


def test_pissa_holds_the_leading_triplets():
    """Singular values of bank and residual, and the balance of A and B."""
    base = linear(dtype=torch.float32)
    singular = torch.linalg.svdvals(base.weight.detach())
    layer = PissaLinear(base, R, 6, 0.0)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    assert_close(S * torch.linalg.svdvals(B @ A)[:R], singular[:R], rtol=1e-4, atol=0)
    wanted, atol = torch.diag(singular[:R] / S), 1e-4 * float(singular[0] / S)
    assert_close(B.T @ B, wanted, rtol=0, atol=atol)
    assert_close(A @ A.T, wanted, rtol=0, atol=atol)
    assert_close(torch.linalg.matrix_norm(layer.residual, 2), singular[R], rtol=1e-4, atol=0)
    layer(randn(1, 4, IN).float()).square().sum().backward()
    assert layer.lora_A.grad.norm() > 0.1 and layer.lora_B.grad.norm() > 0.1
    assert layer.residual.grad is None and layer.lora_A0.grad is None


def test_pissa_has_peft_s_residual_and_product():
    """PEFT's own initialisation, up to the sign of each triplet."""
    model = base_model("qwen3")
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["gate_proj"],
                             init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours = wrapped(model, "pissa")
    for name, layer in method_of(ours).layers.items():
        module = theirs.base_model.model.get_submodule(name)
        A, B = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        assert_close(layer.residual, module.get_base_layer().weight, rtol=0, atol=1e-5)
        assert_close(layer.lora_B @ layer.lora_A, B @ A, rtol=0, atol=1e-5)
        assert (layer.lora_A.abs() - A.abs()).abs().max() <= 1e-5


def test_a_restored_pissa_layer_is_not_decomposed_again(monkeypatch):
    """The residual comes from the saved initial bank, also when the bank itself has moved."""
    base, x = linear(dtype=torch.float32), randn(1, 9, IN).float()
    layer = moved(PissaLinear(base, R, 6, 0.0, svd="fast"))
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()
             if name not in layer.base_tensors}
    assert saved.keys() == {"lora_A", "lora_B", "lora_A0", "lora_B0"}
    monkeypatch.setattr("decomposition.decompose", None)
    other = PissaLinear(base, R, 6, 0.0, svd=None)
    other.restore(saved)
    assert torch.equal(other.residual, layer.residual) and torch.equal(other(x), layer(x))


# --- OLoRA --------------------------------------------------------------------------------------


def test_olora_qr_starts_from_peft_s_factors():
    """A, B and the residual, which holds s times their product."""
    model = base_model("qwen3")
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["gate_proj"],
                             init_lora_weights="olora")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    for name, layer in method_of(wrapped(model, "olora_qr")).layers.items():
        module = theirs.base_model.model.get_submodule(name)
        assert_close(layer.lora_A, module.lora_A["default"].weight, rtol=0, atol=1e-6)
        assert_close(layer.lora_B, module.lora_B["default"].weight, rtol=0, atol=1e-6)
        assert_close(layer.residual, module.get_base_layer().weight, rtol=0, atol=1e-6)
        assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(2), rtol=0, atol=1e-6)


# --- LoRAMoE ------------------------------------------------------------------------------------


def experts(K=4, top_k=None, seed=1, dropout=0.0, base=None):
    """A LoRAMoE layer away from its start."""
    layer = LoraMoeLinear(base or linear(), K, R, S * R, dropout, top_k or K)
    return moved(layer, seed)


def naive_moe(layer, x, base, top_k):
    """Token by token and expert by expert: softmax over the largest logits alone."""
    K, rows = layer.num_experts, []
    for token in x:
        z = (layer.router @ token).tolist()
        chosen = sorted(range(K), key=lambda k: z[k], reverse=True)[:top_k]
        total = sum(math.exp(z[k]) for k in chosen)
        y = base(token)
        for k in chosen:
            A, B = layer.lora_A[k * R:(k + 1) * R], layer.lora_B[:, k * R:(k + 1) * R]
            y = y + S * math.exp(z[k]) / total * (B @ (A @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_loramoe_is_its_formula(top_k):
    """Against loops, in float64: the weights of the top_k are renormalised."""
    base, x = linear(), randn(7, 9, IN)
    layer = experts(top_k=top_k, base=base).eval()
    assert_close(layer(x), naive_moe(layer, x, base, top_k), rtol=1e-10, atol=1e-10)


def test_loramoe_starts_as_its_base():
    """Exactly; and the weights of a token sum to 1, in float32 on a bf16 base too."""
    base, x = linear(dtype=torch.float32), randn(1, 2, 5, IN).float()
    for top_k in (2, 4):
        layer = LoraMoeLinear(base, 4, R, 6, 0.5, top_k)
        assert torch.equal(layer.eval()(x), base(x)) and torch.equal(layer.train()(x), base(x))
        g = layer.route(x).weight
        assert g.shape == (2, 5, 4) and ((g > 0).sum(-1) == top_k).all()
        assert_close(g.sum(-1), torch.ones(2, 5), rtol=0, atol=1e-6)
    assert layer.router.std() > 0.3 / math.sqrt(IN)
    layer = LoraMoeLinear(linear(dtype=torch.bfloat16), 4, R, 6, 0.5, 2)
    assert layer.route(x.bfloat16()).weight.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_experts_are_one_lora(top_k):
    """Also under dropout: one mask for all experts, whatever the router says."""
    base, x = linear(), randn(1, 9, IN)
    single = lora(base, dropout=0.5)
    for K in (1, 4):
        layer = experts(K, min(top_k, K), dropout=0.5, base=base)
        with torch.no_grad():
            layer.lora_A.copy_(single.lora_A.repeat(K, 1))
            layer.lora_B.copy_(single.lora_B.repeat(1, K))
        for training in (False, True):
            torch.manual_seed(2)
            expected = single.train(training)(x)
            torch.manual_seed(2)
            assert_close(layer.train(training)(x), expected, rtol=0, atol=1e-6 if K == 1 else 1e-5)


def test_without_a_router_the_output_is_the_mean_of_the_experts():
    base, x = linear(), randn(1, 9, IN)
    layer = experts(4, base=base).eval()
    with torch.no_grad():
        layer.router.zero_()
    assert_close(layer.route(x).weight, torch.full((9, 4), 0.25, dtype=torch.float64))
    outputs = [base(x) + S * x @ layer.lora_A[k * R:(k + 1) * R].T
               @ layer.lora_B[:, k * R:(k + 1) * R].T for k in range(4)]
    assert_close(layer(x), sum(outputs) / 4, rtol=0, atol=1e-10)


@pytest.mark.parametrize("top_k", [2, 4])
def test_the_router_learns(top_k):
    """One step from a non-zero B moves it."""
    layer = experts(top_k=top_k)
    before = layer.router.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    layer(randn(1, 9, IN)).square().sum().backward()
    optimizer.step()
    assert ((layer.router - before).abs().amax(1) > 1e-3).all()


# --- LoRAMoE's balancing constraint -------------------------------------------------------------


def naive_balancing(g, mask, types, delta):
    """In Python numbers: sample variance over mean of Z."""
    K, Z = g.shape[-1], []
    for row, inside, kind in zip(g.tolist(), mask.tolist(), types, strict=True):
        tokens = [token for token, real in zip(row, inside, strict=True) if real]
        for k in range(K):
            own = (kind == 1) == (k < K // 2)
            Z.append((1 + delta if own else 1 - delta)
                     * sum(token[k] for token in tokens) / len(tokens))
    return statistics.variance(Z) / statistics.fmean(Z)


def balancing(g, mask, types, delta):
    coefficients = importance_coefficients(torch.tensor(types), g.shape[-1], delta)
    return balancing_loss(expert_importance(g, mask), coefficients)


def test_the_balancing_loss_by_hand():
    """Z = (1.1 * .75, .9 * .25, .9 * .5, 1.1 * .5), rtol 1e-6."""
    g = torch.tensor([[[0.7, 0.3], [0.8, 0.2]], [[0.5, 0.5], [9.0, 9.0]]], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    Z = [0.825, 0.225, 0.45, 0.55]
    assert_close(expert_importance(g, mask), torch.tensor([[0.75, 0.25], [0.5, 0.5]]).double())
    value = float(balancing(g, mask, [1, 0], 0.1))
    assert value == pytest.approx(statistics.variance(Z) / statistics.fmean(Z), rel=1e-6)
    assert value == pytest.approx(naive_balancing(g, mask, [1, 0], 0.1), rel=1e-6)


@pytest.mark.parametrize("K", [2, 4, 6])
def test_the_balancing_loss_is_its_formula(K):
    """Against loops, with rows of several lengths and both types."""
    g = randn(1, 3, 5, K).softmax(-1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    value = float(balancing(g, mask, [1, 0, 0], 0.2))
    assert value == pytest.approx(naive_balancing(g, mask, [1, 0, 0], 0.2), rel=1e-6)
    # What stands at padded positions does not matter.
    other = torch.where(mask[..., None], g, torch.tensor(torch.nan).double())
    assert float(balancing(other, mask, [1, 0, 0], 0.2)) == value
    # Without delta types do not matter, and Z constant is perfectly balanced.
    assert balancing(g, mask, [1, 0, 0], 0.0) == balancing(g, mask, [0, 1, 1], 0.0)
    assert balancing(g, mask, [1, 0, 0], 0.2) != balancing(g, mask, [0, 1, 1], 0.2)
    even = torch.full_like(g, 1 / K)
    assert float(balancing(even, mask, [1, 0, 0], 0.0)) <= 1e-10 < value


def gates_of(method, batch):
    """The router weights of every layer, seen from outside."""
    seen, handles = [], []
    for layer in method.layers.values():
        handles.append(layer.register_forward_hook(
            lambda layer, inputs, _: seen.append(layer.route(inputs[0]).weight.detach())))
    with torch.no_grad():
        method.model(**{key: batch[key] for key in DATA_KEYS}, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("top_k", [4, 8])
def test_the_penalty_is_beta_times_the_sum_over_layers(architecture, top_k):
    """On a padded batch; rows without tokens are left out, and recomputation adds nothing."""
    method, batch = balanced(architecture, top_k=top_k), batch_of(ROWS)
    method.model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = 0.7 * sum(naive_balancing(g, batch["attention_mask"], [0, 1, 1, 0, 1], 0.3)
                         for g in gates_of(method, batch))
    assert penalty_of(method) == pytest.approx(expected, rel=1e-5)
    assert len(method.gates) == len(method.layers)
    assert penalty_of(method, [None, *ROWS, None]) == pytest.approx(expected, rel=1e-5)
    assert penalty_of(method, [None, None]) == 0.0


def test_the_penalty_reaches_routers_and_what_lies_below(architecture):
    """Its gradient alone, without the loss: every router gets one, A and B of the last do not."""
    method, batch = balanced(architecture), batch_of(ROWS)
    method.before_forward(batch)
    method.model(**data.model_inputs(batch), use_cache=False)
    method.penalty(batch).backward()
    first, *_, last = method.layers.values()
    assert all(layer.router.grad.norm() > 0 for layer in method.layers.values())
    assert first.lora_A.grad.norm() > 0 and last.lora_A.grad is None


def test_micro_batches_have_a_penalty_each():
    """Accumulation: the second micro-batch neither repeats the first nor keeps its gates."""
    both, alone = balanced(), [balanced(), balanced()]
    parts = [ROWS[:3], ROWS[3:]]
    values = [penalty_of(both, rows) for rows in parts]
    assert values == [penalty_of(method, rows) for method, rows in zip(alone, parts, strict=True)]
    assert values[0] != values[1]
    first, second = map(gradients, alone)
    for name, gradient in gradients(both).items():
        assert_close(gradient, first[name] + second[name], rtol=1e-5, atol=1e-6)


def test_without_weight_there_is_no_penalty_and_nothing_is_kept():
    """The default: beta = 0."""
    method = balanced(balance_weight=0.0)
    assert penalty_of(method) == 0.0
    assert all(layer.gates is None for layer in method.layers.values())


def test_the_penalty_balances():
    """Steps on it alone bring it down."""
    method, batch, values = balanced(top_k=8), batch_of(ROWS), []
    optimizer = torch.optim.Adam([layer.router for layer in method.layers.values()], lr=1e-2)
    for _ in range(30):
        method.before_forward(batch)
        method.model(**data.model_inputs(batch), use_cache=False)
        values.append(method.penalty(batch))
        values[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert values[-1] < 0.5 * values[0]


def test_types_are_named_by_task_or_number():
    """Folder names and T-numbers; a task needs exactly one type."""
    pairs = ["T591=0", "363=1", "other=1", "a=b=0"]
    task = "task591_sciq_answer_generation"
    assert [type_of(name, pairs) for name in (task, "task363_x", "other", "a=b")] == [0, 1, 1, 0]
    for name, wrong in (("task5910_x", pairs), ("task002_x", pairs), (task, [*pairs, f"{task}=1"])):
        with pytest.raises(InputError, match=f"--balance_types .*{name}"):
            type_of(name, wrong)
    with pytest.raises(InputError, match="--balance_types .*other"):
        balanced(balance_types=("qa=0",))


@pytest.mark.parametrize("top_k", [4, 8])
def test_the_router_ignores_padding_and_batch_mates(architecture, top_k):
    """Each token decides alone."""
    method = balanced(architecture, top_k=top_k)
    together = gates_of(method, data.pad_left(PROMPTS, 2))
    assert min(g[3, -4:].std(0).max() for g in together) > 1e-2  # tokens of one row differ
    for i, prompt in enumerate(PROMPTS):
        for g, alone in zip(together, gates_of(method, data.pad_left([prompt], 2)), strict=True):
            assert_close(g[i, -len(prompt):], alone[0], rtol=1e-4, atol=1e-5)


# --- parity with PEFT -----------------------------------------------------------------------------


def peft_twin(model, method):
    """(our model, PEFT's with the same weights); the base is the same too."""
    config = peft.LoraConfig(r=2, lora_alpha=16, lora_dropout=0.0, target_modules=["gate_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).to(model.dtype)
    ours = moved(wrapped(model, method, dropout=0.0), scale=0.1)
    pairs = {}
    with torch.no_grad():
        for name, layer in method_of(ours).layers.items():
            module = theirs.base_model.model.get_submodule(name)
            module.get_base_layer().weight.copy_(layer.residual)
            pairs[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            pairs[name][0].copy_(layer.lora_A)
            pairs[name][1].copy_(layer.lora_B)
    return ours, theirs, pairs


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_logits_are_those_of_peft(architecture, kind):
    """The same weights give the same logits to 1e-5 in fp32."""
    base = logits_of(base_model(architecture))
    ours, theirs, _ = peft_twin(base_model(architecture), kind)
    assert (logits_of(ours) - base).abs().max() > 1e-2
    assert_close(logits_of(ours), logits_of(theirs.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_five_steps_are_those_of_peft(architecture, kind):
    """AdamW on the same data gives the same parameters to 1e-5 in float64."""
    ours, theirs, pairs = peft_twin(base_model(architecture, torch.float64), kind)
    before = {name: layer.lora_A.detach().clone() for name, layer in method_of(ours).layers.items()}
    # Rows of one length: Gemma 2 in float64 turns padding into NaN, with or without an adapter.
    rows = [row | {"input_ids": row["input_ids"][:9]} for row in ROWS]
    for model in (ours, theirs):
        weights = trainable(model).values()
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
        model.train()
        for first in range(5):
            batch = batch_of([rows[(first + i) % 5] for i in range(3)])
            model(**data.model_inputs(batch), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in method_of(ours).layers.items():
        assert layer.lora_A.dtype == torch.float64
        assert (layer.lora_A - before[name]).abs().max() > 1e-2
        assert_close(layer.lora_A, pairs[name][0], rtol=0, atol=1e-5)
        assert_close(layer.lora_B, pairs[name][1], rtol=0, atol=1e-5)


# --- the ablation and the baseline --------------------------------------------------------------


@pytest.mark.parametrize("setting", ["mixed", "sequential"])
def test_both_ablations_are_loramoe(llama, suite, tmp_path, setting):
    """Table 2: bit for bit, adapter, losses, angles and router health, with dropout on."""
    runs = {"loramoe": ("--method", "loramoe"),
            "badit": ("--method", "badit", "--no_bad", "--no_dog")}
    for name, flags in runs.items():
        succeed(*flags, "--model", llama, "--suite", suite, "--setting", setting, *SMALL,
                "--epochs", "1", "--regroup_every", "2", "--learning_rate", "0.02",
                "--eval_tasks", "none", "--output_dir", tmp_path / name)
    for file in ("adapter/adapter_model.safetensors", "log.jsonl", "regroup.jsonl"):
        ours, theirs = ((tmp_path / name / file).read_bytes() for name in runs)
        assert ours == theirs, file
    records = lines_of(tmp_path / "loramoe" / "regroup.jsonl")
    assert {record["grouping"] for record in records} == {"fixed"} and len(records) >= 4
    assert all(record["moved"] == 0 and record["intra_after"] is not None for record in records)
