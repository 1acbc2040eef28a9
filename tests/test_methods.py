"""Check what holds for every method that trains; a new entry in the registry needs no test here.

Each method is tested with its defaults, with every other choice of its settings, and with some
other numbers, on three architectures.
"""

import functools
import typing
from dataclasses import fields, replace

import pytest
import torch
from conftest import ARCHITECTURES, TRAINED, complaint, files_of
from tiny import (
    PROMPTS,
    assert_same,
    backward,
    base_model,
    batch_of,
    learn,
    loader_of,
    logits_of,
    rows_of,
    stage_of,
    start,
    train,
    trainable,
    weights_of,
)
from torch.testing import assert_close

import adapter
import data
from harness.adapter_config import ADAPTER_CONFIG, read_adapter_config
from harness.arguments import ALL_FLAGS, names, parse_flags, settings_of
from inputs.errors import InputError
from method import fingerprint
from registry import METHODS, method_class

# Small values of settings; the threshold leaves free directions in 32 dimensions for several tasks.
SMALL = dict(rank=2, alpha=16.0, regroup_every=2, threshold=0.7)
# Sized for real layers.
TOO_LARGE = {"match_parameters"}
# Further values, for every method with these settings.
NUMBERS = {
    # Not for LoRAMoE: a router whose selected weights sum to 1 learns nothing with top_k = 1.
    "top_1": dict(top_k=1, inactive="keep"),
    "top_8": dict(top_k=8),
    "two_targets": dict(target_modules=("gate_proj", "down_proj")),
    "balanced": dict(balance_weight=0.7, balance_delta=0.3,
                     balance_types=("task0=0", "task1=1", "task2=0")),
}


def choices(cls):
    """Return {name: change} for every non-default value of a setting with choices."""
    found = {}
    for field in fields(cls):
        values = (True,) if field.type is bool else ()
        for kind in (field.type, *typing.get_args(field.type)):
            if typing.get_origin(kind) is typing.Literal:
                values = typing.get_args(kind)
        found |= {f"{field.name}={value}": {field.name: value} for value in values
                  if value != field.default and field.name not in TOO_LARGE}
    return found


def small(cls, change):
    """Return settings with small numbers and a change, or None if the change has no effect."""
    numbers = {name: value for name, value in SMALL.items() if name in cls.names()} | change
    unread = set().union(*cls(**numbers).has_no_effect().values())
    if unread & change.keys():
        return None
    return cls(**{name: value for name, value in numbers.items() if name not in unread})


def make_cases():
    """Return {id: (method name, settings)}; with defaults the id is the method name."""
    cases = {}
    for name in TRAINED:
        cls = METHODS[name].settings
        numbers = {key: change for key, change in NUMBERS.items()
                   if change.keys() <= set(cls.names())}
        for key, change in ({"": {}} | choices(cls) | numbers).items():
            settings = small(cls, change)
            if settings is not None:
                cases[f"{name} {key}".strip()] = name, settings
    return cases


CASES = make_cases()
# Each method on every architecture, each other case on one of them in turn.
PAIRS = [(case, architecture) for index, case in enumerate(CASES)
         for turn, architecture in enumerate(ARCHITECTURES)
         if case in TRAINED or turn == index % len(ARCHITECTURES)]
on_pairs = pytest.mark.parametrize(("case", "architecture"), PAIRS)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def wrap(model, case, **changed):
    """Wrap `model` with a fresh adapter, in evaluation mode, and return the method."""
    name, settings = CASES[case]
    changed = {key: value for key, value in changed.items() if key in settings.names()}
    torch.manual_seed(0)
    method_class(name)(replace(settings, **changed)).wrap(model)
    model.eval()
    return model.adapted_by


@functools.cache
def learned(case, architecture="llama"):
    """Return a method that has learned two tasks. Tests share it and must not change it."""
    method = wrap(base_model(architecture), case)
    learn(method, 0, 1)
    return method


def is_decomposed(method):
    """Return whether base weights are decomposed, so that a start may differ by rounding."""
    return any(key.endswith("lora_A0") for key in method.state_dict())


def starts_elsewhere(method):
    """Return whether the settings break the base model at the start, as "drop" does."""
    return getattr(method.settings, "inactive", "keep") == "drop"


def has_effect(settings, name):
    """Return whether the settings have one of that name, and it has an effect."""
    return name in set(settings.names()).difference(*settings.has_no_effect().values())


