"""An adapter of a run as a standard LoRA adapter, or merged into a whole checkpoint."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

import adapter
import data
import models
from deploy import card, fidelity, low_rank
from harness.adapter_config import ADAPTER_CONFIG, read_adapter_config
from inputs import formats
from inputs.errors import InputError, one_line
from inputs.files import fsync, write_json, write_text
from inputs.model_folders import read_config
from inputs.tensors import write_tensors
from registry import EMBEDDED, MODELS

BATCH = 8  # rows of a calibration pass
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


class Form(NamedTuple):
    """How an export stands for the adapter."""

    rank: int
    fitted: int  # layers whose experts depend on the token
    rows: int  # of the calibration
    lost: float  # largest share of a layer's update that --rank has cut off


def export(args):
    """Write what the flags ask for into --out -> exit status."""
    config, settings = read_adapter_config(args.adapter)
    device = PartialState().device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    run = run_of(args.adapter, config)
    trained, tokenizer = models.load(args.model)
    suite, encoded = read_rows(args, run, tokenizer, config)
    adapter.load(trained.to(device), args.adapter).eval()
    updates, form = fit(args, trained, tokenizer, encoded.train, device)
    dtype = stored_dtype(args.model) if args.merged else None
    exported, _ = models.load(args.model)
    low_rank.merge(exported.to(device), updates, dtype)
    near = fidelity.compare(trained, exported, tokenizer, in_turn(encoded.test, args.rows),
                            {name: task.metric for name, task in suite.tasks.items()},
                            args.max_new_tokens)
    for line in card.measured(form, near, suite.name):
        print(one_line(line), flush=True)
    if near.kl > args.max_kl:
        raise InputError(f"the export would be far from the adapter: its KL of {near.kl:.4f} is "
                         f"above --max_kl {args.max_kl:g}; nothing was written")
    text = card.render(args, config, settings, run, form, near, suite.name, hub_name(args.model))
    with whole_folder(args.out) as folder:
        write_text(folder / "README.md", text)
        if args.merged:
            exported.to("cpu", dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            write_lora(folder, updates, form.rank, args.model)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(one_line(f"{args.out}: {size / 2**20:.1f} MiB"
                   + ("" if args.merged else f"; {serving(form.rank)}")))
    return 0


# --- the update ---------------------------------------------------------------------------------


def fit(args, model, tokenizer, train, device):
    """({layer: Update}, Form) of a wrapped model; calibrated on rows of `train` where need be."""
    layers = model.adapted_by.layers
    rows = in_turn(train, args.rows) if args.approximate else []
    mixing = {}
    if rows:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        batches = [data.pad_left([row["input_ids"] for row in rows[first:first + BATCH]],
                                 tokenizer.pad_token_id) for first in range(0, len(rows), BATCH)]
        batches = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
        mixing = {name: low_rank.least_squares(sums)
                  for name, sums in low_rank.calibrate(model, batches).items()}
    updates, lost = {}, 0.0
    for name, layer in layers.items():
        update = low_rank.constant_update(layer, mixing.get(name))
        if args.rank is not None and args.rank >= len(update.A):
            raise InputError(f"--rank {args.rank}: the update has rank {len(update.A)} already")
        updates[name], cut = low_rank.refactored(update, args.rank)
        lost = max(lost, cut)
    rank = max(len(update.A) for update in updates.values())
    updates = {name: low_rank.padded(update, rank) for name, update in updates.items()}
    return updates, Form(rank, len(mixing), len(rows), lost)


def run_of(path, config):
    """The Results of the run that left an adapter there, or None."""
    path = Path(path).resolve()
    file = next((folder / "results.json" for folder in (path.parent, path.parent.parent)
                 if (folder / "results.json").is_file()), None)
    if file is None:
        return None
    _, results = formats.read(file, formats.Results)
    return results if results.base_sha256 == config.base_sha256 else None


def read_rows(args, run, tokenizer, config):
    """(the suite, its first rows encoded): that of --suite, or of the adapter's run."""
    name, folder, tasks = args.suite, args.data_dir, None
    if name is None:
        if run is None:
            raise InputError(f"beside {args.adapter} stands no results.json of its run: --suite "
                             "names tasks on which to measure the export")
        name, folder = run.args["suite"], run.args["data_dir"]
        tasks = config.trained_on.get("tasks", run.args["tasks"])  # of --setting single: one
    suite = data.load_suite(name, folder)
    suite = data.select_tasks(suite, tasks) if tasks else suite
    each = -(-args.rows // len(suite.tasks))
    suite = data.cut(suite, each, each)
    length = 1024 if run is None else run.args["max_length"]
    return suite, data.encode_suite(suite, tokenizer, length, config.chat_template)


def in_turn(by_task, count):
    """At most `count` rows, one of each task, then a second one, ..."""
    longest = max(map(len, by_task.values()))
    rows = [rows[index] for index in range(longest) for rows in by_task.values()
            if index < len(rows)]
    return rows[:count]


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(path):
    """A context with a folder that becomes `path` at its end, or leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            os.chmod(file, 0o755 if file == temporary else 0o644)  # as made they are private
            fsync(file)
        try:
            os.rename(temporary, path)
        except OSError as error:
            raise InputError(f"--out {path} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_lora(folder, updates, rank, model):
    """The two files of a LoRA adapter as PEFT, transformers and vLLM read them, in float32.

    With lora_alpha = r their scale is 1.
    """
    tensors = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.A.float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.B.float()
    write_tensors(folder / adapter.WEIGHTS_FILE, tensors)
    write_json(folder / ADAPTER_CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in updates}),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "base_model_name_or_path": where(model)})


def hub_name(model):
    """The name of the base model on the hub, or None for one that is not there as it is here."""
    return None if model == EMBEDDED else MODELS.get(model)


def where(model):
    """Where a loader finds the base model, or None: of the embedded one, where it was converted."""
    if model == EMBEDDED:
        return None
    return hub_name(model) or str(Path(model).resolve())


def stored_dtype(model):
    """The type of a checkpoint's weights, as its configuration names it; float32 where it does not.
    """
    return read_config(models.locate(model)).dtype or torch.float32


def serving(rank):
    """What vLLM needs to be told of a rank."""
    fits = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    listed = ", ".join(map(str, VLLM_RANKS))
    if not fits:
        return f"vLLM takes no rank above {VLLM_RANKS[-1]}: give --rank, or --merged"
    return (f"vLLM needs --max-lora-rank {fits[0]}"
            + ("" if rank in VLLM_RANKS else f" (it allows {listed})"))
