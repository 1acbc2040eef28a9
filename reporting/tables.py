"""The tables of a report, as data, and their Markdown, LaTeX and CSV forms."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import metrics
from data import SUPERNI
from records import cell, scores_of
from study import VARIANTS

PAPER = Path(__file__).resolve().parent / "results" / "paper.json"
PARTS = ("load", "decompose", "train", "regroup", "evaluate")
METRICS = {"rouge": "Rouge", "forget_rate": "Forget", "forward": "Forward", "backward": "Backward"}
ABLATIONS = ("badit", "badit --no_bad", "badit --no_dog", "badit --no_bad --no_dog",
             "badit --grouping random")


class Cell(NamedTuple):
    """One number per seed, and the paper's mean where there is one."""

    values: tuple
    paper: float | None = None
    digits: int = 2

    @property
    def mean(self):
        return metrics.mean(self.values)

    @property
    def std(self):
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self):
        """mean ± std [the paper's mean, difference]; empty where nothing was measured."""
        if not self.values:
            return ""
        text = f"{self.mean:.{self.digits}f}"
        if self.std is not None:
            text += f" ± {self.std:.{self.digits}f}"
        if self.paper is not None:
            difference = self.mean - self.paper
            text += f" [{self.paper:.{self.digits}f}, {difference:+.{self.digits}f}]"
        return text

    def columns(self):
        """mean, std, seeds, the paper's mean, difference."""
        mean = self.mean
        paper = self.paper if self.values else None
        return [mean, self.std, len(self.values), paper, None if paper is None else mean - paper]


class Table(NamedTuple):
    """`rows` of strings and Cells under `header`; `name` is that of its files."""

    name: str
    title: str
    note: str
    header: list
    rows: list

    def texts(self):
        return [[part.text() if isinstance(part, Cell) else str(part) for part in row]
                for row in self.rows]

    def markdown(self):
        lines = [self.header, ["---"] * len(self.header), *self.texts()]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{self.note}\n\n{body}\n"

    def latex(self):
        rows = [" & ".join(map(escape, row)) + r" \\" for row in self.texts()]
        columns = "".join("r" if any(isinstance(row[i], Cell) for row in self.rows) else "l"
                          for i in range(len(self.header)))
        head = " & ".join(map(escape, self.header)) + r" \\"
        return "\n".join([f"% {self.title}. {self.note}", rf"\begin{{tabular}}{{{columns}}}",
                          r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}",
                          ""])

    def csv(self):
        """Numbers in columns of their own, with all digits; empty where there is none."""
        wide = [any(isinstance(row[i], Cell) for row in self.rows) for i in range(len(self.header))]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name for i, title in enumerate(self.header) for name in (
            [f"{title} {part}" for part in ("mean", "std", "n", "paper", "difference")]
            if wide[i] else [title])])
        for row in self.rows:
            writer.writerow([value for part in row for value in (
                part.columns() if isinstance(part, Cell) else [part])])
        return file.getvalue()


def escape(text):
    """`text` for LaTeX."""
    for old, new in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"),
                     ("#", r"\#"), ("$", r"\$"), ("^", r"\^{}"), ("~", r"\~{}"),
                     ("±", r"$\pm$"), ("--", "-{}-"), ("Δ", r"$\Delta$")):
        text = text.replace(old, new)
    return text


# --- grouping -----------------------------------------------------------------------------------


def cells(records):
    """{(model, variant, setting): records by seed} without single-task runs, in a fixed order."""
    known = list(VARIANTS.values())
    found = {}
    ordered = sorted(records, key=lambda record: (
        record.model, known.index(record.variant) if record.variant in known else len(known),
        record.variant, record.setting, record.seed))
    for record in ordered:
        if record.setting != "single":
            found.setdefault(cell(record), []).append(record)
    return found


def label(variant):
    """The short name that `study.py --methods` takes, where there is one."""
    names = {words: name for name, words in VARIANTS.items()} | {"base": "zero-shot"}
    return names.get(variant, variant)


