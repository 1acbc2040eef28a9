"""The table of docs/scale.md: what the paper's models, and two larger ones, take of a device.

    python scripts/plan_table.py          # writes it into docs/scale.md; a few minutes

By `train.py --plan` under bf16, from shapes that stand in the models' public configurations.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from harness import plan  # noqa: E402
from harness.arguments import parse_flags  # noqa: E402
from inputs.files import write_text  # noqa: E402

DOCS = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
# model_type, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
# num_key_value_heads, head_dim, vocab_size, tie_word_embeddings
SHAPES = {
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True),
    "qwen3-8b": ("qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "llama3-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128_256, True),
    "llama3-8b": ("llama", 4096, 14_336, 32, 32, 8, 128, 128_256, False),
    "gemma2-2b": ("gemma2", 2304, 9216, 26, 8, 4, 256, 256_000, True),
    "gemma2-9b": ("gemma2", 3584, 14_336, 42, 16, 8, 256, 256_000, True),
    "Qwen3-32B": ("qwen3", 5120, 25_600, 64, 64, 8, 128, 151_936, False),
    "Llama-3-70B": ("llama", 8192, 28_672, 80, 64, 8, 128, 128_256, False),
}
NAMES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
         "tie_word_embeddings")


def write_config(folder, shape):
    """A folder that --model takes for a plan: it holds no weights."""
    folder.mkdir()
    config = dict(zip(NAMES, shape, strict=True), max_position_embeddings=8192)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def table_of(name, folder):
    """The lines of one model, a kind of base each."""
    args, _ = parse_flags(["--model", str(folder)])
    rows = list(plan.plan(args, torch.bfloat16))
    for base in plan.BASES:
        mine = [row for row in rows if row.base == base]
        weights = " / ".join(f"{row.weights / 1e9:.1f}" for row in mine)
        one, *_, last = mine
        rest = one.adapter + one.adam + one.gradients + one.sums
        kept = [" / ".join(f"{size(row) / 1e9:.1f}" for row in (one, last))
                for size in (lambda row: row.checkpointed, lambda row: row.activations)]
        totals = " / ".join(f"{row.total(True) / 1e9:.1f}" for row in mine)
        fits = " / ".join(plan.fits(row.total(True)) for row in mine)
        yield (f"| {name} | {base} | {weights} | {rest / 1e9:.2f} | {kept[0]} | {kept[1]} | "
               f"{totals} | {fits} |")


def main():
    lines = ["| model | base | weights on 1 / 2 / 4 / 8 processes | adapter, Adam, gradients, "
             "Eq. 8 | activations, checkpointed, 8 rows / 1 row | not checkpointed | total, "
             "checkpointed, on 1 / 2 / 4 / 8 | fits |", "|---|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            lines += table_of(name, write_config(Path(folder) / name, shape))
            print("\n".join(lines[-3:]), flush=True)
    before, after = re.split(r"<!-- table -->\n(?:\|.*\n)*", DOCS.read_text(encoding="utf-8"))
    write_text(DOCS, "<!-- table -->\n".join([before, "\n".join(lines) + "\n" + after]))


if __name__ == "__main__":
    main()
