"""The figures of a report and of one run, drawn with matplotlib."""

import math
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import metrics
from data import SUPERNI
from study import SENSITIVITY, VARIANTS
from tables import cells, label, values_of

matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
SMOOTHING = 10  # steps in the running mean of the loss
COLOURS = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]


def grid(panels, width=5.5, height=3.8, columns=3):
    """A figure with so many axes, as a list; what is left of the last row is empty."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows),
                                squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for spare in axes[panels:]:
        spare.set_axis_off()
    return figure, axes[:panels]


def short(task):
    """T363 for a SuperNI task, the whole name for any other."""
    return task.split("_")[0].replace("task", "T") if task in SUPERNI else task


def running_mean(values, window):
    """(steps from 1, means) over windows that end there."""
    window = min(window, len(values))
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(window, len(values) + 1), means


# --- one run ------------------------------------------------------------------------------------


def draw_loss(axes, log):
    """Loss per optimizer step, with its running mean; stages follow one another."""
    loss = np.array([record["loss"] for record in log])
    axes.plot(np.arange(1, len(loss) + 1), loss, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(*running_mean(loss, SMOOTHING), color="tab:blue",
              label=f"mean of {min(SMOOTHING, len(loss))} steps")
    axes.set(xlabel="optimizer step", ylabel="loss per target token", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_angles(axes, regroupings):
    """Mean angles between and inside experts, before and after every regrouping."""
    for angle, color in (("inter", "tab:green"), ("intra", "tab:red")):
        points = [(index + shift, event[f"{angle}_{moment}"])
                  for index, event in enumerate(regroupings, start=1)
                  for moment, shift in (("before", -0.12), ("after", 0.12))
                  if event[f"{angle}_{moment}"] is not None]
        place = "between experts" if angle == "inter" else "inside experts"
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=place)
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="regrouping (left: before it, right: after it; the last only measures)",
             ylabel="degrees, mean over layers", title="Angles between gradients")
    axes.set_xlim(0.5, len(regroupings) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def run_figure(results, log):
    """Loss and angles of one run."""
    panels = 2 if results["regroupings"] else 1
    figure, axes = grid(panels, width=6, height=4)
    draw_loss(axes[0], log)
    if results["regroupings"]:
        draw_angles(axes[1], results["regroupings"])
    args = results["args"]
    figure.suptitle(f"{args['method']}, {args['setting']} training, "
                    f"{args['model'].rstrip('/').split('/')[-1]}, {args['suite']}, seed "
                    f"{args['seed']}")
    return figure


def matrix_figure(matrix, order, rows, title):
    """A score matrix as a heatmap: rows are stages, columns tasks; None stays white."""
    values = np.array([[np.nan if value is None else value for value in row] for row in matrix])
    size = len(order)
    figure, axes = plt.subplots(figsize=(2.2 + 0.52 * size, 1.6 + 0.42 * len(rows)),
                                layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (j, i), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(i, j, f"{value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value < 60 else "black")
    axes.set_xticks(range(size), [short(task) for task in order], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(rows)), [short(row) for row in rows], fontsize=8)
    axes.set(xlabel="score on", ylabel="after", title=title)
    figure.colorbar(image, ax=axes, label="score")
    return figure


def layer_heatmap(axes, events, layers, value, title, **limits):
    """One number per layer (row) and regrouping (column). `value(record)` may be None."""
    table = np.full((len(layers), len(events)), np.nan)
    for column, records in enumerate(events):
        for record in records:
            number = value(record)
            if number is not None:
                table[layers.index(record["layer"]), column] = number
    image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest",
                        extent=(0.5, len(events) + 0.5, len(layers) - 0.5, -0.5), **limits)
    axes.set(xlabel="regrouping, or measurement", ylabel="layer", title=title)
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=10))
    axes.figure.colorbar(image, ax=axes)


def layers_figure(regroupings):
    """Angles, drift and router health of every layer over time, from regroup.jsonl."""
    by_moment = defaultdict(list)
    for record in regroupings:
        by_moment[record["stage"], record["step"]].append(record)
    events = list(by_moment.values())
    layers = list(dict.fromkeys(record["layer"] for record in regroupings))
    panels = {
        "angle inside experts, before": (lambda r: r["intra_before"], {}),
        "angle inside experts, after": (lambda r: r["intra_after"], {}),
        "angle between experts, after": (lambda r: r["inter_after"], {}),
        "components moved": (lambda r: r["moved"], {"vmin": 0}),
        "largest share of tokens of one expert": (lambda r: max(r["expert_share"]),
                                                  {"vmin": 0, "vmax": 1}),
        "entropy of alpha": (lambda r: r["alpha_entropy"], {}),
    }
    figure, axes = grid(len(panels), width=4.6, height=3.6)
    for place, (title, (value, limits)) in zip(axes, panels.items(), strict=True):
        layer_heatmap(place, events, layers, value, title, **limits)
    return figure


# --- a study ------------------------------------------------------------------------------------


def panels_of(records, wanted):
    """{(model, setting): {variant: runs}} of the runs for which `wanted(run)` holds."""
    panels = defaultdict(dict)
    for (model, variant, setting), runs in cells(records).items():
        chosen = [run for run in runs if wanted(run)]
        if chosen:
            panels[model, setting][variant] = chosen
    return panels


def colour_of(panels):
    """A colour for each variant, the same in all panels."""
    variants = list(dict.fromkeys(name for variants in panels.values() for name in variants))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(variants)}


def panelled(records, wanted):
    """A figure, and of each panel (axes, title, [(variant, runs, colour)]); None where it is empty.

    A panel is a model in a setting; only runs for which `wanted(run)` holds are in it.
    """
    panels = panels_of(records, wanted)
    if not panels:
        return None, []
    colours = colour_of(panels)
    figure, axes = grid(len(panels))
    return figure, [(place, f"{model}, {setting}",
                     [(variant, runs, colours[variant]) for variant, runs in variants.items()])
                    for place, ((model, setting), variants) in zip(axes, panels.items(),
                                                                   strict=True)]


def learning_curves(records):
    """Smoothed loss of every method, mean over seeds; None where nothing was trained."""
    figure, panels = panelled(records, lambda run: bool(run.log))
    for place, title, variants in panels:
        for variant, runs, colour in variants:
            losses = [[line["loss"] for line in run.log] for run in runs]
            shortest = min(map(len, losses))
            mean = np.mean([loss[:shortest] for loss in losses], axis=0)
            window = max(1, shortest // 10)
            place.plot(*running_mean(mean, window), color=colour, label=label(variant))
        place.set(title=title, xlabel="optimizer step",
                  ylabel=f"loss per target token,\nmean of {window} steps and all seeds")
        place.set_ylim(bottom=0)
        place.legend(fontsize=8)
    return figure


def series(runs, key):
    """The means over seeds of one number of results.json's regroupings, with their steps."""
    events = [run.results["regroupings"] for run in runs]
    values = [metrics.mean(event[i][key] for event in events)
              for i in range(min(map(len, events)))]
    return list(range(1, len(values) + 1)), [np.nan if v is None else v for v in values]


