"""Compare BADIT's cost with the alternatives: `python scripts/benchmark.py [--full]`.

Everything is measured in one process and one run, the variants in turn (A B A B ...), so that a
busy machine hurts them alike; peak memory is that of processes of their own. Ratios are medians
over rounds of the ratio within a round. Needs `pip install peft` for the comparison with its LoRA.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import peer  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.llama import LlamaConfig  # noqa: E402

import adapter  # noqa: E402
import data  # noqa: E402
import decomposition  # noqa: E402
import evaluation  # noqa: E402
import grouping  # noqa: E402
import models  # noqa: E402
from harness import products  # noqa: E402
from harness.arguments import ALL_FLAGS  # noqa: E402
from inputs.errors import InputError, error_lines  # noqa: E402
from inputs.files import write_json  # noqa: E402
from method import Method, Stage  # noqa: E402
from quantized import quantise  # noqa: E402
from registry import METHODS, method_class  # noqa: E402

# glibc gives freed logits back to the kernel at every step; scripts/setup.sh sets the same.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592",
          "MALLOC_TOP_PAD_": "268435456"}
QWEN3_8B = (12_288, 4_096)  # a gate_proj weight
TINY = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
SECTIONS = {}


def section(function):
    """Register a part of the benchmark under its name; it yields rows of the table."""
    SECTIONS[function.__name__] = function
    return function


# --- measuring ----------------------------------------------------------------------------------


def seconds_of(call, device):
    """Seconds of one call, on a GPU by its own clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(variants, rounds, device, warmup=1):
    """Seconds of each variant {name: callable}, per round: {name: list}."""
    for _ in range(warmup):
        for call in variants.values():
            call()
    seconds = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc=" / ".join(variants), leave=False):
        for name, call in variants.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def row(what, seconds, name, against=None, target=None, **more):
    """A row of the table: median seconds of one variant, and its ratio to another's."""
    row = {"what": what, "variant": name, "seconds": median(seconds[name]), "target": target}
    if against is not None:
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds[against],
                                                        strict=True)]
        row |= {"against": against, "ratio": median(ratios),
                "low": float(np.quantile(ratios, 0.25)), "high": float(np.quantile(ratios, 0.75))}
    return row | more


# --- what is compared ---------------------------------------------------------------------------


def base_model(options, **changed):
    """SmolLM2 with --full, else a tiny random Llama; on the device, in its precision."""
    if options.full and not changed:
        model, _ = models.load("smollm2-135m", options.dtype)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(**TINY | changed, pad_token_id=None)
        model = AutoModelForCausalLM.from_config(config, dtype=options.dtype)
    return model.to(options.device)


def adapted(model, method, **changed):
    """`model` with a fresh adapter of `method`, by train.py's defaults."""
    cls = METHODS[method].settings
    fast = {"svd": "fast"} if "svd" in cls.names() else {}
    method_class(method)(cls(**fast | changed)).wrap(model)
    return model


def with_peft(model, rank):
    """`model` with PEFT's LoRA on the same layers."""
    from peft import LoraConfig, get_peft_model  # not above: it need not be installed
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.05,
                                            target_modules=["gate_proj"]))


class TextbookMoe(nn.Module):
    """LoRAMoE as it is usually written: a loop over experts, each two linear layers."""

    def __init__(self, base, num_experts=8, rank=4, alpha=32):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.dropout = nn.Dropout(0.05)
        kind = dict(bias=False, device=base.weight.device)
        self.router = nn.Linear(base.in_features, num_experts, **kind)
        self.down = nn.ModuleList(nn.Linear(base.in_features, rank, **kind)
                                  for _ in range(num_experts))
        self.up = nn.ModuleList(nn.Linear(rank, base.out_features, **kind)
                                for _ in range(num_experts))
        for up in self.up:
            nn.init.zeros_(up.weight)

    def forward(self, x):
        y, u = self.base(x), self.dropout(x).float()
        g = self.router(x.float()).softmax(dim=-1)
        for k, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + (self.scaling * g[..., k:k + 1] * up(down(u))).to(y.dtype)
        return y


