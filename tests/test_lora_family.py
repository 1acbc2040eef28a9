"""Check LoRA, PiSSA, OLoRA and LoRAMoE against formulas and PEFT, and the balancing loss."""

import copy
import math
import statistics
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, lines_of, refused, succeed, wrapped
from tiny import IN, OUT, backward, base_model, batch_of, flattened, linear, randn, trainable
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import data
from baselines.lora import low_rank_update, match_badit
from baselines.loramoe import (
    LoraMoeLinear,
    balancing_loss,
    expert_importance,
    importance_coefficients,
    type_of,
)
from harness.arguments import parse_flags, settings_of
from inputs.errors import InputError
from method import INPUTS, Stage, method_of, observe
from registry import VARIANTS, LoraSettings, method_class, present_variant, variant_of

R, S = 3, 2.0  # alpha = S * R
ROWS = [{"input_ids": list(range(3 + i, 12 + 4 * i)), "num_targets": 1 + i % 3, "task": task}
        for i, task in enumerate(["qa", "other", "other", "qa", "other"])]
BALANCED = dict(balance_weight=0.7, balance_delta=0.3, balance_types=("qa=0", "other=1"))


@torch.no_grad()
def moved(layer, seed=1, scale=0.3):
    """Move every trainable parameter of `layer` away from its start."""
    for i, parameter in enumerate(layer.parameters()):
        if parameter.requires_grad:
            parameter.add_(scale * randn(seed + i, *parameter.shape))
    return layer


def balanced(architecture="llama", **changed):
    """Return a tiny LoRAMoE with a balancing loss, all its parts away from their start."""
    settings = dict(dropout=0.0) | BALANCED | changed
    method = method_of(moved(wrapped(base_model(architecture), "loramoe", **settings), scale=0.2))
    method.start_stage(Stage("mixed", ("qa", "other"), 1, 3), None)
    method.model.train()
    return method


def penalty_of(method, rows=ROWS):
    """Return the penalty of one micro-batch and add up its gradients."""
    torch.manual_seed(3)
    return backward(method, batch_of(rows, targets=20))[1]


def gradients(method):
    return {name: weight.grad for name, weight in trainable(method.model).items()}


# --- LoRA ---------------------------------------------------------------------------------------


def test_the_low_rank_update_is_a_sum_over_ranks():
    """LoRA's Eq. (3), summed by hand."""
    u, A, B = randn(1, 2, 3, IN), randn(2, R, IN), randn(3, OUT, R)
    expected = torch.zeros(2, 3, OUT, dtype=torch.float64)
    for b, t, o in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(OUT)):
        expected[b, t, o] = S * sum(B[o, j] * sum(A[j, i] * u[b, t, i] for i in range(IN))
                                    for j in range(R))
    assert_close(low_rank_update(u, A, B, S), expected, rtol=1e-12, atol=1e-12)


def smollm2_sizes():
    """Return a model with one layer of SmolLM2-135M's sizes, on the meta device."""
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1,
                         vocab_size=10)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("alpha", [None, 272, 68])
@pytest.mark.parametrize(("name", "default"), [("lora", 272), ("pissa", 272), ("olora_qr", 34)])
def test_match_parameters_gives_badit_s_count_and_scaling(name, default, alpha):
    """On SmolLM2's sizes, 34 (576 + 1536) is nearest to 32 (576 + 1536) + 8 * 576.

    OLoRA has scaling 1, at which dropout does not drown the base.
    """
    model = smollm2_sizes()
    given = [] if alpha is None else ["--alpha", str(alpha)]
    args, _ = parse_flags(["--method", name, "--match_parameters", "badit", *given])
    method = method_class(name)(settings_of(args))
    for _ in range(2):  # before weights are loaded, and when the model is wrapped
        method.check_model(model)
        assert (method.settings.rank, method.settings.alpha) == (34, alpha or default)


@pytest.mark.parametrize("name", ["lora", "pissa", "olora_qr"])
def test_a_matched_variant_has_one_name_for_every_model(name):
    """Here 33 (896 + 4864) is nearest to 32 (896 + 4864) + 8 * 896; scaling and name stay."""
    config = LlamaConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=1, vocab_size=9)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    args, _ = parse_flags(["--method", name, "--match_parameters", "badit"])
    method = method_class(name)(settings_of(args))
    method.check_model(model)
    assert method.settings.rank == 33
    assert method.settings.alpha == 33 * (1 if name == "olora_qr" else 8)
    assert variant_of(name, method.settings) == VARIANTS[f"{name}-matched"]
    other = replace(method.settings, alpha=16.0)
    assert variant_of(name, other) == f"{name} --alpha 16 --match_parameters badit"


