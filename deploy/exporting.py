"""Export an adapter: fit its update, measure the export, write it with a model card."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

import adapter
import data
import models
from deploy import low_rank
from harness.adapter_config import ADAPTER_CONFIG, read_adapter_config
from inputs import formats
from inputs.errors import InputError, one_line
from inputs.files import atomic_folder, write_json, write_text
from inputs.model_folders import read_config
from inputs.tensors import write_tensors
from metrics import named_metrics
from registry import EMBEDDED, MODELS, method_class

BATCH = 8  # rows of a calibration pass


def export(args):
    """Write the export that the flags ask for into --out. Raises InputError."""
    config, settings = read_adapter_config(args.adapter)
    if obstacle := method_class(config.method)(settings).export_obstacle():
        raise InputError(f"{config.method} cannot be exported as a LoRA adapter: {obstacle}")
    if not args.merged and models.is_multimodal(args.model):
        raise InputError(f"model {args.model} is multimodal: PEFT knows the layers of its text "
                         "model by other names; give --merged")
    device = PartialState().device
    device = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    run = run_of(args.adapter, config)
    # A checkpoint that is stored in float32 has other weights when loaded in bf16, as the run did.
    dtype = torch.bfloat16 if run and run["precision"] == "bf16" else torch.float32
    trained, tokenizer = models.load(args.model, dtype)
    adapter.load(trained.to(device, torch.float32), args.adapter).eval()
    check_layers(trained.adapted_by, args.approximate)
    suite, encoded = read_rows(args, run, tokenizer, config)
    updates, form = fit(args, trained, tokenizer, encoded.train, device)
    stored = read_config(models.locate(args.model))[0].dtype or torch.float32
    if dtype == torch.bfloat16 and stored != dtype and not args.merged:
        form += "; load the base in bfloat16, as the run did"
    exported, _ = models.load(args.model, dtype)
    low_rank.merge(exported.to(device, torch.float32), updates, stored if args.merged else None)
    kl, measured = compare(trained, exported, first_of_each(encoded.test, args.rows), suite.name)
    print(one_line(form), one_line(measured), sep="\n", flush=True)
    if not kl <= args.max_kl:  # it may be NaN
        raise InputError(f"KL(adapter || export) is {kl:.3g}, not below --max_kl {args.max_kl:g}: "
                         "nothing was written")
    rank = max(len(update.A) for update in updates.values())
    with atomic_folder(args.out) as folder:
        write_text(folder / "README.md", card(args, config, settings, run, [form, measured]))
        if args.merged:
            exported.to("cpu", stored).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            write_lora(folder, updates, rank, args.model)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(one_line(f"{args.out}: {size / 2**20:.1f} MiB"))


# --- the update ---------------------------------------------------------------------------------


def check_layers(method, approximate):
    """Raise InputError if layers define no update, or --approximate is missing or needless."""
    layers = method.layers.values()
    for layer in layers:
        if getattr(layer, "constant_update", None) is None:
            raise InputError(f"{method.name} cannot be exported as a LoRA adapter: "
                             f"{type(layer).__name__} defines no constant_update")
    routed = any(layer.depends_on_token for layer in layers)
    if routed and not approximate:
        raise InputError("this adapter's experts depend on the token, so no LoRA adapter equals "
                         "it: --approximate exports the nearest one and measures the difference")
    if approximate and not routed:
        raise InputError(f"--approximate has no effect: this {method.name} adapter is exported "
                         "exactly")


def fit(args, model, tokenizer, train, device):
    """Return {layer: Update} of a wrapped model, and a line that says how they were found.

    Layers that depend on the token are fitted to rows of `train`. Raises InputError for a --rank
    that cuts nothing.
    """
    layers, how, mixing = model.adapted_by.layers, "exact", {}
    if args.approximate:
        rows = sorted(first_of_each(train, args.rows), key=lambda row: len(row["input_ids"]))
        batches = [data.pad_left([row["input_ids"] for row in rows[first:first + BATCH]],
                                 tokenizer.pad_token_id) for first in range(0, len(rows), BATCH)]
        batches = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
        mixing = {name: low_rank.least_squares(sums)
                  for name, sums in low_rank.calibrate(model, batches).items()}
        how = (f"approximated: {len(mixing)} layers with experts that depend on the token, each "
               f"replaced by a constant that was fitted to {len(rows)} training rows")
    updates, lost = {}, 0.0
    for name, layer in layers.items():
        update = low_rank.Update(*layer.constant_update(mixing.get(name)))
        if args.rank is not None and args.rank >= len(update.A):
            raise InputError(f"--rank {args.rank}: the update has rank {len(update.A)} already")
        updates[name], cut = low_rank.refactored(update, args.rank)
        lost = max(lost, cut)
    rank = max(len(update.A) for update in updates.values())
    cut = f"; --rank cut off at most {lost:.1%} of a layer's update" if args.rank else ""
    updates = {name: low_rank.padded(update, rank) for name, update in updates.items()}
    return updates, f"{how}; rank {rank}{cut}"


def run_of(path, config):
    """Return the results.json of the adapter's run, or None."""
    path = Path(path).resolve()
    for folder in (path.parent, path.parent.parent):
        if (folder / "results.json").is_file():
            results = formats.load_keys(folder / "results.json",
                                        ("args", "base_sha256", "metrics", "precision"))
            return results if results["base_sha256"] == config.base_sha256 else None
    return None


