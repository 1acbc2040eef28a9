"""Find the neurons and weights that each task activates, and compare them (Sec. 2, Fig. 1, 5-10).

The command `sharing`. Axis names as in probes.py and sharing.py, and H = 2 folds of rows.
"""

import random

import numpy as np
import torch
from tqdm import tqdm

import models
from analysis import session, sharing
from analysis.conflict import conflict, gram_matrix
from analysis.probes import (
    GradientProbe,
    NeuronProbe,
    batch_of,
    check_finite,
    mlp_names,
    positions,
    row_means,
)
from evaluation import row_losses, target_logits
from harness.adapter_config import read_adapter_config
from inputs.errors import InputError
from inputs.numbers import stable_seed

FOLDS = 2
SHARES = (0.01, 0.05, 0.1, 0.2)  # a small table shows whether a conclusion depends on --share
POSITIONS = ("all", "target")
CONTROLS = ("pooled", "shuffled", "random")
PARTS = ("all", "fold0", "fold1")


def run(args):
    """Run the command `sharing`."""
    suite = session.read_suite(args, largest=sharing.MOST_TASKS)
    skeleton = models.skeleton(args.model)
    args.layers = session.check_layers(args, skeleton)
    gates = session.linear_layers(skeleton, args.layers, ["gate_proj"])
    names = session.linear_layers(skeleton, args.layers, args.target_modules)
    for name in names:
        check_share(args.share, skeleton.get_submodule(name).weight.numel(), name)
    check_share(args.share, skeleton.get_submodule(gates[0]).out_features, "a layer's neurons")
    chat = args.adapter and read_adapter_config(args.adapter)[0].chat_template
    tokenizer = models.load_tokenizer(args.model)
    drawn = session.draw(suite, tokenizer, args, FOLDS, bool(chat))
    print(session.describe(drawn, args), flush=True)
    model, sha256 = session.load_model(args, args.adapter)
    model.requires_grad_(False)  # hooks see all gradients that are needed
    args.out.mkdir(parents=True, exist_ok=True)
    # Parentheses: no task has such a name.
    rows = drawn.rows | {f"({name})": mine for name, mine in
                         controls(drawn.rows, tokenizer, args.seed).items()}
    sweep = Sweep(args, model, tokenizer.pad_token_id, names,
                  mlp_names(dict(zip(args.layers, gates, strict=True))))
    kept = session.by_task({name: len(mine) for name, mine in rows.items()},
                           lambda name, count: sweep.task(rows[name], count), "tasks")
    result = {"command": "sharing", "layers": args.layers, "share": args.share,
              "head_dim": head_dim(model.config), "tasks": session.task_lines(suite, drawn),
              "made": session.made_with(args, suite, sha256,
                                        [args.adapter] if args.adapter else [])}
    for line in result["tasks"]:
        line["loss"] = float(kept[line["name"]]["loss"])
    counted, arrays = Comparison(args, suite, kept).statistics(sweep)
    session.write(args.out, result | counted, arrays)


def check_share(share, units, what):
    """Raise InputError where the share of so many units is none or all of them."""
    if not 1 <= round(share * units) < units:
        raise InputError(f"--share {share:g} of {what}, {units:,}, is {round(share * units):,}: "
                         "it must leave at least one in and out")


