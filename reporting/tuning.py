"""Show the loss of held-out rows by learning rate and steps, and the best rate of each method."""

import itertools
import math
import statistics
from collections import defaultdict

import numpy as np
from scipy import stats

import metrics
from inputs.errors import InputError
from inputs.files import write_text
from reporting import figures, verdicts
from reporting.runs import forgets, label
from reporting.tables import Score, Table


def make(records, left_out, out):
    """Write tuning.md with its table and figure into the folder `out`, and return its path."""
    found = losses_by_rate(records)
    table = rate_table(found)
    write_text(out / "tuning.csv", table.csv())
    figures.save(rate_figure(found), out / "tuning", ("png", "pdf"))
    pictures = ["![loss against learning rate](tuning.png)"]
    if figure := steps_figure(found):
        figures.save(figure, out / "steps", ("png", "pdf"))
        pictures.append("![loss against steps](steps.png)")
    if paths := learning_and_forgetting(records):
        figures.save(forgetting_figure(paths), out / "forgetting", ("png", "pdf"))
        pictures += ["![forgetting against what was learnt](forgetting.png)",
                     forgetting_table(paths).markdown()]
    lines = [f"- left out: `{folder}`: {reason}" for folder, reason in left_out]
    write_text(out / "tuning.md", "\n\n".join([
        "# Learning rates", table.markdown(), *pictures, *words(found), *lines]) + "\n")
    return out / "tuning.md"


def losses_by_rate(records):
    """Return {(model, setting, steps a task, variant): {rate: {seed: loss}}}, sorted.

    A loss is the geometric mean over tasks, which verdicts compare too. Raises InputError for a run
    without --eval_loss or --validation.
    """
    found = defaultdict(lambda: defaultdict(dict))
    for record in sorted(records, key=lambda record: (
            record.model, record.setting, record.steps, record.variant, record.seed)):
        if record.setting not in ("mixed", "sequential") or record.losses() is None or not (
                record.results["comparable"].get("--validation")):
            raise InputError(f"{record.folder}: rates are chosen by mixed or sequential training "
                             "with --validation N and --eval_loss")
        key = record.model, record.setting, record.steps, record.variant
        found[key][record.rate][record.seed] = math.exp(verdicts.log_loss(record))
    return {key: dict(sorted(rates.items())) for key, rates in found.items()}


def adjusted(values):
    """Return {rate: mean of its values, adjusted for seeds} of {rate: {seed: value}}.

    Least squares for value = rate + seed, as the seed draws the order of the tasks: a seed counts
    only between rates that it ran with. If all rates have the same seeds, these are plain means.
    """
    rates = list(values)
    seeds = sorted({seed for each in values.values() for seed in each})
    cells = [(rate, seed) for rate in rates for seed in values[rate]]
    design = [[*(rate == each for each in rates), *(seed == each for each in seeds)]
              for rate, seed in cells]
    effects = np.linalg.lstsq(np.array(design, dtype=float),
                              [values[rate][seed] for rate, seed in cells])[0]
    means = effects[:len(rates)] + effects[len(rates):].mean()
    return dict(zip(rates, means.tolist(), strict=True))


def adjusted_losses(rates):
    """Return {rate: loss} of {rate: {seed: loss}}: geometric means, adjusted for seeds."""
    logs = {rate: {seed: math.log(loss) for seed, loss in losses.items()}
            for rate, losses in rates.items()}
    return {rate: math.exp(value) for rate, value in adjusted(logs).items()}


def best(rates):
    """Return the rate with the lowest loss, adjusted for seeds."""
    losses = adjusted_losses(rates)
    return min(losses, key=losses.get)