def is_sparse(method):
    """Return whether some experts may get no token in a few steps."""
    read = method.settings
    return has_effect(read, "top_k") and read.top_k < read.num_experts


def groups(method):
    """Return whether the method logs groupings, and whether they change."""
    read = method.settings
    return ("regroup_every" in read.names(),
            has_effect(read, "grouping") and read.grouping != "fixed")


def assert_starts_as(method, logits, base, tolerance):
    assert base.abs().max() > 1e-2 and base.std() > 0
    difference = (logits - base).abs().max() / base.abs().max()
    if starts_elsewhere(method):
        assert difference > 1e-2
    else:
        if method.name == "olora_qr":  # its factors are s times as large, and so is their rounding
            tolerance *= 2
        assert difference <= (tolerance if is_decomposed(method) else 0)


# --- names, settings and flags ------------------------------------------------------------------


def test_settings_survive_flags_and_the_adapter(case, tmp_path):
    """Settings are the same after adapter_config.json and after --adapter."""
    name, settings = CASES[case]
    model = base_model()
    sha256 = fingerprint(model)
    method = wrap(model, case)
    method.chat_template = True
    adapter.save(model, tmp_path)
    config, loaded = read_adapter_config(tmp_path)
    assert loaded == settings == method.settings
    assert (config.method, config.base_sha256, config.model_type) == (name, sha256, "llama")
    assert method.base_sha256 == sha256
    assert adapter.load(base_model(), tmp_path).adapted_by.chat_template
    assert settings_of(parse_flags(["--adapter", str(tmp_path)])[0]) == settings


@pytest.mark.parametrize("name", METHODS)
def test_flags_are_the_settings(name):
    """Flags of other methods are refused by name."""
    mine = set(METHODS[name].settings.names())
    assert mine <= ALL_FLAGS.keys()
    for flag in sorted(names(of_method=True) - mine):
        with pytest.raises(InputError, match=f"--{flag} has no effect with --method {name}"):
            parse_flags(["--method", name, *words_for(ALL_FLAGS[flag])])
    args, _ = parse_flags(["--method", name])
    assert settings_of(args) == METHODS[name].settings()


def words_for(flag):
    """Return command-line words that give a flag some value."""
    for kind in (flag.type, *typing.get_args(flag.type)):
        if kind is bool:
            return [f"--{flag.name}"]
        if typing.get_origin(kind) is typing.Literal:
            return [f"--{flag.name}", typing.get_args(kind)[0]]
        if typing.get_origin(kind) is tuple:
            return [f"--{flag.name}", "x=1"]
    return [f"--{flag.name}", "1" if flag.default is None else str(flag.default)]


@pytest.mark.parametrize(("flags", "message"), [
    ("badit --top_k 9", "--top_k 9 is above --num_experts 8"),
    ("loramoe --top_k 9", "--top_k 9 is above --num_experts 8"),
    ("loramoe --balance_delta 0.2", "--balance_delta has no effect with --balance_weight 0"),
    ("loramoe --balance_types qa=0", "--balance_types has no effect with --balance_weight 0"),
    ("loramoe --balance_weight 1", "--balance_weight needs --balance_types"),
    ("loramoe --balance_weight 1 --balance_types qa=2", "'qa=2' is not TASK=0 or TASK=1"),
    ("loramoe --balance_weight 1 --balance_types qa=0 --num_experts 5", "5 must be even"),
    ("gainlora --orth_weight 1", "--orth_weight has no effect with --branches inflora"),
    ("gainlora --threshold 1", "'1' is not a number from 0 to below 1"),
])
def test_flags_that_do_not_fit_each_other_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse_flags(["--method", *flags.split()])


@pytest.mark.parametrize("name", [name for name in TRAINED
                                  if "rank" in METHODS[name].settings.names()])
def test_an_impossible_rank_is_refused_before_weights_load(name):
    """The model is on the meta device."""
    with torch.device("meta"):
        model = base_model()
    settings = replace(CASES[name][1], rank=33)
    with pytest.raises(InputError, match="rank.* 33 .*32"):
        method_class(name)(settings).check_model(model)


