"""Show the loss of held-out rows by learning rate, and the best rate of each method."""

from collections import defaultdict
from itertools import cycle

import metrics
from inputs.errors import InputError
from inputs.files import write_text
from reporting import figures
from reporting.runs import label
from reporting.tables import Score, Table


def make(records, left_out, out):
    """Write tuning.md with its table and figure into the folder `out`, and return its path."""
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
    """Return {(model, variant, setting): {rate: losses, one a seed}}, sorted; means over tasks.

    Raises InputError for a run without --eval_loss or --validation.
    """
    found = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: (*record.group, record.seed)):
        if record.setting not in ("mixed", "sequential") or record.losses() is None or not (
                record.results["comparable"].get("--validation")):
            raise InputError(f"{record.folder}: rates are chosen by mixed or sequential training "
                             "with --validation N and --eval_loss")
        found[record.group][record.rate].append(metrics.mean(record.final_losses().values()))
    return {key: dict(sorted(rates.items())) for key, rates in found.items()}


def best(rates):
    """Return the rate with the lowest mean loss."""
    return min(rates, key=lambda rate: metrics.mean(rates[rate]))


def rate_table(found):
    """Make a table with a row for each method and a column for each rate."""
    columns = sorted({rate for rates in found.values() for rate in rates})
    rows = []
    for (model, variant, setting), rates in found.items():
        chosen = best(rates)
        edge = len(rates) > 1 and chosen in (min(rates), max(rates))
        rows.append([model, label(variant), setting, *(Score(tuple(rates.get(rate, ())), digits=3)
                                              for rate in columns),
                     f"{chosen:g}" + " (at the edge of those tried)" * edge])
    return Table("tuning", "Loss by learning rate", "Mean over tasks of the loss of the held-out "
                 "training rows' answers, nats per token, after all training; empty: not run.",
                 ["model", "method", "setting", *(f"{rate:g}" for rate in columns), "best"], rows)


def rate_figure(found):
    """Draw loss against learning rate, a panel a model and setting; a ring marks the best rate."""
    panels = list(dict.fromkeys((model, setting) for model, _, setting in found))
    figure, axes = figures.grid(len(panels), width=7, height=4.6)
    for place, panel in zip(axes, panels, strict=True):
        mine = {variant: rates for (model, variant, setting), rates in found.items()
                if (model, setting) == panel}
        for (variant, rates), colour in zip(mine.items(), cycle(figures.COLOURS), strict=False):
            means = {rate: metrics.mean(losses) for rate, losses in rates.items()}
            place.plot(list(means), list(means.values()), "o-", color=colour, markersize=4,
                       label=label(variant))
            place.plot(best(rates), means[best(rates)], "o", color=colour, markersize=11,
                       markerfacecolor="none")
        place.set(title=", ".join(panel), xscale="log", yscale="log", xlabel="peak learning rate",
                  ylabel="loss of held-out rows, nats per token")
        figures.label_values(place.xaxis, set().union(*mine.values()))
        place.yaxis.set_major_formatter("{x:g}")
        place.yaxis.set_minor_formatter("{x:g}")
        place.legend(fontsize=8)
    return figure


def words(found):
    """Return each variant with its best rate, as study.py --methods takes them."""
    return " ".join(f"'{label(variant)} --learning_rate {best(rates):g}'"
                    for (_, variant, _), rates in found.items())
