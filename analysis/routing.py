"""Measure which experts tasks are routed to, and in which they learn (Fig. 2 and 13).

The commands `experts` and `mmlu`. Axis names
    T, n      tasks, rows of a task
    L, K      adapted layers, experts
    S         tokens of a row
    w         mean routing weight of each expert before the top-k selection
    u         share of tokens that select an expert
"""

import numpy as np
import torch
from scipy import stats

import models
from analysis import adapters, mmlu, session
from analysis.probes import PLACES, loss_of, means_at_places
from analysis.sharing import category_effect, chance_jaccard, jaccard, mean, off_diagonal
from data import Suite
from experts import select_experts
from inputs.errors import InputError
from inputs.numbers import stable_seed
from method import observe

PERMUTATIONS = 1000


# --- statistics ---------------------------------------------------------------------------------


def active_experts(w, top_k):
    """Return the top_k largest of w (T, K) for every task, ties to the lower index: bool (T, K)."""
    return select_experts(torch.as_tensor(w), top_k).numpy()


def information(u):
    """Compute the mutual information of task and expert, in nats: u (..., T, K) -> (...).

    It is the mean over tasks of KL(pi_t || mean pi) with pi_t = u_t / sum u_t. 0: routing ignores
    the task. Upper bounds: ln K, and ln K - ln k where every token selects k experts, because then
    no expert has more than 1 / k of a task's selections. NaN for a task whose u is all zero.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0
        pi = u / u.sum(-1, keepdims=True)  # (..., T, K)
    mean = pi.mean(-2, keepdims=True)
    ratio = np.where(pi > 0, pi / np.where(mean > 0, mean, 1), 1)
    return np.maximum((pi * np.log(ratio)).sum(-1), 0).mean(-1)  # rounding can make it negative


def null_information(rows, sizes, generator):
    """Compute `information` after random assignments of rows (N, ..., K) to tasks.

    `sizes` (T,) are the numbers of rows of the tasks -> (PERMUTATIONS, ...).
    """
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    found = []
    for _ in range(PERMUTATIONS):
        sums = np.add.reduceat(rows[generator.permutation(len(rows))], starts, axis=0)
        means = sums / sizes.reshape(-1, *[1] * (rows.ndim - 1))  # (T, ..., K)
        found.append(information(np.moveaxis(means, 0, -2)))
    return np.array(found)


# --- one adapter --------------------------------------------------------------------------------


@torch.no_grad()
def weights_and_selection(layer, x):
    """Return the routing weights of tokens x (..., in) before top-k, and the selection: (..., K).

    The weights are the softmax of the router's logits. Routing by energy has no weights; its
    relative energies, normalised to sum to 1, take their place.
    """
    routing = layer.route(x)
    if hasattr(layer, "router"):
        weights = routing.scores.softmax(-1)
    else:
        weights = routing.scores / routing.scores.sum(-1, keepdim=True)
    if routing.active is None:  # top_k = K
        return weights, torch.ones_like(weights)
    return weights, routing.active.to(weights.dtype)


def expert_energy(layer):
    """Compute the squared gradient norm of the components of each expert, (K,)."""
    each = (layer.lora_A.grad.double().square().sum(1)
            + layer.lora_B.grad.double().square().sum(0))  # (N,)
    zeros = each.new_zeros(layer.num_experts)
    return zeros.index_add(0, layer.expert_of, each)


def measure_task(model, rows, count, letters=None):
    """Measure the routing of one task's rows -> tensors by name.

    routed (n, 2: w and u, 2: PLACES, L, K); energy (L, K) of the mean gradient; losses (n,). With
    `letters` (4,), token ids of A to D, the target is only the letter of the answer, and right (n,)
    says whether the correct letter is the most probable of the four.
    """
    layers = model.adapted_by.layers
    model.zero_grad()
    routed, losses, right = [], [], []
    for row in rows:
        seen = {}  # (w, u) by layer, each (S, K)
        with observe(model, layers, lambda name, x, _, seen=seen: seen.update(
                {name: weights_and_selection(layers[name], x[0])})):
            loss, logits = loss_of(model, row)
            loss.backward()
        n, last = row["num_targets"], -1
        if letters is not None:
            right.append(int(letters[int(logits[0, letters].argmax())]) == row["input_ids"][-n])
            last = -n  # only the first target
        routed.append(torch.stack([torch.stack([means_at_places(each, n, last) for each in pair])
                                   for pair in seen.values()], 2))  # (2, 2, L, K)
        losses.append(loss.detach())
        count(1)
    energy = torch.stack([expert_energy(layer) for layer in layers.values()]) / len(rows)**2
    return {"routed": torch.stack(routed).double(), "energy": energy,
            "losses": torch.stack(losses), "right": torch.tensor(right)}


def statistics(adapter, categories, kept, seed):
    """Return the entry of an adapter in analysis.json, from `measure_task` of every task."""
    routed = [each["routed"].numpy() for each in kept]  # T of (n, 2, 2, L, K)
    means = np.stack([each.mean(0) for each in routed])  # (T, 2, 2, L, K)
    sizes = np.array([len(each) for each in routed])
    K, top_k = means.shape[-1], adapter.settings.top_k
    generator = np.random.default_rng(stable_seed("routing", seed, adapter.name))
    observed = information(np.moveaxis(means, 0, -2))  # (2, 2, L)
    null = null_information(np.concatenate(routed)[:, 1], sizes, generator)  # (., 2, L)
    energy = information(np.stack([each["energy"].numpy() for each in kept]).swapaxes(0, 1))  # (L,)
    places = {}
    for place, where in enumerate(PLACES):
        w, u = means[:, 0, place, -1], means[:, 1, place, -1]  # (T, K): the last layer
        active = active_experts(w, top_k)
        centred = w - w.mean(0)
        norms = np.linalg.norm(centred, axis=1)
        effect, p = (None, None) if (norms == 0).any() else category_effect(
            centred @ centred.T / np.outer(norms, norms), categories, generator)
        places[where] = {
            "w": w.tolist(), "active": active.tolist(),
            "jaccard": float(off_diagonal(jaccard(active, active)).mean()),
            "tasks_per_expert": active.sum(0).tolist(), "unused": int((u.sum(0) == 0).sum()),
            "category_effect": effect, "category_p": p,
            "information": observed[1, place].tolist(),
            "null_95": np.quantile(null[:, place], 0.95, axis=0).tolist(),
            "mean_information": float(observed[1, place].mean()),
            "mean_of_weights": float(observed[0, place].mean()),
            "mean_null": float(null[:, place].mean())}
    losses = [float(each["losses"].double().mean()) for each in kept]
    return adapter.about | {
        "experts": K, "top_k": top_k, "chance": chance_jaccard(top_k, top_k, K),
        "places": places, "mean_energy": mean(energy[~np.isnan(energy)]),
        "losses": losses, "loss": float(np.mean(losses))}


# --- the commands -------------------------------------------------------------------------------


def run_experts(args):
    """Run the command `experts`, on rows that the adapters were not trained on."""
    found = adapters.find(args.adapter)
    adapters.check_experts(args.adapter, found)
    suite = session.read_suite(args)
    adapters.check_tasks(found, suite, "--tasks, --suite")
    suite, which = adapters.unseen(suite, found, args.rows)
    measure_all(args, found, suite, which)


def run_mmlu(args):
    """Run the command `mmlu`: routing and accuracy on MMLU's questions."""
    found = adapters.find(args.adapter)
    adapters.check_experts(args.adapter, found)
    suite = Suite("mmlu", mmlu.load(args.mmlu, args.subjects))
    adapters.check_tasks(found, suite, "--subjects")
    measure_all(args, found, suite, f"MMLU's questions from {args.mmlu}", letters_of)


