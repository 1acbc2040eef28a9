"""Show one run, or make the report of a study.

    python report.py runs/X                      # its table here; runs/X/report.html, figure.png
    python report.py runs/study --out report     # tables (Markdown, LaTeX, CSV) and figures
    python report.py runs/tune --tuning --out T  # loss against learning rate, by method
    python report.py runs/study --export records # the small part of each run: no weights, no texts

A run that is incomplete, of another version or of mixed settings is named and left out.
"""

import argparse
import sys
from pathlib import Path

import metrics
from inputs.errors import InputError, one_line
from inputs.files import write_text
from inputs.settings import Parser
from reporting import runs


def show_run(folder):
    """Print the table of a run; then write its page and, where it was trained, its figure."""
    try:
        record = runs.read(folder)
        answers, regroupings = runs.read_answers(folder), runs.read_regroupings(folder)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    lines = "\n".join(metrics.score_table(record.results)).split("\n")
    print("\n".join(map(one_line, lines)), flush=True)
    from reporting import figures, page  # not above: the table need not wait for matplotlib
    write_text(folder / "report.html", page.render(record, answers, regroupings))
    print(one_line(f"page: {folder / 'report.html'}"))
    if record.log:
        figures.save(figures.run_figure(record.results, record.log), folder / "figure", ("png",))
        print(one_line(f"figure: {folder / 'figure.png'}"))


def only_run(folders):
    """The folder of the one run in `folders`. Raises InputError where there are more."""
    if len(folders) == 1 and (folders[0] / "results.json").exists():
        return folders[0]  # whatever may lie below it
    found = runs.find(folders)
    if len(folders) > 1 or len(found) > 1:
        raise InputError(f"{' '.join(map(str, folders))} holds several runs: name one, or give "
                         "--out DIR for the report of all")
    return found[0]


def build_parser():
    parser = Parser(prog="report.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER",
                        help="the --output_dir of a run, or folders with runs anywhere below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the report of a study there")
    parser.add_argument("--export", type=Path, metavar="DIR",
                        help="copy the small part of each run that a report needs")
    parser.add_argument("--tuning", action="store_true",
                        help="runs are those of scripts/tune.sh, at several learning rates: "
                             "--out says which suits each method")
    parser.add_argument("--allow_other", nargs="+", choices=runs.FREE, default=[], metavar="WHAT",
                        help="what may differ between runs of one report, of "
                             f"{', '.join(runs.FREE)}")
    return parser


def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        if args.tuning and not (args.out or args.export):
            raise InputError("--tuning needs --out DIR or --export DIR")
        if not (args.out or args.export):
            if args.allow_other:
                raise InputError("--allow_other is read with --out or --export only")
            show_run(only_run(args.runs))
            return 0
        free = [*args.allow_other, *([runs.RATE] if args.tuning else [])]
        records, left_out = runs.collect(args.runs, free)
        for folder, reason in left_out:
            print(one_line(f"left out: {folder}: {reason}"), file=sys.stderr)
        if args.export:
            runs.export(records, args.export, args.runs)
            print(one_line(f"{len(records)} records in {args.export}"))
        if args.out and args.tuning:
            from reporting import tuning  # not above: it takes seconds to load
            tuning.make(records, left_out, args.out)
            print(one_line(f"{len(records)} runs, {len(left_out)} left out: "
                           f"{args.out / 'tuning.md'}"))
        elif args.out:
            from reporting import study_report  # not above: it takes seconds to load
            study_report.make(records, left_out, args.out)
            print(one_line(f"{len(records)} runs, {len(left_out)} left out: "
                           f"{args.out / 'report.md'}"))
    except (InputError, OSError) as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