# --- the start, and what trains -----------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@on_pairs
def test_a_model_starts_as_its_base(case, architecture, dtype, tolerance):
    """Exactly, or to rounding if decomposed; also in training and after start_stage."""
    base = logits_of(base_model(architecture, dtype))
    model = base_model(architecture, dtype)
    method = wrap(model, case, dropout=0.0)
    fresh = logits_of(model)
    assert_starts_as(method, fresh, base, tolerance)
    assert_starts_as(method, logits_of(model.train()), base, tolerance)
    start(method, 0)
    started = logits_of(model.eval())
    if getattr(method.settings, "routing", None) == "energy":  # selects by what it has measured
        assert_starts_as(method, started, base, tolerance)
    else:
        assert torch.equal(started, fresh)


@on_pairs
def test_training_moves_what_trains_and_nothing_else(case, architecture):
    """In two tasks, every row of trained weights moves, and no bit of others."""
    model = base_model(architecture)
    method = wrap(model, case)
    for task in range(2):
        before = logits_of(model)
        start(method, task)
        assert_close(logits_of(model.eval()), before, atol=1e-5, rtol=0)
        first, trains = weights_of(model), trainable(model)
        _, lines = train(method, task, steps=3)
        for name, tensor in model.state_dict().items():
            if name in trains:
                moved = (tensor - first[name]).abs().flatten(1 - (tensor.dim() == 1)).amax(-1)
                assert moved.max() > 1e-4 and (moved.min() > 1e-4 or is_sparse(method)), name
                assert tensor.dtype == torch.float32
            elif tensor.is_floating_point():
                assert torch.equal(tensor, first[name]), name
        logs, regroups = groups(method)
        assert [line["layer"] for line in lines] == list(method.layers) * logs  # after two steps
        groupings = [name for name, tensor in first.items() if not tensor.is_floating_point()
                     and not torch.equal(tensor, model.state_dict()[name])]
        assert bool(groupings) == any(line["moved"] for line in lines) == regroups
        frozen = [weight for name, weight in model.named_parameters() if name not in trains]
        assert all(weight.grad is None for weight in frozen)
        assert (logits_of(model) - before).abs().max() > 1e-3
        ended = logits_of(model)
        method.end_stage(stage_of(task), loader_of(rows_of(task)))
        assert torch.equal(logits_of(model.eval()), ended)


def test_counts_are_of_what_acts(case):
    """active_parameters counts the components that change a token's logits."""
    method = learned(case)
    model, bare = method.model, base_model()
    assert method.base_parameters == sum(weight.numel() for weight in bare.parameters())
    banks = [weight for name, weight in trainable(model).items() if ".lora_" in name]
    others = sum(weight.numel() for weight in trainable(model).values()) - sum(
        weight.numel() for weight in banks)
    if method.name == "gainlora":  # the gates of past tasks act too, but are frozen
        others = sum(weight.numel() for weight in method.gates.tasks.parameters())
    answer, acting = logits_of(model, [[5]]), 0
    for layer in method.layers.values():
        size = sum(layer.residual.shape)
        for name, A in layer.named_parameters():
            if name.split(".")[0] != "lora_A":
                continue
            for row in A.data:
                kept = row.clone()
                row.zero_()
                acting += size * (not torch.equal(logits_of(model, [[5]]), answer))
                row.copy_(kept)
    assert method.active_parameters() == acting + others
    assert torch.equal(logits_of(model, [[5]]), answer)


def test_gradient_checkpointing_changes_nothing(case):
    """Recomputation draws the same random numbers."""
    seen, calls = [], [0, 0]
    for checkpointing in (False, True):
        model = base_model()
        method = wrap(model, case, dropout=0.2)
        next(iter(method.layers.values())).register_forward_pre_hook(
            lambda *_, on=checkpointing: calls.__setitem__(on, calls[on] + 1))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        seen.append(([learn(method, task, steps=3) for task in range(2)], method.state_dict()))
    assert calls[1] == calls[0] + 6  # each training step runs the layer a second time
    assert seen[0][0] == seen[1][0]
    assert_same(seen[0][1], seen[1][1])


def test_a_bf16_base_keeps_a_float32_adapter(case):
    """With and without autocast."""
    model = base_model(dtype=torch.bfloat16)
    base = logits_of(model)
    method = wrap(model, case, dropout=0.0)
    learn(method, 0)
    with torch.autocast("cpu", torch.bfloat16):
        learn(method, 1, steps=2)
    assert (logits_of(model) - base).abs().max() > 2e-2 * base.abs().max()
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    assert {layer.residual.dtype for layer in method.layers.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in method.state_dict().values()} <= {torch.float32,
                                                                         torch.int64}


# --- adapters on disk ---------------------------------------------------------------------------


