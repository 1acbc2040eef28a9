"""The report of a study: Markdown with its tables, what differences are worth, and its figures."""

from collections import Counter

import numpy as np

from inputs.bars import Bar
from inputs.errors import one_line
from inputs.files import write_text
from reporting import figures, runs, significance, tables, verdicts
from reporting.groups import cells, label

# Of the protocol, what would fill pages.
CHECKSUMS = ("data of", "weights of", "test items of", "metric of", "code", "versions")

VERDICTS = ("By the loss of the test answers, in nats per token, ours minus theirs. Paired "
            "bootstrap over seeds and items, of forgetting over seeds and tasks "
            f"({significance.RESAMPLES:,} resamples); the best baseline is the one with the lowest "
            "mean loss on these runs.")


def make(records, left_out, out):
    """Write report.md, tables/ and figures/ into the folder `out`."""
    made = tables.all_tables(records)
    for table in made:
        write_text(out / "tables" / f"{table.name}.tex", table.latex())
        write_text(out / "tables" / f"{table.name}.csv", table.csv())
    names = []
    for name, figure in Bar(figures.of_study(records), desc="figures", unit="figure", delay=5,
                             leave=False):
        figures.save(figure, out / "figures" / name, ("png", "pdf"))
        names.append(name)
    alone = sum(record.setting == "single" for record in records)
    parts = ["# Report", f"{len(records) - alone} runs, {alone} single-task runs, "
             f"{len(left_out)} left out.", "## Settings that all runs share",
             bullets(shared_settings(records)), "## What made them", bullets(made_by(records)),
             *(table.markdown() for table in made)]
    for title, claims in (("The paper's claims", verdicts.PAPER),
                          ("Beyond the paper", verdicts.BEYOND)):
        said = verdicts.lines(records, claims)
        if said:
            parts += [f"## {title}", VERDICTS, bullets(said)]
    said = comparisons(records)
    if said:
        parts += ["## What the differences are worth",
                  f"Paired bootstrap over seeds and items ({significance.RESAMPLES:,} resamples, "
                  "tasks as strata), first reference; no correction for the number of comparisons.",
                  bullets(said)]
    parts += ["## Figures", *(f"![{name}](figures/{name}.png)" for name in names)]
    if left_out:
        parts += ["## Left out", bullets(one_line(f"`{folder}`: {reason}")
                                         for folder, reason in left_out)]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def shared_settings(records):
    """What all runs of the report have in common, a line each."""
    shared = {name: value for record in records for name, value in runs.protocol(record).items()
              if not name.startswith(CHECKSUMS)}
    rates = {name for name in shared if name.startswith(runs.RATE)}
    if len({shared[name] for name in rates}) == 1:  # else a line for every variant
        shared[runs.RATE] = shared[min(rates)]
        shared = {name: value for name, value in shared.items() if name not in rates}
    return [f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in sorted(shared.items())]


def made_by(records):
    """Device, code and versions of the runs, a line each; of how many runs where they differ."""
    made = [{"device": record.results["run"]["device"],
             "code": f"SHA-256 {record.results['code_sha256']:.8}"} | record.results["versions"]
            for record in records]
    lines = []
    for name in made[0]:
        counts = Counter(each[name] for each in made).most_common()
        lines.append(f"{name}: " + ", ".join(
            value if len(counts) == 1 else f"{value} ({count} of {len(made)} runs)"
            for value, count in counts))
    return lines


def comparisons(records):
    """A sentence for BADIT against every other method, by model and setting."""
    groups, sentences = cells(records), []
    for (model, variant, setting), theirs in groups.items():
        ours = groups.get((model, "badit", setting), ())
        if variant == "badit" or not ours:
            continue
        mine = {run.seed: run for run in ours if run.items}
        pairs = [(mine[run.seed], run) for run in theirs if run.seed in mine and run.items]
        if pairs:
            differences = item_differences(pairs)
            items = sum(values.shape[1] for values in differences.values())
            sentences.append(significance.sentence(
                "badit", label(variant), f"{model}, {setting}",
                *significance.paired_bootstrap(differences), len(pairs), items))
    return sentences


def item_differences(pairs):
    """{task: (seeds, items)} of first-reference scores by each task's metric, ours - theirs."""
    differences = {}
    for task, about in pairs[0][0].results["tasks"].items():
        ids = sorted(pairs[0][0].items[task])
        differences[task] = np.array([
            [ours.items[task][name][about["metric"]]["first"]
             - theirs.items[task][name][about["metric"]]["first"] for name in ids]
            for ours, theirs in pairs])
    return differences
