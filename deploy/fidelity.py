"""How near one model is to another on held-out prompts: logits, next tokens, scores."""

from typing import NamedTuple

import torch

import data
import evaluation
from inputs.bars import Bar
from metrics import mean


class Fidelity(NamedTuple):
    """Of an exported model to the one that was trained; means over tokens and over tasks."""

    prompts: int
    tokens: int
    kl: float  # KL(trained || exported) of the next token, in nats
    agreement: float  # share of tokens with the same likeliest next one
    difference: float  # largest difference of two logits, relative to the largest logit
    score: float  # mean over tasks, 0 to 100: of the trained model
    exported_score: float


def divergence(p, q):
    """KL(p || q) of every token, from logits p and q (..., vocabulary) -> (...)."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def compare(trained, exported, tokenizer, rows, metric_of, max_new_tokens):
    """The Fidelity of `exported` on encoded test rows; both models are on one device."""
    device = next(exported.parameters()).device
    kl = agreed = tokens = 0
    difference = largest = torch.zeros((), device=device)
    for row in Bar(rows, desc="compare", unit="prompt", delay=2, leave=False):  # one: no padding
        ids = torch.tensor([row["input_ids"]], device=device)  # (1, seq)
        p, q = (model(input_ids=ids, use_cache=False).logits[0].float()
                for model in (trained, exported))  # (seq, vocabulary)
        kl += float(divergence(p, q).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
        difference = torch.maximum(difference, (p - q).abs().max())
        largest = torch.maximum(largest, p.abs().max())
    scores = [score(model, tokenizer, rows, metric_of, max_new_tokens, device)
              for model in (trained, exported)]
    return Fidelity(len(rows), tokens, max(0.0, kl / tokens), agreed / tokens,
                    float(difference / largest), *scores)


def score(model, tokenizer, rows, metric_of, max_new_tokens, device, size=16):
    """The mean score over tasks of greedy answers to test rows."""
    scored = []
    batches = evaluation.make_batches(rows, size)
    for batch in Bar(batches, desc="answer", unit="batch", delay=2, leave=False):
        prompts = data.pad_left([rows[index]["input_ids"] for index in batch],
                                tokenizer.pad_token_id)
        prompts = {key: tensor.to(device) for key, tensor in prompts.items()}
        texts = evaluation.generate(model, tokenizer, prompts, max_new_tokens)
        scored += [evaluation.scored(rows[index], text)
                   for index, text in zip(batch, texts, strict=True)]
    return mean(evaluation.task_scores(scored, metric_of, "best").values())
