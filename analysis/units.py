"""Find the neurons and weights that each task activates, and compare them (Sec. 2, Fig. 1, 5-10).

The command `sharing`. Axis names as in probes.py and sharing.py, and
    H     2 folds of the rows of a task
    m     neurons of a layer: intermediate size of the MLP
Masks are made of all rows and of each fold: 3 parts.
"""

import random

import numpy as np
import torch
from tqdm import tqdm

import models
from analysis import session, sharing
from analysis.probes import PLACES, check_finite, loss_of, means_at_places, row_gradients
from inputs.errors import InputError
from inputs.numbers import stable_seed
from method import observe

FOLDS = 2
CONTROLS = ("pooled", "shuffled", "random")


def run(args):
    """Run the command `sharing`."""
    suite = session.read_suite(args)
    skeleton = models.skeleton(args.model)
    args.layers = session.check_layers(args, skeleton)
    gates = session.linear_layers(skeleton, args.layers, ["gate_proj"])
    names = session.linear_layers(skeleton, args.layers, args.target_modules)
    for name in names:
        check_share(args.share, skeleton.get_submodule(name).weight.numel(), name)
    check_share(args.share, skeleton.get_submodule(gates[0]).out_features, "a layer's neurons")
    tokenizer = models.load_tokenizer(args.model)
    drawn = session.draw(suite, tokenizer, args, FOLDS, chat_template=False)
    model, sha256 = session.load_model(args)
    args.out.mkdir(parents=True, exist_ok=True)
    # Parentheses: no task has such a name.
    rows = drawn | {f"({name})": mine for name, mine in
                         controls(drawn, tokenizer, args.seed).items()}
    kept = session.by_task(
        {name: len(mine) for name, mine in rows.items()},
        lambda name, count: measure_task(model, rows[name], names, gates, args.share, count),
        "tasks")
    result = {"command": "sharing", "share": args.share, "head_dim": head_dim(model.config),
              "tasks": session.task_lines(suite, drawn),
              "made": session.made_with(args, suite, sha256)}
    for line in result["tasks"]:
        line["loss"] = float(kept[line["name"]]["loss"])
    shapes = {name: tuple(skeleton.get_submodule(name).weight.shape) for name in names}
    counted, arrays = statistics(args, suite, list(kept.values()), shapes)
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


def head_dim(config):
    """Return the number of rows of q, k and v in one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def measure_task(model, rows, names, gates, share, count):
    """Find the active neurons and weights of one task -> tensors by name.

    For each layer of `gates` the masks neurons.{layer} (3 parts, 2 places, m). For each matrix of
    `names` packed masks (3 parts, P / 8 bytes) of the active weights and of the signs of the mean
    gradient, and R2, rows and columns of `sharing.additive_structure`. Sums over rows are float32
    for gradients and their squares, and are freed at the end of a task.
    """
    neurons, losses = {}, 0.0  # neurons by layer: (H, 2 places, m)
    sums = {name: torch.zeros(2, FOLDS, *model.get_submodule(name).weight.shape,
                              device=model.device) for name in names}  # (moment, H, out, in)
    activations = {session.layer_number(name): model.get_submodule(
        name.replace("gate_proj", "act_fn")) for name in gates}
    for index, row in enumerate(rows):
        fold, values = index % FOLDS, {}
        with (observe(model, activations, lambda layer, _, y, values=values: values.update(
                {layer: y[0].detach()})), row_gradients(model, names) as gradient):
            loss, _ = loss_of(model, row)
            loss.backward()
        losses += loss.item()
        for layer, activation in values.items():  # (S, m)
            means = means_at_places(activation.double().abs(), row["num_targets"])
            check_finite(means, row, f"an activation of layer {layer}")
            neurons.setdefault(layer, means.new_zeros(FOLDS, *means.shape))[fold] += means
        for name in names:
            G = gradient(name)
            check_finite(G.square(), row, f"the square of the gradient of {name}")
            sums[name][0, fold] += G
            sums[name][1, fold] += G.square()
        count(1)
    kept = {"loss": torch.tensor(losses / len(rows))}
    for layer, each in neurons.items():
        kept[f"neurons.{layer}"] = sharing.top_mask(parts(each), share)
    for name, (first, second) in sums.items():
        mean = parts(first).flatten(1)  # (3, P), up to a factor
        kept |= {f"{name}.active": packed(sharing.top_mask(parts(second).flatten(1), share)),
                 f"{name}.up": packed(mean > 0), f"{name}.down": packed(mean < 0)}
        R2, rows_effect, columns_effect = sharing.additive_structure(second.sum(0) / len(rows))
        kept |= {f"{name}.R2": torch.tensor(R2), f"{name}.rows": rows_effect,
                 f"{name}.columns": columns_effect}
    return kept


def parts(sums):
    """Stack the sum over folds and the folds: (H, ...) -> (1 + H, ...)."""
    return torch.cat([sums.sum(0, keepdim=True), sums])


def packed(masks):
    """Pack bool masks (3, P) into bytes."""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=-1))


def unpacked(kept, key, P):
    """Return the bool masks (3 parts, tasks, P) of the packed masks `key` of tasks."""
    return np.stack([np.unpackbits(task[key].numpy(), axis=-1, count=P).astype(bool)
                     for task in kept], 1)


def statistics(args, suite, kept, shapes):
    """Return (entries of analysis.json, arrays) from `measure_task` of tasks, then controls."""
    T = len(suite.tasks)
    categories = [task.category for task in suite.tasks.values()]
    neurons, weights, arrays = [], [], {}

    def compare(masks, name):  # masks (3 parts, tasks and controls, P)
        generator = np.random.default_rng(stable_seed("sharing", args.seed, name))
        return sharing.sharing(masks[0][:T], masks[1:, :T], dict(
            zip(CONTROLS, masks[0][T:], strict=True)), categories, generator)

    for layer in args.layers:
        masks = np.stack([task[f"neurons.{layer}"].numpy() for task in kept], 2)
        for place, mine in zip(PLACES, masks.swapaxes(0, 1), strict=True):
            neurons.append({"layer": layer, "positions": place}
                           | compare(mine, f"neurons {layer} {place}"))
            arrays[f"neurons.{layer}.{place}"] = mine[0]
    for name, shape in tqdm(shapes.items(), desc="statistics", unit="matrix"):
        module, layer, P = name.rpartition(".")[2], session.layer_number(name), np.prod(shape)
        active = unpacked(kept, f"{name}.active", P)
        up, down = (unpacked(kept[:T], f"{name}.{sign}", P) for sign in ("up", "down"))
        M = active[0][:T]
        weights.append({
            "layer": layer, "module": module, "shape": shape,
            "additive_r2": sharing.mean([float(task[f"{name}.R2"]) for task in kept[:T]]),
            **{f"{side}_profiles": sharing.mean_correlation([
                task[f"{name}.{side}"].tolist() for task in kept[:T]])
               for side in ("rows", "columns")},
            "signs": sharing.signs(M, up, down)} | compare(active, f"weights {name}"))
        arrays[f"rows.{module}.{layer}"] = M.reshape(T, *shape).mean(2)  # (T, out)
        arrays[f"signs.{module}.{layer}"] = np.stack([  # (2, out): summed over tasks
            (M & sign[0]).sum(0).reshape(shape).sum(1) for sign in (up, down)])
    return {"neurons": neurons, "weights": weights}, arrays