def angles(records):
    """Fig. 4 and 11: angles between and inside experts over training."""
    figure, panels = panelled(records, lambda run: bool(run.results["regroupings"]))
    for place, title, variants in panels:
        for variant, runs, colour in variants:
            for angle, style in (("inter", "--"), ("intra", "-")):
                place.plot(*series(runs, f"{angle}_after"), style, color=colour,
                           marker="o", markersize=3,
                           label=f"{label(variant)}, {'between' if angle == 'inter' else 'inside'}")
        place.axhline(90, color="grey", linewidth=0.8, linestyle=":")
        place.set(title=title, ylabel="degrees, mean over layers and seeds",
                  xlabel="regrouping, or measurement where there is none")
        place.xaxis.get_major_locator().set_params(integer=True)
        place.legend(fontsize=8)
    return figure


def router_health(records):
    """Entropy (1: equal weights) and largest value of the routing weights over training."""
    panels = panels_of(records, lambda run: bool(run.results["regroupings"]))
    if not panels:
        return None
    colours = colour_of(panels)
    figure, axes = grid(2 * len(panels), columns=2)
    for index, ((model, setting), variants) in enumerate(panels.items()):
        for place, key, title in ((axes[2 * index], "alpha_entropy", "entropy of alpha / ln K"),
                                  (axes[2 * index + 1], "alpha_max", "largest alpha")):
            for variant, runs in variants.items():
                moments, values = series(runs, key)
                if key == "alpha_entropy":
                    values = np.divide(values, math.log(runs[0].results["args"]["num_experts"]))
                place.plot(moments, values, color=colours[variant], marker="o", markersize=3,
                           label=label(variant))
            place.set(title=f"{model}, {setting}: {title}", ylabel="mean over layers and seeds",
                      xlabel="regrouping, or measurement where there is none")
            place.set_ylim(bottom=0)
            place.xaxis.get_major_locator().set_params(integer=True)
            place.legend(fontsize=8)
    return figure