def letters_of(tokenizer):
    """Return the token ids of A to D, (4,). Raises InputError where a letter is not one token."""
    ids = [tokenizer(letter, add_special_tokens=False).input_ids for letter in mmlu.LETTERS]
    if any(len(each) != 1 for each in ids):
        raise InputError("the tokenizer splits a letter from A to D into several tokens: mmlu "
                         "cannot compare the four answers")
    return torch.tensor([each[0] for each in ids])


def measure_all(args, found, suite, about, letters_of=None):
    """Measure all adapters on all tasks of a suite, and write analysis.json."""
    tokenizer = models.load_tokenizer(args.model)
    drawn = session.draw(suite, tokenizer, args, 1, found[0].config.chat_template)
    letters = letters_of and letters_of(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    lines, lengths = [], {name: len(rows) for name, rows in drawn.items()}
    categories = [task.category for task in suite.tasks.values()]
    model = loaded = None  # one model in memory, and the folder of its adapter

    def compute(task, count):
        nonlocal model, loaded
        if each.folder(task) != loaded:
            model = None  # frees its memory first
            model, _ = session.load_model(args, each.folder(task))
            loaded = each.folder(task)
        return measure_task(model, drawn[task], count, letters)

    for each in found:
        kept = list(session.by_task(lengths, compute, each.name).values())
        lines.append(statistics(each, categories, kept, args.seed))
        if letters is not None:
            right = [task["right"] for task in kept]
            lines[-1]["accuracy"] = [float(answers.double().mean()) for answers in right]
            lines[-1]["accuracy_p"] = float(stats.binomtest(
                int(torch.cat(right).sum()), len(torch.cat(right)), 1 / len(letters),
                alternative="greater").pvalue)
    made = session.made_with(args, suite, found[0].config.base_sha256,
                             [path for each in found for path in each.folders.values()])
    session.write(args.out, {"made": made, "command": args.command, "about": about,
                             "adapters": lines, "tasks": session.task_lines(suite, drawn)})
