"""Architectures beyond Llama: trained, saved and loaded alike, or refused in one line at load."""

import inspect

import pytest
import torch
import transformers
from conftest import BRIEF, SHAPE, SMALL, complaint, make_tokenizer, refused, run, succeed, wrapped
from tiny import PROMPTS, base_model, continuations, learn, logits_of
from transformers import AutoConfig, AutoModelForCausalLM

import adapter
import models
from harness import checks
from method import find_targets, source_of
from quantized import check_experts, find_experts, quantise

STATE = dict(state_size=8, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
             mamba_d_ssm=64, mamba_chunk_size=16, num_heads=4, n_groups=1, expand=1,
             attention_hidden_size=32, lru_width=32, attention_window_size=16)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=1,
               kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
               v_head_dim=8, n_shared_experts=1)
OTHER_NAMES = dict(n_embd=32, n_layer=2, n_head=4, d_model=32, decoder_layers=2, encoder_layers=2,
                   decoder_attention_heads=4, encoder_attention_heads=4, decoder_ffn_dim=64,
                   encoder_ffn_dim=64, context_length=256)
# What a type needs beside these sizes.
TYPES = {
    "gpt_neox": {}, "bloom": {}, "phi3": {}, "gemma3_text": {}, "mamba2": {}, "falcon_h1": {},
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "bert": dict(is_decoder=True), "qwen3_moe": dict(output_router_logits=True), "mixtral": {},
    "deepseek_v3": dict(num_key_value_heads=4),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                  expert_layer_offset=1, use_mamba_kernels=False),
}
REFUSED = {
    "recurrent_gemma": "padding changes its logits",
    "rwkv": "padding changes its logits",
    "mbart": "its loss is",
    "bert": "depend on later tokens",
    "xlstm": "no argument logits_to_keep",
    "trocr": "no argument logits_to_keep",
}


def config_of(kind, **more):
    """Return the configuration of a tiny model of a type."""
    default = AutoConfig.for_model(kind)
    sizes = {name: size for name, size in (SHAPE | STATE | EXPERTS | OTHER_NAMES).items()
             if hasattr(default, name) and not isinstance(getattr(type(default), name, None),
                                                          property)}
    return AutoConfig.for_model(kind, **sizes | dict(pad_token_id=2) | more)


def save(folder, config):
    """Write a random model and a tokenizer, whose padding the model does see, into `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", TYPES)
def test_trained_saved_and_loaded(kind, tmp_path):
    """A loaded adapter gives equal logits, and a batch the answers of its rows alone."""
    folder = save(tmp_path / "model", config_of(kind, **TYPES[kind]))
    bare, _ = models.load(folder)
    attention = {"deepseek_v3": "q_a_proj"}.get(kind, "q_proj")
    targets = (attention if find_experts(bare) else "all-linear",)
    checks.check_architecture(bare, targets)
    model = wrapped(bare, "lora", target_modules=targets)
    learn(model.adapted_by, 0, steps=2)
    adapter.save(model, tmp_path / "adapter")
    again = adapter.load(models.load(folder)[0], tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again), logits_of(model))
    alone = [continuations(model, [row])[0] for row in PROMPTS]
    assert continuations(model) == [row + [2] * (6 - len(row)) for row in alone]


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_at_load(kind, tmp_path):
    folder = save(tmp_path / "model", config_of(kind))
    for dtype in (torch.float32, torch.bfloat16):
        assert REFUSED[kind] in complaint(models.load, folder, dtype)


def test_a_model_that_sees_padding(suite, tmp_path):
    """Without padding it trains, and each answer is evaluated alone."""
    folder = save(tmp_path / "model", config_of("recurrent_gemma", num_hidden_layers=3))
    argv = ("--model", folder, "--suite", suite, *SMALL, "--method", "lora", "--epochs", 1,
            "--max_train_per_task", 2, "--max_eval_per_task", 2, "--target_modules", "q_proj",
            "--eval_loss")
    refused("--batch_size 1 --eval_batch_size 1", *argv, "--output_dir", tmp_path / "no")
    succeed(*argv, "--batch_size", 1, "--gradient_accumulation_steps", 4, "--eval_batch_size", 1,
            "--output_dir", tmp_path / "out")


def test_the_text_model_of_a_multimodal_checkpoint(suite, tmp_path):
    """It is loaded without its vision tower, and a run says so; a lost layer is still refused."""
    text = config_of("gemma3_text", query_pre_attn_scalar=8)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision,
                                       mm_tokens_per_image=4, image_token_index=290)
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model, _ = models.load(str(tmp_path / "model"))
    assert torch.equal(logits_of(model), logits_of(whole))
    argv = ("--model", tmp_path / "model", "--suite", suite, *BRIEF, "--max_eval_per_task", 1,
            "--method", "zero_shot", "--output_dir", tmp_path / "out")
    outcome = run(*argv)
    assert any("is multimodal" in line for line in outcome.out), outcome
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.save_pretrained(tmp_path / "model")
    message = complaint(models.load, str(tmp_path / "model"))
    assert "no place for the weights model.layers.1." in message


def test_layers_whose_weight_is_read():
    """Mamba's mixer passes it to a kernel, which would bypass an adapter and cannot read codes."""
    model = AutoModelForCausalLM.from_config(config_of("mamba2", hidden_size=64, head_dim=16))
    assert "reads the weight of this layer" in complaint(find_targets, model, ("out_proj",))
    left = quantise(wrapped(model, "lora", target_modules=("all-linear",)), "int8")
    assert left == [f"backbone.layers.{i}.mixer.out_proj" for i in range(2)]


def test_a_class_is_read_once(monkeypatch):
    """Reading its source takes 11 ms, and a model has hundreds of linear layers."""
    model, read = base_model(), []
    monkeypatch.setattr(inspect, "getsource", lambda cls: read.append(cls) or "")
    source_of.cache_clear()
    for _ in range(2):
        find_targets(model, ("all-linear",))
    source_of.cache_clear()  # of what this test answered
    assert len(read) == len(set(read)) == 2  # attention and MLP


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("method, settings", [
    ("lora", {}), ("badit", {}), ("badit", dict(routing="energy")), ("gainlora", {})], ids=str)
def test_a_layer_that_the_loss_does_not_reach(method, settings, called):
    """It is named at the first step, as BigBird's pooler is, whether the model calls it or not."""
    model = base_model()
    model.model.pooler = torch.nn.Linear(32, 32)

    def call(inner, _, output):
        inner.pooler(output.last_hidden_state[:, 0])

    if called:
        model.model.register_forward_hook(call)
    wrapped(model, method, target_modules=("all-linear",), **settings)
    message = complaint(learn, model.adapted_by, 0)
    assert "--target_modules: " in message and "model.pooler" in message


def test_experts_in_one_tensor():
    """They can be neither adapted nor quantised: refused as targets, or as most of the weights."""
    model = AutoModelForCausalLM.from_config(config_of("qwen3_moe", num_local_experts=16))
    for targets in ({"all-linear"}, {"gate_proj"}):
        message = complaint(checks.check_architecture, model, targets)
        assert "model.layers.0.mlp.experts.gate_up_proj" in message
    check_experts(model, "dense")
    message = complaint(check_experts, model, "nf4")
    assert "model type qwen3_moe" in message and "% of its weights" in message
