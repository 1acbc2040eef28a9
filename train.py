"""Train and evaluate a method on a suite of tasks: `accelerate launch train.py --method badit`.

Algorithm 1 of the paper is `train_stage`; a method's own part is in its hooks (method.py).
Checkpoints, processes and files are in harness/. A run writes everything into --output_dir.
"""

import sys

from harness.arguments import end_on_bad_flags

if __name__ == "__main__":  # --help and wrong flags must not wait for the imports below
    end_on_bad_flags(sys.argv[1:])

import math
from functools import partial

import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import adapter
import data
import evaluation
import metrics
import models
from harness import (
    checkpoint,
    checks,
    identity,
    launch,
    output_folder,
    processes,
    results_file,
    sharding,
)
from harness.adapter_config import ADAPTER_CONFIG, WEIGHTS_FILE
from harness.arguments import recorded_args, settings_of, trained_on
from harness.run import Position, Progress, Recorder, Run, Setup, print_main
from inputs.errors import InputError
from inputs.numbers import stable_seed
from method import Stage
from quantized import BLOCK, quantise
from registry import METHODS, method_class

# --- Algorithm 1 --------------------------------------------------------------------------------


def train_stage(run, stage, recorder, resumed=None):
    """Algorithm 1, steps 2 to 4, on the tasks of one stage, with its own optimizer and schedule."""
    accelerator, method = run.accelerator, run.method
    loader, model, optimizer, schedule = begin(run, stage, resumed)
    weights = [weight for weight in run.model.parameters() if weight.requires_grad]
    losses = torch.zeros(2, device=accelerator.device)  # cross-entropy, penalty
    for epoch, batch in remaining_batches(run, stage, loader):  # Alg. 1: for each epoch, each batch
        with accelerator.accumulate(model):
            method.before_forward(batch)
            loss = model(**data.model_inputs(batch), use_cache=False).loss       # Eq. (1)
            penalty = torch.as_tensor(method.penalty(batch), device=loss.device)
            accelerator.backward(loss * run.micro_batches + penalty)
            losses += torch.stack([loss, penalty / run.micro_batches]).detach()
            if accelerator.sync_gradients:
                method.after_backward()                                          # Alg. 1: Eq. (8)
                norm = accelerator.clip_grad_norm_(weights, run.args.max_grad_norm)
                totals = accelerator.reduce(losses).tolist()
                refuse_non_finite(stage, run.progress.position.step + 1, *totals, norm)
            optimizer.step()                                                     # Alg. 1: update
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.step_done()
            recorder.add_step(dict(
                epoch=epoch + 1, loss=totals[0], penalty=totals[1],
                learning_rate=schedule.get_last_lr()[0], gradient_norm=float(norm),
                tokens=batch["num_tokens"]))
            schedule.step()
            losses.zero_()
            with run.progress.seconds.timed("regroup"):
                recorder.add_regrouping(method.after_step(batch))       # Alg. 1: Eq. (9) to (14)
            checkpoint_or_stop(run, stage, optimizer)
    end(run, stage, loader, model)


def begin(run, stage, resumed):
    """Return the loader, model, optimizer and schedule of a stage, new or from a checkpoint.

    The order matters: a method may add weights, so it starts before the optimizer; random states
    are restored after everything that draws.
    """
    args, accelerator = run.args, run.accelerator
    start = run.progress.position.step  # 0 unless the stage is resumed
    set_seed(stable_seed("stage", args.seed, stage.name) % 2**32, device_specific=True)
    loader = accelerator.prepare(stage_loader(run, stage))
    if not start:
        run.method.start_stage(stage, loader)
    weights = [weight for weight in run.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights, "initial_lr": args.learning_rate}],
                                  lr=args.learning_rate, weight_decay=0.0)
    if start:
        checkpoint.restore_optimizer(resumed, run.model, optimizer)
    warmup = math.ceil(args.warmup_ratio * stage.steps)
    # The schedule is not prepared: Accelerate would step it once for every process.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(warmup_then_cosine, warmup=warmup, steps=stage.steps),
        last_epoch=start - 1)
    model, optimizer = sharding.prepare(accelerator, run.model), accelerator.prepare(optimizer)
    model.train()
    if start:
        checkpoint.restore_random_states(resumed, accelerator)
    return loader, model, optimizer, schedule