# After two tasks: what a layer trains, the number of these weights, and what else it saves.
BANK, FIRST = "expert_of lora_A0 lora_B0", "lora_A.0 lora_B.0"
KEPT = {
    "lora": ("lora_A lora_B", 192, ""),
    "pissa": ("lora_A lora_B", 192, "lora_A0 lora_B0"),
    "olora": ("lora_A.1 lora_B.1", 192, FIRST),
    "olora_qr": ("lora_A lora_B", 192, "lora_A0 lora_B0"),
    "loramoe": ("lora_A lora_B router", 1792, "expert_of"),
    "gainlora": ("lora_B.1", 128, f"{FIRST} lora_A.1 basis.0"),
    "gainlora branches=olora": ("lora_A.1 lora_B.1", 192, FIRST),
    "badit": ("lora_A lora_B router", 1792, BANK),
    "badit routing=static": ("lora_A lora_B alpha", 1544, BANK),
    "badit routing=energy": ("lora_A lora_B", 1536, f"{BANK} mean_energy"),
    "badit no_bad=True": ("lora_A lora_B router", 1792, "expert_of"),
}
GATE = {"W1": 1600, "W2": 1600, "k": 32}  # 50 x 32, one gate per task; only the last one trains


@pytest.mark.parametrize("case", KEPT)
def test_an_adapter_keeps_what_a_fresh_base_needs(case):
    """These names are the format of adapters on disk."""
    method, (trained, count, frozen) = learned(case), KEPT[case]
    trains = {f"{layer}.{part}" for layer in method.layers for part in trained.split()}
    kept = trains | {f"{layer}.{part}" for layer in method.layers for part in frozen.split()}
    count *= len(method.layers)
    if case.startswith("gainlora"):
        trains |= {f"gainlora_gates.tasks.1.{part}" for part in GATE}
        kept |= {f"gates.tasks.{task}.{part}" for part in GATE for task in range(2)}
        kept |= {f"gates.{space}.0" for space in ("P1", "P2", "P3")}
        count += sum(GATE.values())
    assert trains == trainable(method.model).keys()
    assert sum(weight.numel() for weight in trainable(method.model).values()) == count
    assert {key.replace("outside_", "") for key in method.state_dict()} == kept


@pytest.mark.parametrize(("case", "architecture", "dtype"), [
    (*pair, (torch.float32, torch.bfloat16)[index % 2]) for index, pair in enumerate(PAIRS)])
def test_a_loaded_adapter_is_the_saved_one(case, architecture, dtype, tmp_path, monkeypatch):
    """Same logits, bytes and third task, at the start and after two tasks.

    Loading decomposes nothing.
    """
    model = base_model(architecture, dtype)
    method = wrap(model, case)
    monkeypatch.setattr("decomposition.decompose", None)
    for tasks in ((), (0, 1)):
        for task in tasks:
            learn(method, task, steps=3)
        adapter.save(model, tmp_path / "saved")
        other = adapter.load(base_model(architecture, dtype), tmp_path / "saved").eval()
        assert torch.equal(logits_of(other), logits_of(model))
        assert_same(other.adapted_by.state_dict(), method.state_dict())
        assert trainable(other).keys() == trainable(model).keys()
        adapter.save(other, tmp_path / "again")
        files = files_of(tmp_path / "again")
        assert files == files_of(tmp_path / "saved")
        assert sorted(files) == [ADAPTER_CONFIG, adapter.WEIGHTS_FILE]
    assert learn(method, 2, steps=2) == learn(other.adapted_by, 2, steps=2)
    assert_same(other.adapted_by.state_dict(), method.state_dict())


@pytest.mark.parametrize("weight", ["model.layers.1.mlp.gate_proj.weight", "model.norm.weight",
                                    "model.embed_tokens.weight"])
@pytest.mark.parametrize("name", TRAINED)
def test_another_base_is_refused(name, weight, tmp_path):
    """One changed number in any weight is enough; the model is left unchanged."""
    adapter.save(learned(name).model, tmp_path)
    other = base_model()
    with torch.no_grad():
        other.get_parameter(weight).view(-1)[5] += 1e-3
    before = logits_of(other)
    assert "another base model" in complaint(adapter.load, other, tmp_path)
    assert torch.equal(logits_of(other), before)


DAMAGES = {
    "another shape": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "another type": lambda tensor: (tensor.long() if tensor.is_floating_point()
                                    else tensor.float()),
    "not a number": lambda tensor: tensor * torch.nan,
    "too large in float32": lambda tensor: tensor.double() + 1e300,
}


