"""Which learning rate suits each method: the loss of held-out rows against it."""

from collections import defaultdict

import metrics
from inputs.errors import InputError
from inputs.files import write_text
from reporting import figures
from reporting.groups import label
from reporting.tables import Cell, Table


def make(records, left_out, out):
    """Write tuning.md, tuning.csv and tuning.png into the folder `out`; return the first."""
    found = losses_by_rate(records)
    table = rate_table(found)
    write_text(out / "tuning.csv", table.csv())
    figures.save(rate_figure(found), out / "tuning", ("png", "pdf"))
    lines = [f"- left out: `{folder}`: {reason}" for folder, reason in left_out]
    write_text(out / "tuning.md", "\n\n".join([
        "# Learning rates", table.markdown(), "![loss against learning rate](tuning.png)",
        "For a study:", f"`--methods {words(found)}`", *lines]) + "\n")
    return out / "tuning.md"


def losses_by_rate(records):
    """{(model, variant): {rate: losses, one a seed}}, mean over tasks, rates and names in order.

    Raises InputError for a run that was not made for choosing: not mixed training with --eval_loss,
    evaluated on --validation rows.
    """
    found = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: (record.model, record.variant, record.seed)):
        if record.setting != "mixed" or record.losses() is None or not record.results[
                "comparable"].get("--validation"):
            raise InputError(f"{record.folder}: rates are chosen by mixed training with "
                             "--validation N and --eval_loss")
        found[record.model, record.variant][record.rate].append(metrics.mean(record.losses()[-1]))
    return {key: dict(sorted(rates.items())) for key, rates in found.items()}


def best(rates):
    """The rate of the lowest mean loss."""
    return min(rates, key=lambda rate: metrics.mean(rates[rate]))


def rate_table(found):
    """A row for each model and variant, a column for each rate."""
    columns = sorted({rate for rates in found.values() for rate in rates})
    rows = []
    for (model, variant), rates in found.items():
        chosen = best(rates)
        edge = len(rates) > 1 and chosen in (min(rates), max(rates))
        rows.append([model, label(variant), *(Cell(tuple(rates.get(rate, ())), digits=3)
                                              for rate in columns),
                     f"{chosen:g}" + " (at the edge of those tried)" * edge])
    return Table("tuning", "Loss by learning rate", "Mean over tasks of the loss of the held-out "
                 "training rows' answers, nats per token, after mixed training; empty: not run.",
                 ["model", "method", *(f"{rate:g}" for rate in columns), "best"], rows)


def rate_figure(found):
    """Loss against learning rate, all methods in one picture; a ring marks the best of each."""
    models = list(dict.fromkeys(model for model, _ in found))
    figure, axes = figures.grid(len(models), width=7, height=4.6)
    for place, model in zip(axes, models, strict=True):
        mine = {variant: rates for (each, variant), rates in found.items() if each == model}
        for (variant, rates), colour in zip(mine.items(), figures.COLOURS, strict=False):
            means = {rate: metrics.mean(losses) for rate, losses in rates.items()}
            place.plot(list(means), list(means.values()), color=colour, marker="o", markersize=4,
                       label=label(variant))
            place.plot([best(rates)], [means[best(rates)]], color=colour, marker="o",
                       markersize=11, markerfacecolor="none", linestyle="none")
        place.set(title=model, xscale="log", yscale="log", xlabel="peak learning rate",
                  ylabel="loss of held-out rows, nats per token")
        ticks = sorted({rate for rates in mine.values() for rate in rates})
        place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        place.xaxis.minorticks_off()
        place.yaxis.set_major_formatter("{x:g}")
        place.yaxis.set_minor_formatter("{x:g}")
        place.legend(fontsize=8)
    return figure


def words(found):
    """Each variant with its best rate, as scripts/study.py takes them."""
    return " ".join(f"'{label(variant)} --learning_rate {best(rates):g}'"
                    for (_, variant), rates in found.items())
