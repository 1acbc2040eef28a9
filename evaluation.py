"""Evaluation: batched greedy generation, losses, predictions on disk, and scores per task."""

import json
import os
from collections import defaultdict

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from transformers import LogitsProcessor

from data import Framer, collate, pad_left
from harness.recorder import stream
from inputs.bars import Bar
from inputs.errors import InputError, Interrupted, library_errors
from inputs.files import atomic_path
from metrics import SCORERS, mean, score

BRIEF = 6  # words: tasks whose answers have fewer on average are generated apart
FILLED = 0.6  # of a batch's longest prompt: a shorter one opens a new batch


def make_batches(rows, size):
    """All row numbers, in lists of at most `size`: this decides the speed, never a prediction.

    Prompts of similar length go together, the longest first, as padding costs; and tasks with brief
    answers go apart, as a batch generates until its last answer has ended.
    """
    words = defaultdict(list)
    for row in rows:
        words[row["task"]].append(len(row["references"][0].split()))
    brief = {task for task, counts in words.items() if mean(counts) < BRIEF}
    batches, batch, kind, longest = [], [], None, 0
    for index in sorted(range(len(rows)), key=lambda index: (
            rows[index]["task"] in brief, -len(rows[index]["input_ids"]))):
        now, length = rows[index]["task"] in brief, len(rows[index]["input_ids"])
        if not batch or len(batch) == size or now != kind or length < FILLED * longest:
            batch, kind, longest = [], now, length
            batches.append(batch)
        batch.append(index)
    return batches


