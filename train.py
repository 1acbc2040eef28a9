"""Train and evaluate a method on a suite of tasks: `accelerate launch train.py --method badit`.

Algorithm 1 of the paper is `train_stage`; what a method does differently is in its hooks
(method.py). Everything that a run leaves behind is in --output_dir.
"""

import contextlib
import errno
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from functools import partial

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import checkpoint
import data
import evaluation
import models
import output_dir
import processes
import results
import resume
from arguments import PAPER_BATCH, parse_flags
from baselines import METHODS
from checkpoint import Position
from errors import InputError, Interrupted, one_line
from method import CONFIG_FILE, WEIGHTS_FILE, Stage, load_adapter, method_of, save_adapter
from utils import StopSignals, cache_dir, print_anything, sha256_file, stable_seed

# Of the disk, not of this program: one line, no traceback.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


# --- a run --------------------------------------------------------------------------------------


class Run:
    """What the parts of one run share: flags, accelerator, data, model, timers, records."""

    def __init__(self, args, accelerator, stop):
        self.args, self.accelerator, self.stop = args, accelerator, stop
        self.trains = METHODS[args.method].trains and not args.eval_only
        self.tasks = self.order = self.encoded = self.tokenizer = self.stages = None  # load_data
        self.model = self.method = self.base_parameters = None  # load_model
        self.single_task_scores = self.single_base_sha256 = None
        self.seconds, self.started = defaultdict(float), {}  # by part; of the parts under way
        self.regroupings = []
        self.steps = 0  # of the optimizer, in all stages
        self.provenance = self.identity = None  # what makes it this run: results.identity
        self.overruled = set()  # what --allow_other has let differ in the course of it
        self.position, self.rows = Position(0, 0), []  # rows of the score matrix so far
        self.files = {}  # finished ones that no later step writes again, with their checksums
        self.resumed = None  # the checkpoint of a stage that is to be gone on with
        self.hashes, self.known_hashes = {}, {}  # of the loaded model: as it is, as it must be

    @property
    def global_batch(self):
        """Rows of one optimizer step, over all micro-batches and processes."""
        steps = self.args.gradient_accumulation_steps
        return self.args.batch_size * self.accelerator.num_processes * steps

    @contextlib.contextmanager
    def timed(self, part):
        self.started[part] = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - self.started.pop(part)

    def seconds_so_far(self):
        """Seconds by part, with those of the parts under way."""
        now = time.perf_counter()
        return self.seconds | {part: self.seconds[part] + now - start
                               for part, start in self.started.items()}

    def stream(self, path, mode="w"):
        """`path` opened for writing on the main process, a sink on the others."""
        if not self.accelerator.is_main_process:
            return open(os.devnull, "w")
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode, encoding="utf-8")

    def print(self, text):
        lines = map(one_line, text.split("\n"))  # it may quote names and data
        self.accelerator.print("\n".join(lines), flush=True)

    def finish_file(self, path):
        """Note a file that no later step writes again; a resumed run relies on it."""
        if self.accelerator.is_main_process:
            name = path.relative_to(self.args.output_dir).as_posix()
            self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def stop_asked(self):
        """Whether any process got a signal that asks to stop; all processes get the same answer."""
        number = torch.tensor([self.stop.received or 0], device=self.accelerator.device)
        number = int(self.accelerator.gather(number).max())
        if number:
            self.stop.note(number)
        return number > 0

    def end_together(self):
        """Raise Interrupted once all processes are here: a launcher kills those that are late."""
        self.accelerator.wait_for_everyone()
        raise Interrupted


