"""Measure what BADIT costs: `python scripts/benchmark.py [--full]` prints a table in Markdown.

    step      an optimizer step, against PEFT's LoRA and LoRAMoE (needs `pip install peft`)
    regroup   Eq. 9 to 14 for 36 layers
    evaluate  generation, against the bare base model

Variants run in turn (A B A B ...), so that a busy machine slows all of them alike. A ratio is the
median over rounds of the ratio within a round.
"""

import argparse
import copy
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.llama import LlamaConfig  # noqa: E402

import adapter  # noqa: E402
import data  # noqa: E402
import grouping  # noqa: E402
import models  # noqa: E402
from harness import launch  # noqa: E402
from inputs.errors import InputError, exit_status  # noqa: E402
from inputs.numbers import PositiveInt, from_text  # noqa: E402
from method import Method, Stage  # noqa: E402
from registry import METHODS, method_class  # noqa: E402

TINY = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)


# --- measuring ----------------------------------------------------------------------------------


def seconds_of(call, device):
    """Return the seconds of one call; on a GPU after all its kernels have finished."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(variants, options, warmup=1):
    """Measure variants {name: callable} in turn -> {name: seconds of each round}."""
    for call in list(variants.values()) * warmup:
        seconds_of(call, options.device)
    seconds = {name: [] for name in variants}
    for _ in tqdm(range(options.rounds), desc=" / ".join(variants), leave=False):
        for name, call in variants.items():
            seconds[name].append(seconds_of(call, options.device))
    return seconds


def rows_of(what, seconds, name=None):
    """Yield the table's rows: each variant alone, or the one called `name` against each other."""
    for other in seconds:
        if name is None:
            yield what, other, f"{median(seconds[other]):.4g} s", "", "", ""
        elif other != name:
            ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds[other],
                                                            strict=True)]
            low, high = np.percentile(ratios, (25, 75))
            yield (what, name, f"{median(seconds[name]):.4g} s", other, f"{median(ratios):.3f}",
                   f"{low:.3f}–{high:.3f}")


def markdown(rows):
    header = [("what", "variant", "time", "against", "ratio", "quartiles"), ("---",) * 6]
    return "\n".join(f"| {' | '.join(row)} |" for row in header + rows)


# --- training step ------------------------------------------------------------------------------


def base_model(options):
    """Return SmolLM2 with --full, else a tiny random Llama; on the device, in its precision."""
    if options.full:
        model, _ = models.load("smollm2-135m", options.dtype)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, pad_token_id=None),
                                                 dtype=options.dtype)
    return model.to(options.device)


def adapted(model, method, **changed):
    """Add a new adapter of `method`, with train.py's defaults but a fast SVD, to `model`."""
    settings = METHODS[method].settings
    fast = {"svd": "fast"} if "svd" in settings.names() else {}
    method_class(method)(settings(**fast | changed)).wrap(model)
    return model


def with_peft(model, rank):
    """Add PEFT's LoRA on the same layers to `model`."""
    try:
        from peft import LoraConfig, get_peft_model  # optional
    except ImportError:
        raise InputError("peft is not installed, run `pip install peft`") from None
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.05,
                                            target_modules=["gate_proj"]))


