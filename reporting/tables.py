"""Make the tables of a report, in Markdown, LaTeX and CSV."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import metrics
from inputs.suites import SUPERNI
from reporting.runs import group_runs, label, losses_of, short, values_of

PAPER = Path(__file__).resolve().parents[1] / "results" / "paper.json"
PARTS = ("load", "decompose", "train", "regroup", "evaluate")
METRICS = {"rouge": "Rouge", "forget_rate": "Forget", "forward": "Forward", "backward": "Backward"}
ABLATIONS = ("badit", "badit --no_bad", "badit --no_dog", "badit --no_bad --no_dog",
             "badit --grouping random")
OLORA = ("`olora` is O-LoRA (Wang et al. 2023), which the paper cites. In mixed training O-LoRA is "
         "LoRA, but the paper's OLoRA and LoRA rows differ there, so it cannot have run O-LoRA. "
         "Its row is set beside OLoRA (arXiv 2406.01775), here `olora_qr`.")
# Characters that pandas does not escape and LaTeX shows wrongly.
SYMBOLS = {"±": r"$\pm$", "Δ": r"$\Delta$", "--": "-{}-"}


class Score(NamedTuple):
    """One number per seed, and the paper's mean if it reports one."""

    values: tuple
    paper: float | None = None
    digits: int = 2

    @property
    def mean(self):
        return metrics.mean(self.values)

    @property
    def std(self):
        """The sample standard deviation over seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self):
        """Return "mean ± std [the paper's mean, difference]", "" if nothing was measured."""
        if not self.values:
            return ""
        text = f"{self.mean:.{self.digits}f}"
        if self.std is not None:
            text += f" ± {self.std:.{self.digits}f}"
        if self.paper is not None:
            text += (f" [{self.paper:.{self.digits}f}, "
                     f"{self.mean - self.paper:+.{self.digits}f}]")
        return text

    def numbers(self):
        """Return {name: number or None} for a CSV file."""
        return {"mean": self.mean, "std": self.std, "n": len(self.values), "paper": self.paper}


class Table(NamedTuple):
    """Rows of strings and Scores under a header; its files are called `name`."""

    name: str
    title: str
    note: str
    header: list
    rows: list

    def texts(self):
        return [[part.text() if isinstance(part, Score) else str(part) for part in row]
                for row in self.rows]

    def markdown(self):
        return f"## {self.title}\n\n{self.note}\n\n{markdown_table(self.header, self.texts())}"

    def latex(self):
        columns = "".join("r" if isinstance(part, Score) else "l" for part in self.rows[0])
        body = pd.DataFrame(self.texts(), columns=self.header).to_latex(
            index=False, escape=True, column_format=columns)
        for symbol, command in SYMBOLS.items():
            body = body.replace(symbol, command)
        return f"% {self.title}. {self.note}\n{body}"

    def csv(self):
        """Return CSV with all digits and a column for each number of a Score."""
        return pd.DataFrame([{f"{title} {name}".strip(): value
                              for title, part in zip(self.header, row, strict=True)
                              for name, value in (part.numbers() if isinstance(part, Score)
                                                  else {"": part}).items()}
                             for row in self.rows]).to_csv(index=False)


def markdown_table(header, rows):
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


# --- tables -------------------------------------------------------------------------------------


def all_tables(records):
    """Return every table for which there is a run."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    made = [table1(records, paper), table2(records, paper), table3(records, paper),
            losses(records), regroupings(records), tasks(records)]
    return [table for table in made if table.rows]


def paper_figure(paper, table, model, variant, column, runs):
    """Return the paper's mean if the runs are on all of its tasks, else None."""
    if not runs or set(runs[0].order) != set(SUPERNI):
        return None
    entry = paper[table]["rows"].get(model, {}).get(variant, {}).get(column, {})
    return entry.get("mean", entry.get("value"))


def beside_paper(records, paper, table, model, variant, runs, columns):
    """Return a Score for each column, such as "mixed/rouge", of `runs` by setting."""
    scores = []
    for column in columns:
        setting, metric = column.split("/")
        mine = runs.get(setting, ())
        scores.append(Score(values_of(mine, metric, records),
                            paper_figure(paper, table, model, variant, column, mine)))
    return scores


def score_name(records):
    """Return the name of the mean over tasks: Rouge only if all tasks are Rouge-L."""
    types = {about["metric"] for record in records for about in record.tasks.values()}
    return METRICS["rouge"] if metrics.headline(types) == "rouge" else "score"


def variants(records):
    """Return {(model, variant): {setting: runs}}, in a fixed order."""
    found = defaultdict(dict)
    for (model, variant, setting), runs in group_runs(records).items():
        found[model, variant][setting] = runs
    return found


def table1(records, paper):
    columns = ["mixed/rouge", "mixed/forward", *(f"sequential/{name}" for name in METRICS)]
    rows = []
    for (model, variant), runs in variants(records).items():
        numbers = beside_paper(records, paper, "table1", model, variant, runs, columns)
        if variant == "zero_shot":
            numbers[0] = Score(values_of(runs["eval"], "rouge", records))
            n, counts = len(runs["eval"]), "-"
        else:
            n = f"{len(runs.get('mixed', ()))} + {len(runs.get('sequential', ()))}"
            first = next(iter(runs.values()))[0]
            counts = " / ".join(f"{first.results['parameters'][name] / 1e6:.2f} M"
                                for name in ("trainable", "stored"))
        rows.append([model, label(variant), counts, n, *numbers])
    named = METRICS | {"rouge": score_name(records)}
    header = ["model", "method", "trained / stored", "seeds", *(
        f"{setting} {named[name]}" for setting, name in (column.split("/") for column in columns))]
    note = ("Against the first reference, 0 to 100: mean ± standard deviation over seeds (mixed + "
            "sequential); trained and stored weights; in brackets the "
            "paper's mean and the difference from it. Empty: not measured. " + metrics.BACKWARD)
    if any(record.variant.split()[0] == "olora" for record in records):
        note += " " + OLORA
    return Table("table1", "Table 1: all methods", note, header, rows)


