"""Which neurons and weights a task activates, and how tasks share them (Sec. 2, Fig. 1, 5-10, H.1).

The command `sharing`. Axis names as in probes.py and sharing.py, and H = 2 folds of rows.
"""

import functools
import random

import numpy as np
import torch

import models
from analysis import released, session, sharing
from analysis.conflict import conflict, gram_matrix
from analysis.probes import (
    GradientProbe,
    NeuronProbe,
    batch_of,
    mlp_names,
    positions,
    refuse_non_finite,
    row_means,
)
from evaluation import row_losses, target_logits
from harness.adapter_config import read_adapter_config
from inputs.bars import Bar
from inputs.errors import InputError
from inputs.numbers import stable_seed

FOLDS = 2
SHARES = (0.01, 0.05, 0.1, 0.2)  # of the small table: no conclusion may hang on one of them
POSITIONS = ("all", "target")
CONTROLS = ("pooled", "shuffled", "random")
PARTS = ("all", "fold0", "fold1")


def run(args):
    """The command `sharing`."""
    suite = session.read_suite(args, largest=sharing.MOST_TASKS)
    skeleton = models.skeleton(args.model)
    args.layers = session.check_layers(args, skeleton)
    gates = session.linear_layers(skeleton, args.layers, ["gate_proj"])
    names = session.linear_layers(skeleton, args.layers, args.target_modules)
    for name in names:
        check_share(args, skeleton.get_submodule(name).weight.numel(), name)
    check_share(args, skeleton.get_submodule(gates[0]).out_features, "a layer's neurons")
    chat = args.adapter and read_adapter_config(args.adapter)[0].chat_template
    tokenizer = models.load_tokenizer(args.model)
    drawn = session.draw(suite, tokenizer, args, FOLDS, bool(chat))
    print(session.describe(drawn, args), flush=True)
    model, sha256 = session.load_model(args, args.adapter)
    model.requires_grad_(False)  # hooks see all gradients that are needed
    made = session.made_with(args, suite, sha256, [args.adapter] if args.adapter else [])
    # In brackets, which no task's name has.
    rows = drawn.rows | {f"({name})": mine for name, mine in
                         controls(drawn.rows, tokenizer, args.seed).items()}
    sweep = Sweep(args, model, tokenizer.pad_token_id, names,
                  mlp_names(dict(zip(args.layers, gates, strict=True))))
    with session.Session(args.out, made).reserved() as folder:
        kept = folder.by_task({name: len(mine) for name, mine in rows.items()},
                              lambda name, count: sweep.task(rows[name], count), "tasks")
        result = {"command": "sharing", "layers": args.layers, "share": args.share,
                  "head_dim": head_dim(model.config), "tasks": session.task_lines(suite, drawn)}
        for line in result["tasks"]:
            line["loss"] = float(kept[line["name"]]["loss"])
        counted, arrays = Counted(args, suite, kept).statistics(sweep)
        folder.finish(result | counted, arrays)


def check_share(args, units, what):
    """Raise InputError where the share of so many units is none or all of them."""
    if args.epsilon is None and not 1 <= round(args.share * units) < units:
        raise InputError(f"--share {args.share:g} of {what}, {units:,}, is "
                         f"{round(args.share * units):,}: it must leave at least one in and out")


