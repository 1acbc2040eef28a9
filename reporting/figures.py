"""Draw the figures of a report and of one run."""

import math
from collections import defaultdict
from itertools import cycle

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import metrics
from inputs.files import atomic_path
from registry import SENSITIVITY, VARIANTS
from reporting import verdicts
from reporting.runs import group_runs, label, short, values_of

matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
SMOOTHING = 10  # steps in the running mean of the loss
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


def label_values(axis, values):
    """Put ticks of a logarithmic axis at these values, and nowhere else."""
    axis.set_ticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axis.minorticks_off()


# --- one run ------------------------------------------------------------------------------------


def draw_loss(axes, log):
    """Draw the loss of each optimizer step and its running mean, over all stages."""
    loss = np.array([record["loss"] for record in log])
    window = min(SMOOTHING, len(loss))
    means = np.convolve(loss, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(1, len(loss) + 1), loss, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(np.arange(window, len(loss) + 1), means, color="tab:blue",
              label=f"mean of {window} steps")
    axes.set(xlabel="optimizer step", ylabel="loss per target token", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.legend()


def series(runs, key):
    """Return the mean over seeds of one number of each regrouping; NaN where it is undefined."""
    events = [run.results["regroupings"] for run in runs]
    return np.array([metrics.mean(event[i][key] for event in events)
                     for i in range(min(map(len, events)))], dtype=float)


def draw_angles(axes, runs, colour, name=""):
    """Draw mean angles between and inside experts, at every regrouping.

    Solid lines are of new gradients, under the groups that were chosen earlier; dotted lines are of
    the gradients that chose the groups, after the regrouping.
    """
    for angle, marker, where in (("inter", "^", "between experts"), ("intra", "o", "inside")):
        before, after = (series(runs, f"{angle}_{moment}") for moment in ("before", "after"))
        style = dict(color=colour, marker=marker, markersize=4)
        axes.plot(np.arange(1, len(before) + 1), before, "-", label=name + where, **style)
        if not np.array_equal(before, after, equal_nan=True):  # else nothing regroups
            axes.plot(np.arange(1, len(after) + 1), after, ":", **style)


def label_angles(axes, title):
    axes.axhline(90, color="grey", linewidth=0.8)
    axes.set(title=f"{title}\nsolid: before (new gradients), dotted: after",
             ylabel="degrees, mean over layers and seeds",
             xlabel="regrouping, or measurement where there is none")
    axes.xaxis.get_major_locator().set_params(integer=True)


def run_figure(record):
    """Draw the loss of one run and, if it has experts, its angles."""
    regroupings = record.results["regroupings"]
    figure, axes = grid(2 if regroupings else 1, width=6, height=4)
    draw_loss(axes[0], record.log)
    if regroupings:
        draw_angles(axes[1], [record], "tab:green")
        label_angles(axes[1], "Angles between gradients")
        axes[1].legend()
    figure.suptitle(record.title)
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


# --- a study ------------------------------------------------------------------------------------


def angles(records):
    """Draw Fig. 4 and 11: the angles over training, a panel for each model and setting."""
    groups = {key: runs for key, runs in group_runs(records).items()
              if runs[0].results["regroupings"]}
    panels = list(dict.fromkeys((model, setting) for model, _, setting in groups))
    if not panels:
        return None
    figure, axes = grid(len(panels))
    places = dict(zip(panels, axes, strict=True))
    variants = dict.fromkeys(variant for _, variant, _ in groups)
    colours = dict(zip(variants, cycle(COLOURS), strict=False))
    for (model, variant, setting), runs in groups.items():
        draw_angles(places[model, setting], runs, colours[variant], f"{label(variant)}, ")
    for panel, place in places.items():
        label_angles(place, ", ".join(panel))
        place.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def sensitivity(records):
    """Draw Fig. 12: BADIT's score against K (r = 4) and against r (K = 8), with every seed's."""
    lines = defaultdict(lambda: defaultdict(list))  # {panel: {setting: points}}
    for (model, variant, setting), runs in group_runs(records).items():
        if variant in [VARIANTS[name] for name in SENSITIVITY]:
            scores = values_of(runs, "rouge", records)
            experts, rank = (runs[0].results["settings"][key] for key in ("num_experts", "rank"))
            if rank == 4:
                lines[model, "experts K (r = 4)"][setting].append((experts, scores))
            if experts == 8:
                lines[model, "rank r (K = 8)"][setting].append((rank, scores))
    lines = {panel: each for panel, each in lines.items() if max(map(len, each.values())) > 1}
    if not lines:
        return None
    figure, axes = grid(len(lines), columns=2)
    for place, ((model, xlabel), each) in zip(axes, sorted(lines.items()), strict=True):
        for setting, points in each.items():
            sizes, scores = zip(*sorted(points), strict=True)
            (line,) = place.plot(sizes, list(map(metrics.mean, scores)), marker="o", label=setting)
            for size, seeds in zip(sizes, scores, strict=True):
                place.plot([size] * len(seeds), seeds, "_", color=line.get_color())
        place.set(title=model, ylabel="score: mean, and each seed", xscale="log", xlabel=xlabel)
        label_values(place.xaxis, {x for points in each.values() for x, _ in points})
        place.legend(fontsize=8)
    return figure


def claims(found):
    """Draw the Verdicts on losses: each seed's difference, and their mean with its interval."""
    found = [verdict for verdict in found
             if verdict.seeds >= verdicts.FEWEST and not verdict.claim.forgets]
    if not found:
        return None
    figure, (axes,) = grid(1, width=10, height=1 + 0.5 * len(found))
    for row, verdict in enumerate(found):
        mean, low, high, _ = verdict.interval
        axes.plot(verdict.by_seed, [row] * verdict.seeds, "o", color="tab:blue", alpha=0.4)
        axes.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="D", color="black",
                      capsize=4)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(found)), [
        f"{verdict.claim.text}\n{verdict.model}, {verdict.setting}, against {verdict.against}"
        for verdict in found], fontsize=8)
    axes.set(xlabel="ln(loss), ours minus theirs: each seed, and the mean with its uncorrected "
             "95 % interval\nleft of 0 is better for ours", ylim=(len(found) - 0.5, -0.5))
    return figure


def of_study(records, found):
    """Return {name: figure} of every figure for which there is a run; `found` are Verdicts."""
    drawn = {"angles": angles(records), "sensitivity": sensitivity(records),
             "claims": claims(found)}
    return {name: figure for name, figure in drawn.items() if figure}