def parameters_and_scores(records):
    """Trained weights against the score after all training, mean over seeds."""
    figure, panels = panelled(records, lambda run: run.setting != "eval")
    for place, title, variants in panels:
        for variant, runs, colour in variants:
            scores = values_of(runs, "rouge", records)
            spread = np.std(scores, ddof=1) if len(scores) > 1 else 0
            millions = runs[0].results["parameters"]["trainable"] / 1e6
            place.errorbar(millions, np.mean(scores), spread,
                           marker="o", capsize=3, linestyle="none", color=colour,
                           label=f"{label(variant)} (n = {len(scores)})")
        place.set(title=title, xlabel="trained weights, millions",
                  ylabel="score (mean, standard deviation)")
        place.margins(0.2)
        place.set_xlim(0, 1.2 * place.dataLim.x1)
        place.legend(fontsize=8, loc="upper left")
    return figure


def sensitivity(records):
    """Fig. 12: BADIT's score against K (r = 4) and against r (K = 8)."""
    groups = cells(records)
    points = defaultdict(list)
    for (model, variant, setting), runs in groups.items():
        args = runs[0].results["args"]
        if variant not in [VARIANTS[name] for name in SENSITIVITY]:
            continue
        score = metrics.mean(values_of(runs, "rouge", records))
        for name, other, fixed in (("num_experts", "rank", 4), ("rank", "num_experts", 8)):
            if args[other] == fixed:
                points[model, name].append((setting, args[name], score))
    points = {key: some for key, some in points.items()
              if len({value for _, value, _ in some}) > 1}
    if not points:
        return None
    figure, axes = grid(len(points), columns=2)
    for place, ((model, name), some) in zip(axes, sorted(points.items()), strict=True):
        for setting in dict.fromkeys(setting for setting, _, _ in some):
            place.plot(*zip(*sorted((x, y) for each, x, y in some if each == setting),
                            strict=True), marker="o", label=setting)
        place.set(title=model, ylabel="score, mean over seeds", xscale="log",
                  xlabel="experts K (r = 4)" if name == "num_experts" else "rank r (K = 8)")
        ticks = sorted({x for _, x, _ in some})
        place.set_xticks(ticks, ticks)
        place.minorticks_off()
        place.legend(fontsize=8)
    return figure


def matrices(records):
    """Tables 6 to 9: (name, heatmap) of every sequential run, one after the other."""
    for (model, variant, setting), runs in cells(records).items():
        for run in runs if setting == "sequential" else ():
            name = f"matrix-{label(variant).replace(' ', '')}-{model}-seed{run.seed}"
            yield name, matrix_figure(
                run.matrix("first"), run.order, run.order,
                f"{label(variant)}, {model}, seed {run.seed}: scores by stage")


FIGURES = {"learning_curves": learning_curves, "angles": angles, "router_health": router_health,
           "parameters": parameters_and_scores, "sensitivity": sensitivity}