def table2(records, paper):
    columns = {"sequential/rouge": 1, "sequential/forget_rate": -1, "mixed/rouge": 1}
    found, rows = variants(records), []
    for model in dict.fromkeys(model for model, _ in found):
        present = {variant: beside_paper(records, paper, "table2", model, variant,
                                         found[model, variant], columns)
                   for variant in ABLATIONS if (model, variant) in found}
        for variant, scores in present.items() if len(present) > 1 else ():
            lost = [sign * (whole.mean - score.mean) for sign, whole, score in
                    zip(columns.values(), present.get("badit", ()), scores, strict=False)
                    if whole.values and score.values]
            complete = len(lost) == len(columns) and variant != "badit"
            runs = found[model, variant].get("sequential", ())
            rows.append([model, label(variant), *scores, Score(
                (sum(lost),) if complete else (),
                paper_figure(paper, "table2", model, variant, "degradation", runs))])
    score = score_name(records)
    header = ["model", "variant", f"sequential {score}", "sequential Forget", f"mixed {score}", "Δ"]
    return Table("table2", "Table 2: ablations", "Without BAD, DOG or both, and the control that "
                 "regroups at random. Δ: total loss of the three scores against BADIT, empty "
                 "unless all three are there.", header, rows)


def table3(records, paper):
    found, rows = variants(records), []
    for (model, variant), runs in found.items():
        base = {(run.seed, machine(run)): training_seconds(run)
                for run in found.get((model, "loramoe"), {}).get("mixed", ())}
        alike = [run for run in runs.get("mixed", ()) if base.get((run.seed, machine(run)))]
        for place in dict.fromkeys(map(machine, alike)):
            here = [run for run in alike if machine(run) == place]
            ratio = Score(tuple(training_seconds(run) / base[run.seed, place] for run in here),
                          paper_figure(paper, "table3", model, variant, "relative_time", here))
            parts = [Score(tuple(run.results["run"]["seconds"].get(part, 0.0) for run in here),
                           digits=1) for part in PARTS]
            rows.append([model, label(variant), place[0], ratio, *parts])
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


# --- tables with a row for each setting ---------------------------------------------------------


def by_setting(records, columns, digits=2):
    """Return (header, rows) with a column for each {title: function of a run, or None}."""
    rows = []
    for (model, variant, setting), runs in group_runs(records).items():
        values = ([number(run) for run in runs] for number in columns.values())
        rows.append([model, label(variant), setting, *(
            Score(tuple(value for value in each if value is not None), digits=digits)
            for each in values)])
    return ["model", "method", "setting", *columns], rows


def losses(records):
    def measure(name):
        return lambda run: losses_of(run, records).get(name)

    header, rows = by_setting(records, {
        "ln(loss / zero-shot)": measure("relative"), "its median task": measure("median"),
        "loss": measure("loss"), "Forget": measure("forget_rate"), "Forward": measure("forward"),
        "Backward": measure("backward")}, digits=3)
    return Table("losses", "Loss of the test answers", "After all training, of the first reference "
                 "(--eval_loss). First the mean and the median over tasks of ln(loss / loss of the "
                 "bare model): no task can make up most of it. Then in nats per token, means over "
                 "tasks: the loss, and the metrics of losses with the signs of scores. "
                 + metrics.BACKWARD, header, [row for row in rows if row[5].values])


def regroupings(records):
    def later(name):
        return lambda run: metrics.mean(event[name] for event in run.results["regroupings"][1:])

    def chosen(name):
        """Average over the regroupings; if there are none, over all measurements."""
        return lambda run: metrics.mean(event[name] for event in [
            event for event in run.results["regroupings"]
            if event["grouping"] != "fixed"] or run.results["regroupings"])

    header, rows = by_setting(records, {
        "inside, before": later("intra_before"), "between, before": later("inter_before"),
        "inside, after": chosen("intra_after"), "moved": chosen("moved"),
        "drift": chosen("regroup_drift")})
    rows = [[*row[:-1], row[-1]._replace(digits=4)] for row in rows if row[-1].values]
    return Table("regroupings", "Regroupings", "Means over layers and regroupings. Angles "
                 "(degrees) between component gradients, inside and between experts. Before: under "
                 "the groups of the previous regrouping, so a run's first is left out. After: "
                 "under the groups from these gradients. Components that change their expert, and "
                 "the relative change of a layer's output (drift).",
                 header, rows)


def tasks(records):
    def score_on(task):
        return lambda run: run.final("first").get(task)

    names = sorted({task for runs in group_runs(records).values() for task in runs[0].tasks})
    header, rows = by_setting(records, {short(task): score_on(task) for task in names})
    return Table("tasks", "Scores by task", "After all training, by the task's metric, first "
                 "reference.", header, rows)