def make_accelerator(args):
    """The Accelerator, and a batch size for every process. Raises InputError."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher sets
    if precision not in ("no", "bf16"):
        raise InputError(f"--mixed_precision {precision} is not supported; allowed: no, bf16")
    processes.refuse_sharding()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir / "tracking",
            # Buffers are groupings, equal on all processes by construction.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError("Accelerate does not start: what the launcher or the environment asks for "
                         f"does not fit this machine ({type(error).__name__}: {error})") from error
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise InputError(f"the launcher asks for {accelerator.gradient_accumulation_steps} "
                         "accumulation steps: give --gradient_accumulation_steps to train.py, not "
                         "to accelerate launch")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(f"distributed training by {kind} is not supported, only DDP on GPUs or "
                         "CPUs")
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
    if run.trains:
        run.stages = make_stages(run)
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
    if run.tokenizer.pad_token_id >= rows:  # the others are in the rows that are checked below
        raise InputError(f"model {args.model}: its tokenizer pads with the token "
                         f"{run.tokenizer.pad_token_id}, its embedding has only {rows} rows")
    data.check_encoded(run.encoded, limit - args.max_new_tokens, rows)
    if not args.eval_only:
        method = new_method(args)
        method.check_tasks(run.order)
        method.check_model(skeleton)
        for name, value in method.settings.items():
            if getattr(args, name) != value:  # chosen by the model's shape
                run.print(f"{name} {value}")


def new_method(args):
    method = METHODS[args.method]
    return method(**{name: getattr(args, name) for name in method.reads})


def load_model(run):
    """Load the base model and wrap it, with a new adapter, a saved one or a checkpoint's."""
    args, accelerator = run.args, run.accelerator
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    run.model = run.method = None  # of an earlier stage: not two models at a time
    accelerator.free_memory()
    with run.timed("load"):
        model, tokenizer = models.load(args.model, dtype)
        config_sha256 = models.config_sha256(model, tokenizer)
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
            method.wrap(model, fresh=run.resumed is None)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.model, run.method = model, method_of(model)
    run.hashes = {"base_sha256": run.method.base_sha256, "config_sha256": config_sha256}
    for name, sha256 in run.known_hashes.items():
        if sha256 != run.hashes.get(name):
            raise InputError(f"model {args.model} has {results.MODEL_HASHES[name]} other than in "
                             f"the run to be {'resumed' if args.resume else 'repeated'}: its "
                             f"{name} was {sha256!r:.20}, now {run.hashes.get(name)!r:.20}")
    if run.resumed is not None:
        checkpoint.restore(run)
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
    start = run.position.step  # 0, but in a resumed stage
    if not start:
        method.start_task(stage, loader)  # may add weights, so before the optimizer
    weights = [weight for weight in run.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights, "initial_lr": args.learning_rate}],
                                  lr=args.learning_rate, weight_decay=0.0)
    if start:
        checkpoint.restore_optimizer(run, optimizer)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(args.warmup_ratio * stage.steps), stage.steps, last_epoch=start - 1)
    # The schedule is not prepared: Accelerate would step it once for every process.
    model, optimizer = accelerator.prepare(run.model, optimizer)
    model.train()
    if start:
        checkpoint.restore_random_states(run)  # after all that might draw
    losses = torch.zeros(2, device=accelerator.device)  # cross-entropy, penalty
    for epoch in range(start // stage.steps_per_epoch, stage.epochs):    # Alg. 1: for each epoch
        for batch in rest_of_epoch(run, stage, loader, epoch):           # Alg. 1: for each batch
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
                    refuse_non_finite(stage, recorder.step + 1, cross_entropy, penalty, norm)
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
                save_and_stop(run, stage, optimizer)
    run.model = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    loader.set_epoch(stage.epochs)  # for a pass over the data, in an order of its own
    method.end_task(stage, loader)
    processes.check_equal(accelerator, method.state_dict(), run.steps)
    accelerator.free_memory()


def rest_of_epoch(run, stage, loader, epoch):
    """The micro-batches of one epoch that come after `run.position`, for this process."""
    loader.set_epoch(epoch)
    done = run.position.step - epoch * stage.steps_per_epoch
    if done == 0:
        return loader
    return skip_first_batches(loader, done * run.args.gradient_accumulation_steps)


def save_and_stop(run, stage, optimizer):
    """Between two steps: a checkpoint if it is due, and the end if a signal asks for it.

    After a stage's last step, `train_all` does both.
    """
    run.position = run.position._replace(step=run.position.step + 1)
    if run.position.step == stage.steps:
        return
    asked, every = run.stop_asked(), run.args.checkpoint_every
    if asked or every and run.steps % every == 0:
        checkpoint.save(run, optimizer)
    if asked:
        run.end_together()


def micro_batches(run):
    """Micro-batches of one optimizer step, over all processes.

    A micro-batch's loss is already its share of the mean over all target tokens of the step; times
    this number it outlives the means that Accelerate (micro-batches) and DDP (processes) take.
    """
    return run.accelerator.num_processes * run.args.gradient_accumulation_steps


def refuse_non_finite(stage, step, loss, penalty, norm):
    """Stop before an optimizer step would destroy the adapter; equal on all processes."""
    if not all(map(math.isfinite, (loss, penalty, norm))):
        raise InputError(f"training diverged in stage {stage.name} at step {step}: loss "
                         f"{float(loss)}, gradient norm {float(norm)}; nothing of this stage was "
                         "saved. Try a lower --learning_rate")


class Recorder:
    """What is kept of the steps of one stage: log.jsonl, regroup.jsonl, a tracker and a tqdm bar.

    A context manager. `step` counts the optimizer steps of the stage.
    """

    def __init__(self, run, stage):
        self.run, self.stage, self.step, self.tokens = run, stage.name, run.position.step, 0
        self.log = run.stream(run.args.output_dir / "log.jsonl", "a")
        self.regroup_log = run.stream(run.args.output_dir / "regroup.jsonl", "a")
        self.bar = tqdm(total=stage.steps, initial=self.step, desc=f"train {stage.name}",
                        unit="step", disable=not run.accelerator.is_main_process)
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
        if records:
            state = self.run.method.state_dict()
            processes.check_equal(self.run.accelerator, state, self.run.steps)
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
            path = run.args.output_dir / "predictions" / f"{number:02d}_{name}.jsonl"
            predictions = evaluation.evaluate(run, rows, path)
        run.finish_file(path)
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
    """Train and evaluate stage after stage, from `run.position` on; fills `run.rows`."""
    args, stages = run.args, run.stages
    if args.eval_before and not run.rows:
        run.rows.append(evaluate_row(run, 0, "before", run.order))
        save_between_stages(run, Position(0, 0))
    for index in range(run.position.stage, len(stages)):
        stage, alone = stages[index], args.setting == "single"
        if not run.position.step:
            run.resumed = None  # its adapter is in place
            if alone and index > 0:
                load_model(run)  # every task starts from the base model
        if run.position.step < stage.steps:
            with run.timed("train"), Recorder(run, stage) as recorder:
                train_stage(run, stage, recorder)
            folder = args.output_dir / "adapter" / (stage.name if alone else "")
            if run.accelerator.is_main_process:
                save_adapter(run.model, folder)
            if alone or index == len(stages) - 1:  # else the next stage writes it again
                for name in (WEIGHTS_FILE, CONFIG_FILE):
                    run.finish_file(folder / name)
            save_between_stages(run, Position(index, stage.steps))
        tasks = evaluated_tasks(run, stages, index + 1)
        run.rows.append(evaluate_row(run, index + 1, stage.name, tasks))
        save_between_stages(run, Position(index + 1, 0))


def save_between_stages(run, position):
    """A checkpoint at `position`, and the end if a signal asks for it."""
    run.position, run.resumed = position, None
    checkpoint.save(run)
    if run.stop_asked():
        run.end_together()


# --- main ---------------------------------------------------------------------------------------


def check_tracker(name):
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"--report_to {name}: not installed, run `pip install {name}`")