def test_records_of_a_matched_variant_keep_their_meaning():
    """The alpha that they gave is the matched one at rank 34 alone."""
    old = "lora --alpha 272 --match_parameters badit"
    assert present_variant({"variant": old, "settings": {"rank": 34}}) == VARIANTS["lora-matched"]
    assert present_variant({"variant": old, "settings": {"rank": 33}}) == old
    assert present_variant({"variant": "zero_shot", "settings": {}}) == "zero_shot"


def test_match_parameters_reads_no_rank_and_no_default_alpha():
    """Saved settings of a matched rank keep the scaling that they were trained with."""
    for flag, value in (("--rank", 4), ("--alpha", 32)):
        with pytest.raises(InputError, match=f"{flag} has no effect with --match_parameters"):
            parse_flags(["--method=lora", "--match_parameters=badit", f"{flag}={value}"])
    saved = LoraSettings(rank=34, alpha=32.0, match_parameters="badit")
    assert match_badit(saved, smollm2_sizes()) == saved


# --- PiSSA --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "theirs"), [("pissa", "pissa"), ("olora_qr", "olora")])
def test_initial_factors_are_those_of_peft(name, theirs):
    """PEFT's residual, product and factors; each PiSSA triplet may have another sign."""
    model = base_model("qwen3")
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["gate_proj"],
                             init_lora_weights=theirs)
    twin = peft.get_peft_model(copy.deepcopy(model), config)
    for key, layer in method_of(wrapped(model, name)).layers.items():
        module = twin.base_model.model.get_submodule(key)
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert_close(layer.residual, module.get_base_layer().weight, rtol=0, atol=1e-5)
        assert_close(layer.lora_B @ layer.lora_A, B @ A, rtol=0, atol=1e-5)
        signs = (A * layer.lora_A).sum(1).sign() if name == "pissa" else torch.ones(2)
        assert_close(layer.lora_A, signs[:, None] * A, rtol=0, atol=1e-5)
        assert_close(layer.lora_B, signs * B, rtol=0, atol=1e-5)


# --- LoRAMoE ------------------------------------------------------------------------------------


def naive_moe(layer, x, u):
    """Compute by loops over tokens and experts; softmax is over the largest logits only."""
    K, rows = layer.num_experts, []
    for token, dropped in zip(x, u, strict=True):
        z = (layer.router @ token).tolist()
        chosen = sorted(range(K), key=lambda k: z[k], reverse=True)[:layer.top_k]
        total = sum(math.exp(z[k]) for k in chosen)
        y = layer.residual @ token + layer.bias
        for k in chosen:
            A, B = layer.lora_A[k * R:(k + 1) * R], layer.lora_B[:, k * R:(k + 1) * R]
            y = y + S * math.exp(z[k]) / total * (B @ (A @ dropped))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_loramoe_is_its_formula(top_k):
    """In float64, with one dropout mask; the weights of the top_k are renormalised."""
    layer, x = moved(LoraMoeLinear(linear(), 4, R, S * R, 0.5, top_k)), randn(7, 9, IN)
    assert_close(layer.eval()(x), naive_moe(layer, x, x), rtol=1e-10, atol=1e-10)
    torch.manual_seed(2)
    y = layer.train()(x)
    torch.manual_seed(2)
    assert_close(y, naive_moe(layer, x, F.dropout(x, 0.5)), rtol=1e-10, atol=1e-10)


# --- LoRAMoE's balancing constraint -------------------------------------------------------------