class Extremes(LogitsProcessor):
    """Keeps the extreme logits of every step, which it leaves as they are."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen += torch.aminmax(scores)  # NaN where there is one; nothing waits for a GPU
        return scores


def generate(model, tokenizer, batch, max_new_tokens, **options):
    """Continuations of left-padded prompts, as texts without prompt and special tokens.

    `batch` holds input_ids and attention_mask (batch, seq) on the model's device. Greedy, unless
    the `options` of the model's own generate say otherwise. Raises InputError for logits that are
    not finite: the answer to them would be token 0.
    """
    extremes = Extremes()
    # By its column, as in training: the frozen output layer takes a slice of a batch of prompts for
    # as many products, each with a copy of its matrix.
    last = torch.tensor([-1], device=batch["input_ids"].device)
    prompt_length = batch["input_ids"].shape[1]
    tokens = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                            max_new_tokens=max_new_tokens, num_beams=1, use_cache=True,
                            logits_processor=[extremes], logits_to_keep=last,
                            **{"do_sample": False} | options)  # (batch, seq + new)
    if not torch.isfinite(torch.stack(extremes.seen)).all():
        raise InputError("the model answers with logits that are NaN or infinite: its "
                         "configuration, or the adapter, makes its activations overflow")
    with library_errors("the tokenizer cannot decode an answer"):
        texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def target_logits(model, batch):
    """Logits (B, k - 1, vocabulary) of the last tokens of every row; float32 at least."""
    if hasattr(model, "adapted_by"):
        model.adapted_by.before_forward(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids",
                                          "logits_to_keep")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # (B, k - 1, vocabulary)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def row_losses(logits, batch, reduction="mean"):
    """l_d = -(1/|y|) sum_j log p(y_j | x, y_<j) of every row, (B,); "sum" leaves out 1/|y|.

    From `target_logits` (B, k - 1, vocabulary).
    """
    labels = batch["labels"][:, 1:]  # (B, k - 1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view_as(labels).sum(1)  # (B,)
    return losses / (labels != -100).sum(1) if reduction == "mean" else losses


@torch.no_grad()
def answer_losses(model, framer, rows):
    """[(summed cross-entropy, number of tokens)] of the first reference and EOS of test rows.

    As in training: after the prompt, in float32. Raises InputError for a loss that is not finite.
    """
    eos, answers = framer.tokenizer.eos_token_id, []
    for row in rows:
        target = [*framer.text(row["references"][0]), eos]
        answers.append({"input_ids": row["input_ids"] + target, "num_targets": len(target)})
    batch = collate(answers, framer.tokenizer.pad_token_id, 1)
    batch = {key: value.to(model.device) if torch.is_tensor(value) else value
             for key, value in batch.items()}
    losses = row_losses(target_logits(model, batch), batch, "sum")  # (B,)
    if not torch.isfinite(losses).all():
        raise InputError("the loss of a test answer is NaN or infinite")
    return list(zip(losses.tolist(), (row["num_targets"] for row in answers), strict=True))


@torch.no_grad()
def evaluate(run, rows, path):
    """Predict all test `rows`, write them to the file `path` and return the predicted rows.

    Each process generates every n-th batch. Predictions reach `path`.partial as they come, and
    `path` itself, in the order of `rows`, once all are there. Every process gets all of them.
    """
    accelerator, args = run.accelerator, run.args
    batches, processes = make_batches(rows, args.eval_batch_size), accelerator.num_processes
    partial = path.with_name(path.name + ".partial")
    predicted = {}
    run.model.eval()
    with (stream(run, partial) as file,
          Bar(total=len(rows), desc=f"evaluate {path.stem}", unit="item", leave=False,
               disable=not accelerator.is_main_process) as bar):
        for first in range(0, len(batches), processes):
            if run.stop_asked():
                raise Interrupted
            # One batch for each process; the last round may have none for some of them.
            mine = batches[first:first + processes][accelerator.process_index:][:1]
            texts = [each for batch in mine for each in _predict(run, rows, batch)]
            if args.shard_base and not mine:  # the others need this process' part of the base
                _predict(run, rows, batches[first])
            for index, text, loss in gather_object(texts):
                predicted[index] = scored(rows[index], text) | loss
                file.write(json.dumps(predicted[index], ensure_ascii=False) + "\n")
                bar.update()
            file.flush()
    done = [predicted[index] for index in range(len(rows))]
    if accelerator.is_main_process:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
        os.remove(partial)
    return done


def _predict(run, rows, batch):
    """(row number, text, {"loss": (sum, tokens)} if it is asked for) for a batch of row numbers."""
    tokenizer = run.setup.tokenizer
    prompts = pad_left([rows[index]["input_ids"] for index in batch], tokenizer.pad_token_id)
    prompts = {key: tensor.to(run.accelerator.device) for key, tensor in prompts.items()}
    run.method.before_forward(prompts)
    with run.accelerator.autocast():
        texts = generate(run.model, tokenizer, prompts, run.args.max_new_tokens)
        losses = [{}] * len(batch)
        if run.args.eval_loss:
            losses = [{"loss": loss} for loss in answer_losses(
                run.model, Framer(tokenizer), [rows[index] for index in batch])]
    return list(zip(batch, texts, losses, strict=True))


def scored(row, prediction):
    """A test row with its prediction, scored by every metric against best and first reference."""
    kept = {key: row[key] for key in ("task", "id", "prompt", "references")}
    scores = {metric: score(prediction, row["references"], metric) for metric in SCORERS}
    return kept | {"prediction": prediction, "scores": scores}


def task_losses(predictions):
    """Mean loss per task over the tokens of its answers, from predictions that have it."""
    sums = defaultdict(lambda: [0.0, 0])
    for row in predictions:
        loss, tokens = row["loss"]
        sums[row["task"]][0] += loss
        sums[row["task"]][1] += tokens
    return {task: loss / tokens for task, (loss, tokens) in sums.items()}


def task_scores(predictions, metric_of, reference):
    """Mean score per task by its metric; `reference` is "best" or "first"."""
    by_task = {}
    for row in predictions:
        value = row["scores"][metric_of[row["task"]]][reference]
        by_task.setdefault(row["task"], []).append(value)
    return {task: mean(values) for task, values in by_task.items()}