def random_batch(model, batch, length, targets, device):
    """Return random token ids (batch, length) with a loss at the last `targets` positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (batch, length), generator=generator)
    ids = ids.to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(length, device=device).expand(batch, -1),
            "logits_to_keep": torch.arange(length - targets - 1, length, device=device),
            "labels": ids[:, -targets - 1:]}


def training_step(model, batch, device):
    """Return a function that makes one optimizer step: forward, backward, AdamW."""
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    method = getattr(model, "adapted_by", Method(None))  # its hooks cost time as well
    method.start_stage(Stage("benchmark", ("benchmark",), 1, 10**6), [batch])
    bf16 = next(model.parameters()).dtype == torch.bfloat16

    def step():
        method.before_forward(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        method.after_backward()
        optimizer.step()
        method.after_step(batch)
        optimizer.zero_grad()

    return step


def step(options):
    """Compare optimizer steps of 4 rows of 256 tokens."""
    model = base_model(options)
    variants = {"BADIT": adapted(copy.deepcopy(model), "badit"),
                "LoRA r=32 (PEFT)": with_peft(copy.deepcopy(model), 32),
                "LoRAMoE": adapted(copy.deepcopy(model), "loramoe"),
                "BADIT by energy": adapted(copy.deepcopy(model), "badit", routing="energy")}
    batch = random_batch(model, 4, 256, 32, options.device)
    steps = {name: training_step(variant, batch, options.device)
             for name, variant in variants.items()}
    return rows_of("training step", in_turn(steps, options, warmup=2), "BADIT")


# --- regrouping and generation ------------------------------------------------------------------


def regroup(options):
    """Time Eq. 9 to 14 for 36 layers of 32 components with 16,384 entries each, and its parts."""
    generator = torch.Generator(options.device).manual_seed(0)
    draw = dict(generator=generator, device=options.device)
    shared = torch.randn(36, 6, 16_384, **draw)  # as gradients of one loss share directions
    gradients = torch.randn(36, 32, 6, **draw) @ shared + torch.randn(36, 32, 16_384, **draw)
    gram = grouping.component_gram(gradients)  # (36, 32, 32)
    current = (torch.arange(32) // 4).expand(36, 32)
    return rows_of("regrouping, 36 layers", in_turn({
        "all": lambda: grouping.group_components(gradients, 8, current),
        "Gram matrices": lambda: grouping.component_gram(gradients),
        "grouping from them": lambda: grouping.grouping_from_gram(gram, 8, current)}, options))


def evaluate(options):
    """Compare generation, 20 tokens for the 16 longest test prompts, with the bare base model's."""
    bare, tokenizer = models.load("smollm2-135m", options.dtype)
    bare = bare.to(options.device).eval()
    ours = copy.deepcopy(bare)
    ours = adapter.load(ours, options.adapter) if options.adapter else adapted(ours, "badit")
    encoded = data.encode_suite(data.load_suite(options.suite), tokenizer, 1024, splits=("test",))
    prompts = sorted((row["input_ids"] for rows in encoded.test.values() for row in rows), key=len)
    batch = data.pad_left(prompts[-16:], tokenizer.pad_token_id)
    inputs = {name: batch[name].to(options.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def generate(model, **last):
        model.generate(**inputs, do_sample=False, max_new_tokens=20, min_new_tokens=20, **last)

    last = {"logits_to_keep": torch.tensor([-1], device=options.device)}  # as in evaluation.py
    seconds = in_turn({"BADIT": lambda: generate(ours.eval(), **last),
                       "bare base model": lambda: generate(bare)}, options)
    return rows_of("20 tokens for 16 prompts", seconds, "BADIT")


# --- the table ----------------------------------------------------------------------------------

SECTIONS = {"step": step, "regroup": regroup, "evaluate": evaluate}


def machine(options, onednn):
    """Say what the numbers were measured on."""
    device = options.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    known = {"device": name or platform.machine(), "threads": options.threads,
             "dtype": str(options.dtype).removeprefix("torch."), "torch": torch.__version__,
             "rounds": options.rounds, "float32 products": "oneDNN" if onednn else "default",
             "malloc settings": "MALLOC_TOP_PAD_" in os.environ}  # of scripts/setup.sh
    return ", ".join(f"{key} {value}" for key, value in known.items())


def benchmark(argv):
    """Print the table that the flags in `argv` ask for. Raises InputError."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, from_text(PositiveInt)
    add("--full", action="store_true", help="a step of SmolLM2 (default: of a tiny random Llama)")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)")
    add("--rounds", type=count, default=3, help="of each comparison (default: 3)")
    add("--threads", type=count, default=os.cpu_count(), help="(default: all cores)")
    add("--bf16", action="store_true", help="instead of float32, on a CPU")
    add("--suite", default="mini", help="whose prompts `evaluate` takes (default: mini)")
    add("--adapter", type=Path, help="of SmolLM2, for `evaluate` (default: a new one)")
    options = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    options.device = torch.device("cuda" if cuda else "cpu")
    options.dtype = torch.bfloat16 if cuda or options.bf16 else torch.float32
    torch.set_num_threads(options.threads)
    models.avoid_cudnn_attention()
    onednn = not cuda and launch.use_onednn()
    rows = [row for name in options.only for row in SECTIONS[name](options)]
    print(markdown(rows), machine(options, onednn), sep="\n\n")


def main(argv=None):
    return exit_status(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