def read_rows(args, run, tokenizer, config):
    """Return the suite of --suite or of the adapter's run, and its first rows encoded."""
    name, folder, tasks = args.suite, args.data_dir, None
    if name is None:
        if run is None:
            raise InputError(f"no results.json of its run is beside {args.adapter}: name tasks "
                             "with --suite, to measure the export")
        name, folder = run["args"]["suite"], run["args"]["data_dir"]
        tasks = config.trained_on.get("tasks", run["args"]["tasks"])  # one in --setting single
    suite = data.load_suite(name, folder)
    suite = data.select_tasks(suite, tasks) if tasks else suite
    each = -(-args.rows // len(suite.tasks))
    suite = data.cut(suite, each, each)
    length = 1024 if run is None else run["args"]["max_length"]
    return suite, data.encode_suite(suite, tokenizer, length, config.chat_template)


def first_of_each(by_task, count):
    """Return at most `count` rows: the first of each task, then the second of each, ..."""
    longest = max(map(len, by_task.values()))
    rows = [rows[index] for index in range(longest) for rows in by_task.values()
            if index < len(rows)]
    return rows[:count]


# --- the measurement ----------------------------------------------------------------------------


def divergence(p, q):
    """Return KL(p || q) of every token (...), from logits p and q (..., vocabulary)."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def compare(trained, exported, rows, suite):
    """Return KL(trained || exported) per token in nats, and a line with all that was measured.

    `rows` are encoded test rows of the suite with that name; both models are on one device.
    """
    device = next(exported.parameters()).device
    kl = same = tokens = 0
    difference = largest = torch.zeros((), device=device)
    for row in tqdm(rows, desc="compare", unit="prompt", delay=2, leave=False):  # one: no padding
        ids = torch.tensor([row["input_ids"]], device=device)  # (1, seq)
        p, q = (model(input_ids=ids, use_cache=False).logits[0].float()
                for model in (trained, exported))  # (seq, vocabulary)
        kl += float(divergence(p, q).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
        difference = torch.maximum(difference, (p - q).abs().max())
        largest = torch.maximum(largest, p.abs().max())
    kl = max(kl / tokens, 0.0)  # NaN stays NaN
    return kl, (f"on {len(rows)} held-out prompts of {suite} ({tokens:,} tokens): KL(adapter || "
                f"export) {kl:.2g}, same most likely token at {same / tokens:.1%}, largest "
                f"difference of a logit {float(difference / largest):.1e} of the largest logit")


# --- files --------------------------------------------------------------------------------------


def write_lora(folder, updates, rank, model):
    """Write a LoRA adapter as PEFT, transformers and vLLM read it, in float32.

    Its scale is lora_alpha / r = 1.
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
        "base_model_name_or_path":
            None if model == EMBEDDED else hub_name(model) or str(Path(model).resolve())})


def card(args, config, settings, run, said):
    """Return the README.md of an export, with front matter for the hub.

    `run`: results.json of the adapter's run, or None. `said`: the lines about fit and measurement.
    """
    name = hub_name(args.model)
    front = [f"base_model: {name}"] if name else []
    front += [f"library_name: {'transformers' if args.merged else 'peft'}",
              "pipeline_tag: text-generation", "tags:", "- badit"]
    base = name or (args.model if args.model in MODELS else config.model_type)
    given = ", ".join(f"{key} {value}" for key, value in sorted(asdict(settings).items()))
    stored = "" if config.base == "dense" else (
        f"; trained on it stored as {config.base}, exported for the dense one")
    lines = [*said, f"method: {config.method} ({given})",
             f"base model: {base}, SHA-256 of its weights as float32 {config.base_sha256}{stored}"]
    if run is not None:
        trained = ", ".join(f"{key} {run['args'][key]}" for key in (
            "suite", "setting", "epochs", "learning_rate", "seed"))
        scores = ", ".join(f"{key} {value:.2f}" for key, value in named_metrics(run)
                           if value is not None)
        lines += [f"trained: {trained}, precision {run['precision']}", f"scores: {scores}"]
    return "\n".join([
        "---", *front, "---", "", f"# {config.method} on {base}", "",
        "A whole checkpoint: the adapter is merged into its weights." if args.merged else
        "A LoRA adapter: `PeftModel.from_pretrained(base, folder)`.", "",
        *(f"- {line}" for line in lines), "",
        f"Format of its prompts, with{'' if config.chat_template else 'out'} the model's chat "
        "template around it:", "",
        "```", data.build_prompt("{definition}", "{input}"), "```", ""])


def hub_name(model):
    """Return the base model's name on the hub, or None: the embedded model's weights differ there.
    """
    if model == EMBEDDED or model not in MODELS and Path(model).is_dir():
        return None
    return MODELS.get(model, model)
