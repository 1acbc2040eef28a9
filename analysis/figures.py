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


def neurons(result, arrays, place, in_order):
    """Draw Fig. 1 (left) and 5: active neurons of each task, and the number of tasks per neuron.

    `in_order` sorts the neurons by this number, then by pattern.
    """
    found = middle_first([line for line in result["neurons"] if line["positions"] == place])
    tasks, order = result["tasks"], by_category(result["tasks"])
    figure, axes = plt.subplots(2 * len(found), 1, figsize=(16, 4.2 * len(found)),
                                layout="constrained", height_ratios=[3, 1] * len(found))
    for index, line in enumerate(found):
        mask = arrays[f"neurons.{line['layer']}.{place}"][:len(tasks)][order]  # (T, m)
        if in_order:
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
                 xlabel="neuron, sorted by its number of tasks" if in_order else "neuron")
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
        if module != "gate_proj":
            for head in range(0, rows + 1, result["head_dim"]):
                total.axhline(head, color="black", linewidth=0.4)
    figure.colorbar(drawn, ax=list(axes), label="share of the row's weights that are active")
    figure.suptitle(f"{module}: active weights by row and task")
    return figure


def signs(result, arrays, module="gate_proj"):
    """Draw Fig. 10, and beside it whether the same weight has both signs."""
    found = middle_first([line for line in result["weights"] if line["module"] == module])
    figure, axes = grid(3 * len(found), width=4.6, height=3.8)
    for index, line in enumerate(found):
        rows, both, minority = axes[3 * index:3 * index + 3]
        up, down = binned(arrays[f"signs.{module}.{line['layer']}"].T).T
        edges = np.linspace(0, line["shape"][0], len(up) + 1)
        for counts, colour, name in ((up, "tab:red", "positive"), (-down, "tab:blue", "negative")):
            rows.stairs(counts, edges, orientation="horizontal", fill=True, color=colour,
                        label=name)
        rows.set(title=f"layer {line['layer']}: activations by sign", ylim=(edges[-1], 0),
                 ylabel="row", xlabel="active weights of the row, over tasks")
        rows.legend(fontsize=8)
        by_n = line["signs"]["by_n"]
        n = [each["n"] for each in by_n]
        for axes_, key, title in ((both, "both", "weights with both signs"),
                                  (minority, "minority", "share of the rarer sign")):
            values = [np.nan if each[key] is None else each[key] for each in by_n]
            axes_.plot(n, values, marker="o", markersize=4, label="measured")
            axes_.plot(n, [each[f"{key}_chance"] for each in by_n], color="black",
                       label="fair coin flips")
            axes_.set(title=title, xlabel="tasks in which the weight is active", ylim=(0, None))
            axes_.xaxis.get_major_locator().set_params(integer=True)
            axes_.legend(fontsize=8)
    figure.suptitle(f"{module}: signs of the mean gradient on active weights")
    return figure


def measured_units(result):
    """Yield (title, statistics) of all neurons and weights."""
    for line in sorted(result["neurons"], key=lambda line: line["positions"]):
        yield f"neurons, {line['positions']} tokens, layer {line['layer']}", line
    for line in result["weights"]:
        yield f"{line['module']}, layer {line['layer']}", line


def sharing(result):
    """Draw the units by their number of tasks, with the expectation for independent tasks."""
    found = list(measured_units(result))
    figure, axes = grid(len(found), width=4.2, height=2.9)
    for place, (title, line) in zip(axes, found, strict=True):
        n = np.arange(1, len(line["histogram"]))
        place.bar(n, line["histogram"][1:], color="#ffb000", label="measured")
        place.plot(n, line["chance_histogram"][1:], color="black", marker=".", label="chance")
        place.set(yscale="log", ylim=(0.5, None), xlabel="tasks", ylabel="units")
        place.set_title(f"{title}\nin no task {line['histogram'][0] / line['units']:.2f} (chance "
                        f"{line['chance_histogram'][0] / line['units']:.2f})", fontsize=9)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.yaxis.set_major_formatter("{x:,.0f}")
    axes[0].legend(fontsize=8)
    return figure


def overlap(result):
    """Draw the Jaccard index of tasks and controls; two halves of a task on the diagonal."""
    found = list(measured_units(result))
    figure, axes = grid(len(found), width=4.4, height=3.6)
    tasks, order = result["tasks"], by_category(result["tasks"])
    for place, (title, line) in zip(axes, found, strict=True):
        matrix = np.array(line["matrix"])[np.ix_(order, order)]
        controls = line["controls"]
        rows = [np.array(control["by_task"])[order] for control in controls.values()]
        drawn = place.imshow(np.vstack([matrix, *rows]), vmin=0, vmax=1, cmap="viridis",
                             interpolation="nearest")
        place.axhline(len(order) - 0.5, color="white")
        label_tasks(place, tasks, order)
        label_tasks(place, tasks, order, "x")
        place.set_yticks(range(len(order) + len(rows)),
                         [*(short(tasks[t]["name"]) for t in order), *controls], fontsize=6)
        place.tick_params(axis="x", labelsize=6)
        place.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, label="Jaccard index; diagonal: two halves of a task",
                    shrink=0.5)
    return figure


