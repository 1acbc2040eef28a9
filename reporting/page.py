"""Write one run as one HTML file with its figures inside."""

import base64
import io
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt

import metrics
from reporting import figures

PROMPT_END = 600  # characters of a prompt that are shown


def render(record, answers):
    """Return the page as HTML; `answers` are the predictions after all training, or []."""
    results = record.results
    pictures = {}
    if len(results["rows"]) > 1:
        pictures["matrix"] = image(figures.matrix_figure(
            results["scores"]["best"], record.order, results["rows"], "Score by stage"))
    if record.log:
        pictures["training"] = image(figures.run_figure(record))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["shown"] = shown
    return environment.get_template("page.html.jinja").render(
        title=record.title, scores=scores(record), over_tasks=[
            (name, "not measured" if value is None else value)
            for name, value in metrics.named_metrics(results)],
        examples=list(examples(record, answers)), flags=[
            (name, None if value is None else str(value))  # all digits of a learning rate
            for name, value in sorted(results["args"].items())], **pictures)


def shown(value):
    """Return a value as text for a table."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def image(figure):
    """Return the figure as a PNG in base64, and close it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(file.getvalue()).decode()


def scores(record):
    """Yield the scores of each task against both references, and their means."""
    results, final = record.results, {key: record.final(key) for key in ("best", "first")}
    before = results["args"]["eval_before"] and dict(
        zip(record.order, results["scores"]["best"][0], strict=True))
    for task, about in record.tasks.items():
        yield (task, about["category"], about["metric"], before[task] if before else None,
               final["best"][task], final["first"][task])
    yield ("mean", "", "", metrics.mean(map(before.get, record.tasks)) if before else None,
           *(metrics.mean(final[key].values()) for key in ("best", "first")))


def examples(record, answers):
    """Yield the best and the worst answer of each task, the first among equals."""
    for task, about in record.tasks.items():
        metric = about["metric"]
        mine = [answer | {"metric": metric, "score": answer["scores"][metric]["best"],
                          "prompt": answer["prompt"][-PROMPT_END:]}
                for answer in answers if answer["task"] == task]
        best = max(mine, key=lambda answer: answer["score"], default={"score": 0})
        worst = min(mine, key=lambda answer: answer["score"], default={"score": 100})
        if best["score"] > 0:  # else all are wrong
            yield best | {"verdict": "right"}
        if worst["score"] < 100:
            yield worst | {"verdict": "wrong"}