def warmup_then_cosine(step, warmup, steps):
    """Return the share of the peak learning rate at a step: up linearly, then half a cosine to 0.

    It equals transformers' get_cosine_schedule_with_warmup, whose import loads PEFT where that is
    installed and so delays every start.
    """
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup))))


def remaining_batches(run, stage, loader):
    """Yield (epoch, micro-batch of this process) after the run's position."""
    start = run.progress.position.step
    for epoch in range(start // stage.steps_per_epoch, stage.epochs):
        loader.set_epoch(epoch)
        done = max(0, start - epoch * stage.steps_per_epoch)
        skipped = done * run.args.gradient_accumulation_steps
        for batch in skip_first_batches(loader, skipped) if done else loader:
            yield epoch, batch


def end(run, stage, loader, model):
    """End a stage: unwrap the model, and call the method's hook."""
    run.model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False,
                                             keep_torch_compile=False)
    loader.set_epoch(stage.epochs)  # the method may pass over the data once more
    run.method.end_stage(stage, loader)
    processes.check_equal(run.accelerator, run.method.state_dict(), run.steps)
    run.accelerator.free_memory()


def refuse_non_finite(stage, step, loss, penalty, norm):
    """Raise InputError before a step would destroy the adapter; all processes agree."""
    if not all(map(math.isfinite, (loss, penalty, norm))):
        raise InputError(f"training diverged in stage {stage.name} at step {step}: loss "
                         f"{float(loss)}, gradient norm {float(norm)}; this step was not taken. "
                         "Try a lower --learning_rate, in another --output_dir")


def checkpoint_or_stop(run, stage, optimizer):
    """Save a checkpoint if it is due, and stop if a signal asks for it.

    `train_all` does both after a stage's last step.
    """
    if run.progress.position.step == stage.steps:
        return
    asked, every = run.stop_asked(), run.args.checkpoint_every
    if asked or every and run.steps % every == 0:
        checkpoint.save(run, optimizer)
    if asked:
        run.end_together()


# --- stages -------------------------------------------------------------------------------------


def make_stages(args, accelerator, order, encoded):
    """Return the stages of a run with the names of their tasks; [] if nothing is trained."""
    if args.eval_only or not METHODS[args.method].trains:
        return []
    groups = [("mixed", tuple(encoded.train))]
    if args.setting != "mixed":
        groups = [(name, (name,)) for name in order]
    batch = args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    stages = []
    for name, tasks in groups:
        rows = sum(len(encoded.train[task]) for task in tasks)
        stages.append(Stage(name, tasks, args.epochs, math.ceil(rows / batch)))
        if stages[-1].steps == 1 and args.warmup_ratio:
            print_main(accelerator, f"stage {name} has a single step, at learning rate 0, so it "
                       "trains nothing: raise --epochs, or give --warmup_ratio 0")
    return stages


def stage_loader(run, stage):
    """Return a loader of micro-batches for one stage; Accelerate splits them over processes."""
    rows = [row for task in stage.tasks for row in run.setup.encoded.train[task]]
    plan = data.EpochPlan(rows, run.global_batch, run.args.batch_size, run.args.seed, stage.name)
    collate = partial(data.collate_micro_batch, pad_token_id=run.setup.tokenizer.pad_token_id)
    # Its own generator: the loader must not draw from the one that dropout uses.
    return DataLoader(plan, batch_size=1, collate_fn=collate, generator=torch.Generator())


def train_all(run, resumed):
    """Train and evaluate all stages after the run's position."""
    args, stages, single = run.args, run.setup.stages, run.args.setting == "single"
    if args.eval_before and not run.progress.rows:
        evaluate_row(run, 0, "before", run.setup.order)
        save_between_stages(run, Position(0, 0))
    for index in range(run.progress.position.stage, len(stages)):
        stage, step = stages[index], run.progress.position.step
        if single and index > 0 and not step:
            load_model(run)  # every task starts from the base model
        if step < stage.steps:
            with run.progress.seconds.timed("train"), Recorder(run, stage) as recorder:
                train_stage(run, stage, recorder, resumed)
            folder = args.output_dir / "adapter" / (stage.name if single else "")
            if single:
                run.method.trained_on = trained_on(args, list(stage.tasks))
            if run.accelerator.is_main_process:
                adapter.save(run.model, folder)
            if single or index == len(stages) - 1:  # else the next stage writes it again
                for name in (WEIGHTS_FILE, ADAPTER_CONFIG):
                    run.finish_file(folder / name)
            save_between_stages(run, Position(index, stage.steps))
        evaluate_row(run, index + 1, stage.name, evaluated_tasks(run, index + 1))
        save_between_stages(run, Position(index + 1, 0))