def of_sharing(result, arrays):
    """Yield (name, figure) of the command `sharing`."""
    for place in ("all", "target"):
        for in_order in (False, True):
            name = f"neurons-{place}{'-sorted' if in_order else ''}"
            yield name, neurons(result, arrays, place, in_order)
    for module in dict.fromkeys(line["module"] for line in result["weights"]):
        yield f"weights-{module}", weights(result, arrays, module)
        yield f"signs-{module}", signs(result, arrays, module)
    yield "sharing", sharing(result)
    yield "overlap", overlap(result)


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
        trained = f"accuracy {np.mean(accuracy):.0%}, chance 25%"
        tokens = "the letter's token" if place == "target" else tokens
    axes.set_title(f"{adapter['name']}, {tokens} ({trained})\nJaccard "
                   f"{found['jaccard']:.2f}, of random sets {adapter['chance']:.2f}", fontsize=9)
    axes.set_xlabel("expert of the last layer")


def largest_information(adapter):
    """Return the upper bound of the routing information, ln K - ln k, in nats."""
    return np.log(adapter["experts"] / adapter["top_k"])


def draw_information(axes, adapter):
    """Draw the routing information of every layer with its null distribution."""
    layers = np.arange(len(adapter["layers"]))
    for place, colour in (("all", "tab:blue"), ("target", "tab:orange")):
        found = adapter["places"][place]
        values, null = (np.array(found[key], dtype=float) for key in ("information", "null_95"))
        axes.plot(layers, values, color=colour, marker="o", markersize=3, label=f"{place} tokens")
        axes.fill_between(layers, 0, null, color=colour, alpha=0.25,
                          label=f"95% of random assignments, {place}")
    axes.set(xlabel="adapted layer", ylabel="nats", ylim=(0, None),
             title=f"routing information (upper bound {largest_information(adapter):.2f})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)


def experts(result):
    """Draw Fig. 2 and 13: active experts of each task, and the routing information."""
    tasks = result["tasks"]
    figure, axes = grid(3 * len(result["adapters"]), width=5.6, height=1.4 + 0.3 * len(tasks))
    for index, adapter in enumerate(result["adapters"]):
        for place, where in zip(axes[3 * index:], ("all", "target"), strict=False):
            draw_active(place, adapter, where, tasks)
        draw_information(axes[3 * index + 2], adapter)
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
    same = {len(adapter["layers"]) for adapter in result["adapters"]}
    if len(result["adapters"]) > 1 and len(same) == 1 and result["command"] == "experts":
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


def conflicts(result):
    """Draw the T x T maps of all adapters on one scale."""
    figure, axes = grid(len(result["adapters"]), width=6, height=5.4)
    drawn = [draw_conflict(place, adapter, result["tasks"])
             for place, adapter in zip(axes, result["adapters"], strict=True)]
    if any(drawn):
        figure.colorbar(next(filter(None, drawn)), ax=axes, shrink=0.7,
                        label="cosine of mean gradients; diagonal: reliability")
    return figure


def conflict_layers(result):
    """Draw the shares of decided pairs by layer."""
    figure, axes = grid(len(result["adapters"]), width=6, height=3.6)
    for place, adapter in zip(axes, result["adapters"], strict=True):
        shares = np.array([line["decided"] or [np.nan] * 3 for line in adapter["by_layer"]])
        place.stackplot(range(len(shares)), shares.T, step="mid", labels=(
            "conflict", "undecided", "agreement"), colors=("tab:red", "lightgrey", "tab:blue"))
        place.set(xlabel="adapted layer", ylabel="share of pairs", ylim=(0, 1),
                  xlim=(0, max(1, len(shares) - 1)), title=adapter["name"])
        place.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure


def lookahead(result):
    """Draw the gain of every task after a step for one task, relative to that task's gain."""
    adapters, tasks = result["adapters"], result["tasks"]
    order = by_category(tasks)
    figure, axes = grid(len(adapters), width=6, height=5.4)
    for place, adapter in zip(axes, adapters, strict=True):
        found = adapter["lookahead"]
        delta = np.array(found["delta"])
        own = np.abs(delta.diagonal())[:, None]
        relative = (delta / np.where(own > 0, own, np.nan))[np.ix_(order, order)]
        drawn = place.imshow(-relative, vmin=-1, vmax=1, cmap=CONFLICT)
        label_tasks(place, tasks, order)
        label_tasks(place, tasks, order, "x")
        place.set(ylabel="task of the step", xlabel="task whose loss changes")
        place.set_title(f"{adapter['name']} (loss {adapter['loss']:.2f}): a step improves its own "
                        f"task\nin {found['improved']} of {found['tasks']} cases", fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.7,
                    label="gain / gain of the step's task (red: loss rises)")
    return figure


def of_conflict(result, _):
    """Yield (name, figure) of the command `conflict`."""
    yield "conflict", conflicts(result)
    yield "conflict-layers", conflict_layers(result)
    if result["adapters"][0]["lookahead"] is not None:
        yield "lookahead", lookahead(result)


DRAWN = {"sharing": of_sharing, "experts": of_experts, "mmlu": of_experts, "conflict": of_conflict}
