"""Write analysis.md, the tables of an analysis, and its figures. docs/analyses.md explains them."""

import numpy as np
from tqdm import tqdm

from analysis import figures
from analysis.figures import largest_information, measured_units, number
from inputs.errors import one_line
from inputs.files import write_text
from inputs.formats import load
from reporting.figures import save
from reporting.runs import short
from reporting.tables import Table


def write(folder):
    """Write analysis.md and figures/ from the analysis.json and arrays.npz of a folder."""
    result, arrays = load(folder / "analysis.json"), {}
    if (folder / "arrays.npz").exists():
        with np.load(folder / "arrays.npz") as file:
            arrays = dict(file)
    drawn = figures.DRAWN[result["command"]](result, arrays)
    for name, figure in tqdm(drawn, desc="figures", unit="figure", delay=5, leave=False):
        save(figure, folder / "figures" / name, ("png", "pdf"))
    write_text(folder / "analysis.md", text(folder))


def text(folder):
    """Return the text of analysis.md: its tables, and the figures in the folder."""
    result = load(folder / "analysis.json")
    title, tables = TABLES[result["command"]]
    parts = [f"# {title}", settings(result), *filter(None, (make(result) for make in tables))]
    shown = [f"![{file.stem}](figures/{file.name})"
             for file in sorted((folder / "figures").glob("*.png"))]
    return "\n\n".join([*parts, *(["## Figures", *shown] if shown else [])]) + "\n"


def settings(result):
    """Return the flags, rows and base model in one line."""
    made = result["made"]
    shown = [f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for name, value in sorted(made["args"].items())
             if value is not None and value is not False and value != [] and name != "command"]
    rows, tokens = (sum(task[key] for task in result["tasks"]) for key in ("rows", "tokens"))
    about = f" ({result['about']})" if "about" in result else ""
    return one_line(f"{'; '.join(shown)}; {rows} rows{about}, {tokens:,} tokens; base model "
                    f"{made['base_sha256'][:12]}")


def table(title, note, header, rows):
    """Return a Markdown table under its heading, "" without rows."""
    return Table("", title, note, header, rows).markdown() if rows else ""


def numbers(values, digits=2, between=", "):
    return "–" if values is None else between.join(number(value, digits) for value in values)


def effect_and_p(line):
    """Return the text "effect, p value" of a line, or a dash where it was not measured."""
    effect, p = line["category_effect"], line["category_p"]
    return "–" if effect is None else f"{effect:+.3f}, " + (
        f"{p:.4f}" if p >= 0.0002 else "< 0.0002")


# --- sharing ------------------------------------------------------------------------------------


def sharing_table(result):
    rows = []
    for title, line in measured_units(result):
        T, controls = len(line["histogram"]) - 1, line["controls"]
        patterns, permuted = line["patterns"]
        rows.append([
            title, f"{line['jaccard']:.3f} ({line['smallest']:.2f} to {line['largest']:.2f})",
            number(line["chance"], 3), number(line["ceiling"], 3), number(line["kappa"]),
            f"{line['shared']:.3f} ({line['shared_chance']:.3f})",
            f"{line['histogram'][0] / line['units']:.3f} "
            f"({line['chance_histogram'][0] / line['units']:.3f})",
            f"{line['histogram'][T]:,} ({line['chance_histogram'][T]:.2g})",
            numbers([controls[name]["jaccard"] for name in ("pooled", "shuffled", "random")], 3),
            number(controls["random"]["core"]), effect_and_p(line),
            f"{patterns} ({permuted:.0f})", number(line["lower_half"])])
    return table("Shared units", "J: Jaccard index, mean over pairs of tasks (smallest to "
                 "largest), of random sets, of two halves of a task, of tasks and controls. Core: "
                 "share of the units active in all tasks that are active on random tokens. "
                 "Patterns: sets of tasks that cover half of the active units (after permutation).",
                 ["units", "J tasks", "J chance", "J halves", "kappa", "shared (chance)",
                  "in no task (chance)", "in all (chance)", "J pooled, shuffled, random", "core",
                  "category effect, p", "patterns", "in lower half of ids"], rows)


def weight_table(result):
    return table("Scores and signs of weights", "R2 of log F on row and column effects; "
                 "correlation between tasks of column effects (input channels) and row effects. "
                 "Share with both signs among the weights active in two tasks or more (fair coin "
                 "flips); share of the rarer sign in weights active in all tasks; agreement of two "
                 "tasks, and of two halves of a task.",
                 ["matrix", "R2", "columns", "rows", "both signs (chance)", "rarer sign (chance)",
                  "pairs", "halves"],
                 [[f"{line['module']}, layer {line['layer']}", *(number(line[key]) for key in (
                     "additive_r2", "columns_profiles", "rows_profiles")),
                   f"{number(signs['both'])} ({number(signs['both_chance'])})",
                   f"{number(signs['minority_all'])} ({number(signs['minority_chance'])})",
                   number(signs["pairwise"]), number(signs["reliability"])]
                  for line in result["weights"] for signs in [line["signs"]]])


def task_table(result):
    return table("Tasks", "Mean loss of the rows.",
                 ["task", "category", "rows", "tokens", "loss"],
                 [[short(task["name"]), task["category"], task["rows"], task["tokens"],
                   number(task["loss"])] for task in result["tasks"]])


