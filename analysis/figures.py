"""Draw the figures of the analyses from analysis.json and arrays.npz."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from reporting.figures import grid
from reporting.runs import short

ACTIVE = ListedColormap(["#1b2a52", "#ffd700"])  # dark blue, yellow
BINS = 256  # largest number of rows in a picture of a matrix; more are averaged
CONFLICT = plt.get_cmap("RdBu")  # red: negative, white: 0, blue: positive


def by_category(tasks):
    """Return the indices of the tasks, sorted by category."""
    return sorted(range(len(tasks)), key=lambda t: (tasks[t]["category"], t))


def middle_first(items):
    """Return the panels with the middle layer first."""
    items = list(items)
    middle = len(items) // 2
    return [items[middle], *items[:middle], *items[middle + 1:]]


def number(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def label_tasks(axes, tasks, order, axis="y"):
    """Write task names along an axis, and the categories beside the y axis."""
    set_ticks = axes.set_yticks if axis == "y" else axes.set_xticks
    turned = {} if axis == "y" else dict(rotation=60, ha="right", rotation_mode="anchor")
    set_ticks(range(len(order)), [short(tasks[t]["name"]) for t in order], fontsize=7, **turned)
    if axis == "y":
        names = [tasks[t]["category"] for t in order]
        for name in dict.fromkeys(names):
            first, count = names.index(name), names.count(name)
            axes.text(1.005, first + (count - 1) / 2, name.replace(" ", "\n", 1), fontsize=6,
                      va="center", transform=axes.get_yaxis_transform())
            if first:
                axes.axhline(first - 0.5, color="white", linewidth=0.8)


# --- sharing ------------------------------------------------------------------------------------


def neurons(result, arrays, place):
    """Draw Fig. 1 (left) and 5: active neurons of each task, and the number of tasks per neuron.

    The neurons are sorted by this number, then by their tasks.
    """
    found = middle_first([line for line in result["neurons"] if line["positions"] == place])
    tasks, order = result["tasks"], by_category(result["tasks"])
    figure, axes = plt.subplots(2 * len(found), 1, figsize=(16, 4.2 * len(found)),
                                layout="constrained", height_ratios=[3, 1] * len(found))
    for index, line in enumerate(found):
        mask = arrays[f"neurons.{line['layer']}.{place}"][:len(tasks)][order]  # (T, m)
        mask = mask[:, np.lexsort([*~mask[::-1], -mask.sum(0)])]
        image, bars = axes[2 * index:2 * index + 2]
        m = mask.shape[1]
        image.imshow(mask, cmap=ACTIVE, aspect="auto", interpolation="nearest", vmin=0, vmax=1,
                     extent=(0, m, len(tasks) - 0.5, -0.5))
        label_tasks(image, tasks, order)
        image.set_title(f"layer {line['layer']}, {place} tokens: Jaccard of tasks "
                        f"{line['jaccard']:.2f} (chance {line['chance']:.2f}, "
                        f"two halves of a task {line['ceiling']:.2f})")
        bars.stairs(mask.sum(0), np.arange(m + 1), fill=True, color="#ffb000")
        bars.set(xlim=(0, m), ylim=(0, len(tasks)), ylabel="tasks",
                 xlabel="neuron, sorted by its number of tasks")
        bars.set_facecolor("#1b2a52")
    return figure


def binned(rows):
    """Average rows (n, ...) in at most BINS equal parts."""
    return np.stack([part.mean(0) for part in np.array_split(rows, min(BINS, len(rows)))])


def weights(result, arrays, module):
    """Draw Fig. 1 (right) and 6 to 9: share of active weights by row of a matrix and task."""
    found = middle_first([line for line in result["weights"] if line["module"] == module])
    tasks, order = result["tasks"], by_category(result["tasks"])
    figure, axes = plt.subplots(1, 2 * len(found), figsize=(5.6 * len(found), 6.5),
                                layout="constrained", width_ratios=[1, 4] * len(found))
    shares = [binned(arrays[f"rows.{module}.{line['layer']}"][order].T) for line in found]
    highest = max(share.max() for share in shares)
    for index, (line, share) in enumerate(zip(found, shares, strict=True)):
        total, image = axes[2 * index:2 * index + 2]
        rows = line["shape"][0]
        drawn = image.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=highest,
                             interpolation="nearest", extent=(-0.5, len(tasks) - 0.5, rows, 0))
        label_tasks(image, tasks, order, "x")
        image.set_title(f"layer {line['layer']}: J {line['jaccard']:.2f} "
                        f"(chance {line['chance']:.2f})", fontsize=10)
        image.set_yticks([])
        edges = np.linspace(0, rows, len(share) + 1)
        total.stairs(share.mean(1), edges, orientation="horizontal", fill=True, color="tab:grey")
        total.set(ylim=(rows, 0), ylabel="row (output unit)" if index == 0 else None)
        total.invert_xaxis()
        total.set_xlabel("share over\nall tasks", fontsize=8)
        if module in ("q_proj", "k_proj", "v_proj"):  # whose rows belong to heads
            for head in range(0, rows + 1, result["head_dim"]):
                total.axhline(head, color="black", linewidth=0.4)
    figure.colorbar(drawn, ax=list(axes), label="share of the row's weights that are active")
    figure.suptitle(f"{module}: active weights by row and task")
    return figure


def signs(result, arrays, module):
    """Draw Fig. 10: active weights of each row by the sign of the mean gradient, over tasks."""
    found = middle_first([line for line in result["weights"] if line["module"] == module])
    figure, axes = grid(len(found), width=4.6, height=3.8)
    for place, line in zip(axes, found, strict=True):
        up, down = binned(arrays[f"signs.{module}.{line['layer']}"].T).T
        edges = np.linspace(0, line["shape"][0], len(up) + 1)
        for counts, colour, name in ((up, "tab:red", "positive"), (-down, "tab:blue", "negative")):
            place.stairs(counts, edges, orientation="horizontal", fill=True, color=colour,
                         label=name)
        both, chance = (number(line["signs"][key]) for key in ("both", "both_chance"))
        place.set(title=f"layer {line['layer']}: both signs {both} (coin flips {chance})",
                  ylim=(edges[-1], 0), ylabel="row", xlabel="active weights of the row, over tasks")
        place.legend(fontsize=8)
    figure.suptitle(f"{module}: signs of the mean gradient on active weights")
    return figure


def measured_units(result):
    """Yield (title, statistics) of all neurons and weights."""
    for line in sorted(result["neurons"], key=lambda line: line["positions"]):
        yield f"neurons, {line['positions']} tokens, layer {line['layer']}", line
    for line in result["weights"]:
        yield f"{line['module']}, layer {line['layer']}", line


def of_sharing(result, arrays):
    """Yield (name, figure) of the command `sharing`."""
    for place in ("all", "target"):
        yield f"neurons-{place}", neurons(result, arrays, place)
    for module in dict.fromkeys(line["module"] for line in result["weights"]):
        yield f"weights-{module}", weights(result, arrays, module)
        yield f"signs-{module}", signs(result, arrays, module)


# --- experts ------------------------------------------------------------------------------------


def draw_active(axes, adapter, place, tasks):
    """Draw the active experts of each task in the last layer, with the mean routing weights."""
    order, found = by_category(tasks), adapter["places"][place]
    active, w = (np.array(found[key])[order] for key in ("active", "w"))
    axes.imshow(active, cmap=ACTIVE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for (t, k), value in np.ndenumerate(w):
        axes.text(k, t, f"{value:.2f}", ha="center", va="center", fontsize=7,
                  color="black" if active[t, k] else "white")
    label_tasks(axes, tasks, order)
    axes.set_xticks(range(w.shape[1]), [chr(ord("A") + k) if w.shape[1] <= 26 else k
                                        for k in range(w.shape[1])])
    accuracy = adapter.get("accuracy")
    tokens = f"{place} tokens"
    trained = "an adapter for each task" if adapter["alone"] else f"loss {adapter['loss']:.2f}"
    if accuracy is not None:
        trained = f"accuracy {np.average(accuracy, weights=[task['rows'] for task in tasks]):.0%}"
        trained += ", chance 25%"
        tokens = "the letter's token" if place == "target" else tokens
    axes.set_title(f"{adapter['name']}, {tokens} ({trained})\nJaccard "
                   f"{found['jaccard']:.2f}, of random sets {adapter['chance']:.2f}", fontsize=9)
    axes.set_xlabel("expert of the last layer")


def largest_information(adapter):
    """Return the upper bound of the routing information, ln K - ln k, in nats."""
    return np.log(adapter["experts"] / adapter["top_k"])


def experts(result):
    """Draw Fig. 2 and 13: active experts of each task."""
    tasks = result["tasks"]
    figure, axes = grid(2 * len(result["adapters"]), columns=2, width=5.6,
                        height=1.4 + 0.3 * len(tasks))
    panels = [(adapter, place) for adapter in result["adapters"] for place in adapter["places"]]
    for axis, (adapter, place) in zip(axes, panels, strict=True):
        draw_active(axis, adapter, place, tasks)
    if result["command"] == "mmlu":
        figure.suptitle(mmlu_title(result))
    return figure


def mmlu_title(result):
    """Return a title that says whether the models answer above chance."""
    able = [adapter["name"] for adapter in result["adapters"]
            if adapter["accuracy_p"] < 0.05]
    return "MMLU: " + (f"above chance: {', '.join(able)}" if able else
                       "no model is above chance, so this shows no abilities")


def information(result):
    """Draw the routing information of every layer for all adapters."""
    figure, axes = grid(2, width=7, height=4.4)
    most = max(map(largest_information, result["adapters"]))
    for place, where in zip(axes, ("all", "target"), strict=True):
        nulls = []
        for adapter in result["adapters"]:
            found = adapter["places"][where]
            loss = "" if adapter["alone"] else f" (loss {adapter['loss']:.2f})"
            place.plot(np.array(found["information"], dtype=float), marker="o", markersize=3,
                       linewidth=1, label=f"{adapter['name']}{loss}")
            nulls.append(np.array(found["null_95"], dtype=float))
        null = np.max(nulls, axis=0)  # (layers,)
        place.fill_between(range(len(null)), 0, null, color="0.85",
                           label="95% of random assignments, largest")
        place.set(xlabel="adapted layer", ylabel="nats", ylim=(0, None),
                  title=f"mutual information of task and selected experts, {where} tokens\n"
                        f"upper bound {most:.2f} nats")
        place.xaxis.get_major_locator().set_params(integer=True)
        place.legend(fontsize=7)
    return figure


def of_experts(result, _):
    """Yield (name, figure) of the commands `experts` and `mmlu`."""
    yield result["command"], experts(result)
    if len({len(adapter["places"]["all"]["information"]) for adapter in result["adapters"]}) == 1:
        yield "information", information(result)


# --- conflict -----------------------------------------------------------------------------------


def draw_conflict(axes, adapter, tasks):
    """Draw cosines of task gradients; reliability on the diagonal, undecided pairs hatched."""
    order, whole = by_category(tasks), adapter["whole"]
    axes.set_title(adapter["name"] + (
        "\na task has no gradient: not measured" if whole is None else
        f" (loss {adapter['loss']:.2f}): cosine {whole['cosine']:.2f}\nconflict, undecided, "
        f"agreement: {', '.join(f'{share:.0%}' for share in whole['decided'])}"), fontsize=9)
    if whole is None:
        return None
    cosines, signs = (np.array(whole[key])[np.ix_(order, order)] for key in ("cosines", "signs"))
    np.fill_diagonal(cosines, np.array(whole["reliability"])[order])
    drawn = axes.imshow(cosines, vmin=-1, vmax=1, cmap=CONFLICT)
    for t, u in np.argwhere(signs == 0):
        if t != u:
            axes.add_patch(plt.Rectangle((u - 0.5, t - 0.5), 1, 1, fill=False, hatch="////",
                                         linewidth=0, edgecolor="grey"))
    for t, value in enumerate(cosines.diagonal()):
        axes.text(t, t, f"{value:.1f}", ha="center", va="center", fontsize=6,
                  color="white" if abs(value) > 0.6 else "black")
    label_tasks(axes, tasks, order)
    label_tasks(axes, tasks, order, "x")
    return drawn


def of_conflict(result, _):
    """Yield (name, figure) of the command `conflict`: the maps of all adapters on one scale."""
    figure, axes = grid(len(result["adapters"]), width=6, height=5.4)
    drawn = [draw_conflict(place, adapter, result["tasks"])
             for place, adapter in zip(axes, result["adapters"], strict=True)]
    if any(drawn):
        figure.colorbar(next(filter(None, drawn)), ax=axes, shrink=0.7,
                        label="cosine of mean gradients; diagonal: reliability")
    yield "conflict", figure


DRAWN = {"sharing": of_sharing, "experts": of_experts, "mmlu": of_experts, "conflict": of_conflict}