def execute(args, argv, stop, first_to_say):
    """One whole run -> its results."""
    check_tracker(args.report_to)
    there = output_dir.listing(args.output_dir)
    accelerator = make_accelerator(args)
    first_to_say.meet(accelerator)
    run = Run(args, accelerator, stop)
    run.print(f"badit: method {args.method}, {args.setting if run.trains else 'evaluation only'}, "
              f"model {args.model}, precision {accelerator.mixed_precision}, processes "
              f"{accelerator.num_processes}, device {accelerator.device}")
    idle = (os.cpu_count() or 1) - torch.get_num_threads() * accelerator.num_processes
    if accelerator.device.type == "cpu" and idle > 0:
        run.print(f"{idle} CPU cores stay idle: `accelerate launch --num_cpu_threads_per_process "
                  "N`, or `python train.py`, uses them")
    run.provenance = results.provenance()
    load_data(run)
    results.read_single_task_results(run)
    check_model(run)
    run.provenance["read_files"] = results.read_files(run)
    run.identity = results.identity(run)
    if accelerator.num_processes > 1:
        seen = run.identity | data.encoded_sha256(run.encoded)
        processes.check_same(seen, "flags, data or libraries")
    if args.from_results is not None:
        resume.check_repeat(run)
    finished = resume.find(run) if args.resume else None
    if finished is not None:
        run.print(f"{args.output_dir} is finished already")
        results.print_table(run, finished)
        return finished
    load_model(run)
    counts = results.parameter_counts(run)
    run.print(f"parameters: {counts['trainable']:,} trainable, {counts['stored']:,} stored, "
              f"{counts['active']:,} active per token, {counts['total']:,} in the base model")
    with output_dir.reserved(run, there):
        return carry_out(run, argv, first_to_say)


