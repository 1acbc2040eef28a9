"""Train and evaluate a method on a suite of tasks: `accelerate launch train.py --method badit`.

Algorithm 1 of the paper is `train_stage`; what a method does differently is in its hooks
(method.py). Everything that a run leaves behind is in --output_dir.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import data
import evaluation
import models
import results
from baselines import METHODS
from errors import InputError
from flags import fraction, positive, positive_int, seed
from method import Stage, load_adapter, method_of, read_adapter_config, save_adapter
from utils import cache_dir, stable_seed

PAPER_BATCH = 8
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
# Flags that no method reads when nothing is trained, and flags that need one of the settings.
TRAINING_FLAGS = {"setting", "task_order", "epochs", "max_train_per_task", "batch_size",
                  "gradient_accumulation_steps", "learning_rate", "warmup_ratio", "max_grad_norm",
                  "gradient_checkpointing", "eval_tasks", "eval_before", "paper_metrics",
                  "single_task_results"}
SETTING_FLAGS = {"task_order": ("sequential",), "paper_metrics": ("sequential",),
                 "single_task_results": ("mixed", "sequential")}
# What a run writes into its folder, and what --overwrite may delete there.
OUTPUTS = (r"results\.json", r"log\.jsonl", r"regroup\.jsonl", r"figure\.png",
           r"predictions/\d{2,}_[\w.-]+\.jsonl(\.partial)?",
           r"adapter/([\w.-]+/)?adapter_(model\.safetensors|config\.json)", r"tracking/badit/.+",
           # atomic writes that were killed
           r"(.+/)?\.(results\.json|figure\.png|\d{2,}_[\w.-]+\.jsonl|adapter_[\w.]+)\.\w+\.tmp")


# --- flags --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see `python train.py --help`")


def build_parser():
    """All flags with the paper's defaults (Appendix G.4)."""
    parser = Parser(prog="train.py", allow_abbrev=False, description=__doc__.split("\n")[0],
                    epilog="Precision and processes come from `accelerate launch`, for example "
                           "`accelerate launch --mixed_precision bf16 train.py --method badit`.")
    add = parser.add_argument_group("run").add_argument
    add("--method", default="badit", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    add("--model", default=models.EMBEDDED,
        help=f"one of {', '.join(models.MODELS)}, or a checkpoint's folder (default: %(default)s)")
    add("--setting", choices=("mixed", "sequential", "single"), default="mixed",
        help="train all tasks together, one after the other, or each alone from the base model "
             "(default: %(default)s)")
    add("--seed", type=seed, default=1, help="also decides the task order (default: 1)")
    add("--output_dir", help="default: runs/<method>-<setting>-<model>-seed<seed>")
    add("--overwrite", action="store_true",
        help="reuse an --output_dir that is in use, deleting only what this program wrote there")
    add("--report_to", choices=("none", *TRACKERS), default="none",
        help="experiment tracker, besides the files in --output_dir (default: none)")

    add = parser.add_argument_group("data").add_argument
    add("--suite", default="mini", help="mini (shipped), superni, or a folder of tasks in the "
                                        "natural-instructions layout (default: mini)")
    add("--data_dir", help="where SuperNI is (default: $BADIT_DATA, or the download)")
    add("--tasks", nargs="+", metavar="TASK",
        help="only these, by name or T-number (T363)")
    add("--task_order", nargs="+", metavar="TASK",
        help="order for --setting sequential (default: that of the seed, Table 5)")
    add("--max_train_per_task", type=positive_int, metavar="N", help="the first N (default: all)")
    add("--max_eval_per_task", type=positive_int, metavar="N", help="the first N (default: all)")
    add("--max_length", type=positive_int, default=1024,
        help="tokens of prompt + target in training, of the prompt in evaluation (default: 1024)")
    add("--chat_template", action="store_true", help="wrap prompts in the model's chat template")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=10, help="per stage (default: 10)")
    add("--batch_size", type=positive_int, metavar="N",
        help=f"per process (default: {PAPER_BATCH} / (processes * accumulation steps))")
    add("--gradient_accumulation_steps", type=positive_int, default=1, metavar="N",
        help="micro-batches per optimizer step and process (default: 1)")
    add("--learning_rate", type=positive, default=2e-4, help="peak of AdamW (default: 2e-4)")
    add("--warmup_ratio", type=fraction, default=0.03,
        help="share of a stage's steps before the cosine (default: 0.03)")
    add("--max_grad_norm", type=positive, default=1.0, help="clipping (default: 1.0)")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_tasks", choices=("all", "seen", "none"), default="all",
        help="tasks evaluated after every stage (default: all)")
    add("--eval_before", action="store_true", help="evaluate before training too, as row 0")
    add("--eval_batch_size", type=positive_int, default=16, help="per process (default: 16)")
    add("--max_new_tokens", type=positive_int, default=50, help="per answer (default: 50)")
    add("--eval_only", action="store_true", help="evaluate --adapter DIR; nothing is trained")
    add("--adapter", metavar="DIR", help="adapter folder of a finished run, for --eval_only")
    add("--single_task_results", metavar="FILE",
        help="results.json of the same run with --setting single, for the metric `forward`")
    add("--paper_metrics", action="store_true",
        help="also Backward and Forget Rate as the released scripts compute them")

    add = parser.add_argument_group("adapters").add_argument
    add("--target_modules", nargs="+", default=["gate_proj"], metavar="NAME",
        help="last name component of the linear layers to adapt (default: gate_proj)")
    add("--rank", type=positive_int, default=4, help="r, of each expert (default: 4)")
    add("--alpha", type=positive, default=32.0, help="scaling is alpha / rank (default: 32)")
    add("--dropout", type=fraction, default=0.05, help="on the adapter's input (default: 0.05)")
    add("--num_experts", type=positive_int, default=8, help="K (default: 8)")
    add("--top_k", type=positive_int, default=4, help="experts per token (default: 4)")
    add("--svd", choices=("exact", "fast"), default="exact",
        help="decomposition: LAPACK's, or a randomised one for large weights (default: exact)")
    for name, method in METHODS.items():
        if "add_flags" in vars(method):  # an inherited one is declared already
            method.add_flags(parser.add_argument_group(name))
    return parser