def controls(rows, tokenizer, seed):
    """Make three control tasks from two rows of every task.

    `pooled` has these rows, `shuffled` permutes the tokens of each prompt, `random` draws them from
    the ordinary tokens. Lengths and targets are equal.
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
    """Forward and backward passes over the rows of one task."""

    def __init__(self, args, model, pad_token_id, names, mlps):
        self.args, self.model, self.pad_token_id = args, model, pad_token_id
        self.names, self.mlps = names, mlps
        self.shares = sorted({args.share, *SHARES})
        self.shapes = {name: layer_shape(model.get_submodule(name)) for name in names}
        self.neurons = {layer: layer_shape(model.get_submodule(f"{name}.gate_proj"))[0]
                        for layer, name in mlps.items()}

    def task(self, rows, count):
        """Return what the statistics need of one task's rows, as tensors by name.

        Sums over rows of activations, gradients and squared gradients are kept for each fold until
        the task ends. Then one bit for each mask and sign of a weight remains.
        """
        device = self.model.device
        neurons = {layer: torch.zeros(FOLDS, len(POSITIONS), m, dtype=torch.float64, device=device)
                   for layer, m in self.neurons.items()}
        sums = {name: torch.zeros(2, FOLDS, *shape, device=device)  # (moment, H, out, in)
                for name, shape in self.shapes.items()}
        losses, in_fold = 0.0, [len(rows[fold::FOLDS]) for fold in range(FOLDS)]
        for fold, some in session.micro_batches(rows, FOLDS, self.args.micro_batch):
            batch = batch_of(some, self.pad_token_id, device)
            with (NeuronProbe(self.model, self.mlps) as seen,
                  GradientProbe(self.model, self.names) as probe):
                loss = row_losses(target_logits(self.model, batch), batch)  # (B,)
                check_finite(loss, some, "the loss")
                loss.sum().backward()
            losses += float(loss.detach().double().sum())
            where = positions(batch)  # (positions, B, S)
            for layer, values in seen.values.items():
                means = row_means(values.double().abs(), where).sum(1)  # (positions, m)
                check_finite(means, some, f"an activation of layer {layer}")
                neurons[layer][fold] += means
            for name in self.names:
                G = probe.gradients(name)  # (B, out, in)
                squares = G.square().sum(0)
                check_finite(squares, some, f"the square of the gradient of {name}")
                sums[name][0, fold] += G.sum(0)
                sums[name][1, fold] += squares
            count(len(some))
        kept = {"loss": torch.tensor(losses / len(rows))}
        each = torch.tensor([len(rows), *in_fold], device=device)[:, None, None]
        for layer, total in neurons.items():
            kept[f"neurons.{layer}"] = torch.cat([total.sum(0, True), total]) / each
        for name, (first, second) in sums.items():
            kept |= {f"{name}.{key}": value for key, value in
                     self.reduce(first, second, in_fold).items()}
            if name.endswith("gate_proj"):
                kept[f"{name}.folds"] = first / torch.tensor(in_fold, device=device)[:, None, None]
        return kept

    def reduce(self, first, second, in_fold):
        """Reduce S1 and S2 (H, out, in), sums of gradients and of squares, to masks and numbers."""
        n, kept = sum(in_fold), {}
        F = second.sum(0) / n  # empirical Fisher information, (out, in)
        for part, scores, total in zip(
                PARTS, (F, *(second[fold] / in_fold[fold] for fold in range(FOLDS))),
                (first.sum(0), *first), strict=True):
            for share, mask in self.masks(scores.flatten()).items():
                kept[f"{share}.{part}"] = packed(mask)
            kept[f"up.{part}"] = packed(total.flatten() > 0)
            kept[f"down.{part}"] = packed(total.flatten() < 0)
        R2, rows, columns, clamped = sharing.additive_structure(F)
        numbers = [*sharing.concentration(F.flatten()), R2, clamped, float(first.sum(0).norm() / n)]
        kept["numbers"] = torch.tensor([float("nan") if number is None else number
                                        for number in numbers], dtype=torch.float64)
        return kept | {"rows": rows, "columns": columns}

    def masks(self, scores):
        """Return {share: mask of the largest scores}, scores (P,)."""
        counts = [round(share * len(scores)) for share in self.shares]
        return dict(zip(self.shares, sharing.top_masks(scores, counts), strict=True))


def head_dim(config):
    """Return the number of rows of q, k and v in one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_shape(layer):
    """Return (out, in) of a linear layer, adapted or not."""
    return tuple(getattr(layer, "weight", getattr(layer, "residual", None)).shape)