# --- experts and mmlu ---------------------------------------------------------------------------


def routing_table(result):
    rows = []
    for adapter in result["adapters"]:
        for place, found in adapter["places"].items():
            above = np.greater(found["information"], found["null_95"])
            rows.append([
                adapter["name"], adapter["variant"], place, number(found["jaccard"]),
                number(adapter["chance"]), " ".join(map(str, found["tasks_per_expert"])),
                found["unused"], number(found["mean_information"], 4),
                number(largest_information(adapter)), number(found["mean_null"], 4),
                f"{above.sum()} of {len(above)}", number(found["mean_of_weights"], 5),
                number(adapter["mean_energy"], 3), number(adapter["loss"]), effect_and_p(found)])
    return table("Routing", "J of the tasks' active experts, tasks per expert and experts "
                 "without a token: last layer. Mutual information of task and expert in nats, mean "
                 "over layers: of the selection, its upper bound, its null, layers above the 95% "
                 "quantile of the null; of the weights before top-k; of gradient energy.",
                 ["adapter", "method", "tokens", "J", "J chance", "tasks per expert", "unused",
                  "information", "bound", "null", "above null", "of weights", "of energy", "loss",
                  "category effect, p"], rows)


def loss_table(result):
    return table("Losses", "Mean loss of the rows.",
                 ["task", "category", "rows", *(each["name"] for each in result["adapters"])],
                 [[short(task["name"]), task["category"], task["rows"],
                   *(number(adapter["losses"][t]) for adapter in result["adapters"])]
                  for t, task in enumerate(result["tasks"])])


def accuracy_table(result):
    adapters, rows = result["adapters"], [task["rows"] for task in result["tasks"]]
    return table("Accuracy", "Most probable of the four letters; chance 25%. p: binomial test.",
                 ["subject", "family", "questions", *(each["name"] for each in adapters)],
                 [["all", "", sum(rows), *(
                     f"{np.average(each['accuracy'], weights=rows):.1%}, p "
                     f"{each['accuracy_p']:.2g}" for each in adapters)],
                  *([task["name"], task["category"], task["rows"], *(
                      f"{each['accuracy'][t]:.0%}" for each in adapters)]
                    for t, task in enumerate(result["tasks"]))])


# --- conflict -----------------------------------------------------------------------------------


def conflict_cells(found):
    """Return the cells that show `analysis.conflict.conflict`, of an empty dict: dashes."""
    return [number(found.get("cosine"), 3), number(found.get("negative")),
            number(found.get("median_reliability")), numbers(found.get("decided"), between=" / "),
            number(found.get("cancellation"), 3)]


def conflict_table(result):
    return table("Conflict in the trained weights", "Cosine of mean gradients, mean over pairs of "
                 "tasks; share of negative cosines; R: median reliability; decided: conflict / "
                 "undecided / agreement; rho.",
                 ["adapter", "method", "loss", "cosine", "negative", "R", "decided", "rho"],
                 [[adapter["name"], adapter["variant"], number(adapter["loss"]),
                   *conflict_cells(adapter["whole"] or {})] for adapter in result["adapters"]])


def effective_table(result):
    return table("Conflict in the effective weight", "The gradient of the adapted weight: the same "
                 "space for all methods.",
                 ["adapter", "layer", "cosine", "negative", "R", "decided", "rho"],
                 [[adapter["name"], " ".join(str(line[key]) for key in ("layer", "module")
                                             if key in line), *conflict_cells(line)]
                  for adapter in result["adapters"] for line in adapter["effective"]])


def lookahead_table(result):
    keys = ("interference_share", "harm_ratio", "transfer")
    return table("One step for each task", "Steps that improve their own task, and by how much; "
                 "share of other tasks whose loss rises; harm over all change; median gain of "
                 "another task over own gain.",
                 ["adapter", "loss", "improved", "own gain", "interference share", "harm ratio",
                  "transfer", "step", "not measured because"],
                 [[adapter["name"], number(adapter["loss"]),
                   f"{found['improved']} of {found['tasks']}", f"{found['own_gain']:.2e}",
                   *(number(found[key], 3) for key in keys), f"{found['step_size']:g}",
                   found["reason"] or ""]
                  for adapter in result["adapters"] if (found := adapter["lookahead"])])


def norm_table(result):
    return table("Tasks", "Mean loss of the rows, norm of the mean gradient, reliability.",
                 ["task", "category", "rows", *(
                     f"{adapter['name']}, {what}" for adapter in result["adapters"]
                     for what in ("loss", "norm", "R"))],
                 [[short(task["name"]), task["category"], task["rows"], *(
                     cell for adapter in result["adapters"] for cell in (
                         number(adapter["losses"][t]),
                         number(adapter["whole"] and adapter["whole"]["norms"][t], 3),
                         number(adapter["whole"] and adapter["whole"]["reliability"][t])))]
                  for t, task in enumerate(result["tasks"])])


TABLES = {
    "sharing": ("Neurons and weights that tasks activate", (
        sharing_table, weight_table, task_table)),
    "experts": ("Experts of each task", (routing_table, loss_table)),
    "mmlu": ("Experts of each MMLU subject", (routing_table, loss_table, accuracy_table)),
    "conflict": ("Conflict between tasks", (
        conflict_table, effective_table, lookahead_table, norm_table))}
