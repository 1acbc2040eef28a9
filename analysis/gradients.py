"""Measure whether tasks' gradients conflict, and whether a step for one task harms others.

The command `conflict`. Axis names as in conflict.py. Cosines between gradients of a method's own
weights depend on its parametrisation and cannot rank methods. Gradients of the effective weight are
in the same space for all methods, and the look-ahead compares losses.
"""

import contextlib

import numpy as np
import torch

import models
from analysis import adapters, session
from analysis.conflict import conflict, gram_matrix, interference
from analysis.probes import check_finite, loss_of, row_gradients
from inputs.errors import InputError
from method import find_targets


def run(args):
    """Run the command `conflict`, on rows that the adapters were not trained on."""
    found = adapters.find(args.adapter)
    for path, each in zip(args.adapter, found, strict=True):
        if each.single:
            raise InputError(f"--adapter {path} holds one adapter for each task: conflict is "
                             "measured in weights that all tasks share")
    suite = session.read_suite(args)
    suite, which = adapters.unseen(suite, found, args.rows + args.lookahead)
    skeleton = models.skeleton(args.model)
    args.layers = session.check_layers(args, skeleton)
    tokenizer = models.load_tokenizer(args.model)
    drawn = session.draw(suite, tokenizer, args, args.folds, found[0].config.chat_template,
                         args.lookahead)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for each in found:
        chosen = [name for name in find_targets(skeleton, each.settings.target_modules)
                  if session.layer_number(name) in args.layers]
        model, _ = session.load_model(args, each.folder(None))
        lines.append(OneAdapter(args, each, model, drawn, chosen).measure())
        del model  # frees its memory first
    made = session.made_with(args, suite, found[0].config.base_sha256,
                             [each.folder(None) for each in found])
    session.write(args.out, {
        "made": made, "command": "conflict", "about": which, "adapters": lines,
        "tasks": session.task_lines(suite, drawn)})


class OneAdapter:
    """Measure one adapter on `rows` by task; the last --lookahead rows of each are held out."""

    def __init__(self, args, adapter, model, rows, chosen):
        self.args, self.adapter, self.model, self.chosen = args, adapter, model, chosen
        cut = {task: len(mine) - args.lookahead for task, mine in rows.items()}
        self.rows = {task: mine[:cut[task]] for task, mine in rows.items()}
        self.held_out = {task: mine[cut[task]:] for task, mine in rows.items()}
        self.weights = {name: weight for name, weight in model.named_parameters()
                        if weight.requires_grad}
        trained = adapter.results.get("args", {}).get("learning_rate", 2e-4)
        self.step_size = args.learning_rate or trained

    def measure(self):
        """Return the entry of the adapter in analysis.json."""
        lengths = {task: len(rows) for task, rows in self.rows.items()}
        kept = session.by_task(lengths, self.gradients, f"gradients, {self.adapter.name}")
        losses = [float(each["loss"]) for each in kept.values()]
        return self.adapter.about | {
            "losses": losses, "loss": float(np.mean(losses)),
            "whole": conflict(sum(self.gram(name, kept) for name in self.weights)),
            "effective": [{"layer": session.layer_number(name),
                           "module": name.rpartition(".")[2]} | (
                conflict(self.gram(f"effective {name}", kept)) or {}) for name in self.chosen],
            "lookahead": self.lookahead(kept) if self.args.lookahead else None}

    def gradients(self, task, count):
        """Compute the mean gradients (H, ...) of a task's folds, by trained and effective weight.
        """
        model, rows, H = self.model, self.rows[task], self.args.folds
        sums = {name: torch.zeros(H, *weight.shape, device=model.device)
                for name, weight in self.weights.items()}
        total = 0.0
        for index, row in enumerate(rows):
            fold = index % H
            model.zero_grad()
            with row_gradients(model, self.chosen) as gradient:
                loss, _ = loss_of(model, row)
                loss.backward()
            total += loss.item()
            share = 1 / len(rows[fold::H])
            for name, weight in self.weights.items():
                if weight.grad is not None:
                    check_finite(weight.grad, row, f"the gradient of {name}")
                    sums[name][fold] += share * weight.grad
            for name in self.chosen:
                found, key = gradient(name), f"effective {name}"  # (out, in)
                if key not in sums:
                    sums[key] = found.new_zeros(H, *found.shape)
                sums[key][fold] += share * found
            count(1)
        return sums | {"loss": torch.tensor(total / len(rows), dtype=torch.float64)}

    def gram(self, name, kept):
        """Compute the inner products (T, H, T, H) of all tasks' and folds' gradients by a weight.
        """
        T, H = len(kept), self.args.folds
        vectors = torch.cat([each[name].flatten(1) for each in kept.values()])  # (T H, P)
        return gram_matrix(vectors).view(T, H, T, H).numpy()

    def lookahead(self, kept):
        """Return `interference` of one step for each task."""
        rows = sum(map(len, self.held_out.values()))
        steps = dict(zip(self.rows, self.steps(kept), strict=True))
        seen = session.by_task(
            dict.fromkeys(["(before)", *steps], rows),  # no task has such a name
            lambda task, count: {"losses": self.losses_after(steps.get(task, {}), count)},
            f"steps, {self.adapter.name}")
        before, *after = [each["losses"].numpy() for each in seen.values()]
        return interference(np.stack(after) - before, before) | {"step_size": self.step_size}

    def steps(self, kept):
        """Return Adam's step {weight: change} for each task.

        step_i = -lr g_i / (sqrt(mean over u of g_u^2) + 1e-8): with the second moment of mixed
        training.
        """
        means = {name: torch.stack([each[name].mean(0) for each in kept.values()])
                 for name in self.weights}  # (T, *shape)
        changes = {name: -self.step_size * g / (g.square().mean(0).sqrt() + 1e-8)
                   for name, g in means.items()}
        return [{name: each[t] for name, each in changes.items()} for t in range(len(kept))]

    @torch.no_grad()
    def losses_after(self, step, count):
        """Compute the losses (T,) of held-out rows after a step {weight: change}."""
        losses = []
        with stepped(self.weights, step):
            for rows in self.held_out.values():
                losses.append(sum(float(loss_of(self.model, row)[0]) for row in rows) / len(rows))
                count(len(rows))
        return torch.tensor(losses, dtype=torch.float64)


@contextlib.contextmanager
def stepped(weights, step):
    """Add `step` {name: tensor} to the weights, and restore them to the bit at the end."""
    before = {name: weights[name].detach().clone() for name in step}
    try:
        for name, change in step.items():
            weights[name].add_(change.to(weights[name]))
        yield
    finally:
        for name, tensor in before.items():
            weights[name].copy_(tensor)