def controls(rows, tokenizer, seed):
    """Two rows of every task as further tasks, each with the lengths and targets of `pooled`.

    `shuffled` permutes the tokens of each prompt, `random` draws them from the ordinary ones.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    pooled = [row for mine in rows.values() for row in mine[:2]]
    made = {name: [] for name in CONTROLS}
    for index, row in enumerate(pooled):
        generator = random.Random(stable_seed("control", seed, index))
        split = len(row["input_ids"]) - row["num_targets"]
        prompt, target = row["input_ids"][:split], row["input_ids"][split:]
        prompts = {"pooled": prompt, "shuffled": generator.sample(prompt, split),
                   "random": generator.choices(ordinary, k=split)}
        for name, ids in prompts.items():
            made[name].append(row | {"task": name, "input_ids": ids + target})
    return made


class Sweep:
    """Forward and backward passes over the rows of one task, summed up as they come."""

    def __init__(self, args, model, pad_token_id, names, mlps):
        self.args, self.model, self.pad_token_id = args, model, pad_token_id
        self.names, self.mlps = names, mlps
        self.shapes = {name: layer_shape(model.get_submodule(name)) for name in names}
        self.neurons = {layer: layer_shape(model.get_submodule(f"{name}.gate_proj"))[0]
                        for layer, name in mlps.items()}

    def task(self, rows, count):
        """The small tensors that the statistics need, by name, of one task's rows.

        Sums over rows, of neurons' |values| and of gradients and their squares, are kept for each
        fold while the task lasts: of the weights one bit per mask and sign remains.
        """
        device = self.model.device
        neurons = {layer: torch.zeros(FOLDS, len(POSITIONS), m, dtype=torch.float64, device=device)
                   for layer, m in self.neurons.items()}
        sums = {name: torch.zeros(2, FOLDS, *shape, device=device)  # (moment, H, out, in)
                for name, shape in self.shapes.items()}
        z = {layer: torch.zeros(m, dtype=torch.float64, device=device)
             for layer, m in self.neurons.items()}
        losses, in_fold = 0.0, [len(rows[fold::FOLDS]) for fold in range(FOLDS)]
        for fold, some in session.micro_batches(rows, FOLDS, self.args.micro_batch):
            batch = batch_of(some, self.pad_token_id, device)
            with (NeuronProbe(self.model, self.mlps, self.args.neurons) as seen,
                  NeuronProbe(self.model, self.mlps if self.args.released else {}, "pre") as before,
                  GradientProbe(self.model, self.names) as probe):
                logits = target_logits(self.model, batch)  # (B, k - 1, vocabulary)
                loss = row_losses(logits, batch, self.args.row_loss)  # (B,)
                refuse_non_finite(loss, some, "the loss")
                loss.sum().backward()
            losses += float(loss.detach().double().sum())
            where = positions(batch)  # (positions, B, S)
            for layer, values in seen.values.items():
                means = row_means(values.double().abs(), where).sum(1)  # (positions, m)
                refuse_non_finite(means, some, f"an activation of layer {layer}")
                neurons[layer][fold] += means
            for layer, values in before.values.items():
                z[layer] += values[where[0]].double().sum(0)
            for name in self.names:
                G = probe.gradients(name)  # (B, out, in)
                squares = G.square().sum(0)
                refuse_non_finite(squares, some, f"the square of the gradient of {name}")
                sums[name][0, fold] += G.sum(0)
                sums[name][1, fold] += squares
            count(len(some))
        kept = {"loss": torch.tensor(losses / len(rows))}
        each = torch.tensor([len(rows), *in_fold], device=device)[:, None, None]
        for layer, total in neurons.items():
            kept[f"neurons.{layer}"] = torch.cat([total.sum(0, True), total]) / each
        if self.args.released:
            tokens = sum(len(row["input_ids"]) for row in rows)
            kept |= {f"released.{layer}": total / tokens for layer, total in z.items()}
        for name, (first, second) in sums.items():
            kept |= {f"{name}.{key}": value for key, value in
                     self.reduce(first, second, in_fold).items()}
            if name.endswith("gate_proj"):
                kept[f"{name}.folds"] = first / torch.tensor(in_fold, device=device)[:, None, None]
        return kept

    def reduce(self, first, second, in_fold):
        """What is kept of one matrix: S1 and S2 (H, out, in) of its rows' gradients -> tensors."""
        n = sum(in_fold)
        scores = {"all": second.sum(0) / n} | {  # empirical Fisher information
            f"fold{fold}": second[fold] / in_fold[fold] for fold in range(FOLDS)}
        kept = {}
        for part, F in scores.items():
            for key, mask in self.masks(F.flatten()).items():
                kept[f"{key}.{part}"] = packed(mask)
        for part, total in (("all", first.sum(0)), ("fold0", first[0]), ("fold1", first[1])):
            kept[f"up.{part}"] = packed(total.flatten() > 0)
            kept[f"down.{part}"] = packed(total.flatten() < 0)
        F = scores["all"]
        R2, rows, columns, clamped = sharing.additive_structure(F)
        numbers = [*sharing.concentration(F.flatten()), R2, clamped,
                   float(first.sum(0).norm() / n)]
        kept["numbers"] = torch.tensor([float("nan") if number is None else number
                                        for number in numbers], dtype=torch.float64)
        if self.args.released:
            theirs = released.matrix_scores(first.sum(0) / n, F)
            kept |= {f"released.{key}": packed(value) if key == "top" else value
                     for key, value in theirs.items()}
        return kept | {"rows": rows, "columns": columns}

    def masks(self, scores):
        """Active units by scores (P,): {"main": mask, and of SHARES "share0.01": mask, ...}."""
        if self.args.epsilon is not None:
            return {"main": scores > self.args.epsilon}
        shares = (self.args.share, *SHARES)
        counts = [round(share * len(scores)) for share in shares]
        keys = ("main", *(f"share{share}" for share in SHARES))
        return dict(zip(keys, sharing.top_masks(scores, counts), strict=True))