def carry_out(run, argv, first_to_say):
    """Train, evaluate and write down what a run is for -> its results."""
    args, accelerator = run.args, run.accelerator
    run.stop.deferred = True
    resume.prepare_output_dir(run)
    accelerator.init_trackers("badit", config={
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in results.recorded_args(run).items()})
    try:
        if run.trains:
            train_all(run)
        else:
            run.rows.append(evaluate_row(run, 1, args.method, run.order))
        summary = results.write_results(run, run.rows, argv)
        accelerator.log({key: value for key, value in summary["metrics"].items()
                         if value is not None}, step=run.steps)
    except BaseException:
        first_to_say()  # before the other processes see this one leave
        raise
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        checkpoint.discard(run)
    results.print_table(run, summary)
    run.print(f"results in {args.output_dir}")
    return summary


def main(argv=None):
    """Run with the flags `argv` -> exit status.

    0; 2 after one line on bad input; 128 + the signal's number after one that asked to stop.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    print_anything()
    first_to_say = processes.FirstToSay()

    def end(status, reason):
        if first_to_say():
            print(one_line(reason), file=sys.stderr)
        return status

    with StopSignals() as stop:
        processes.end_with_launcher()
        try:
            args, _ = parse_flags(argv)
            output_dir.check(args)
            execute(args, argv, stop, first_to_say)
            return 0
        except InputError as error:
            return end(2, f"error: {error}")
        except OSError as error:
            full = (f"; what was saved before is whole: make room there, then "
                    f"{command(argv, stop)}") if error.errno in DISK_ERRORS else ""
            return end(2, f"error: {error}{full}")
        except (Interrupted, KeyboardInterrupt) as error:
            number = stop.received or signal.SIGINT
            whole = isinstance(error, Interrupted) and checkpoint.checkpoints_in(
                args.output_dir / checkpoint.FOLDER)
            saved = "saved" if whole else "nothing more was saved"
            return end(128 + number, f"stopped by {number.name}, {saved}; go on with: "
                                     f"{command(argv, stop)}")
        except Exception:
            if first_to_say():
                raise
            return 1


def command(argv, stop):
    """The command that goes on with a run, or starts it again where it had not begun to write."""
    if stop.deferred:
        argv = [*(word for word in argv if word not in ("--resume", "--overwrite")), "--resume"]
    threads = os.environ.get("OMP_NUM_THREADS")  # a run goes on with as many
    prefix = f"OMP_NUM_THREADS={shlex.quote(threads)} " if threads else ""
    return f"{prefix}{results.launcher()} train.py {shlex.join(argv)}"


if __name__ == "__main__":
    sys.exit(main())