def save_between_stages(run, position):
    """Save a checkpoint at `position`, and stop if a signal asks for it."""
    run.progress.position = position
    checkpoint.save(run)
    if run.stop_asked():
        run.end_together()


def evaluated_tasks(run, done):
    """Return the tasks to evaluate after `done` stages."""
    args, stages, order = run.args, run.setup.stages, run.setup.order
    if args.eval_tasks == "none":
        return []
    if args.setting == "single":
        return list(stages[done - 1].tasks)
    first = done - 1 if args.eval_tasks == "new" and done < len(stages) else 0
    seen = {task for stage in stages[first:done] for task in stage.tasks}
    return [task for task in order if args.eval_tasks == "all" or task in seen]


def evaluate_row(run, number, name, tasks):
    """Evaluate `tasks` and append a row to the score matrices; None for tasks not evaluated."""
    args, setup, scores, losses = run.args, run.setup, {}, {}
    if tasks:
        rows = [row for task in tasks for row in setup.encoded.test[task]]
        path = run.predictions_file(number, name)
        with run.progress.seconds.timed("evaluate"):
            predictions = evaluation.evaluate(
                run.model, setup.tokenizer, run.method, run.accelerator, rows, path,
                batch_size=args.eval_batch_size, max_new_tokens=args.max_new_tokens,
                losses=args.eval_loss, in_step=args.shard_base, stop_asked=run.stop_asked)
        run.finish_file(path)
        metric_of = {task: about.metric for task, about in setup.tasks.items()}
        scores = {reference: evaluation.task_scores(predictions, metric_of, reference)
                  for reference in ("best", "first")}
        losses = evaluation.task_losses(predictions) if args.eval_loss else {}
    run.progress.rows.append({"name": name, "loss": [losses.get(task) for task in setup.order], **{
        reference: [scores.get(reference, {}).get(task) for task in setup.order]
        for reference in ("best", "first")}})


# --- a run --------------------------------------------------------------------------------------


def prepare(args, accelerator, stop, seconds):
    """Return the Setup of a run: the suite, cut and tokenised, and its stages. Loads no weights."""
    made = identity.provenance(args)
    suite = data.load_suite(args.suite, args.data_dir)
    suite = data.select_tasks(suite, args.tasks) if args.tasks else suite
    known = list(checks.rows_of_the_adapter(args, suite))
    suite = data.hold_out(suite, args.validation) if args.validation else suite
    suite = data.cut(suite, args.max_train_per_task, args.max_eval_per_task)
    order = data.task_order(suite.tasks, args.seed, args.task_order)
    trains = METHODS[args.method].trains and not args.eval_only
    with accelerator.main_process_first(), seconds.timed("load"):
        tokenizer = models.load_tokenizer(args.model)
        encoded = data.encode_suite(suite, tokenizer, args.max_length, args.chat_template,
                                    data.SPLITS if trains else ("test",))
    for line in (*data.describe(suite, encoded, args.max_length, args.max_new_tokens), *known):
        print_main(accelerator, line)
    stages = make_stages(args, accelerator, order, encoded)
    mine = identity.identity(args, accelerator, suite.tasks, made)
    if accelerator.num_processes > 1:
        processes.check_same(mine | identity.encoded_sha256(encoded))
    return Setup(args, accelerator, stop, suite.tasks, order, tokenizer, encoded, stages, made,
                 mine)


def load_model(run, resumed=None):
    """Load the base model and wrap it, with a new adapter, a saved one or a checkpoint's."""
    run.model = None  # free the model of an earlier stage first
    run.accelerator.free_memory()
    mesh = sharding.mesh_of(run.accelerator) if run.args.shard_base else None
    with sharding.one_at_a_time(run.accelerator, run.args.shard_base):
        load_in_process(run, resumed, mesh)
    if resumed is not None:
        checkpoint.restore(run, resumed)