def head_dim(config):
    """Rows of q, k and v that make one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_shape(layer):
    """(out, in) of a linear layer, adapted or not."""
    return tuple(getattr(layer, "weight", getattr(layer, "residual", None)).shape)


def packed(mask):
    """A bool mask (P,) as bytes of eight units."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


class Counted:
    """The statistics of all tasks, matrix by matrix."""

    def __init__(self, args, suite, kept):
        self.args, self.kept = args, kept
        self.tasks = list(suite.tasks)
        self.categories = [task.category for task in suite.tasks.values()]

    def statistics(self, sweep):
        """(JSON, arrays) of all neurons and weights."""
        neurons, weights, table, arrays = [], [], [], {}
        for layer in self.args.layers:
            for index, place in enumerate(POSITIONS):
                masks = functools.partial(self.neuron_masks, sweep, layer, index)
                found = self.of_masks(masks("main"), f"neurons {layer} {place}")
                if self.args.released and place == "all":
                    z = torch.stack([self.kept[task][f"released.{layer}"] for task in self.tasks])
                    found["released"] = released.compared(released.neuron_masks(z),
                                                          self.tenth(masks))
                neurons.append({"layer": layer, "positions": place} | found)
                table += self.table(masks, f"neurons, {place} tokens", layer)
                arrays[f"neurons.{layer}.{place}"] = masks("main")[0]
        for name in Bar(sweep.names, desc="statistics", unit="matrix"):
            module, layer = name.rpartition(".")[2], session.layer_number(name)
            masks = functools.partial(self.weight_masks, name, sweep.shapes[name])
            main = masks("main")
            found = self.of_masks(main, f"weights {name}")
            found["signs"], arrays[f"signs.{module}.{layer}"] = self.signs(
                name, sweep.shapes[name], main[0])
            row_counts = main[0][:len(self.tasks)].reshape(
                len(self.tasks), *sweep.shapes[name]).sum(2)  # (T, out)
            found |= self.structure(name, row_counts)
            if module == "gate_proj":
                found |= {"conflict": self.conflict(name)}
            if self.args.released:
                found["released"] = self.released(name, self.tenth(masks))
            weights.append({"layer": layer, "module": module, "shape": sweep.shapes[name]} | found)
            arrays[f"rows.{module}.{layer}"] = row_counts / sweep.shapes[name][1]
            table += self.table(masks, module, layer)
        return {"neurons": neurons, "weights": weights, "shares": table}, arrays

    def of_masks(self, parts, seed_name):
        """`sharing.sharing` of masks (3 parts, tasks and controls, P)."""
        T = len(self.tasks)
        generator = np.random.default_rng(stable_seed("sharing", self.args.seed, seed_name))
        return sharing.sharing(parts[0][:T], parts[1:, :T], dict(
            zip(CONTROLS, parts[0][T:], strict=True)), self.categories, generator)

    def table(self, masks, what, layer):
        """How much is shared at each of SHARES; nothing where a threshold decides."""
        if self.args.epsilon is not None:
            return
        for share in SHARES:
            parts = masks(f"share{share}")[:, :len(self.tasks)]
            k, P = parts[0].sum(1), parts.shape[2]
            if 1 <= k[0] < P:
                J = sharing.off_diagonal(sharing.jaccard(parts[0], parts[0]))
                own = [sharing.jaccard(one[None], other[None])[0, 0]
                       for one, other in zip(parts[1], parts[2], strict=True)]
                yield {"what": what, "layer": layer, "share": share, "jaccard": float(J.mean()),
                       "chance": sharing.mean_chance_jaccard(k, P), "ceiling": float(np.mean(own))}

    def tenth(self, masks):
        """Our masks (T, P) of a tenth, from which --share may differ."""
        return masks(f"share{released.SHARE}")[0][:len(self.tasks)]

    def released(self, name, ours):
        """`released.compared_weights` of a matrix with our masks `ours` (T, P)."""
        tops, blocks, fisher = ([self.kept[task][f"{name}.released.{key}"] for task in self.tasks]
                                for key in ("top", "blocks", "fisher"))
        tops = np.array([unpacked(bits, ours.shape[1]) for bits in tops])
        return released.compared_weights(tops, blocks, fisher, ours)

    def neuron_masks(self, sweep, layer, place, key):
        """Masks (3 parts, tasks and controls, m) of a layer's neurons."""
        masks = []
        for kept in self.kept.values():
            s = kept[f"neurons.{layer}"][:, place]  # (parts, m)
            masks.append([sweep.masks(scores)[key].numpy() for scores in s])
        return np.array(masks).swapaxes(0, 1)

    def weight_masks(self, name, shape, key):
        """Masks (3 parts, tasks and controls, P) of a matrix."""
        P = shape[0] * shape[1]
        return np.array([[unpacked(kept[f"{name}.{key}.{part}"], P) for kept in self.kept.values()]
                         for part in PARTS])

    def signs(self, name, shape, M):
        """`sharing.signs` of a matrix with masks M (tasks and controls, P), and counts by row.

        Those are the active weights, over tasks, with a positive and a negative gradient: (2, out).
        """
        P, tasks = shape[0] * shape[1], [self.kept[task] for task in self.tasks]

        def of_part(part):
            return [np.array([unpacked(kept[f"{name}.{sign}.{part}"], P) for kept in tasks])
                    for sign in ("up", "down")]

        M, (up, down) = M[:len(tasks)], of_part("all")
        by_row = np.stack([(M & sign).sum(0).reshape(shape).sum(1) for sign in (up, down)])
        return sharing.signs(M, up, down, [of_part("fold0"), of_part("fold1")]), by_row

    def conflict(self, name):
        """`conflict.conflict` of the mean gradients of a matrix, in two folds."""
        T = len(self.tasks)
        folds = torch.cat([self.kept[task][f"{name}.folds"].flatten(1) for task in self.tasks])
        return conflict(gram_matrix(folds).view(T, FOLDS, T, FOLDS).numpy())

    def structure(self, name, row_counts):
        """Concentration, additive structure and row counts of a matrix; means over tasks."""
        tasks = [self.kept[task] for task in self.tasks]
        numbers = np.array([kept[f"{name}.numbers"].tolist() for kept in tasks])  # (T, 5)
        top1, top10, R2 = [None if np.isnan(column).any() else float(column.mean())
                           for column in numbers[:, :3].T]
        profiles = {side: sharing.mean_correlation([kept[f"{name}.{side}"].tolist()
                                                    for kept in tasks])
                    for side in ("rows", "columns")}
        half = len(row_counts[0]) // 2
        return {"concentration": [top1, top10], "additive_r2": R2,
                "clamped": int(numbers[:, 3].sum()),
                "row_profiles": profiles["rows"], "column_profiles": profiles["columns"],
                "row_counts_correlation": sharing.mean_correlation(row_counts),
                "lower_half_rows": float(row_counts[:, :half].sum() / max(1, row_counts.sum())),
                "gradient_norms": numbers[:, 4].tolist()}


def unpacked(bits, P):
    """The bool mask (P,) of packed bytes."""
    return np.unpackbits(bits.numpy(), count=P).astype(bool)