def parse_flags(argv):
    """Parse and cross-check `argv` -> (args, names of the flags that were typed)."""
    parser = build_parser()
    untyped = object()
    defaults = vars(parser.parse_args([]))
    probe = argparse.Namespace(**dict.fromkeys(defaults, untyped))
    typed = {name for name, value in vars(parser.parse_args(argv, probe)).items()
             if value is not untyped}
    args = parser.parse_args(argv)
    if args.eval_only and args.adapter:
        method = read_adapter_config(args.adapter)["method"]
        if "method" in typed and args.method != method:
            raise InputError(f"--method {args.method}: the adapter was made by {method}")
        args.method = method
    if args.method not in METHODS:
        raise InputError(f"--method {args.method!r} is unknown; allowed: {', '.join(METHODS)}")
    refuse_unread_flags(args, typed)
    if not args.eval_only:
        method = METHODS[args.method]
        method.check({name: getattr(args, name) for name in method.reads}, typed)
    args.output_dir = Path(args.output_dir or default_output_dir(args))
    return args, typed


def refuse_unread_flags(args, typed):
    """Raise InputError for a typed flag that this method or setting would ignore."""
    method = METHODS[args.method]
    adapter_flags = {name for each in METHODS.values() for name in each.reads} - {"seed"}
    if args.eval_only:
        unread, why = TRAINING_FLAGS | adapter_flags, "with --eval_only"
        if method.trains and not args.adapter:
            raise InputError("--eval_only needs --adapter DIR (or --method base)")
    else:
        unread = (adapter_flags - set(method.reads)) | {"adapter"}
        why = f"by --method {args.method} in training"
        if not method.trains:
            unread, why = unread | TRAINING_FLAGS, f"by --method {args.method}"
    for flag in sorted(typed & unread):
        raise InputError(f"--{flag} is not read {why}")
    for flag, settings in SETTING_FLAGS.items():
        if flag in typed and args.setting not in settings:
            raise InputError(f"--{flag} is not read with --setting {args.setting}, "
                             f"only with {' or '.join(settings)}")
    if args.paper_metrics and args.eval_tasks != "all":
        raise InputError("--paper_metrics needs all rows of the score matrix: --eval_tasks all")


