"""One run as one HTML file that needs nothing else: figures are inside it, no network."""

import base64
import html
import io

import matplotlib.pyplot as plt

import figures
import metrics
from records import read_lines

STYLE = """body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .2em .6em; }
td { text-align: right; } td:first-child, td.text { text-align: left; }
img { max-width: 100%; } pre { white-space: pre-wrap; background: #f6f6f6; padding: .5em; }
.right { border-left: 4px solid #2a2; } .wrong { border-left: 4px solid #c22; }"""


def image(figure):
    """An <img> with the figure in it, which is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def table(header, rows):
    """An HTML table; every cell is escaped, None is an empty one."""
    def line(cells, kind):
        return "<tr>" + "".join(f"<{kind}>{text(value)}</{kind}>" for value in cells) + "</tr>"
    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def text(value):
    if value is None:
        return ""
    return html.escape(f"{value:.2f}" if isinstance(value, float) else str(value))


def scores(record):
    """Scores per task against both references, and the metrics over tasks."""
    results, final = record.results, {key: record.final(key) for key in ("best", "first")}
    before = results["scores"]["best"][0] if results["args"]["eval_before"] else None
    rows = [[task, results["tasks"][task]["category"], results["tasks"][task]["metric"],
             before and before[i], final["best"][task], final["first"][task]]
            for i, task in enumerate(record.order)]
    rows.append(["mean", "", "", before and metrics.mean(before),
                 *(metrics.mean(final[key].values()) for key in ("best", "first"))])
    header = ["task", "category", "metric", "before", "best reference", "first reference"]
    over = [[name, "not measured" if value is None else value]
            for name, value in results["metrics"].items()]
    return table(header, rows) + "<h3>Over tasks</h3>" + table(["metric", "value"], over)


def examples(record):
    """For every task its best and its worst answer, the first where several are equal."""
    lines = {}
    for path in sorted((record.folder / "predictions").glob("[0-9]*.jsonl"))[-1:]:
        for answer in read_lines(path):
            lines.setdefault(answer["task"], []).append(answer)
    parts = []
    for task, answers in lines.items():
        metric = record.results["tasks"][task]["metric"]

        def score(answer, metric=metric):
            return answer["scores"][metric]["best"]

        best, worst = max(answers, key=score), min(answers, key=score)
        found = [("right", best)] if score(best) > 0 else []  # else all are wrong
        found += [("wrong", worst)] if score(worst) < 100 else []
        for kind, chosen in found:
            parts.append(f'<div class="{kind}"><pre>{html.escape(chosen["prompt"][-600:])}'
                         f'<b>{html.escape(chosen["prediction"])}</b></pre><p>{html.escape(task)}: '
                         f'{metric} {score(chosen):.1f}; reference: '
                         f'{html.escape(" | ".join(chosen["references"]))}</p></div>')
    return "".join(parts) or "<p>No predictions are kept here.</p>"


def render(record, regroupings):
    """The whole page. `regroupings` are the lines of regroup.jsonl, [] where there are none."""
    results = record.results
    title = f"{record.variant}, {record.setting}, {record.model}, seed {record.seed}"
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>Scores</h2>", scores(record)]
    if len(results["rows"]) > 1:
        parts.append(image(figures.matrix_figure(
            results["scores"]["best"], record.order, results["rows"], "Score by stage")))
    if record.log:
        parts += ["<h2>Training</h2>", image(figures.run_figure(results, record.log))]
    if regroupings:
        parts += ["<h2>Layers</h2>", image(figures.layers_figure(regroupings))]
    parts += ["<h2>Best and worst answers</h2>", examples(record), "<h2>Settings</h2>",
              table(["flag", "value"], sorted(results["args"].items())), "<h2>Made with</h2>",
              table(["what", "value"], [
                  *sorted(results["versions"].items()),
                  *((key, results[key]) for key in ("precision", "processes", "global_batch_size",
                                                    "base_sha256", "code_sha256")),
                  *((f"parameters, {key}", f"{value:,}")
                    for key, value in results["parameters"].items()),
                  *((f"seconds, {key}", value)
                    for key, value in results["run"]["seconds"].items())])]
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>"
            f"{html.escape(title)}</title><style>{STYLE}</style></head><body>"
            f"{''.join(parts)}</body></html>\n")
