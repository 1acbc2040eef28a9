"""Write the report of a study: tables, verdicts on claims, and figures."""

from collections import Counter

from inputs.errors import one_line
from inputs.files import write_text
from reporting import figures, runs, tables, verdicts

# Parts of the protocol that would fill pages.
CHECKSUMS = ("data of", "weights of", "test items of", "metric of", "code", "versions")

VERDICTS = ("Ours minus theirs, below zero is better for ours: the mean over tasks of ln(loss of "
            "the test answers), so -0.05 is a loss about 5 % lower; of forgetting, the rise of the "
            "loss in nats per token. Intervals are Student's over the seeds, with the standard "
            "error of a paired bootstrap over seeds and items, of forgetting over seeds and tasks "
            f"({verdicts.RESAMPLES:,} resamples). A claim is **shown** (if ours is worse: **the "
            "reverse**) if its p is below 0.05 after Holm's correction over all claims of this "
            f"report. **No gain of {verdicts.TARGET}**: the interval, uncorrected, excludes such a "
            "gain. **Open**: none of these. The best baseline is the one with the lowest "
            "loss on these runs, among those with the most seeds; if it wins, its p counts as many "
            "times as there were baselines. The seeds that would show a difference are for 80 % of "
            "studies, before correction.")


def make(records, left_out, out, claims=()):
    """Write report.md, tables/ and figures/ into the folder `out`; return report.md's path.

    Only the Claims in `claims` are judged; without any, the built-in ones.
    """
    groups = {"The paper's claims": verdicts.PAPER, "Beyond the paper": verdicts.BEYOND}
    if claims:
        groups = {"Chosen claims": claims}
    made = tables.all_tables(records)
    for table in made:
        write_text(out / "tables" / f"{table.name}.tex", table.latex())
        write_text(out / "tables" / f"{table.name}.csv", table.csv())
    found = verdicts.verdicts(records, sum(groups.values(), ()))
    for old in (out / "figures").glob("claims.*"):
        old.unlink()  # of other claims
    for name, figure in figures.of_study(records, found).items():
        figures.save(figure, out / "figures" / name, ("png", "pdf"))
    single = sum(record.setting == "single" for record in records)
    parts = ["# Report", f"{len(records) - single} runs, {single} single-task runs, "
             f"{len(left_out)} left out."]
    without = sorted({task for record in records for task in record.without})
    if without:
        parts.append(f"No number counts {', '.join(without)}: its test rows asked for facts that "
                     "no training row holds.")
    parts += ["## Settings that all runs share", bullets(shared_settings(records)),
              "## What made them", bullets(made_by(records)),
              *(table.markdown() for table in made)]
    if found:
        parts += ["## Claims", VERDICTS]
    for title, group in groups.items():
        said = [verdict.sentence() for verdict in found if verdict.claim in group]
        if said:
            parts += [f"### {title}", bullets(said)]
    if not found:
        parts.append("No claim is judged: that needs runs of two methods with --eval_loss.")
    if left_out:
        parts += ["## Left out", bullets(one_line(f"`{folder}`: {reason}")
                                         for folder, reason in left_out)]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def shared_settings(records):
    """Return the protocol of all runs of the report, a line a part."""
    shared = {name: value for record in records for name, value in runs.protocol(record).items()
              if not name.startswith(CHECKSUMS)}
    rates = {name for name in shared if name.startswith(runs.RATE)}
    if len({shared[name] for name in rates}) == 1:  # else a line for every variant
        shared[runs.RATE] = shared[min(rates)]
        shared = {name: value for name, value in shared.items() if name not in rates}
    return [f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in sorted(shared.items())]


def made_by(records):
    """Return device, code and versions of the runs, a line each, with counts where they differ."""
    made = [{"device": record.results["run"]["device"],
             "code": f"SHA-256 {record.results['code_sha256']:.8}",
             "git commit": f"{record.results.get('git_commit') or 'none':.12}"}
            | record.results["versions"] for record in records]
    lines = []
    for name in made[0]:
        counts = Counter(each[name] for each in made).most_common()
        lines.append(f"{name}: " + ", ".join(
            value if len(counts) == 1 else f"{value} ({count} of {len(made)} runs)"
            for value, count in counts))
    return lines