def default_output_dir(args):
    setting = "eval" if args.eval_only or not METHODS[args.method].trains else args.setting
    return f"runs/{args.method}-{setting}-{Path(args.model).name}-seed{args.seed}"


# --- a run --------------------------------------------------------------------------------------


class Run:
    """What the parts of one run share: flags, accelerator, data, model, timers, records."""

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        self.trains = METHODS[args.method].trains and not args.eval_only
        self.tasks = self.order = self.encoded = self.tokenizer = None  # load_data
        self.model = self.method = self.base_parameters = None  # load_model
        self.single_task_scores = self.single_base_sha256 = None
        self.seconds = defaultdict(float)
        self.regroupings = []
        self.steps = 0

    @property
    def global_batch(self):
        """Rows of one optimizer step, over all micro-batches and processes."""
        steps = self.args.gradient_accumulation_steps
        return self.args.batch_size * self.accelerator.num_processes * steps

    @contextlib.contextmanager
    def timed(self, part):
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def stream(self, path, mode="w"):
        """`path` opened for writing on the main process, a sink on the others."""
        if not self.accelerator.is_main_process:
            return open(os.devnull, "w")
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode, encoding="utf-8")

    def print(self, text):
        self.accelerator.print(text, flush=True)


def make_accelerator(args):
    """The Accelerator, and a batch size for every process. Raises InputError."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher sets
    if precision not in ("no", "bf16"):
        raise InputError(f"--mixed_precision {precision} is not supported; allowed: no, bf16")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir / "tracking",
        # Buffers are groupings, equal on all processes by construction.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise InputError(f"the launcher asks for {accelerator.gradient_accumulation_steps} "
                         "accumulation steps: give --gradient_accumulation_steps to train.py, not "
                         "to accelerate launch")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(f"distributed training by {kind} is not supported, only DDP: sharded "
                         "gradients would make Eq. 8 wrong, and the trainable state is small")
    if args.batch_size is None:
        micro_batches = accelerator.num_processes * args.gradient_accumulation_steps
        if PAPER_BATCH % micro_batches:
            raise InputError(f"the global batch of {PAPER_BATCH} does not split over "
                             f"{micro_batches} processes * accumulation steps: give --batch_size")
        args.batch_size = PAPER_BATCH // micro_batches
    return accelerator


def load_data(run):
    """Read, cut and tokenise the suite, with nothing but the tokenizer loaded."""
    args = run.args
    suite = data.load_suite(args.suite, args.data_dir)
    if args.tasks:
        suite = data.select_tasks(suite, args.tasks)
    run.order = data.task_order(suite.tasks, args.seed, args.task_order)
    run.tasks = {name: task._replace(train=task.train[:args.max_train_per_task],
                                     test=task.test[:args.max_eval_per_task])
                 for name, task in suite.tasks.items()}
    with run.accelerator.main_process_first(), run.timed("load"):
        run.tokenizer = models.load_tokenizer(args.model)
        run.encoded = data.encode_suite(
            suite._replace(tasks=run.tasks), run.tokenizer, args.max_length, args.chat_template,
            cache_dir() / "tokenized", splits=data.SPLITS if run.trains else ("test",))
    counts = [sum(map(len, split.values())) for split in (run.encoded.train, run.encoded.test)]
    run.print(f"suite {suite.name}: {len(run.tasks)} tasks, {counts[0]} training and {counts[1]} "
              f"test instances; input shortened to fit {args.max_length} tokens: "
              f"{run.encoded.shortened['train']} and {run.encoded.shortened['test']}")
    assumed = [name for name in run.tasks if name not in data.SUPERNI]
    if assumed:
        named = ", ".join(f"{name} {run.tasks[name].metric}" for name in assumed)
        run.print(f"metrics (JSON key Metric, default rouge_l): {named}")
    for task, name in run.encoded.left_out:
        run.print(f"left out, does not fit {args.max_length} tokens without input: {task} {name}")


def check_model(run):
    """Refuse what the model's shape rules out, before its weights are loaded."""
    args = run.args
    skeleton = models.skeleton(args.model)
    limit = getattr(skeleton.config, "max_position_embeddings", math.inf)
    if args.max_length + args.max_new_tokens > limit:
        raise InputError(f"--max_length {args.max_length} + --max_new_tokens {args.max_new_tokens} "
                         f"is more than the model's {limit} positions")
    rows = skeleton.get_input_embeddings().weight.shape[0]
    if len(run.tokenizer) > rows:
        raise InputError(f"model {args.model}: its tokenizer has {len(run.tokenizer)} tokens, its "
                         f"embedding only {rows}")
    if not args.eval_only:
        method = new_method(args)
        method.check_tasks(run.order)
        method.check_model(skeleton)
        for name, value in method.settings.items():
            if getattr(args, name) != value:  # chosen by the model's shape
                run.print(f"{name} {value}")
                setattr(args, name, value)


