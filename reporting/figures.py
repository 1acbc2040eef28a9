"""Draw the figures of a report and of one run."""

import math
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import metrics
from inputs.files import atomic_path
from registry import SENSITIVITY, VARIANTS
from reporting.runs import forgets, group_runs, label, losses_of, short, values_of

matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
SMOOTHING = 10  # steps in the running mean of the loss
# Degrees inside experts after the rounds of DOG on isotropic noise, K = 8, r = 4, of the length of
# a gate_proj component's gradient: in + out. Between experts: 90.2 to 90.4.
NOISE = {"smollm2-135m": 88.9, "llama3-3b": 89.5, "gemma2-2b": 89.5, "qwen3-4b": 89.6,
         "qwen3-8b": 89.6, "gemma2-9b": 89.6, "llama3-8b": 89.6}
COLOURS = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]


def grid(panels, width=5.5, height=3.8, columns=3):
    """Return (figure, its axes as a list); unused places of the last row stay empty."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows),
                                squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for spare in axes[panels:]:
        spare.set_axis_off()
    return figure, axes[:panels]


def save(figure, path, types):
    """Write a figure as `path`.png or .pdf, and close it; equal figures give equal bytes."""
    for name in types:
        with atomic_path(path.with_name(f"{path.name}.{name}")) as temporary:
            metadata = {"CreationDate": None} if name == "pdf" else None
            figure.savefig(temporary, format=name, dpi=120, metadata=metadata)
    plt.close(figure)


def running_mean(values, window):
    """Return (steps, means): the mean of the `window` values that end at each step, from 1."""
    window = min(window, len(values))
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(window, len(values) + 1), means


# --- one run ------------------------------------------------------------------------------------


def draw_loss(axes, log):
    """Draw the loss of each optimizer step and its running mean, over all stages."""
    loss = np.array([record["loss"] for record in log])
    axes.plot(np.arange(1, len(loss) + 1), loss, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(*running_mean(loss, SMOOTHING), color="tab:blue",
              label=f"mean of {min(SMOOTHING, len(loss))} steps")
    axes.set(xlabel="optimizer step", ylabel="loss per target token", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_angles(axes, regroupings):
    """Draw the mean angles between and inside experts, before and after every regrouping."""
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
    """Draw the loss of one run and, if it has experts, its angles."""
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
    """Draw a score matrix as a heatmap: rows are stages, columns tasks; None stays white."""
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
    """Draw one number per layer (row) and regrouping (column). `value(record)` may be None."""
    table = np.full((len(layers), len(events)), np.nan)
    for column, records in enumerate(events):
        for record in records:
            number = value(record)
            if number is not None:
                table[layers.index(record["layer"]), column] = number
    image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest",
                        extent=(0.5, len(events) + 0.5, len(layers) - 0.5, -0.5), **limits)
    axes.set(xlabel="regrouping, or measurement", ylabel="layer", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(plt.MaxNLocator(integer=True, nbins=10))
    axes.figure.colorbar(image, ax=axes).formatter.set_useOffset(False)


def largest_share(record):
    return record["expert_share"] and max(record["expert_share"])


def layers_figure(regroupings):
    """Draw angles, moves and routing weights of every layer over time, from regroup.jsonl."""
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
        "largest share of tokens of one expert": (largest_share, {"vmin": 0, "vmax": 1}),
        "entropy of alpha": (lambda r: r["alpha_entropy"], {}),
    }
    figure, axes = grid(len(panels), width=4.6, height=3.6)
    for place, (title, (value, limits)) in zip(axes, panels.items(), strict=True):
        layer_heatmap(place, events, layers, value, title, **limits)
    return figure


# --- a study ------------------------------------------------------------------------------------


def panelled(records, wanted, each=1):
    """Return (figure, [(axes, title, [(variant, runs, colour)])]), (None, []) if it is empty.

    A panel is a model in a setting, with `each` axes side by side; only runs for which
    `wanted(run)` holds are in it. A variant has the same colour in all panels.
    """
    panels, variants = defaultdict(list), {}
    for (model, variant, setting), runs in group_runs(records).items():
        chosen = [run for run in runs if wanted(run)]
        if chosen:
            colour = variants.setdefault(variant, COLOURS[len(variants) % len(COLOURS)])
            panels[f"{model}, {setting}"].append((variant, chosen, colour))
    if not panels:
        return None, []
    figure, axes = grid(each * len(panels), columns=3 if each == 1 else each)
    return figure, [(axes[each * i:each * (i + 1)], title, chosen)
                    for i, (title, chosen) in enumerate(panels.items())]


def learning_curves(records):
    """Draw the smoothed loss of every method, mean over seeds; None if nothing was trained."""
    figure, panels = panelled(records, lambda run: bool(run.log))
    for (place,), title, variants in panels:
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


def has_regroupings(run):
    return bool(run.results["regroupings"])


def series(runs, key):
    """Return (1, 2, ..., means over seeds of one number of each regrouping)."""
    events = [run.results["regroupings"] for run in runs]
    values = [metrics.mean(event[i][key] for event in events)
              for i in range(min(map(len, events)))]
    return np.arange(1, len(values) + 1), np.array(values, dtype=float)  # None becomes NaN


def label_regroupings(place, title, ylabel, legend="best"):
    place.set(title=title, ylabel=f"{ylabel} over layers and seeds",
              xlabel="regrouping, or measurement where there is none")
    place.xaxis.get_major_locator().set_params(integer=True)
    crowded = len(place.get_legend_handles_labels()[1]) > 8
    outside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if crowded else dict(loc=legend)
    place.legend(fontsize=6 if crowded else 8, **outside)


def noise_level(runs):
    """Return the angle inside experts after a regrouping by noise, or None if it is unknown."""
    settings = runs[0].results["settings"]
    if [settings[key] for key in ("num_experts", "rank", "target_modules")] == [
            8, 4, ["gate_proj"]]:
        return NOISE.get(runs[0].model)


def angles(records):
    """Draw Fig. 4 and 11: angles between and inside experts over training.

    Before a regrouping they are of new gradients under the grouping that was chosen earlier; after
    it, of the very gradients that chose the grouping.
    """
    figure, panels = panelled(records, has_regroupings)
    for (place,), title, variants in panels:
        for variant, runs, colour in variants:
            for angle, marker, where in (("inter", "^", "between"), ("intra", "o", "inside")):
                for moment, style in (("before", "-"), ("after", ":")):
                    moments, values = series(runs, f"{angle}_{moment}")
                    if moment == "after" and np.array_equal(
                            values, series(runs, f"{angle}_before")[1], equal_nan=True):
                        continue  # nothing regroups
                    place.plot(moments, values, style, color=colour, marker=marker, markersize=3,
                               label=f"{label(variant)}, {where}" if moment == "before" else None)
        place.axhline(90, color="grey", linewidth=0.8)
        levels = {noise_level(runs) for _, runs, _ in variants} - {None}
        for level in levels:
            place.axhline(level, color="black", linewidth=0.8, linestyle=":",
                          label=f"inside, after regrouping noise: {level:.1f}")
        label_regroupings(place, f"{title}\nsolid: before (out of sample), dotted: after",
                          "degrees, mean")
    return figure


def router_health(records):
    """Draw the entropy (1: equal weights) and the largest of the routing weights over training."""
    figure, panels = panelled(records, has_regroupings, each=2)
    for (left, right), title, variants in panels:
        for variant, runs, colour in variants:
            style = dict(color=colour, marker="o", markersize=3, label=label(variant))
            moments, entropy = series(runs, "alpha_entropy")
            experts = runs[0].results["settings"]["num_experts"]
            left.plot(moments, entropy / math.log(experts), **style)
            right.plot(*series(runs, "alpha_max"), **style)
        for place, shown in ((left, "entropy of alpha / ln K"), (right, "largest alpha")):
            place.update_datalim([(1, 0)], updatex=False)  # else nearly equal values are at the rim
            place.autoscale_view()
            place.set_ylim(bottom=0)
            label_regroupings(place, f"{title}: {shown}", "mean", legend="lower right")
    return figure


def parameters_and_scores(records):
    """Draw the number of trained weights against the score after all training."""
    figure, panels = panelled(records, lambda run: run.setting != "eval")
    for (place,), title, variants in panels:
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


def losses(records):
    """Draw the loss after all training, and what later tasks changed of it in sequence.

    A column for each variant, a line for each seed, a bar at the mean.
    """
    relative = any(losses_of(run, records).get("relative") is not None for run in records)
    name = "relative" if relative else "loss"
    panels = defaultdict(dict)
    for (model, variant, setting), runs in group_runs(records).items():
        runs = [run for run in runs if run.losses()]
        shown = {"loss after all training": name}
        if all(map(forgets, runs)):
            shown["Backward (below zero: forgetting)"] = "backward"
        for title, number in shown.items() if runs and setting != "eval" else ():
            panels[f"{model}, {setting}: {title}", number][label(variant)] = {
                run.seed: losses_of(run, records)[number] for run in runs}
    panels = {title: columns for title, columns in panels.items() if len(columns) > 1}
    if not panels:
        return None
    figure, axes = grid(len(panels), columns=2, width=7, height=4.4)
    for place, ((title, number), columns) in zip(axes, panels.items(), strict=True):
        for seed in sorted(set().union(*columns.values())):
            place.plot([each.get(seed, math.nan) for each in columns.values()], marker="o",
                       markersize=3, linewidth=0.7, alpha=0.6, label=f"seed {seed}")
        place.plot([metrics.mean(each.values()) for each in columns.values()], "_k", markersize=16)
        place.set_xticks(range(len(columns)), columns, rotation=35, ha="right",
                         rotation_mode="anchor", fontsize=8)
        place.set(title=title, ylabel="mean over tasks of ln(loss / zero-shot loss)"
                  if number == "relative" else "nats per token")
        place.legend(fontsize=7)
    return figure


def sensitivity(records):
    """Draw Fig. 12: BADIT's score against K (r = 4) and against r (K = 8)."""
    wanted = [VARIANTS[name] for name in SENSITIVITY]
    points = defaultdict(list)
    for (model, variant, setting), runs in group_runs(records).items():
        if variant not in wanted:
            continue
        score = metrics.mean(values_of(runs, "rouge", records))
        settings = runs[0].results["settings"]
        experts, rank = settings["num_experts"], settings["rank"]
        if rank == 4:
            points[model, "experts K (r = 4)"].append((setting, experts, score))
        if experts == 8:
            points[model, "rank r (K = 8)"].append((setting, rank, score))
    points = {key: some for key, some in points.items()
              if len({value for _, value, _ in some}) > 1}
    if not points:
        return None
    figure, axes = grid(len(points), columns=2)
    for place, ((model, xlabel), some) in zip(axes, sorted(points.items()), strict=True):
        for setting in dict.fromkeys(setting for setting, _, _ in some):
            place.plot(*zip(*sorted((x, y) for each, x, y in some if each == setting),
                            strict=True), marker="o", label=setting)
        place.set(title=model, ylabel="score, mean over seeds", xscale="log", xlabel=xlabel)
        ticks = sorted({x for _, x, _ in some})
        place.set_xticks(ticks, ticks)
        place.minorticks_off()
        place.legend(fontsize=8)
    return figure


def matrices(records):
    """Yield (name, figure) of Tables 6 to 9: the score matrices of the first seed."""
    for (model, variant, setting), runs in group_runs(records).items():
        for run in runs[:1] if setting == "sequential" else ():
            name = f"matrix-{label(variant).replace(' ', '')}-{model}-seed{run.seed}"
            yield name, matrix_figure(
                run.matrix("first"), run.order, run.order,
                f"{label(variant)}, {model}, seed {run.seed}: scores by stage")


def of_study(records):
    """Yield (name, figure) of every figure for which there is a run."""
    for name, draw in (("learning_curves", learning_curves), ("angles", angles),
                       ("router_health", router_health), ("losses", losses),
                       ("parameters", parameters_and_scores),
                       ("sensitivity", sensitivity)):
        figure = draw(records)
        if figure is not None:
            yield name, figure
    yield from matrices(records)