def packed(mask):
    """Pack a bool mask (P,) into bytes."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpacked(bits, P):
    """Return the bool mask (P,) of packed bytes."""
    return np.unpackbits(bits.numpy(), count=P).astype(bool)


class Comparison:
    """The statistics over all tasks, one layer or matrix at a time."""

    def __init__(self, args, suite, kept):
        self.args, self.kept = args, kept
        self.tasks = [kept[name] for name in suite.tasks]
        self.categories = [task.category for task in suite.tasks.values()]

    def statistics(self, sweep):
        """Return (entries of analysis.json, arrays) of all neurons and weights."""
        neurons, weights, table, arrays = [], [], [], {}
        T = len(self.tasks)
        for layer in self.args.layers:
            for index, place in enumerate(POSITIONS):
                masks = self.neuron_masks(sweep, layer, index)
                neurons.append({"layer": layer, "positions": place}
                               | self.compare(masks[self.args.share], f"neurons {layer} {place}"))
                table += self.at_shares(masks.get, f"neurons, {place} tokens", layer)
                arrays[f"neurons.{layer}.{place}"] = masks[self.args.share][0]
        for name in tqdm(sweep.names, desc="statistics", unit="matrix"):
            module, layer = name.rpartition(".")[2], session.layer_number(name)
            shape = sweep.shapes[name]
            main = self.bits(name, self.args.share, shape)
            row_counts = main[0][:T].reshape(T, *shape).sum(2)  # (T, out)
            line = {"layer": layer, "module": module, "shape": shape} | self.compare(
                main, f"weights {name}") | self.structure(name, row_counts)
            line["signs"], arrays[f"signs.{module}.{layer}"] = self.signs(name, shape, main[0][:T])
            if module == "gate_proj":
                folds = torch.cat([task[f"{name}.folds"].flatten(1) for task in self.tasks])
                line["conflict"] = conflict(gram_matrix(folds).view(T, FOLDS, T, FOLDS).numpy())
            weights.append(line)
            arrays[f"rows.{module}.{layer}"] = row_counts / shape[1]
            table += self.at_shares(lambda share, name=name, shape=shape: self.bits(
                name, share, shape), module, layer)
        return {"neurons": neurons, "weights": weights, "shares": table}, arrays

    def neuron_masks(self, sweep, layer, place):
        """Return {share: masks (3 parts, tasks and controls, m)} of a layer's neurons."""
        found = [[sweep.masks(scores) for scores in kept[f"neurons.{layer}"][:, place]]
                 for kept in self.kept.values()]
        return {share: np.array([[masks[share].numpy() for masks in parts] for parts in found]
                                ).swapaxes(0, 1) for share in sweep.shares}

    def bits(self, name, key, shape):
        """Return masks (3 parts, tasks and controls, P) of a matrix."""
        return np.array([[unpacked(kept[f"{name}.{key}.{part}"], shape[0] * shape[1])
                          for kept in self.kept.values()] for part in PARTS])

    def compare(self, parts, seed_name):
        """Return `sharing.sharing` of masks (3 parts, tasks and controls, P)."""
        T = len(self.tasks)
        generator = np.random.default_rng(stable_seed("sharing", self.args.seed, seed_name))
        return sharing.sharing(parts[0][:T], parts[1:, :T], dict(
            zip(CONTROLS, parts[0][T:], strict=True)), self.categories, generator)

    def at_shares(self, masks, what, layer):
        """Yield Jaccard indices of masks(share) at each of SHARES that leaves a unit in and out."""
        for share in SHARES:
            parts = masks(share)[:, :len(self.tasks)]
            k, P = parts[0].sum(1), parts.shape[2]
            if 1 <= k[0] < P:
                J = sharing.off_diagonal(sharing.jaccard(parts[0], parts[0]))
                yield {"what": what, "layer": layer, "share": share, "jaccard": float(J.mean()),
                       "chance": sharing.mean_chance_jaccard(k, P),
                       "ceiling": float(sharing.own_jaccard(parts[1:]).mean())}

    def signs(self, name, shape, M):
        """Return `sharing.signs` of a matrix, and counts by row (2, out).

        The counts are of active weights, over tasks, with a positive and a negative gradient.
        """
        T = len(self.tasks)
        up, down = (self.bits(name, sign, shape)[:, :T] for sign in ("up", "down"))  # (3, T, P)
        by_row = np.stack([(M & sign[0]).sum(0).reshape(shape).sum(1) for sign in (up, down)])
        return sharing.signs(M, up[0], down[0], [(up[1], down[1]), (up[2], down[2])]), by_row

    def structure(self, name, row_counts):
        """Return concentration, additive structure and row counts of a matrix, means over tasks."""
        numbers = np.array([task[f"{name}.numbers"].tolist() for task in self.tasks])  # (T, 5)
        top1, top10, R2 = [None if np.isnan(column).any() else float(column.mean())
                           for column in numbers[:, :3].T]
        profiles = {side: sharing.mean_correlation([task[f"{name}.{side}"].tolist()
                                                    for task in self.tasks])
                    for side in ("rows", "columns")}
        half = len(row_counts[0]) // 2
        return {"concentration": [top1, top10], "additive_r2": R2,
                "clamped": int(numbers[:, 3].sum()),
                "row_profiles": profiles["rows"], "column_profiles": profiles["columns"],
                "row_counts_correlation": sharing.mean_correlation(row_counts),
                "lower_half_rows": float(row_counts[:, :half].sum() / row_counts.sum()),
                "gradient_norms": numbers[:, 4].tolist()}