def rate_table(found):
    """Make a table with a row for each method and number of steps, a column for each rate."""
    columns = sorted({rate for rates in found.values() for rate in rates})
    rows = []
    for (model, setting, steps, variant), rates in found.items():
        chosen = best(rates)
        edge = len(rates) > 1 and chosen in (min(rates), max(rates))
        rows.append([model, label(variant), setting, str(steps),
                     *(Score(tuple(rates.get(rate, {}).values()), digits=3) for rate in columns),
                     f"{chosen:g}" + " (at the edge of those tried)" * edge])
    return Table("tuning", "Loss by learning rate", "Geometric mean over tasks of the loss of "
                 "the held-out training rows' answers, nats per token, after all training, mean ± "
                 "standard deviation over seeds; empty: not run. The best rate is adjusted for "
                 "seeds: each counts only between the rates that it ran with.",
                 ["model", "method", "setting", "steps a task",
                  *(f"{rate:g}" for rate in columns), "best"], rows)


def rate_figure(found):
    """Draw loss against learning rate, a panel a model, setting and number of steps.

    Points are adjusted for seeds. A ring marks the best rate, a bar is the 95 % interval of the
    mean over seeds (Student's t).
    """
    panels = (list(dict.fromkeys(key[:3] for key, rates in found.items() if len(rates) > 1))
              or list(dict.fromkeys(key[:3] for key in found)))
    variants = sorted({key[3] for key in found})
    figure, axes = figures.grid(len(panels), width=7 if len(panels) == 1 else 5.5, height=4.6)
    for place, panel in zip(axes, panels, strict=True):
        mine = {variant: rates for (*where, variant), rates in found.items()
                if tuple(where) == panel}
        for variant, rates in mine.items():
            colour = figures.COLOURS[variants.index(variant) % len(figures.COLOURS)]
            means = adjusted_losses(rates)
            place.errorbar(list(means), list(means.values()),
                           yerr=[half_width(list(losses.values())) for losses in rates.values()],
                           fmt="o-", color=colour, markersize=4, capsize=3, label=label(variant))
            place.plot(best(rates), means[best(rates)], "o", color=colour, markersize=11,
                       markerfacecolor="none")
        model, setting, steps = panel
        label_axes(place, f"{model}, {setting}, {steps} steps a task", "peak learning rate",
                   set().union(*mine.values()))
    means = [metrics.mean(losses.values()) for rates in found.values() for losses in rates.values()]
    for place in axes:  # one scale, so that numbers of steps can be compared; long bars are cut
        place.set_ylim(0.8 * min(means), 1.25 * max(means))
    return figure


def steps_figure(found):
    """Draw loss against steps a task, a panel a model and setting, for rates with several of them.

    A bar is the 95 % interval of the mean over all seeds. Lines are moved apart a little. Returns
    None if no method ran with different numbers of steps at one rate.
    """
    panels = defaultdict(lambda: defaultdict(dict))
    for (model, setting, steps, variant), rates in found.items():
        for rate, losses in rates.items():
            panels[model, setting][variant, rate][steps] = list(losses.values())
    panels = {panel: {key: line for key, line in lines.items() if len(line) > 1}
              for panel, lines in panels.items()}
    panels = {panel: lines for panel, lines in panels.items() if lines}
    if not panels:
        return None
    variants = sorted({variant for lines in panels.values() for variant, _ in lines})
    rates = sorted({rate for lines in panels.values() for _, rate in lines})
    figure, axes = figures.grid(len(panels), width=7, height=4.6)
    for place, ((model, setting), lines) in zip(axes, panels.items(), strict=True):
        for number, ((variant, rate), line) in enumerate(sorted(lines.items())):
            place.errorbar([steps * 1.03**number for steps in line],
                           [metrics.mean(losses) for losses in line.values()],
                           yerr=list(map(half_width, line.values())), fmt="o", capsize=3,
                           linestyle=("-", "--", ":", "-.")[rates.index(rate) % 4],
                           color=figures.COLOURS[variants.index(variant) % len(figures.COLOURS)],
                           label=f"{label(variant)}, {rate:g}")
        label_axes(place, f"{model}, {setting}", "optimizer steps a task",
                   set().union(*lines.values()))
    return figure