def load_in_process(run, resumed, mesh):
    """Load and wrap the model in this process alone; `mesh` shards the base, None leaves it whole.
    """
    args, accelerator, seconds = run.args, run.accelerator, run.progress.seconds
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    with seconds.timed("load"):
        rows = max(args.eval_batch_size, args.batch_size if run.setup.stages else 1)
        model, tokenizer = models.load(args.model, dtype, padded=rows > 1)
        config_sha256 = models.config_sha256(model, tokenizer)
        if args.base == "dense" and mesh is None:  # others may not fit the device yet
            model.to(accelerator.device)
    with seconds.timed("decompose"):
        set_seed(args.seed)
        if args.adapter and (args.eval_only or resumed is None):  # a checkpoint holds its own
            adapter.load(model, args.adapter, None if args.eval_only else settings_of(args),
                         accelerator.device)
        else:
            method = method_class(args.method)(settings_of(args))
            method.chat_template, method.device = args.chat_template, accelerator.device
            method.wrap(model, fresh=resumed is None)
        model.adapted_by.base_name = args.model
        model.adapted_by.trained_on = trained_on(args, args.tasks and run.setup.order)
        run.model = model
        hashes = {"base_sha256": run.method.base_sha256, "config_sha256": config_sha256}
        checks.check_hashes(run, hashes)
        run.progress.hashes = hashes
        if resumed is not None:
            adapter.restore(run.method, checkpoint.part(resumed, "adapter"))
        left = quantise(model, args.base, accelerator.device)
        if left:
            run.print(f"stored dense (not called as layers, or inputs not a multiple of {BLOCK}): "
                      f"{checks.patterns(left)}")
        if mesh is None:
            model.to(accelerator.device)
        else:
            sharding.shard(model, mesh, accelerator.device)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def execute(args, argv, stop):
    """Carry out one run -> the content of its results.json."""
    files_at_start = output_folder.listing(args.output_dir)
    accelerator = launch.make_accelerator(args)
    launch.greet(args, accelerator)
    progress, resumed = Progress(), None
    setup = prepare(args, accelerator, stop, progress.seconds)
    checks.check_model(setup, None if args.eval_only else
                       method_class(args.method)(settings_of(args)))
    if args.resume:
        done = checkpoint.finished(setup)
        if done is not None:
            print_main(accelerator, f"{args.output_dir} is finished already")
            print_main(accelerator, "\n".join(metrics.score_table(done)))
            return done
        progress, resumed = checkpoint.find(setup, progress)
    run = Run(setup, progress)
    if resumed is not None:
        run.print(f"resuming at step {run.steps}, after checkpoint {resumed.name}")
    load_model(run, resumed if run.steps else None)  # an untrained adapter is made as it was
    counts = results_file.parameter_counts(run)
    run.print(f"parameters: {counts['trainable']:,} trainable, {counts['stored']:,} stored, "
              f"{counts['active']:,} active per token, {counts['total']:,} in the base model")
    if run.method.layers:
        run.print(f"adapted layers: {checks.patterns(run.method.layers)}")
    with output_folder.reserved(run, files_at_start):
        return carry_out(run, argv, resumed)


def carry_out(run, argv, resumed):
    """Train, evaluate and write results -> the content of results.json."""
    args, accelerator = run.args, run.accelerator
    run.setup.stop.deferred = True
    checkpoint.prepare_output_folder(run, resumed)
    accelerator.init_trackers("badit", config={
        key: value if isinstance(value, (int, float, str)) else str(value)
        for key, value in recorded_args(args).items()})
    try:
        if run.setup.stages:
            train_all(run, resumed)
        else:
            name = args.method if args.base == "dense" else f"{args.method}-{args.base}"
            evaluate_row(run, 1, name, run.setup.order)
        results = results_file.write_results(run, argv)
        accelerator.log({key: value for key, value in results["metrics"].items()
                         if value is not None}, step=run.steps)
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        checkpoint.discard(run)
    run.print("\n".join(metrics.score_table(results)))
    run.print(f"results in {args.output_dir}")
    return results


def main(argv=None):
    """Run with the flags `argv` -> exit status: 0, 2 (bad input), 128 + the stopping signal."""
    return launch.carry_out(sys.argv[1:] if argv is None else list(argv), execute)


if __name__ == "__main__":
    sys.exit(main())