def textbook_moe(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.gate_proj = TextbookMoe(layer.mlp.gate_proj)
    return model


def random_batch(model, batch, length, targets, device):
    """Token ids, with logits and loss at the last `targets` positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (batch, length), generator=generator)
    ids = ids.to(device)
    kept = {"logits_to_keep": torch.arange(length - targets - 1, length, device=device),
            "labels": ids[:, -targets - 1:]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(length, device=device).expand(batch, -1), **kept}


def training_step(model, batch, device):
    """A function that does one optimizer step: forward, backward, AdamW."""
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    method = getattr(model, "adapted_by", Method(None))  # its hooks cost time as well
    method.start_stage(Stage("benchmark", ("benchmark",), 1, 10**6), [batch])

    def step():
        method.before_forward(batch)
        with torch.autocast(device.type, torch.bfloat16,
                            enabled=next(model.parameters()).dtype == torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        method.after_backward()
        optimizer.step()
        method.after_step(batch)
        optimizer.zero_grad()

    return step


# --- 1. training step ---------------------------------------------------------------------------


@section
def step(options):
    """One optimizer step of batch 4, length 256, beside PEFT's LoRA and a textbook LoRAMoE."""
    model = base_model(options)
    variants = {"BADIT": adapted(copy.deepcopy(model), "badit"),
                "LoRA r=32 (PEFT)": with_peft(copy.deepcopy(model), 32),
                "LoRAMoE (textbook)": textbook_moe(copy.deepcopy(model)),
                "LoRAMoE (ours)": adapted(copy.deepcopy(model), "loramoe"),
                "LoRA r=34 (ours)": adapted(copy.deepcopy(model), "lora", rank=34),
                "BADIT by energy": adapted(copy.deepcopy(model), "badit", routing="energy")}
    batch = random_batch(model, 4, 256, 32, options.device)
    steps = {name: training_step(variant, batch, options.device)
             for name, variant in variants.items()}
    seconds = in_turn(steps, options.rounds, options.device, warmup=2)
    for against, target in (("LoRA r=32 (PEFT)", 1.05), ("LoRAMoE (textbook)", 0.8),
                            ("LoRAMoE (ours)", None), ("LoRA r=34 (ours)", None)):
        yield row("training step", seconds, "BADIT", against, target)
    yield row("training step", seconds, "BADIT by energy", "BADIT", "1.06")


@section
def precision(options):
    """The same step in bf16 beside float32, and with the last logits as a slice."""
    steps = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        options = copy.copy(options)
        options.dtype = dtype
        model = adapted(base_model(options), "badit")
        batch = random_batch(model, 4, 256, 32, options.device)
        sliced = batch | {"logits_to_keep": len(batch["logits_to_keep"])}
        steps[name] = training_step(model, batch, options.device)
        steps[f"{name}, a slice"] = training_step(model, sliced, options.device)
    steps["float32, PyTorch's default products"] = partial(with_default_products, steps["float32"])
    seconds = in_turn(steps, options.rounds, options.device, warmup=2)
    yield row("training step in bf16", seconds, "bf16", "float32", "0.67")
    for name in ("bf16", "float32"):
        yield row("training step", seconds, name, f"{name}, a slice")
    yield row("training step", seconds, "float32", "float32, PyTorch's default products")


def with_default_products(call):
    """Call with the float32 products that PyTorch takes unless it is told otherwise."""
    matmul = torch.backends.mkldnn.matmul
    chosen, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    call()
    matmul.fp32_precision = chosen


@section
def limits(options):
    """The products of a training step as one core can do them, and the share of it that is theirs.

    A step multiplies each token with every weight of the frozen layers forward, and again backward
    for the gradient of its input; attention, adapter and head are left out.
    """
    for dtype in (torch.float32, torch.bfloat16):
        options = copy.copy(options)
        options.dtype = dtype
        model = base_model(options)
        shapes = [tuple(layer.weight.shape) for name, layer in model.named_modules()
                  if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings()]
        flops = 4 * 8 * 160 * sum(rows * columns for rows, columns in shapes)
        pairs = {shape: (torch.randn(8 * 160, shape[1], dtype=dtype, device=options.device),
                         torch.randn(shape, dtype=dtype, device=options.device))
                 for shape in set(shapes)}

        def products(pairs=pairs, shapes=shapes):
            for x, W in map(pairs.get, shapes):
                (x @ W.T) @ W

        variant = adapted(model, "badit")
        batch = random_batch(variant, 8, 160, 16, options.device)
        seconds = in_turn({"step": training_step(variant, batch, options.device),
                           "its products alone": products}, options.rounds, options.device)
        speed = flops / 1e9 / median(seconds["its products alone"])
        name = str(dtype).removeprefix("torch.")
        yield row(f"products of a step of 8 x 160, {name}, {speed:.0f} GFLOP/s", seconds,
                  "its products alone", "step")


# --- 2. regrouping ------------------------------------------------------------------------------


@section
def regroup(options):
    """Eq. 9 to 14 for 36 layers of 32 components with 16,384 entries each, and its parts."""
    generator = torch.Generator(options.device).manual_seed(0)
    # Components share directions, as gradients of one loss do.
    shared = torch.randn(36, 6, 16_384, generator=generator, device=options.device)
    mix = torch.randn(36, 32, 6, generator=generator, device=options.device)
    noise = torch.randn(36, 32, 16_384, generator=generator, device=options.device)
    gradients = mix @ shared + noise
    gram = grouping.component_gram(gradients)
    current = (torch.arange(32) // 4).expand(36, 32)
    seconds = in_turn({
        "all": lambda: grouping.group_components(gradients, 8, current),
        "Gram matrices": lambda: grouping.component_gram(gradients),
        "grouping from them": lambda: grouping.grouping_from_gram(gram, 8, current),
    }, options.rounds, options.device)
    yield row("regrouping, 36 layers", seconds, "all", target="0.1 s")
    yield row("regrouping, 36 layers", seconds, "Gram matrices")
    yield row("regrouping, 36 layers", seconds, "grouping from them")


# --- 3. decomposition ---------------------------------------------------------------------------


def weight_like(spectrum, shape, device):
    """A random weight (out, in) with this spectrum, stretched over its smaller side."""
    n, generator = min(shape), torch.Generator(device).manual_seed(0)
    places = torch.linspace(0, len(spectrum) - 1, n - 32, dtype=torch.float64)
    tail = np.interp(places.numpy(), np.arange(32, len(spectrum) + 32), spectrum.cpu().numpy())
    S = torch.cat([spectrum[:32].cpu(), torch.from_numpy(tail)[: n - 32]]).sort(descending=True)[0]
    U, V = (torch.linalg.qr(torch.randn(side, n, generator=generator, device=device)).Q
            for side in shape)
    return (U * S.float().to(device)) @ V.T, S[:32]


@section
def decompose(options):
    """The top 32 triplets by --svd fast and exact: seconds, and the energy that is captured."""
    model, _ = models.load("smollm2-135m")
    weights = [layer.mlp.gate_proj.weight.detach().to(options.device)
               for layer in model.model.layers]
    weights = weights if options.full else weights[::10]
    calls = {svd: lambda svd=svd: [decomposition.top_singular_triplets(W, 32, svd) for W in weights]
             for svd in ("fast", "exact")}
    seconds = in_turn(calls, 3, options.device)
    share = min(captured(W, torch.linalg.svdvals(W)[:32]) for W in weights)
    yield row(f"decomposing {len(weights)} layers of SmolLM2", seconds, "fast", "exact",
              captured=share)
    shape = QWEN3_8B if options.full else (1_536, 512)
    W, leading = weight_like(torch.linalg.svdvals(weights[0]).double(), shape, options.device)
    calls = {"fast": lambda: decomposition.top_singular_triplets(W, 32, "fast"),
             "exact": lambda: decomposition.top_singular_triplets(W, 32, "exact")}
    seconds = in_turn(calls, 1 if options.full else 3, options.device, warmup=not options.full)
    yield row(f"decomposing {shape[0]} x {shape[1]}", seconds, "fast", "exact",
              "0.1 and 3 s", captured=captured(W, leading))


def captured(W, leading):
    """Share of the energy of the exact `leading` singular values that "fast" captures."""
    _, _, Vh = decomposition.top_singular_triplets(W, 32, "fast")
    return float((W @ Vh.T).double().square().sum().cpu() / leading.double().square().sum().cpu())


# --- 4. memory ----------------------------------------------------------------------------------


@section
def memory(options):
    """Peak memory of training steps at batch 2, length 1024, each in a process of its own."""
    for checkpointing, target in ((True, 0.6), (False, None)):
        peaks = {kept: peak_of(options, kept, checkpointing) for kept in ("targets", "all")}
        yield {"what": "peak memory, " + ("with" if checkpointing else "without")
               + " gradient checkpointing", "variant": "logits at targets",
               "gib": peaks["targets"], "against": "all logits",
               "ratio": peaks["targets"] / peaks["all"], "target": target}


def peak_of(options, kept, checkpointing):
    """GiB that two steps of BADIT need, measured in a new process."""
    words = [sys.executable, __file__, "--peak", kept, *["--full"] * options.full,
             *["--checkpointing"] * checkpointing]
    # Freed memory must go back to the system, or the peak would be that of the allocator.
    lean = {key: value for key, value in os.environ.items() if key not in MALLOC}
    lean |= {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # fixed: glibc would raise it, and keep more
    return float(subprocess.run(words, env=lean, capture_output=True, text=True,
                                check=True).stdout.split()[-1])


def print_peak(options):
    """What `peak_of` asks for."""
    model = base_model(options) if options.full else base_model(options, vocab_size=32_768)
    model = adapted(model, "badit")
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = 1023 if options.peak == "all" else 32
    step = training_step(model, random_batch(model, 2, 1024, targets, options.device),
                         options.device)
    for _ in range(2):  # in the second, the optimizer has its moments
        step()
    if options.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:  # not getrusage, whose peak a process inherits from the one that started it
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(int(status["VmHWM"].split()[0]) / 2**20)


# --- 5. evaluation ------------------------------------------------------------------------------


@section
def evaluate(options):
    """Generation beside the bare base model, and beside unsorted batches of 8 and 50 new tokens."""
    bare, tokenizer = models.load("smollm2-135m", options.dtype)
    bare = bare.to(options.device).eval()
    ours = copy.deepcopy(bare)
    ours = (adapter.load(ours, options.adapter) if options.adapter else
            adapted(ours, "badit")).eval()
    suite = data.load_suite(options.suite)
    encoded = data.encode_suite(suite, tokenizer, 1024, splits=("test",))
    rows = [row for task in encoded.test.values() for row in task]
    by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))

    def predict(model, batches, **fixed):
        for some in batches:
            batch = data.pad_left([row["input_ids"] for row in some], tokenizer.pad_token_id)
            batch = {key: tensor.to(options.device) for key, tensor in batch.items()}
            if fixed:  # as many tokens for every prompt
                ours_only = {} if model is bare else {
                    "logits_to_keep": torch.tensor([-1], device=options.device)}
                model.generate(input_ids=batch["input_ids"], do_sample=False, **ours_only,
                               attention_mask=batch["attention_mask"], **fixed)
            else:
                evaluation.generate(model, tokenizer, batch, 50)

    fixed = dict(max_new_tokens=20, min_new_tokens=20)
    with torch.no_grad():
        seconds = in_turn({
            "BADIT": lambda: predict(ours, [by_length[-16:]], **fixed),
            "bare base model": lambda: predict(bare, [by_length[-16:]], **fixed),
        }, options.rounds, options.device)
        yield row("20 tokens for each prompt", seconds, "BADIT", "bare base model", "1.08")
        batches = {
            "our batches": evaluation.make_batches(
                rows, ALL_FLAGS["eval_batch_size"].default),
            "unsorted, batches of 8, 50 tokens": [
                range(first, min(first + 8, len(rows))) for first in range(0, len(rows), 8)]}
        count = 12 if options.full else 3
        seconds = in_turn({
            name: partial(predict, ours, [[rows[index] for index in batch]
                                          for batch in spread(all_of_them, count)],
                          **(fixed | dict(max_new_tokens=50, min_new_tokens=50)
                             if name.startswith("unsorted") else {}))
            for name, all_of_them in batches.items()}, 1, options.device, warmup=0)
    for name, all_of_them in batches.items():
        seconds[name] = [some * len(all_of_them) / count for some in seconds[name]]
    yield row(f"all {len(rows)} items of {suite.name}, from {count} batches", seconds,
              "our batches", "unsorted, batches of 8, 50 tokens", 0.5)


def spread(batches, count):
    """`count` batches from the middles of as many equal parts of the list."""
    return [batches[int((part + 0.5) * len(batches) / count)] for part in range(count)]


# --- 6. scaling ---------------------------------------------------------------------------------


@section
def scaling(options):
    """Seconds of a step of a small model against K, r, layers and length, with the exponent."""
    base = {"K": 8, "r": 4, "layers": 4, "length": 128}
    values = {"K": (2, 4, 8, 16, 32), "r": (1, 2, 4, 8, 16), "layers": (2, 4, 8),
              "length": (64, 128, 256, 512)}
    for name, tried in values.items():
        steps = {}
        for value in tried:
            at = base | {name: value}
            model = adapted(base_model(options, num_hidden_layers=at["layers"]), "badit",
                            num_experts=at["K"], rank=at["r"], top_k=max(1, at["K"] // 2))
            batch = random_batch(model, 4, at["length"], 32, options.device)
            steps[f"{name} = {value}"] = training_step(model, batch, options.device)
        seconds = in_turn(steps, options.rounds, options.device, warmup=2)
        times = [median(each) for each in seconds.values()]
        exponent = float(np.polyfit(np.log(tried), np.log(times), 1)[0])
        for key in seconds:
            yield row(f"scaling with {name}, exponent {exponent:.2f}", seconds, key)


@section
def bases(options):
    """One optimizer step on a quantised base, beside the dense one."""
    model, steps = base_model(options), {}
    for kind in ("dense", "int8", "nf4"):
        variant = adapted(copy.deepcopy(model), "badit")
        quantise(variant, kind)
        batch = random_batch(model, 4, 256, 32, options.device)
        steps[kind] = training_step(variant, batch, options.device)
    seconds = in_turn(steps, options.rounds, options.device, warmup=1)
    for kind in steps:
        yield row("training step by base", seconds, kind, None if kind == "dense" else "dense")


@section
def processes(options):
    """Two processes against one on the same global batch, by train.py's own clock."""
    if options.device.type == "cuda":
        return
    seconds = {}
    for count in (1, 2):
        folder = options.out / f"processes-{count}"
        several = ["--multi_gpu"] if count == 2 else []
        threads = max(1, options.threads // count)
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1",
             "--mixed_precision", "no", "--dynamo_backend", "no", *several,
             "--num_processes", str(count),
             "--num_cpu_threads_per_process", str(threads), ROOT / "train.py", "--overwrite",
             "--max_train_per_task", "8" if options.full else "2", "--epochs", "1",
             "--eval_tasks", "none", "--svd", "fast", "--output_dir", folder],
            env=os.environ | {"ACCELERATE_USE_CPU": "true"}, check=True, capture_output=True)
        results = json.loads((folder / "results.json").read_text())
        seconds[f"{count}"] = [results["run"]["seconds"]["train"]]
    yield row("SmolLM2 training, processes", seconds, "2", "1")


# --- 7. against TRL -----------------------------------------------------------------------------


def beside_trl(options):
    """An epoch of `train.py` beside TRL's SFTTrainer, each in a process of its own, in turn."""
    for package in ("trl", "peft"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--peer: {package} is not installed, run `pip install trl peft`")
    suite = data.load_suite(options.suite)
    per_task, left = divmod(options.rows, len(suite.tasks))
    if left or not per_task:
        raise InputError(f"--rows {options.rows} must be a multiple of {len(suite.tasks)}, the "
                         f"number of tasks of {suite.name}")
    variants = [*peer.OURS, *options.peer]
    measured = {name: [] for name in variants}
    for _ in tqdm(range(options.rounds), desc=" / ".join(variants), leave=False):
        for name in variants:
            measured[name].append(epoch_of(name, options, per_task))
            tqdm.write(f"{name}: {json.dumps(measured[name][-1])}", file=sys.stderr)
            check_same_work(name, measured[name][-1], measured["lora"][0], options)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in measured.items()}
    what = f"an epoch of {options.rows} rows of {suite.name}"
    for name, runs in measured.items():
        more = {"tokens_per_second": runs[0]["tokens"] / median(seconds[name]),
                "gib": max(run["gib"] for run in runs)}
        if name in options.peer:
            yield row(what, seconds, name, **more)
        for against in options.peer if name in peer.OURS else ():
            yield row(what, seconds, name, against, {"lora": 0.8, "badit": 0.833}[name], **more)


def epoch_of(name, options, rows_per_task):
    """What scripts/peer.py measures of one variant, in a new process."""
    words = [sys.executable, ROOT / "scripts" / "peer.py", name, "--suite", options.suite,
             "--rows_per_task", str(rows_per_task),
             *["--precision", "bf16"] * (options.dtype == torch.bfloat16)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if name in peer.PEERS and name not in peer.OUR_MALLOC:
        environment = {key: value for key, value in environment.items() if key not in MALLOC}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise InputError(f"scripts/peer.py {name} ends with status {done.returncode}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_same_work(name, mine, lora, options):
    """Raise InputError unless a variant trains on the same tokens, from the same first loss."""
    if mine["tokens"] != lora["tokens"]:
        raise InputError(f"{name} trains on {mine['tokens']} tokens, lora on {lora['tokens']}")
    near = 1e-2 if options.dtype == torch.bfloat16 else 1e-4  # relative
    same = math.isclose(mine["first_loss"], lora["first_loss"], rel_tol=near)
    if name in options.peer and not same:  # BADIT's own dropout acts from the start
        raise InputError(f"{name} starts at loss {mine['first_loss']}, lora at "
                         f"{lora['first_loss']}, from the same rows")


# --- the table ----------------------------------------------------------------------------------


SIZES = {"seconds": "{:.4g} s", "tokens_per_second": "{:.0f} tokens/s", "gib": "{:.2f} GiB"}


def markdown(rows, machine):
    """The table, and what it was measured on."""
    lines = ["| what | variant | seconds or GiB | against | ratio | quartiles | target |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        size = ", ".join(form.format(row[key]) for key, form in SIZES.items() if key in row)
        energy = f", {100 * row['captured']:.3f} % captured" if "captured" in row else ""
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        spread = f"{row['low']:.3f}–{row['high']:.3f}" if "low" in row else ""
        lines.append(f"| {row['what']} | {row['variant']} | {size}{energy} "
                     f"| {row.get('against') or ''} | {ratio} | {spread} "
                     f"| {row.get('target') or ''} |")
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    return "\n".join(lines) + f"\n\n{described}\n"


def machine_of(options):
    device = options.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": name or platform.machine(), "threads": options.threads,
            "dtype": str(options.dtype).removeprefix("torch."), "torch": torch.__version__,
            "rounds": options.rounds, "malloc settings": "MALLOC_TOP_PAD_" in os.environ}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true",
                        help="SmolLM2 and Qwen3-8B's layer shapes (default: tiny shapes)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS,
                        help="default: all, but `processes` with --full alone")
    parser.add_argument("--rounds", type=int,
                        help="of every comparison (default: 3, with --full 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--bf16", action="store_true", help="in place of float32, on a CPU")
    parser.add_argument("--suite", default="mini", help="for `evaluate` and --peer (default: mini)")
    parser.add_argument("--peer", nargs="+", choices=peer.PEERS, metavar="NAME",
                        help="alone: train.py's lora and badit beside SFTTrainer (`pip install "
                             "trl peft`): " + ", ".join(peer.PEERS))
    parser.add_argument("--rows", type=int, default=240,
                        help="of the suite, as many of each task, for --peer (default: 240)")
    parser.add_argument("--adapter", help="of SmolLM2, for `evaluate` (default: untrained)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"),
                        help="folder for benchmark.json and benchmark.md")
    parser.add_argument("--peak", choices=("targets", "all"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (7 if options.full else 3)
    sections = {"beside_trl": beside_trl} if options.peer else SECTIONS
    if options.peer:
        options.only = [*sections]
    options.only = options.only or [name for name in SECTIONS
                                    if options.full or name != "processes"]
    if not (options.peak or os.environ.keys() & MALLOC.keys()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    cuda = torch.cuda.is_available()
    options.device = torch.device("cuda" if cuda else "cpu")
    options.dtype = torch.bfloat16 if cuda or options.bf16 else torch.float32
    torch.set_num_threads(options.threads)
    products.avoid_cudnn_attention()  # as train.py
    onednn = not cuda and products.use_onednn()
    if options.peak:
        print_peak(options)
        return 0
    rows = []
    try:
        for name in tqdm(options.only, desc="sections"):
            for row in sections[name](options):
                rows.append({"section": name} | row)
                tqdm.write(json.dumps(rows[-1]))
    except InputError as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    machine = machine_of(options) | {"float32 products": "oneDNN" if onednn else "default"}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "benchmark.json", {"machine": machine, "rows": rows})
    text = markdown(rows, machine)
    (options.out / "benchmark.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
