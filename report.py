"""Show one run, or make the report of a study.

    python report.py runs/X                           # its table, runs/X/report.html, figure.png
    python report.py runs/study --out report          # tables (Markdown, LaTeX, CSV) and figures
    python report.py runs/study --out report --claims "mine beats lora-matched"
    python report.py runs/tune --tuning --out T       # loss against learning rate, by method
    python report.py runs/study --export S.jsonl.gz   # all runs in one file, no weights, no texts
    python report.py S.jsonl.gz --out report          # the same report from that file
    python report.py runs/X runs/single               # a run with Forward from single-task runs
    python report.py S.jsonl.gz --readme README.md    # the table of claims, in that file

A run that is incomplete, of another version or of mixed settings is named and left out.
"""

import sys
from pathlib import Path
from typing import Literal

import metrics
from inputs.errors import InputError, exit_status, one_line
from inputs.files import write_text
from inputs.settings import REQUIRED, Flag, program_parser
from reporting import runs

FLAGS = (
    Flag("runs", tuple[Path, ...], REQUIRED, "the --output_dir of a run, folders with runs "
         "anywhere below, or files that --export wrote", metavar="PATH", positional=True),
    Flag("out", Path | None, None, "write the report of a study there", metavar="DIR"),
    Flag("export", Path | None, None, "write what a report reads of each run to one file, "
         "NAME.jsonl.gz", metavar="FILE"),
    Flag("unpack", Path | None, None, "write each run to a folder of its own there, from which a "
         "study goes on", metavar="DIR"),
    Flag("readme", Path | None, None, "write the table of claims between the markers "
         "<!-- results --> and <!-- /results --> of this file; each PATH is a study",
         metavar="FILE"),
    Flag("tuning", bool, False, "the runs are those of scripts/tune.sh, at several learning "
         "rates and, if they differ, numbers of rows: --out says which rate suits each method"),
    Flag("claims", tuple[str, ...] | None, None, "judge these claims and no other, for --out: "
         '"A beats B" or "A forgets less than B", where A and B are names in the report\'s tables',
         metavar="CLAIM"),
    Flag("allow_other", tuple[Literal[runs.FREE], ...], (), "let the runs of one report differ in "
         f"these: {', '.join(runs.FREE)}", metavar="WHAT"),
)


def show_run(args):
    """Print the table of a run; write its page and, if it was trained, its figure.

    The first of the paths holds the run, the others single-task runs for its Forward.
    """
    folder = only_run(args.runs[0])
    others = collect(args, args.runs[1:])[0] if args.runs[1:] else None
    try:
        record = runs.read(folder)
        if others:
            record = runs.with_forward(record, others)
        answers = runs.read_answers(folder, record.setting == "single")
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    lines = "\n".join(metrics.score_table(record.results)).split("\n")
    print("\n".join(map(one_line, lines)), flush=True)
    from reporting import figures, page  # not above: the table need not wait for matplotlib
    write_text(folder / "report.html", page.render(record, answers))
    print(one_line(f"page: {folder / 'report.html'}"))
    if record.log:
        figures.save(figures.run_figure(record), folder / "figure", ("png",))
        print(one_line(f"figure: {folder / 'figure.png'}"))


def only_run(folder):
    """Return the folder of the one run in `folder`. Raises InputError if there are more."""
    if (folder / "results.json").exists():
        return folder  # even if other runs lie below it
    if runs.is_records_file(folder):
        raise InputError(f"{folder} is a file of records: give --out DIR for their report")
    found = list(runs.find([folder]))
    if len(found) != 1:
        raise InputError(f"{folder} holds several runs: name one, or give --out DIR for the report "
                         "of all")
    return found[0]


def collect(args, paths):
    """Return what runs.collect does, and name on stderr what is left out."""
    records, left_out = runs.collect(paths, [*args.allow_other, *runs.TUNED * args.tuning])
    for folder, reason in left_out:
        print(one_line(f"left out: {folder}: {reason}"), file=sys.stderr)
    return records, left_out


def write_readme(args):
    """Write the table of claims, each path a study, into the file --readme."""
    from reporting import readme  # not above: numpy takes a second to load
    readme.update(args.readme, {path: collect(args, [path])[0] for path in args.runs})
    print(one_line(f"table of {len(args.runs)} studies: {args.readme}"))


def write_study(args):
    """Write the report, the file or the folders of a study."""
    names = {path.name for path in args.out.iterdir()} if args.out and args.out.is_dir() else set()
    # A report that was stopped left only these; they may be overwritten.
    begun = {"tables", "figures", "tuning.csv"} | {
        f"{name}.{kind}" for name in ("tuning", "forgetting", "steps") for kind in ("png", "pdf")}
    if names - begun and not names & {"report.md", "tuning.md"}:
        raise InputError(f"--out {args.out} holds other files and no report: name a new folder")
    records, left_out = collect(args, args.runs)
    claims = ()
    if args.claims:  # before anything is written
        from reporting import verdicts
        claims = verdicts.read_claims(args.claims, records)
    if args.export:
        runs.write_records(records, args.export)
        print(one_line(f"{len(records)} records in {args.export}"))
    if args.unpack:
        runs.unpack(records, args.unpack)
        print(one_line(f"{len(records)} runs in {args.unpack}"))
    if args.out:
        from reporting import study_report, tuning  # not above: they take seconds to load
        written = (tuning.make(records, left_out, args.out) if args.tuning else
                   study_report.make(records, left_out, args.out, claims))
        print(one_line(f"{len(records)} runs, {len(left_out)} left out: {written}"))


def report(argv):
    """Do what the flags in `argv` ask for. Raises InputError."""
    args = program_parser("report.py", __doc__, FLAGS).parse_args(argv)
    outputs = args.out or args.export or args.unpack
    if args.export and not args.export.name.endswith(runs.RECORDS):
        raise InputError(f"--export {args.export}: the name must end with {runs.RECORDS}")
    if args.readme and (outputs or args.tuning):
        raise InputError("--readme takes no --out, --export, --unpack or --tuning")
    if (args.tuning or args.allow_other) and not (outputs or args.readme):
        raise InputError("--tuning and --allow_other need --out DIR, --export FILE, --unpack "
                         "DIR or --readme FILE")
    if args.claims and (args.tuning or not args.out):
        raise InputError("--claims needs --out DIR, and takes no --tuning")
    if args.readme:
        write_readme(args)
    elif outputs:
        write_study(args)
    else:
        show_run(args)


def main(argv=None):
    return exit_status(report, argv)


if __name__ == "__main__":
    sys.exit(main())