def new_method(args):
    method = METHODS[args.method]
    return method(**{name: getattr(args, name) for name in method.reads})


def load_model(run):
    """Load the base model and wrap it, with a new adapter or a saved one."""
    args, accelerator = run.args, run.accelerator
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    run.model = run.method = None  # of an earlier stage: not two models at a time
    accelerator.free_memory()
    with run.timed("load"):
        model, _ = models.load(args.model, dtype)
        model.to(accelerator.device)
    run.base_parameters = sum(weight.numel() for weight in model.parameters())
    with run.timed("decompose"):
        set_seed(args.seed)
        if args.eval_only and args.adapter:
            load_adapter(model, args.adapter)
            if model.adapted_by.chat_template != args.chat_template:
                raise InputError(f"--adapter {args.adapter} was trained with --chat_template "
                                 f"{'on' if model.adapted_by.chat_template else 'off'}: evaluate "
                                 "it so")
        else:
            method = new_method(args)
            method.chat_template = args.chat_template
            method.wrap(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model, run.method = model, method_of(model)
    if run.single_task_scores and run.method.base_sha256 != run.single_base_sha256:
        raise InputError(f"--single_task_results {args.single_task_results} was made on another "
                         "base model")


# --- training -----------------------------------------------------------------------------------


def make_stages(run):
    """The stages of the run, each with the names of its tasks."""
    groups = {"mixed": [("mixed", tuple(run.tasks))],
              "sequential": [(name, (name,)) for name in run.order],
              "single": [(name, (name,)) for name in run.order]}[run.args.setting]
    stages = []
    for name, tasks in groups:
        rows = sum(len(run.encoded.train[task]) for task in tasks)
        stages.append(Stage(name, tasks, run.args.epochs, math.ceil(rows / run.global_batch)))
        if stages[-1].steps == 1 and run.args.warmup_ratio:
            run.print(f"stage {name} has a single step, at learning rate 0: it trains nothing "
                      "(--epochs, or --warmup_ratio 0)")
    return stages


def stage_loader(run, stage):
    """A loader of micro-batches for one stage; Accelerate deals them out to the processes."""
    rows = [row for task in stage.tasks for row in run.encoded.train[task]]
    plan = data.EpochPlan(rows, run.global_batch, run.args.batch_size, run.args.seed, stage.name)
    collate = partial(data.collate_micro_batch, pad_token_id=run.tokenizer.pad_token_id)
    # A generator of its own: the loader must not draw from the one that dropout uses.
    return DataLoader(plan, batch_size=1, collate_fn=collate, generator=torch.Generator())


def train_stage(run, stage, recorder):
    """Algorithm 1, steps 2 to 4, on the tasks of one stage, with its own optimizer and schedule."""
    args, accelerator, method = run.args, run.accelerator, run.method
    set_seed(stable_seed("stage", args.seed, stage.name) % 2**32, device_specific=True)
    loader = accelerator.prepare(stage_loader(run, stage))
    method.start_task(stage, loader)  # may add weights, so before the optimizer
    weights = [weight for weight in run.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(args.warmup_ratio * stage.steps), stage.steps)
    # The schedule is not prepared: Accelerate would step it once for every process.
    model, optimizer = accelerator.prepare(run.model, optimizer)
    model.train()
    losses = torch.zeros(2, device=accelerator.device)  # cross-entropy, penalty
    for epoch in range(stage.epochs):                                    # Alg. 1: for each epoch
        loader.set_epoch(epoch)
        for batch in loader:                                             # Alg. 1: for each batch
            num_tokens, method.row_tasks = batch.pop("num_tokens"), batch.pop("tasks")
            with accelerator.accumulate(model):
                method.before_forward(batch)
                loss = model(**batch, use_cache=False).loss              # Eq. (1)
                penalty = torch.as_tensor(method.penalty(), device=loss.device)
                accelerator.backward(loss * micro_batches(run) + penalty)
                losses += torch.stack([loss, penalty / micro_batches(run)]).detach()
                if accelerator.sync_gradients:
                    method.after_backward()                              # Alg. 1: Eq. (8)
                    norm = accelerator.clip_grad_norm_(weights, args.max_grad_norm)
                    cross_entropy, penalty = accelerator.reduce(losses).tolist()
                    refuse_non_finite(stage, recorder.step + 1, cross_entropy, norm)
                optimizer.step()                                         # Alg. 1: update
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                recorder.add_step(dict(
                    stage=stage.name, epoch=epoch + 1, loss=cross_entropy, penalty=penalty,
                    learning_rate=schedule.get_last_lr()[0], gradient_norm=float(norm),
                    tokens=num_tokens))
                schedule.step()
                losses.zero_()
                with run.timed("regroup"):
                    recorder.add_regrouping(method.after_step())         # Alg. 1: Eq. (9) to (14)
    run.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    method.end_task(stage, loader)
    accelerator.free_memory()


def micro_batches(run):
    """Micro-batches of one optimizer step, over all processes.

    A micro-batch's loss is already its share of the mean over all target tokens of the step; times
    this number it outlives the means that Accelerate (micro-batches) and DDP (processes) take.
    """
    return run.accelerator.num_processes * run.args.gradient_accumulation_steps


def refuse_non_finite(stage, step, loss, norm):
    """Stop before an optimizer step would destroy the adapter; equal on all processes."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"training diverged in stage {stage.name} at step {step}: loss "
                         f"{float(loss)}, gradient norm {float(norm)}; nothing of this stage was "
                         "saved. Try a lower --learning_rate")


class Recorder:
    """What is kept of the steps of one stage: log.jsonl, regroup.jsonl, a tracker and a tqdm bar.

    A context manager. `step` counts the optimizer steps of the stage.
    """

    def __init__(self, run, stage):
        self.run, self.stage, self.step, self.tokens = run, stage.name, 0, 0
        self.log = run.stream(run.args.output_dir / "log.jsonl", "a")
        self.regroup_log = run.stream(run.args.output_dir / "regroup.jsonl", "a")
        self.bar = tqdm(total=stage.steps, desc=f"train {stage.name}", unit="step",
                        disable=not run.accelerator.is_main_process)
        self.start = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for part in (self.bar, self.log, self.regroup_log):
            part.close()

    def add_step(self, record):
        self.step += 1
        self.run.steps += 1
        self.tokens += record["tokens"]
        self._write(self.log, record | {"step": self.step})
        speed = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{record['learning_rate']:.1e}",
                             tok_s=f"{speed:.0f}", refresh=False)
        self.bar.update()
        numbers = {key: value for key, value in record.items() if not isinstance(value, str)}
        self.run.accelerator.log(numbers, step=self.run.steps)

    def add_regrouping(self, records):
        for record in records:
            record = {"stage": self.stage, "step": self.step} | record
            self._write(self.regroup_log, record)
            self.run.regroupings.append(record)

    @staticmethod
    def _write(file, record):
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()


# --- evaluation ---------------------------------------------------------------------------------


def evaluate_row(run, number, name, tasks):
    """One row of the score matrix, by best and by first reference; None where not evaluated."""
    scores = {}
    if tasks:
        rows = [row for task in tasks for row in run.encoded.test[task]]
        with run.timed("evaluate"):
            predictions = evaluation.evaluate(
                run, rows, run.args.output_dir / "predictions" / f"{number:02d}_{name}.jsonl")
        metric_of = {name: task.metric for name, task in run.tasks.items()}
        scores = {reference: evaluation.task_scores(predictions, metric_of, reference)
                  for reference in ("best", "first")}
    return {"name": name, **{reference: [scores.get(reference, {}).get(task) for task in run.order]
                             for reference in ("best", "first")}}


def evaluated_tasks(run, stages, done):
    """The tasks to evaluate after `done` stages."""
    if run.args.eval_tasks == "none":
        return []
    if run.args.setting == "single":
        return list(stages[done - 1].tasks)
    seen = {task for stage in stages[:done] for task in stage.tasks}
    return [task for task in run.order if run.args.eval_tasks == "all" or task in seen]


def train_all(run):
    """Train and evaluate stage after stage -> rows of the score matrix."""
    args, stages, rows = run.args, make_stages(run), []
    if args.eval_before:
        rows.append(evaluate_row(run, 0, "before", run.order))
    for done, stage in enumerate(stages, start=1):
        if args.setting == "single" and done > 1:
            load_model(run)  # every task starts from the base model
        with run.timed("train"), Recorder(run, stage) as recorder:
            train_stage(run, stage, recorder)
        if run.accelerator.is_main_process:
            alone = stage.name if args.setting == "single" else ""
            save_adapter(run.model, args.output_dir / "adapter" / alone)
        rows.append(evaluate_row(run, done, stage.name, evaluated_tasks(run, stages, done)))
    return rows


# --- main ---------------------------------------------------------------------------------------


def check_output_dir(args):
    """Refuse an --output_dir that is in use, cannot be written, or holds what the run reads."""
    folder = args.output_dir
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: {standing} is no folder that can be written to")
    if standing != folder or not any(folder.iterdir()):
        return
    if not args.overwrite:
        raise InputError(f"--output_dir {folder} is not empty: name another, or give --overwrite "
                         "to replace what this program wrote there")
    for flag in ("adapter", "single_task_results"):
        needed = getattr(args, flag)
        if needed and Path(needed).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--{flag} {needed} lies in --output_dir {folder}, where --overwrite "
                             "would delete it: name another --output_dir")


def clear_output_dir(folder):
    """Make `folder`, without files that an earlier run of this program wrote there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be made: {error.strerror}") from None
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(re.fullmatch(pattern, name) for pattern in OUTPUTS):
            path.unlink()


def check_tracker(name):
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--report_to {name}: not installed, run `pip install {name}`")


def execute(args, argv):
    """One whole run -> its results."""
    check_tracker(args.report_to)
    run = Run(args, make_accelerator(args))
    accelerator = run.accelerator
    run.print(f"badit: method {args.method}, {args.setting if run.trains else 'evaluation only'}, "
              f"model {args.model}, precision {accelerator.mixed_precision}, processes "
              f"{accelerator.num_processes}, device {accelerator.device}")
    idle = (os.cpu_count() or 1) - torch.get_num_threads() * accelerator.num_processes
    if accelerator.device.type == "cpu" and idle > 0:
        run.print(f"{idle} CPU cores stay idle: `accelerate launch --num_cpu_threads_per_process "
                  "N`, or `python train.py`, uses them")
    load_data(run)
    results.read_single_task_results(run)
    check_model(run)
    load_model(run)
    counts = results.parameter_counts(run)
    run.print(f"parameters: {counts['trainable']:,} trainable, {counts['stored']:,} stored, "
              f"{counts['active']:,} active per token, {counts['total']:,} in the base model")
    if accelerator.is_main_process:
        clear_output_dir(args.output_dir)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("badit", config={
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in results.recorded_args(run).items()})
    try:
        rows = train_all(run) if run.trains else [evaluate_row(run, 1, args.method, run.order)]
        summary = results.write_results(run, rows, argv)
        accelerator.log({key: value for key, value in summary["metrics"].items()
                         if value is not None}, step=run.steps)
    finally:
        accelerator.end_training()
    results.print_table(run, rows, summary)
    run.print(f"results in {args.output_dir}")
    return summary


def main(argv=None):
    """Run with the flags `argv` -> exit status: 0, or 2 after one line on bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args, _ = parse_flags(argv)
        check_output_dir(args)
        execute(args, argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