def lines_of(groups):
    """(model, variant) of all groups, each once."""
    return list(dict.fromkeys((model, variant) for model, variant, _ in groups))


def values_of(runs, metric, records, reference="first"):
    """One metric of each run, without those for which it is missing."""
    values = [scores_of(run, records, reference)[metric] for run in runs]
    return tuple(value for value in values if value is not None)


def paper_figure(paper, table, model, variant, column, runs):
    """The paper's mean, where the runs are on all of its tasks; else None."""
    if not runs or set(runs[0].order) != set(SUPERNI):
        return None
    entry = paper[table]["rows"].get(model, {}).get(variant, {}).get(column)
    return entry and entry.get("mean", entry.get("value"))


# --- tables -------------------------------------------------------------------------------------


def all_tables(records):
    """Every table for which there is a run."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    made = [table1(records, paper), table2(records, paper), table3(records, paper),
            categories(records), references(records), tasks(records)]
    return [table for table in made if table.rows]


def table1(records, paper):
    groups = cells(records)
    wanted = [("mixed", name) for name in ("rouge", "forward")]
    wanted += [("sequential", name) for name in METRICS]
    rows = []
    for model, variant in lines_of(groups):
        runs = {setting: groups.get((model, variant, setting), ())
                for setting in ("mixed", "sequential", "eval")}
        if variant == "base":
            numbers = [Cell(values_of(runs["eval"], "rouge", records)),
                       *[Cell(())] * (len(wanted) - 1)]
            n, counts = len(runs["eval"]), "-"
        else:
            numbers = [Cell(values_of(runs[setting], name, records), paper_figure(
                paper, "table1", model, variant, f"{setting}/{name}", runs[setting]))
                for setting, name in wanted]
            n = f"{len(runs['mixed'])} + {len(runs['sequential'])}"
            first = next(run for some in runs.values() for run in some)
            counts = " / ".join(f"{first.results['parameters'][kind] / 1e6:.2f} M"
                                for kind in ("trainable", "stored"))
        rows.append([model, label(variant), counts, n, *numbers])
    header = ["model", "method", "trained / stored", "seeds"]
    header += [f"{setting} {METRICS[name]}" for setting, name in wanted]
    return Table("table1", "Table 1: all methods", "Against the first reference, 0 to 100: mean ± "
                 "standard deviation over seeds (mixed + sequential); weights that are trained and "
                 "that an adapter stores; in brackets the paper's mean "
                 "and the difference from it. Empty: not measured.", header, rows)


def table2(records, paper):
    groups = cells(records)
    columns = {"sequential/rouge": 1, "sequential/forget_rate": -1, "mixed/rouge": 1}
    rows = []
    for model in dict.fromkeys(model for model, _, _ in groups):
        def numbers(variant, model=model):
            found = {}
            for column in columns:
                setting, name = column.split("/")
                runs = groups.get((model, variant, setting), ())
                found[column] = Cell(values_of(runs, name, records), paper_figure(
                    paper, "table2", model, variant, column, runs))
            return found

        whole = numbers("badit")
        present = [variant for variant in ABLATIONS
                   if any(number.values for number in numbers(variant).values())]
        if len(present) < 2:
            continue
        for variant in present:
            mine = numbers(variant)
            lost = [sign * (whole[column].mean - mine[column].mean)
                    for column, sign in columns.items()
                    if whole[column].values and mine[column].values]
            complete = len(lost) == len(columns) and variant != "badit"
            runs = groups.get((model, variant, "sequential"), ())
            lost = Cell((sum(lost),) if complete else (), paper_figure(
                paper, "table2", model, variant, "degradation", runs))
            rows.append([model, label(variant), *mine.values(), lost])
    header = ["model", "variant", "sequential Rouge", "sequential Forget", "mixed Rouge", "Δ"]
    return Table("table2", "Table 2: ablations", "Without BAD, DOG or both, and the control that "
                 "regroups at random. Δ: what the three scores lose together against BADIT, empty "
                 "unless all three are there.", header, rows)


def table3(records, paper):
    groups, rows = cells(records), []
    for model, variant in lines_of(groups):
        runs = groups.get((model, variant, "mixed"), ())
        base = {run.seed: run for run in groups.get((model, "loramoe", "mixed"), ())
                if training_seconds(run) > 1e-6}  # to divide by
        alike = [run for run in runs
                 if run.seed in base and machine(run) == machine(base[run.seed])]
        if not alike:
            continue
        ratio = Cell(tuple(training_seconds(run) / training_seconds(base[run.seed])
                           for run in alike),
                     paper_figure(paper, "table3", model, variant, "relative_time", alike))
        parts = [Cell(tuple(run.results["run"]["seconds"].get(part, 0.0) for run in alike),
                      digits=1) for part in PARTS]
        rows.append([model, label(variant), alike[0].results["run"]["device"], ratio, *parts])
    header = ["model", "method", "device", "relative", *(f"{part} s" for part in PARTS)]
    return Table("table3", "Table 3: time", "Seconds to decompose, train and regroup in mixed "
                 "training, relative to LoRAMoE with the same seed on the same kind of machine; "
                 "then seconds of each part.", header, rows)


def machine(run):
    about = run.results["run"]
    return about["device"], about["threads"], run.results["processes"]


def training_seconds(run):
    seconds = run.results["run"]["seconds"]
    return sum(seconds.get(part, 0.0) for part in ("decompose", "train", "regroup"))


def categories(records):
    groups, names = cells(records), []
    for runs in groups.values():
        for about in runs[0].results["tasks"].values():
            if about["category"] and about["category"] not in names:
                names.append(about["category"])
    rows = []
    for (model, variant, setting), runs in groups.items():
        of = [{task: about["category"] for task, about in run.results["tasks"].items()}
              for run in runs]
        rows.append([model, label(variant), setting, *[
            Cell(tuple(metrics.mean(score for task, score in run.final("first").items()
                                    if category[task] == name)
                       for run, category in zip(runs, of, strict=True)))
            for name in sorted(names)]])
    return Table("categories", "Scores by category", "Mean over the tasks of a category after all "
                 "training, first reference.", ["model", "method", "setting", *sorted(names)],
                 rows if names else [])


def references(records):
    rows = []
    for (model, variant, setting), runs in cells(records).items():
        numbers = [Cell(tuple(metrics.mean(run.final(reference).values()) for run in runs))
                   for reference in ("first", "best")]
        for metric in ("rouge_l", "accuracy"):
            numbers.append(Cell(tuple(item_mean(run, metric) for run in runs if run.items)))
        rows.append([model, label(variant), setting, *numbers])
    return Table("references", "References and metrics", "After all training. Each task by its own "
                 "metric, against the first and the best reference; then all tasks by Rouge-L and "
                 "by exact match, first reference.",
                 ["model", "method", "setting", "first reference", "best reference", "Rouge-L",
                  "exact match"], rows)


def item_mean(run, metric):
    """Mean over tasks of the mean over items, by one metric for all tasks."""
    return metrics.mean(metrics.mean(item[metric]["first"] for item in items.values())
                        for items in run.items.values())


def tasks(records):
    groups = cells(records)
    names = sorted({task for runs in groups.values() for task in runs[0].order})
    rows = []
    for (model, variant, setting), runs in groups.items():
        rows.append([model, label(variant), setting, *[
            Cell(tuple(run.final("first")[task] for run in runs if task in run.order))
            for task in names]])
    short = [name.split("_")[0].replace("task", "T") if name in SUPERNI else name for name in names]
    return Table("tasks", "Scores by task", "After all training, by the task's metric, first "
                 "reference.", ["model", "method", "setting", *short], rows)
