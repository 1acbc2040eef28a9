"""Show one run, or make the report of a study.

    python report.py runs/X                      # its table here; runs/X/report.html, figure.png
    python report.py runs/study --out report     # tables (Markdown, LaTeX, CSV) and figures
    python report.py runs/study --export records # the small part of each run: no weights, no texts

A run that is incomplete, of another version or of mixed settings is named and left out.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import figures
import page
import records as runs
import results
import significance
import tables
from arguments import Parser
from errors import InputError, one_line
from tables import cells, label
from utils import atomic_path

FREE = ("code", "versions")


# --- one run ------------------------------------------------------------------------------------


def show_run(folder):
    """Print the table of a run and write its page and its figure."""
    try:
        record = runs.read(folder)
        lines = folder / "regroup.jsonl"
        regroupings = runs.read_lines(lines) if lines.exists() else []
        shown = "\n".join(results.table(record.results))
        written = {"report.html": page.render(record, regroupings)}
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{folder} is damaged, or of another version of this program "
                         f"({error!r})") from None
    print("\n".join(map(one_line, shown.split("\n"))))
    for name, text in written.items():
        write_text(folder / name, text)
        print(one_line(f"page: {folder / name}"))
    if record.log:
        save(figures.run_figure(record.results, record.log), folder / "figure", ("png",))
        print(one_line(f"figure: {folder / 'figure.png'}"))


# --- a study ------------------------------------------------------------------------------------


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


def shared_settings(records):
    """What all runs of the report have in common, as Markdown; checksums are left out."""
    shared = {name: value for record in records for name, value in runs.protocol(record).items()
              if not name.startswith(("data of", "weights of", "test items of", "metric of"))
              and name not in ("code", "versions")}
    lines = [f"- {name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
             for name, value in sorted(shared.items())]
    return "## Settings that all runs share\n\n" + "\n".join(lines) + "\n"


def make_report(records, left_out, out):
    """Write report.md, tables/ and figures/ into the folder `out`."""
    made = tables.all_tables(records)
    for table in made:
        write_text(out / "tables" / f"{table.name}.tex", table.latex())
        write_text(out / "tables" / f"{table.name}.csv", table.csv())
    drawn = {name: draw(records) for name, draw in figures.FIGURES.items()}
    drawn = {name: figure for name, figure in drawn.items() if figure is not None}
    names = [*drawn]
    for name, figure in tqdm(drawn.items(), desc="figures", unit="figure", delay=5, leave=False):
        save(figure, out / "figures" / name, ("png", "pdf"))
    for name, figure in figures.matrices(records):
        save(figure, out / "figures" / name, ("png", "pdf"))
        names.append(name)
    kinds = [record.setting == "single" for record in records]
    parts = ["# Report\n", f"{len(kinds) - sum(kinds)} runs, {sum(kinds)} single-task runs, "
             f"{len(left_out)} left out.\n", shared_settings(records),
             *(table.markdown() for table in made)]
    said = comparisons(records)
    if said:
        parts.append("## What the differences are worth\n\nPaired bootstrap over seeds and items "
                     f"({significance.RESAMPLES:,} resamples, tasks as strata), first reference; "
                     "no correction for the number of comparisons.\n\n"
                     + "\n".join(f"- {line}" for line in said) + "\n")
    parts.append("## Figures\n\n" + "\n\n".join(f"![{name}](figures/{name}.png)"
                                                for name in names) + "\n")
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(
            one_line(f"- `{folder}`: {reason}") for folder, reason in left_out) + "\n")
    write_text(out / "report.md", "\n".join(parts))


def export(records, out, folders):
    """Copy the small part of each run into a folder of its name in `out`."""
    taken = {path.resolve() for path in runs.find(folders)}
    destinations = [(out / record.folder.resolve().name).resolve() for record in records]
    for destination in destinations:
        if destination in taken or runs.is_other_run(destination):
            raise InputError(f"--export would overwrite {destination}, or write it twice")
        taken.add(destination)
    for record, destination in zip(records, destinations, strict=True):
        runs.export(record, destination)


def write_text(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(figure, path, kinds):
    """Write a figure as `path`.png and the like, and close it; equal figures give equal bytes."""
    for kind in kinds:
        with atomic_path(path.with_name(f"{path.name}.{kind}")) as temporary:
            metadata = {"CreationDate": None} if kind == "pdf" else None
            figure.savefig(temporary, format=kind, dpi=120, metadata=metadata)
    plt.close(figure)


# --- main ---------------------------------------------------------------------------------------


def build_parser():
    parser = Parser(prog="report.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER",
                        help="the --output_dir of a run, or folders with runs anywhere below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the report of a study there")
    parser.add_argument("--export", type=Path, metavar="DIR",
                        help="copy the small part of each run that a report needs")
    parser.add_argument("--allow_other", nargs="+", choices=FREE, default=[], metavar="WHAT",
                        help=f"what may differ between runs of one report, of {', '.join(FREE)}")
    return parser


def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        if not (args.out or args.export):
            if len(args.runs) > 1 or args.allow_other:
                raise InputError("the report of several runs needs --out DIR")
            found = args.runs
            if not (found[0] / "results.json").exists():
                found = runs.find(found)
            if len(found) > 1:
                raise InputError(f"{args.runs[0]} holds several runs: name one, or give --out DIR "
                                 "for the report of all")
            show_run(found[0])
            return 0
        records, left_out = runs.collect(args.runs, args.allow_other)
        for folder, reason in left_out:
            print(one_line(f"left out: {folder}: {reason}"), file=sys.stderr)
        if args.export:
            export(records, args.export, args.runs)
            print(one_line(f"{len(records)} records in {args.export}"))
        if args.out:
            make_report(records, left_out, args.out)
            print(one_line(f"{len(records)} runs, {len(left_out)} left out: "
                           f"{args.out / 'report.md'}"))
    except (InputError, OSError) as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
