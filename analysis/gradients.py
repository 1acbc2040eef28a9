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
from analysis.probes import GradientProbe, batch_of, check_finite
from analysis.routing import information, without_nan
from evaluation import row_losses, target_logits
from inputs.errors import InputError
from method import find_targets

PER_LAYER = ("cosine", "negative", "decided", "median_reliability")


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
    print(session.describe(drawn, args), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for each in found:
        names = list(find_targets(skeleton, each.settings.target_modules))
        chosen = [name for name in names if session.layer_number(name) in args.layers]
        model, _ = session.load_model(args, each.folder(None))
        lines.append(OneAdapter(args, each, model, drawn.rows, tokenizer.pad_token_id, names,
                                chosen).measure())
        del model
    made = session.made_with(args, suite, found[0].config.base_sha256,
                             [each.folder(None) for each in found])
    session.write(args.out, {
        "made": made, "command": "conflict", "about": which, "adapters": lines,
        "layers": args.layers, "tasks": session.task_lines(suite, drawn)})


class OneAdapter:
    """Measures one adapter on `rows` by task; the last --lookahead rows of each are held out."""

    def __init__(self, args, adapter, model, rows, pad_token_id, names, chosen):
        self.args, self.adapter, self.model = args, adapter, model
        self.pad_token_id, self.names, self.chosen = pad_token_id, names, chosen
        cut = {task: len(mine) - args.lookahead for task, mine in rows.items()}
        self.rows = {task: mine[:cut[task]] for task, mine in rows.items()}
        self.held_out = {task: mine[cut[task]:] for task, mine in rows.items()}
        trained = adapter.results.get("args", {}).get("learning_rate", 2e-4)
        self.step_size = args.learning_rate or trained

    def measure(self):
        """Return the entry of the adapter in analysis.json."""
        lengths = {task: len(rows) for task, rows in self.rows.items()}
        kept = session.by_task(lengths, self.gradients, f"gradients, {self.adapter.name}")
        losses = [float(each["loss"]) for each in kept.values()]
        line = self.adapter.about | {"losses": losses, "loss": float(np.mean(losses))}
        line |= self.conflicts(kept)
        line["effective"] = [{"layer": session.layer_number(name)} | (conflict(self.gram(
            [each[f"effective {name}"].flatten(1) for each in kept.values()])) or {})
            for name in self.chosen]
        return line | {"lookahead": self.lookahead(kept) if self.args.lookahead else None}

    def lookahead(self, kept):
        """Return `interference` of one step for each task, and its first-order prediction."""
        means = Means(kept, [name for name, _ in trained_weights(self.model)])
        rows = sum(map(len, self.held_out.values()))
        seen = session.by_task(
            dict.fromkeys(["(before)", *self.rows], rows),
            lambda task, count: {"losses": self.losses_after(
                means.step(task, self.step_size) if task in self.rows else {}, count)},
            f"steps, {self.adapter.name}")
        before, *after = [each["losses"].numpy() for each in seen.values()]
        delta = np.stack(after) - before  # (T, T)
        predicted = -self.step_size * means.preconditioned().numpy()  # (T, T)
        others = ~np.eye(len(delta), dtype=bool)
        spread = delta[others].std() > 0 and predicted[others].std() > 0
        return interference(delta, before) | {
            "step_size": self.step_size, "losses": before.tolist(), "delta": delta.tolist(),
            "predicted": predicted.tolist(), "prediction_correlation": float(np.corrcoef(
                delta[others], predicted[others])[0, 1]) if spread else None}

    # --- gradients ------------------------------------------------------------------------------

    def gradients(self, task, count):
        """Compute the mean gradients (H, ...) of a task's folds, of trained and effective weights.
        """
        model, rows, H = self.model, self.rows[task], self.args.folds
        device = model.device
        weights = trained_weights(model)
        sums = {name: torch.zeros(H, *weight.shape, device=device) for name, weight in weights}
        for name in self.chosen:
            layer = model.get_submodule(name)
            sums[f"effective {name}"] = torch.zeros(H, *layer.residual.shape, device=device)
        total = 0.0
        for fold, some in session.micro_batches(rows, H, self.args.micro_batch):
            batch = batch_of(some, self.pad_token_id, device)
            model.zero_grad()
            with GradientProbe(model, self.chosen) as probe:
                loss = row_losses(target_logits(model, batch), batch)
                check_finite(loss, some, "the loss")
                loss.sum().backward()
            total += float(loss.detach().double().sum())
            share = 1 / len(rows[fold::H])
            for name, weight in weights:
                if weight.grad is not None:
                    check_finite(weight.grad, some, f"the gradient of {name}")
                    sums[name][fold] += share * weight.grad
            for name in self.chosen:
                sums[f"effective {name}"][fold] += share * probe.gradients(name).sum(0)
            count(len(some))
        return sums | {"loss": torch.tensor(total / len(rows), dtype=torch.float64)}

    def gram(self, vectors):
        """Compute the inner products (T, H, T, H) of every task's fold vectors (H, P)."""
        T, H = len(vectors), self.args.folds
        return gram_matrix(torch.cat(vectors)).view(T, H, T, H).numpy()

    def conflicts(self, kept):
        """Compute conflict in the whole adapter, by layer and by expert, and energy information."""
        owned = {name: [] for name in (*self.names, "")}  # weights by adapted layer; "": no layer
        for name, _ in trained_weights(self.model):
            owner = max((layer for layer in self.names if name.startswith(f"{layer}.")), key=len,
                        default="")
            owned[owner].append(name)
        whole, layers, experts, energy, groups = 0, [], [], [], 0
        for owner in filter(owned.get, owned):
            grams = [self.gram(vectors) for vectors in self.groups(owner, owned[owner], kept)]
            whole = whole + sum(grams)
            found = conflict(sum(grams)) or dict.fromkeys(PER_LAYER)
            layers.append({"layer": owner} | {key: found[key] for key in PER_LAYER})
            if len(grams) > 1:
                experts += [found for gram in grams[:-1] if (found := conflict(gram))]
                groups += len(grams) - 1
                size = np.stack([gram.mean((1, 3)).diagonal() for gram in grams[:-1]], 1)  # (T, K)
                energy.append(information(size))
        measured = [value for value in without_nan(energy) if value is not None]
        return {"whole": conflict(whole), "by_layer": layers, "by_expert": {
            "groups": groups, "measured": len(experts)} | {
            key: np.mean([each[key] for each in experts], axis=0).tolist()
            for key in PER_LAYER if experts},
            "energy": float(np.mean(measured)) if measured else None}

    def groups(self, owner, names, kept):
        """Yield the fold vectors (H, P) of all tasks for each group of weights of one layer.

        The groups are the experts, with their rows of lora_A and columns of lora_B, and the rest.
        """
        layer = self.model.get_submodule(owner)
        each = {name.removeprefix(f"{owner}."): [task[name] for task in kept.values()]
                for name in names}
        if hasattr(layer, "expert_of"):
            A, B = each.pop("lora_A"), each.pop("lora_B")  # (H, N, in), (H, out, N) of each task
            for k in range(layer.num_experts):
                mine = layer.expert_of.cpu() == k  # (N,)
                yield [torch.cat([a[:, mine].flatten(1), b[:, :, mine].flatten(1)], 1)
                       for a, b in zip(A, B, strict=True)]
        if each:
            yield [torch.cat([part.flatten(1) for part in parts], 1)
                   for parts in zip(*each.values(), strict=True)]

    # --- look-ahead -----------------------------------------------------------------------------

    @torch.no_grad()
    def losses_after(self, step, count):
        """Compute the losses (T,) of held-out rows after a step {weight: change}."""
        model, losses = self.model, []
        with stepped(model, step):
            for rows in self.held_out.values():
                total = 0.0
                for _, some in session.micro_batches(rows, 1, self.args.micro_batch):
                    batch = batch_of(some, self.pad_token_id, model.device)
                    found = row_losses(target_logits(model, batch), batch)
                    check_finite(found, some, "the loss after a step")
                    total += float(found.double().sum())
                    count(len(some))
                losses.append(total / len(rows))
        return torch.tensor(losses, dtype=torch.float64)


class Means:
    """Mean gradients of tasks, and the step of Adam for one task.

    step_i = -lr g_i / (sqrt(mean over u of g_u^2) + 1e-8): the second moment is that of mixed
    training.
    """

    def __init__(self, kept, names):
        self.kept, self.names = kept, names
        self.scale = {name: 1 / (self.gradients(name).square().mean(0).sqrt() + 1e-8)
                      for name in names}

    def gradients(self, name):
        """Return g of every task for one weight, (T, *shape)."""
        return torch.stack([each[name].mean(0) for each in self.kept.values()])

    def step(self, task, step_size):
        return {name: -step_size * self.kept[task][name].mean(0) * self.scale[name]
                for name in self.names}

    def preconditioned(self):
        """Compute <g_j, g_i scaled> of tasks i (rows) and j (columns), (T, T)."""
        total = 0
        for name in self.names:
            g = self.gradients(name)
            total = total + ((g * self.scale[name]).flatten(1).double()
                             @ g.flatten(1).double().T)
        return total


def trained_weights(model):
    """Return (name, weight) of every trained weight."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


@contextlib.contextmanager
def stepped(model, step):
    """A context that adds `step` {name: tensor} to the weights and restores them to the bit."""
    weights = dict(model.named_parameters())
    before = {name: weights[name].detach().clone() for name in step}
    try:
        for name, change in step.items():
            weights[name].add_(change.to(weights[name]))
        yield
    finally:
        for name, tensor in before.items():
            weights[name].copy_(tensor)
