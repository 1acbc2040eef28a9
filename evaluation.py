"""Evaluate a model: batched greedy generation, losses, predictions on disk, scores per task."""

import json
import os
from collections import defaultdict

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm import tqdm

from data import Framer, collate, pad_left
from inputs.errors import InputError, Interrupted, library_errors
from inputs.files import atomic_path
from metrics import SCORERS, mean, score

BRIEF = 6  # words; tasks with shorter answers on average are batched separately
FILLED = 0.6  # a prompt shorter than this share of a batch's longest starts a new batch


def make_batches(rows, size):
    """Return all row numbers in lists of at most `size`. Batching affects speed only.

    Prompts of similar length go together, the longest first, to save padding. Tasks with brief
    answers are batched separately, as a batch generates until its last answer ends.
    """
    words = defaultdict(list)
    for row in rows:
        words[row["task"]].append(len(row["references"][0].split()))
    brief = {task for task, counts in words.items() if mean(counts) < BRIEF}
    batches, batch, batch_is_brief, longest = [], [], None, 0
    for index in sorted(range(len(rows)), key=lambda index: (
            rows[index]["task"] in brief, -len(rows[index]["input_ids"]))):
        is_brief, length = rows[index]["task"] in brief, len(rows[index]["input_ids"])
        if (not batch or len(batch) == size or is_brief != batch_is_brief
                or length < FILLED * longest):
            batch, batch_is_brief, longest = [], is_brief, length
            batches.append(batch)
        batch.append(index)
    return batches


def generate(model, tokenizer, batch, max_new_tokens, **options):
    """Return the continuations of left-padded prompts, without prompt and special tokens.

    `batch` holds input_ids and attention_mask (batch, seq) on the model's device. Decoding is
    greedy unless `options` of the model's generate say otherwise. Raises InputError on NaN or
    infinite logits, for which argmax silently returns token 0.
    """
    extremes = []

    def record(_, logits):
        extremes.extend(torch.aminmax(logits))  # NaN if there is one; without a GPU sync
        return logits

    # Pass indices, not a slice: a strided input makes the output layer several times slower.
    last = torch.tensor([-1], device=batch["input_ids"].device)
    prompt_length = batch["input_ids"].shape[1]
    tokens = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                            max_new_tokens=max_new_tokens, num_beams=1, use_cache=True,
                            logits_processor=[record], logits_to_keep=last,
                            **{"do_sample": False} | options)  # (batch, seq + new)
    if not torch.isfinite(torch.stack(extremes)).all():
        raise InputError("the model's logits are NaN or infinite: its configuration or the "
                         "adapter makes its activations overflow")
    with library_errors("the tokenizer cannot decode an answer"):
        texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def target_logits(model, batch):
    """Return the logits (B, k - 1, vocabulary) of every row's last tokens, in float32 at least."""
    if hasattr(model, "adapted_by"):
        model.adapted_by.before_forward(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids",
                                          "logits_to_keep")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # (B, k - 1, vocabulary)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def row_losses(logits, batch, reduction="mean"):
    """Return l_d = -(1/|y|) sum_j log p(y_j | x, y_<j) of every row, (B,); "sum" omits 1/|y|.

    `logits` are those of `target_logits`, (B, k - 1, vocabulary).
    """
    labels = batch["labels"][:, 1:]  # (B, k - 1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view_as(labels).sum(1)  # (B,)
    return losses / (labels != -100).sum(1) if reduction == "mean" else losses


@torch.no_grad()
def answer_losses(model, framer, rows):
    """Return [(summed cross-entropy, number of tokens)] of test rows' first reference and EOS.

    Computed after the prompt in float32, as in training. Raises InputError on NaN or infinity.
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
def evaluate(model, tokenizer, method, accelerator, rows, path, *, batch_size, max_new_tokens,
             losses, in_step, stop_asked):
    """Predict all test `rows`, write them to the file `path` and return the predicted rows.

    Each process generates every n-th batch of `batch_size` rows; if `in_step`, all generate in
    every round, as a sharded base needs. With `losses` the losses of the answers are computed as
    well. Predictions are streamed to `path`.partial; `path` itself, in the order of `rows`, is
    written when all are there. Every process returns all of them. Raises Interrupted when
    `stop_asked()`, called between rounds by all processes, says so.
    """
    batches, processes = make_batches(rows, batch_size), accelerator.num_processes
    partial, main = path.with_name(path.name + ".partial"), accelerator.is_main_process
    path.parent.mkdir(parents=True, exist_ok=True)
    predicted = {}
    model.eval()

    def predict(batch):
        prompts = pad_left([rows[index]["input_ids"] for index in batch], tokenizer.pad_token_id)
        prompts = {key: tensor.to(accelerator.device) for key, tensor in prompts.items()}
        method.before_forward(prompts)
        with accelerator.autocast():
            texts = generate(model, tokenizer, prompts, max_new_tokens)
            more = [{}] * len(batch)
            if losses:
                more = [{"loss": loss} for loss in answer_losses(
                    model, Framer(tokenizer), [rows[index] for index in batch])]
        return list(zip(batch, texts, more, strict=True))

    with (open(partial if main else os.devnull, "w", encoding="utf-8") as file,
          tqdm(total=len(rows), desc=f"evaluate {path.stem}", unit="item", leave=False,
               disable=not main) as bar):
        for first in range(0, len(batches), processes):
            if stop_asked():
                raise Interrupted
            # One batch for each process; in the last round some may have none.
            mine = batches[first:first + processes][accelerator.process_index:][:1]
            answers = [answer for batch in mine for answer in predict(batch)]
            if in_step and not mine:
                predict(batches[first])
            for index, text, loss in gather_object(answers):
                predicted[index] = scored(rows[index], text) | loss
                file.write(json.dumps(predicted[index], ensure_ascii=False) + "\n")
                bar.update()
            file.flush()
    done = [predicted[index] for index in range(len(rows))]
    if main:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in done)
        os.remove(partial)
    return done


def scored(row, prediction):
    """Return a test row with its prediction, scored by every metric and reference rule."""
    kept = {key: row[key] for key in ("task", "id", "prompt", "references")}
    scores = {metric: score(prediction, row["references"], metric) for metric in SCORERS}
    return kept | {"prediction": prediction, "scores": scores}


def task_losses(predictions):
    """Return the mean loss per task over the tokens of its answers."""
    sums = defaultdict(lambda: [0.0, 0])
    for row in predictions:
        loss, tokens = row["loss"]
        sums[row["task"]][0] += loss
        sums[row["task"]][1] += tokens
    return {task: loss / tokens for task, (loss, tokens) in sums.items()}


def task_scores(predictions, metric_of, reference):
    """Return the mean score per task by its metric; `reference` is "best" or "first"."""
    by_task = {}
    for row in predictions:
        value = row["scores"][metric_of[row["task"]]][reference]
        by_task.setdefault(row["task"], []).append(value)
    return {task: mean(values) for task, values in by_task.items()}
