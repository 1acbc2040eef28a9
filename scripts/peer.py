"""Train one epoch as a user would, here or with TRL; `benchmark.py --peer` starts one process each.

TRL's SFTTrainer gets PEFT's LoRA of the same rank on the same layers, the same rows as tokens and
labels (no loss on prompts), the same micro-batch, optimizer, schedule and precision. It prints one
line of JSON: seconds of the epoch without loading, its tokens, the peak memory of the process, and
the loss of the rows that are our first batch, before any training.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs.errors import InputError, error_lines  # noqa: E402

RANK = 32
# SFTTrainer as it comes would checkpoint activations, which costs time and saves memory: only the
# last does. The others get one after the other what makes the difference.
PEERS = {"trl": {}, "trl-malloc": {}, "trl-products": {},
         "trl-by-length": {"train_sampling_strategy": "group_by_length"},
         "trl-checkpointing": {"gradient_checkpointing": True}}
OUR_MALLOC = ("trl-malloc", "trl-products", "trl-by-length")  # the settings of scripts/setup.sh
OUR_PRODUCTS = ("trl-products", "trl-by-length")  # harness/products.py
OURS = {"lora": ("--rank", str(RANK)), "badit": ()}


def rows_of(args):
    """(rows of the training files in our order, the rows of our first batch, the tokenizer)."""
    import data  # these three not above: --help must not wait for them
    import models  # as `data`
    from train import parse_flags  # as `data`
    flags, _ = parse_flags(train_flags("lora", args, Path("unused")))
    suite = data.cut(data.load_suite(args.suite), flags.max_train_per_task, 0)
    tokenizer = models.load_tokenizer(flags.model)
    encoded = data.encode_suite(suite, tokenizer, flags.max_length, splits=("train",))
    rows = [row for task in encoded.train.values() for row in task]
    plan = data.EpochPlan(rows, args.batch, args.batch, flags.seed, "mixed")
    return rows, plan[0].rows, tokenizer


def train_flags(method, args, folder):
    """The flags of `train.py` for our side."""
    return ["--method", method, *OURS[method], "--suite", args.suite, "--max_train_per_task",
            str(args.rows_per_task), "--batch_size", str(args.batch), "--epochs", "1",
            "--eval_tasks", "none", "--output_dir", str(folder)]


def ours(method, args):
    """One epoch of `train.py`."""
    import train  # not above: as in `rows_of`
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        status = train.main(train_flags(method, args, run))
        if status:  # it has said why
            sys.exit(status)
        results = json.loads((run / "results.json").read_text())
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {"seconds": results["run"]["seconds"]["train"],
            "tokens": sum(step["tokens"] for step in steps), "first_loss": steps[0]["loss"]}


def as_labels(row):
    """A row as SFTTrainer takes it: no loss on the prompt."""
    prompt = len(row["input_ids"]) - row["num_targets"]
    return {"input_ids": row["input_ids"], "labels": [-100] * prompt + row["input_ids"][prompt:]}


def sft_trainer(args, rows, tokenizer, folder, **options):
    """TRL's trainer for one epoch over `rows`, by our defaults."""
    import torch  # not above: as in `rows_of`
    from datasets import Dataset  # as torch
    from peft import LoraConfig  # need not be installed
    from trl import SFTConfig, SFTTrainer  # need not be installed

    import models  # as torch
    from harness.arguments import ALL_FLAGS  # as torch
    bf16 = args.precision == "bf16"
    model, _ = models.load("smollm2-135m", torch.bfloat16 if bf16 else torch.float32)
    default = {name: ALL_FLAGS[name].default for name in
               ("learning_rate", "warmup_ratio", "max_grad_norm", "max_length")}
    warmup = default.pop("warmup_ratio")
    steps = math.ceil(len(rows) / args.batch)
    config = SFTConfig(
        output_dir=folder, bf16=bf16, use_cpu=not torch.cuda.is_available(), num_train_epochs=1,
        per_device_train_batch_size=args.batch, lr_scheduler_type="cosine", weight_decay=0.0,
        warmup_steps=math.ceil(warmup * steps), report_to="none", save_strategy="no",
        logging_steps=1, **{"gradient_checkpointing": False} | default | options)
    lora = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.05, target_modules=["gate_proj"])
    return SFTTrainer(model=model, args=config, processing_class=tokenizer, peft_config=lora,
                      train_dataset=Dataset.from_list([as_labels(row) for row in rows]))


def peer(name, args):
    """One epoch of SFTTrainer."""
    import torch  # not above: as in `rows_of`

    from harness import products  # as torch
    rows, first, tokenizer = rows_of(args)
    if name in OUR_PRODUCTS and not torch.cuda.is_available():
        products.use_onednn()
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(args, rows, tokenizer, folder, **PEERS[name])
        batch = trainer.data_collator([as_labels(row) for row in first])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item()
        trainer._total_train_tokens = 0  # that was no training
        trained = trainer.train()
    *_, last, _ = trainer.state.log_history
    return {"seconds": trained.metrics["train_runtime"], "tokens": int(last["num_tokens"]),
            "first_loss": loss}


def peak_gib():
    """Peak memory of this process, or of its GPU."""
    import torch  # not above: as in `rows_of`
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("variant", choices=[*OURS, *PEERS])
    parser.add_argument("--suite", default="superni")
    parser.add_argument("--rows_per_task", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = args.precision  # as `accelerate launch` does
    try:
        measured = (ours if args.variant in OURS else peer)(args.variant, args)
    except InputError as error:
        print(error_lines(error), file=sys.stderr)
        return 2
    print(json.dumps(measured | {"gib": peak_gib()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