def naive_balancing(g, mask, types, delta):
    """Compute the sample variance over the mean of Z, in Python numbers."""
    K, Z = g.shape[-1], []
    for row, inside, kind in zip(g.tolist(), mask.tolist(), types, strict=True):
        tokens = [token for token, real in zip(row, inside, strict=True) if real]
        for k in range(K):
            own = (kind == 1) == (k < K // 2)
            Z.append((1 + delta if own else 1 - delta)
                     * sum(token[k] for token in tokens) / len(tokens))
    return statistics.variance(Z) / statistics.fmean(Z)


@pytest.mark.parametrize("K", [2, 4, 6])
@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_the_balancing_loss_is_its_formula(K, delta):
    """Against loops, with rows of several lengths and both types; padding does not matter."""
    g = randn(1, 3, 5, K).softmax(-1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    spoiled = torch.where(mask[..., None], g, torch.nan)
    for types in ([1, 0, 0], [0, 1, 1]):
        coefficients = importance_coefficients(torch.tensor(types), K, delta)
        value = float(balancing_loss(expert_importance(spoiled, mask), coefficients))
        assert value == pytest.approx(naive_balancing(g, mask, types, delta), rel=1e-6)


def gates_of(method, batch):
    """Return the router weights of every layer."""
    seen = {}
    with torch.no_grad(), observe(method.model, method.layers, lambda name, x, _: seen.update(
            {name: method.layers[name].route(x).weight})):
        method.model(**{key: batch[key] for key in INPUTS}, use_cache=False)
    return seen.values()


def test_the_penalty_of_flattened_inputs():
    """As in OPT: that of inputs (batch, seq, hidden)."""
    methods = balanced(), balanced()
    flattened(methods[1].model)
    assert penalty_of(methods[0]) == pytest.approx(penalty_of(methods[1]), rel=1e-6)


@pytest.mark.parametrize("top_k", [4, 8])
def test_the_penalty_is_beta_times_the_sum_over_layers(architecture, top_k):
    """Padding and fillers do not count, and recomputation adds nothing."""
    method, batch = balanced(architecture, top_k=top_k), batch_of(ROWS)
    method.model.activation_checkpointing_enable({"use_reentrant": False})
    expected = 0.7 * sum(naive_balancing(g, batch["attention_mask"], [0, 1, 1, 0, 1], 0.3)
                         for g in gates_of(method, batch))
    assert penalty_of(method) == pytest.approx(expected, rel=1e-5)
    assert len(method.gates) == len(method.layers)
    assert penalty_of(method, [None, *ROWS, None]) == pytest.approx(expected, rel=1e-5)
    assert penalty_of(method, [None, None]) == 0.0


def test_the_penalty_reaches_routers_and_what_lies_below(architecture):
    """Its gradient reaches every router, but not A and B of the last layer."""
    method, batch = balanced(architecture), batch_of(ROWS)
    method.before_forward(batch)
    method.model(**data.model_inputs(batch), use_cache=False)
    method.penalty(batch).backward()
    first, *_, last = method.layers.values()
    assert all(layer.router.grad.norm() > 0 for layer in method.layers.values())
    assert first.lora_A.grad.norm() > 0 and last.lora_A.grad is None


def test_micro_batches_have_a_penalty_each():
    """With accumulation, the second micro-batch keeps nothing of the first."""
    both, alone = balanced(), [balanced(), balanced()]
    parts = [ROWS[:3], ROWS[3:]]
    values = [penalty_of(both, rows) for rows in parts]
    assert values == [penalty_of(method, rows) for method, rows in zip(alone, parts, strict=True)]
    assert values[0] != values[1]
    first, second = map(gradients, alone)
    for name, gradient in gradients(both).items():
        assert_close(gradient, first[name] + second[name], rtol=1e-5, atol=1e-6)


def test_without_weight_there_is_no_penalty_and_nothing_is_kept():
    """With beta = 0 no router weights are stored."""
    method = balanced(balance_weight=0.0)
    assert penalty_of(method) == 0.0
    assert all(layer.gates is None for layer in method.layers.values())


def test_types_are_named_by_task_or_number():
    """A task needs exactly one type, by folder name or T-number."""
    pairs = ["T591=0", "363=1", "other=1", "a=b=0"]
    task = "task591_sciq_answer_generation"
    assert [type_of(name, pairs) for name in (task, "task363_x", "other", "a=b")] == [0, 1, 1, 0]
    for name, wrong in (("task5910_x", pairs), ("task002_x", pairs), (task, [*pairs, f"{task}=1"])):
        with pytest.raises(InputError, match=f"--balance_types .*{name}"):
            type_of(name, wrong)


def test_a_task_without_a_type_is_refused(tiny, tmp_path):
    refused("--balance_types", *tiny, *SMALL, "--method", "loramoe", "--balance_weight",
            "0.1", "--balance_types", "colour_name=0", "--output_dir", tmp_path / "out")


# --- parity with PEFT -----------------------------------------------------------------------------


def peft_twin(model, method):
    """Return our model and PEFT's with the same weights, and PEFT's (A, B) by layer."""
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
def test_five_steps_are_those_of_peft(architecture, kind):
    """AdamW on the same data gives the same parameters, to 1e-5 in float64."""
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
    """Adapter, losses, angles and router health are equal to the bit (Table 2)."""
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