def label_axes(place, title, xlabel, values):
    """Make both axes of a figure of losses logarithmic, with ticks at the x `values`."""
    place.set(title=title, xscale="log", yscale="log", xlabel=xlabel,
              ylabel="loss of held-out rows, nats per token\n(geometric mean over tasks)")
    figures.label_values(place.xaxis, values)
    place.yaxis.set_major_formatter("{x:g}")
    place.yaxis.set_minor_formatter("{x:g}")
    place.legend(fontsize=8)


def learning_and_forgetting(records):
    """Return {(model, steps a task): {variant: {rate: (learnt, forgotten)}}} of sequential runs.

    Means over tasks in nats per token, adjusted for seeds: the loss right after a task's own
    training, and its rise by later tasks, which is minus the Backward of the loss.
    """
    found = defaultdict(lambda: defaultdict(lambda: (defaultdict(dict), defaultdict(dict))))
    for run in filter(forgets, records):
        losses = run.losses()
        learnt, forgotten = found[run.model, run.steps][run.variant]
        learnt[run.rate][run.seed] = metrics.mean(
            losses[i][i] for i in map(run.order.index, run.tasks))
        forgotten[run.rate][run.seed] = metrics.mean(verdicts.rises(run))
    return {panel: {variant: {rate: tuple(each[rate] for each in pair) for rate in sorted(pair[0])}
                    for variant, both in sorted(variants.items())
                    for pair in [tuple(map(adjusted, both))]}
            for panel, variants in sorted(found.items())}


def forgetting_table(paths):
    """Make a table with a row for each method, number of steps and rate."""
    rows = [[model, label(variant), str(steps), f"{rate:g}", *(f"{value:.3f}" for value in point)]
            for (model, steps), mine in paths.items() for variant, points in mine.items()
            for rate, point in points.items()]
    return Table("forgetting", "Learnt and forgotten", "Nats per token, means over tasks, adjusted "
                 "for seeds: the loss right after a task's own training, and its rise by later "
                 "tasks.", ["model", "method", "steps a task", "rate", "learnt", "forgotten"], rows)


def forgetting_figure(paths):
    """Draw what a method forgets against what it learnt; a marker for each learning rate."""
    variants = sorted(set().union(*paths.values()))
    rates = sorted({rate for mine in paths.values() for points in mine.values() for rate in points})
    markers = dict(zip(rates, itertools.cycle("osD^vP*X"), strict=False))
    figure, axes = figures.grid(len(paths), width=7 if len(paths) == 1 else 5.5, height=4.6)
    for place, ((model, steps), mine) in zip(axes, paths.items(), strict=True):
        for variant, points in mine.items():
            colour = figures.COLOURS[variants.index(variant) % len(figures.COLOURS)]
            place.plot(*zip(*points.values(), strict=True), color=colour, label=label(variant))
            for rate, point in points.items():
                place.plot(*point, markers[rate], color=colour)
        for rate, marker in markers.items():
            place.plot([], [], marker, color="grey", label=f"learning rate {rate:g}")
        place.axhline(0, color="grey", linewidth=0.6)
        place.set(title=f"{model}, {steps} steps a task; lower left is better",
                  xlabel="loss right after a task's own training, nats per token",
                  ylabel="rise of the loss by later tasks, nats per token")
        place.legend(fontsize=8)
    return figure


def half_width(losses):
    """Return half the interval of the mean of `losses`; not a number for one loss."""
    if len(losses) == 1:
        return math.nan
    return (stats.t.ppf((1 + verdicts.LEVEL) / 2, len(losses) - 1) * statistics.stdev(losses)
            / len(losses) ** 0.5)


def words(found):
    """Return lines that name each variant with its best rate, as study.py --methods takes them."""
    studies = defaultdict(list)
    for (model, setting, steps, variant), rates in found.items():
        studies[model, setting, steps].append(f"'{label(variant)} --learning_rate {best(rates):g}'")
    return [line for (model, setting, steps), each in studies.items()
            for line in (f"For a study of {model}, {setting}, {steps} steps a task:",
                         f"`--methods {' '.join(each)}`")]