@pytest.mark.parametrize("damage", ["missing", *DAMAGES])
@pytest.mark.parametrize("name", TRAINED)
def test_a_damaged_tensor_is_refused(name, damage):
    """By name, for each tensor of the last layer or outside of layers."""
    state = learned(name).state_dict()
    *_, last = learned(name).layers
    for key, tensor in state.items():
        if key.startswith("model.") and not key.startswith(last):
            continue
        damaged = dict(state)
        if damage == "missing":
            del damaged[key]
        else:
            damaged[key] = DAMAGES[damage](tensor)
        assert key.rpartition(".")[0] in complaint(restore, name, damaged)


@pytest.mark.parametrize("name", TRAINED)
def test_an_unknown_tensor_is_refused(name):
    state = learned(name).state_dict()
    restore(name, state)
    with pytest.raises(InputError, match="1 are unknown .*stray"):
        restore(name, state | {"stray": torch.ones(2)})


def restore(case, state):
    """Load a state into a fresh model."""
    name, settings = CASES[case]
    method = method_class(name)(settings)
    method.wrap(base_model(), fresh=False)
    adapter.restore(method, state)


# --- batches ------------------------------------------------------------------------------------


@on_pairs
def test_logits_ignore_padding_and_batch_mates(case, architecture):
    """A prompt's logits are the same alone, in a batch, and beside a long prompt."""
    model = learned(case, architecture).model
    alone = torch.cat([logits_of(model, [prompt]) for prompt in PROMPTS])
    beside = torch.cat([logits_of(model, [prompt, [7] * 40])[:len(prompt)] for prompt in PROMPTS])
    assert_close(logits_of(model), alone, rtol=1e-4, atol=1e-4)
    assert_close(beside, alone, rtol=1e-4, atol=1e-4)


@on_pairs
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(case, architecture):
    """With a prefill in two parts, then token by token, left-padded."""
    method = learned(case, architecture)
    batch = data.pad_left(PROMPTS, 2)
    method.before_forward(batch)
    full = method.model(**batch, use_cache=False).logits  # (batch, seq, vocabulary)
    cache, parts, length = None, [], batch["input_ids"].shape[1]
    for begin, end in ((0, 1), (1, length - 6), *((i, i + 1) for i in range(length - 6, length))):
        output = method.model(input_ids=batch["input_ids"][:, begin:end],
                              attention_mask=batch["attention_mask"][:, :end],
                              position_ids=batch["position_ids"][:, begin:end],
                              past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    real = batch["attention_mask"].bool()
    assert_close(torch.cat(parts, 1)[real], full[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_loss_at_the_targets_is_the_full_loss(name, architecture):
    """`logits_to_keep` and filler rows change nothing."""
    method, rows = learned(name, architecture), rows_of(2)
    total = 0.0
    for row in rows:
        method.before_forward(batch_of([row]))
        ids = torch.tensor([row["input_ids"]])  # (1, seq)
        with torch.no_grad():
            log_probs = method.model(input_ids=ids).logits.log_softmax(-1)
        first = ids.shape[1] - row["num_targets"]
        total -= sum(float(log_probs[0, i - 1, ids[0, i]]) for i in range(first, ids.shape[1]))
    seen = []
    for batch_rows in (rows, [*rows, None, None], [None, *rows]):
        method.model.zero_grad()
        batch = batch_of(batch_rows, targets=13)
        loss, _ = backward(method, batch)
        assert loss == pytest.approx(total / 13, rel=1e-5)
        logits = method.model(**data.model_inputs(batch), use_cache=False).logits
        assert logits.shape[1] == len(batch["logits_to_keep"]) == 4 and torch.isfinite(logits).all()
        seen.append({name: weight.grad for name, weight in trainable(method.model).items()})
    for name, gradient in seen[0].items():
        assert_close(seen[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert_close(seen[2][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", TRAINED)
def test_a_batch_of_fillers_has_no_loss_and_no_gradient(name, architecture):
    """As at the end of a short last global batch."""
    method = wrap(base_model(architecture), name)
    method.model.train()
    batch = batch_of([None, None], targets=7)
    assert backward(method, batch) == (0, 0)
    logits = method.model(**data.model_inputs(batch), use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert not any(weight.grad.any() for weight in trainable(method.model).values())
