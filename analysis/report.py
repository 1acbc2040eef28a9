"""analysis.md: tables, and sentences that follow from the numbers of analysis.json, and figures."""

import numpy as np

from analysis import figures
from analysis.figures import measured_units, number
from inputs.bars import Bar
from inputs.errors import one_line
from inputs.files import write_text
from inputs.formats import load
from reporting.figures import save
from reporting.groups import short
from reporting.study_report import bullets
from reporting.tables import Table


def write(folder):
    """Write analysis.md and figures/ beside the analysis.json and arrays.npz of a folder."""
    result = load(folder / "analysis.json")
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    title, facts, tables = PARTS[result["command"]](result)
    names = []
    drawn = DRAWN[result["command"]](result, arrays)
    for name, figure in Bar(drawn, desc="figures", unit="figure", delay=5, leave=False):
        save(figure, folder / "figures" / name, ("png", "pdf"))
        names.append(name)
    parts = [f"# {title}", settings(result), "## What can be said", bullets(facts),
             *(table.markdown() for table in tables if table.rows), "## Figures",
             *(f"![{name}](figures/{name}.png)" for name in names)]
    write_text(folder / "analysis.md", "\n\n".join(map(str, parts)) + "\n")


def settings(result):
    """What was analysed, in a line."""
    made = result["made"]
    shown = [f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
             for name, value in made["args"].items()
             if value not in (None, [], False) and name != "command"]
    rows, tokens = (sum(task[key] for task in result["tasks"]) for key in ("rows", "tokens"))
    return one_line(f"{'; '.join(shown)}; {rows} rows, {tokens:,} tokens; base model "
                    f"{made['base_sha256'][:12]}")


def span(values, digits=2):
    """The smallest and the largest of some numbers, as words; None where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "not measured"
    low, high = f"{min(known):.{digits}f}", f"{max(known):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def listed(values, digits=2):
    """Numbers in a row of a table."""
    return ", ".join("–" if value is None else f"{value:.{digits}f}" for value in values)


def probability(value):
    return "–" if value is None else f"{value:.4f}" if value >= 0.0002 else "< 0.0002"


# --- sharing ------------------------------------------------------------------------------------


def of_sharing(result):
    """Title, sentences and tables of the command `sharing`."""
    facts = [concentration(result), chance(result), categories(result), cores(result),
             opposite_signs(result), base_conflict(result), *released(result)]
    return ("Neurons and weights that tasks activate, and share", facts,
            [sharing_table(result), structure_table(result), sign_table(result),
             share_table(result), conflict_table(result), released_table(result),
             task_table(result)])


def concentration(result):
    held = [line["concentration"][1] for line in result["weights"]]
    if result["made"]["args"]["epsilon"] is not None:
        how = "Active are units whose score is above a threshold that was given"
    else:
        how = (f"The largest {result['share']:.0%} of the scores of a task are called active, so "
               "that a small subset is active is true by construction")
    return (f"{how}. The largest 10% of the weights hold {span(held)} of a matrix's empirical "
            "Fisher information.")


def chance(result):
    """Fact 2: what is shared, beside what random sets share."""
    sentences, lines = [], list(measured_units(result))
    for what, some in (("neurons", [line for title, line in lines if "neurons" in title]),
                       ("weights", [line for title, line in lines if "neurons" not in title])):
        if not some:
            continue
        above = sum(line["jaccard"] > line["chance"] for line in some)
        sentences.append(
            f"of a task's active {what} {span([line['shared'] for line in some])} are active in "
            f"another task too, of random sets {span([line['shared_chance'] for line in some])}; "
            f"the Jaccard index of two tasks is above chance in {above} of {len(some)} cases, and "
            f"kappa (0 random, 1 as two halves of one task) "
            f"{span([line['kappa'] for line in some])}")
    return "Sharing and chance: " + ("; ".join(sentences) or "not measured") + "."


def categories(result):
    """In how many cases tasks of a category share more."""
    lines = [(title, line) for title, line in measured_units(result)
             if line["category_p"] is not None]
    if not lines:
        return "Categories: not measured, fewer than two of them have two tasks."
    clear = [title for title, line in lines if line["category_p"] < 0.05]
    return (f"Tasks of one category share more than others (p < 0.05, not corrected for the "
            f"number of cases) in {len(clear)} of {len(lines)} cases"
            + (f": {'; '.join(clear)}." if clear else "."))


def cores(result):
    """Fact 4: what the controls explain of the units that all tasks share."""
    sentences = []
    for what, lines in (("neurons (all tokens)", [line for line in result["neurons"]
                                                  if line["positions"] == "all"]),
                        ("gate_proj weights", [line for line in result["weights"]
                                               if line["module"] == "gate_proj"])):
        shares = [line["controls"]["random"]["core"] for line in lines if "jaccard" in line]
        if any(share is not None for share in shares):
            sentences.append(f"of the {what} that all tasks share {listed(shares)} (layers "
                             f"{', '.join(str(line['layer']) for line in lines)}) are also active "
                             "on prompts of random tokens")
    if not sentences:
        return "No unit is shared by all tasks, so nothing can be said of such units."
    return ("Control: " + "; ".join(sentences) + ". What is active whatever the input is no "
            "evidence of an ability.")


def opposite_signs(result):
    """Fact 5: do tasks agree on the direction?"""
    lines = [line for line in result["weights"] if line["signs"]["both"] is not None]
    if not lines:
        return "Signs: not measured, no weight is active in two tasks."
    gate = [line for line in lines if line["module"] == "gate_proj"] or lines
    most = [line for line in lines if line["signs"]["both"] < 0.5]
    return (f"Signs: of the {gate[0]['module']} weights active in two tasks or more "
            f"{span([line['signs']['both'] for line in gate])} get gradients of both signs "
            f"(independent fair signs: {span([line['signs']['both_chance'] for line in gate])}). "
            f"Most such weights have one sign in {len(most)} of {len(lines)} matrices"
            + (f" ({'; '.join(place(line) for line in most)})" if most else "")
            + f". Two halves of a task agree on "
            f"{span([line['signs']['reliability'] for line in lines])} of the signs: below that, "
            "a disagreement of tasks may be noise.")


def base_conflict(result):
    """Fact 6, as far as the model as it is can tell."""
    lines = [line for line in result["weights"] if line.get("conflict")]
    if not lines:
        return "Conflict of mean gradients: not measured."
    where = ", ".join(str(line["layer"]) for line in lines)
    return (f"Mean gradients of gate_proj (layers {where}): share of negative cosines between "
            f"tasks {listed(line['conflict']['negative'] for line in lines)}, mean cosine "
            f"{listed(line['conflict']['cosine'] for line in lines)}; median reliability "
            f"{listed(line['conflict']['median_reliability'] for line in lines)} (1: no noise). "
            "The share of negative cosines alone is no measure of conflict: unlearnt tasks agree "
            "on format and length, and noise is negative half of the time.")


def released(result):
    """What the released scripts' reading makes of the same rows; nothing without --released."""
    neurons, weights = ([line["released"] for line in result[key] if "released" in line]
                        for key in ("neurons", "weights"))
    if neurons:
        counts = [count for found in neurons for count in found["active"]]
        yield (f"Released scripts' reading of neurons (signed means, averaged over 32 neighbours, "
               f"one threshold for all tasks): {min(counts)} to {max(counts)} of "
               f"{neurons[0]['blocks']} blocks are active in a task; {against_ours(neurons)}.")
    if weights:
        overlap = [value for found in weights for value in found["overlap"]]
        yield (f"Released scripts' reading of weights (squared mean gradients, averaged over "
               f"32 x 32 blocks): {against_ours(weights)}. One step at a time: by the squared "
               f"mean gradient of single weights J of tasks is "
               f"{span([found['single'] for found in weights])}, by F in their blocks "
               f"{span([found['fisher_blocks'] for found in weights])}. Without blocks, J of their "
               f"active weights with those of F is {span(overlap)} (1: the same weights).")


def against_ours(lines):
    """J of tasks in their reading beside ours, in words."""
    known = [found for found in lines if None not in (found["jaccard"], found["ours"])]
    above = sum(found["jaccard"] > found["ours"] for found in known)
    return (f"J of tasks {span([found['jaccard'] for found in lines])} (chance "
            f"{span([found['chance'] for found in lines])}), ours "
            f"{span([found['ours'] for found in lines])} (chance "
            f"{span([found['ours_chance'] for found in lines])}), and theirs is higher in {above} "
            f"of {len(known)} cases")


def place(line):
    return f"{line['module']} of layer {line['layer']}"


def sharing_table(result):
    rows = []
    for title, line in measured_units(result):
        T = len(line["histogram"]) - 1
        control = line["controls"]["random"]
        rows.append([title, f"{line['jaccard']:.3f} ({line['smallest']:.2f} to "
                     f"{line['largest']:.2f})", number(line["chance"], 3),
                     number(line["ceiling"], 3), number(line["kappa"]),
                     f"{line['shared']:.3f} ({line['shared_chance']:.3f})",
                     f"{line['histogram'][0] / line['units']:.3f} "
                     f"({line['chance_histogram'][0] / line['units']:.3f})",
                     f"{line['histogram'][T]:,} ({line['chance_histogram'][T]:.2g})",
                     listed([line["controls"][name]["jaccard"]
                             for name in ("pooled", "shuffled")], 3),
                     number(control["jaccard"], 3), number(control["core"]),
                     "–" if line["category_effect"] is None
                     else f"{line['category_effect']:+.3f}, {probability(line['category_p'])}",
                     f"{line['patterns']['observed']['distinct']:,} of "
                     f"{line['patterns']['observed']['active']:,}; "
                     f"{line['patterns']['observed']['cover_half']:,} cover half (permuted: "
                     f"{line['patterns']['permuted']['distinct']:,.0f}; "
                     f"{line['patterns']['permuted']['cover_half']:.0f})",
                     number(line["lower_half"])])
    header = ["units", "J tasks", "J chance", "J halves", "kappa", "shared (chance)",
              "in no task (chance)", "in all (chance)", "J pooled, shuffled", "J random",
              "core also on random", "category effect, p", "patterns", "lower half"]
    return Table("sharing", "How much is shared", "J: Jaccard index, mean over pairs of tasks, of "
                 "two halves of a task, of tasks and controls; core: units active in all tasks; "
                 "lower half: share of active units with an id in the lower half.",
                 header, rows)


def structure_table(result):
    rows = [[place(line), listed(line["concentration"]), number(line["additive_r2"]),
             number(line["column_profiles"]), number(line["row_profiles"]),
             number(line["row_counts_correlation"]), number(line["lower_half_rows"]),
             line["clamped"]] for line in result["weights"]]
    return Table("structure", "Where the weights' scores come from", "Share of the sum held by the "
                 "top 1% and 10%; R2 of log F on row and column effects; correlation between tasks "
                 "of the column effects (input channels), row effects and counts of active weights "
                 "by row; share of active weights in the lower half of rows; entries that were 0. "
                 "Where R2 and the columns' correlation are high, shared weights are mostly shared "
                 "input channels.",
                 ["matrix", "top 1%, 10%", "R2", "columns", "rows", "row counts", "lower half",
                  "clamped"], rows)


def sign_table(result):
    rows = [[place(line), *(number(line["signs"][key]) for key in ("both", "both_chance")),
             f"{number(line['signs']['minority_all'])} "
             f"({line['signs']['by_n'][-1]['minority_chance']:.2f})",
             *(number(line["signs"][key]) for key in ("pairwise", "reliability"))]
            for line in result["weights"]]
    return Table("signs", "Signs", "Of the mean gradient: weights active in two tasks or more with "
                 "both signs, and by chance; mean share of the rarer sign where all tasks are "
                 "active (by chance); agreement of pairs of tasks (0.5: independent), of halves.",
                 ["matrix", "both", "chance", "rarer sign, in all", "pairs", "halves"], rows)


def share_table(result):
    cells = {}
    for line in result["shares"]:
        cells.setdefault((line["what"], line["layer"]), {})[line["share"]] = line
    shares = sorted({line["share"] for line in result["shares"]})
    rows = [[f"{what}, layer {layer}", *(
        listed([there[share][key] for key in ("jaccard", "chance", "ceiling")], 3)
        if share in there else "–" for share in shares)] for (what, layer), there in cells.items()]
    return Table("shares", "At other shares", "J of tasks, by chance, of two halves, where this "
                 "share of the units counts as active.",
                 ["units", *(f"{share:.0%}" for share in shares)], rows)


def conflict_table(result):
    rows = [[place(line), number(found["cosine"], 3), number(found["smallest"]),
             number(found["negative"]), number(found["median_reliability"]),
             number(found["cancellation"])]
            for line in result["weights"] if (found := line.get("conflict"))]
    return Table("base", "Mean gradients of the model as it is", "Cosines over pairs of tasks; R: "
                 "median reliability, from two halves; rho: 1 all pull alike, 0 orthogonal.",
                 ["matrix", "mean cosine", "smallest", "negative", "R", "rho"], rows)


def released_table(result):
    rows = []
    for what, line in ((f"neurons, all tokens, layer {line['layer']}" if "positions" in line
                        else place(line), line) for line in result["neurons"] + result["weights"]):
        if found := line.get("released"):
            overlap, out = found.get("overlap"), len(found["left_out"])
            rows.append([what, found["blocks"], span(found["active"], 0)
                         + (f" ({out} left out)" if out else ""),
                         f"{number(found['jaccard'], 3)} ({number(found['chance'], 3)})",
                         f"{number(found['ours'], 3)} ({number(found['ours_chance'], 3)})",
                         *(number(found[key], 3) if overlap else "–"
                           for key in ("single", "fisher_blocks")),
                         f"{np.mean(overlap):.3f} ({span(overlap)})" if overlap else "–"])
    return Table("released", "The released scripts' reading, beside ours", "For comparison only: "
                 "neighbours in a block have nothing to do with each other. Blocks that are active "
                 "in a task (tasks with none, or all, are left out of J); J of tasks (by chance), "
                 "where the largest tenth is active, of neurons theirs over all tasks together; J "
                 "of tasks by the squared mean gradient of "
                 "single weights and by F in their blocks; J of their single weights with those "
                 "of F, mean over tasks (smallest to largest).",
                 ["units", "blocks", "active", "J theirs (chance)", "J ours (chance)",
                  "without blocks", "F in blocks", "overlap with F"], rows)


def task_table(result):
    norms = [line for line in result["weights"] if line["module"] == "gate_proj"]
    rows = [[short(task["name"]), task["category"], task["rows"], task["tokens"],
             number(task["loss"]), *(number(line["gradient_norms"][t], 3) for line in norms)]
            for t, task in enumerate(result["tasks"])]
    return Table("tasks", "Tasks", "Mean loss of the rows, and the norm of the mean gradient of "
                 "gate_proj by layer: unequal pull is what mixed training sees first.",
                 ["task", "category", "rows", "tokens", "loss",
                  *(f"norm, layer {line['layer']}" for line in norms)], rows)


# --- experts ------------------------------------------------------------------------------------


def of_experts(result):
    """Title, sentences and tables of the command `experts`."""
    facts = [f"Rows: {result['about']}."]
    for adapter in result["adapters"]:
        facts += [counted_experts(adapter, len(result["tasks"])), told_by_routing(adapter),
                  learnt_in_experts(adapter)]
    return ("Experts that tasks route to, and learn in", facts,
            [expert_table(result), weight_table(result), loss_table(result)])


def counted_experts(adapter, T):
    """Fact 3: what is true by counting, and what is not."""
    last = adapter["places"]["all"]
    same = ("; each task was measured with its own adapter, and experts of different trainings can "
            "be compared only because all started from one seed" if adapter["alone"] else "")
    return (f"{adapter['name']}: every task activates {adapter['top_k']} of {adapter['experts']} "
            f"experts, so an expert has {adapter['tasks_per_expert']:g} of {T} tasks on average "
            f"whatever the router does (last layer: "
            f"{' '.join(map(str, last['tasks_per_expert']))}). Two tasks' sets have Jaccard "
            f"{last['jaccard']:.2f}, random ones {adapter['chance']:.2f}{same}.")


def told_by_routing(adapter):
    """How much the selection tells of the task."""
    parts = []
    for place, found in adapter["places"].items():
        above = sum(value is not None and value > null for value, null in
                    zip(found["information"], found["null_95"], strict=True))
        parts.append(f"{found['mean_information']:.3f} nats over {place} tokens (rows dealt at "
                     f"random: {found['mean_null']:.3f}; above 95% of them in {above} of "
                     f"{len(adapter['layers'])} layers), of the routing weights "
                     f"{found['mean_of_weights']:.4f}")
    return (f"{adapter['name']}: the selected experts tell of the task, as a mean over layers, "
            f"{'; '.join(parts)}; a selection of {adapter['top_k']} of {adapter['experts']} "
            f"experts can tell {figures.largest_information(adapter):.2f}.")


def learnt_in_experts(adapter):
    if adapter["mean_energy"] is None:
        return f"{adapter['name']}: in which experts tasks learn is not measured: no gradient."
    return (f"{adapter['name']}: in which expert a task's gradient has its energy tells "
            f"{adapter['mean_energy']:.3f} of {np.log(adapter['experts']):.2f} nats of the task.")


def expert_table(result):
    rows = []
    for adapter in result["adapters"]:
        for name, found in adapter["places"].items():
            rows.append([adapter["name"], adapter["variant"], name, number(found["jaccard"]),
                         number(adapter["chance"]), " ".join(map(str, found["tasks_per_expert"])),
                         found["unused"], number(found["mean_information"], 4),
                         number(found["mean_null"], 4), number(found["information"][-1], 4),
                         number(found["null_95"][-1], 4), number(found["mean_of_weights"], 5),
                         number(adapter["mean_energy"], 3), number(adapter["loss"]),
                         "–" if found["category_effect"] is None else
                         f"{found['category_effect']:+.3f}, {probability(found['category_p'])}"])
    return Table("experts", "Routing", "J, tasks per expert and experts without a token: last "
                 "layer. Information in nats: mean over layers, of rows dealt to tasks at random, "
                 "of the last layer and the 95% quantile of its null, of the weights before top-k, "
                 "of gradient energy. Category effect: cosines of routing weights, within minus "
                 "between categories.",
                 ["adapter", "method", "tokens", "J", "J chance", "tasks per expert", "unused",
                  "information", "null", "last layer", "null 95%", "of weights", "of energy",
                  "loss", "category effect, p"], rows)


def weight_table(result):
    rows = [[adapter["name"], short(task["name"]), listed(found["w"][t]), listed(found["u"][t])]
            for adapter in result["adapters"] for found in [adapter["places"]["all"]]
            for t, task in enumerate(result["tasks"])]
    return Table("weights", "Routing of each task", "Last layer, all tokens: mean routing weight "
                 "over all experts before top-k, and share of tokens that select each expert.",
                 ["adapter", "task", "mean weights", "shares of tokens"], rows)


def loss_table(result):
    rows = [[short(task["name"]), task["category"], task["rows"],
             *(number(adapter["losses"][t]) for adapter in result["adapters"])]
            for t, task in enumerate(result["tasks"])]
    return Table("losses", "Losses", "Mean loss of the rows.", ["task", "category", "rows", *(
        adapter["name"] for adapter in result["adapters"])], rows)


# --- MMLU ---------------------------------------------------------------------------------------


def of_mmlu(result):
    """Title, sentences and tables of the command `mmlu`."""
    title, (rows, *facts), tables = of_experts(result)
    for adapter in result["adapters"]:
        facts += [accuracy(adapter), *preferences(adapter)]
    return f"{title}: MMLU", [rows, *facts], [*tables, accuracy_table(result)]


def accuracy(adapter):
    mean = np.mean(adapter["accuracy"])
    able = adapter["accuracy_p"] < 0.05
    return (f"{adapter['name']}: accuracy {mean:.1%} (chance 25%, p {adapter['accuracy_p']:.2g}): "
            + ("above chance." if able else "not above chance, so its routing shows no abilities."))


def preferences(adapter):
    """Whether families of subjects prefer, or avoid, experts, as the paper reads its picture."""
    for place, found in adapter["places"].items():
        largest = found["largest_difference"]
        if largest is None:
            continue
        verdict = "is" if largest["p"] < 0.05 else "is not"
        yield (f"{adapter['name']}, {place} tokens: the largest difference between a family's "
               f"mean routing weight and all others', {largest['difference']:+.4f} "
               f"({largest['family']}, expert {chr(ord('A') + largest['expert'])}), {verdict} "
               f"beyond what permuted families show (p {largest['p']:.4f}, all pairs of family and "
               "expert counted).")


def accuracy_table(result):
    rows = [[task["name"], task["category"], task["rows"], *(
        f"{adapter['accuracy'][t]:.0%}" for adapter in result["adapters"])]
        for t, task in enumerate(result["tasks"])]
    return Table("accuracy", "Accuracy", "By the likeliest of the four letters; chance: 25%.",
                 ["subject", "family", "questions", *(adapter["name"]
                                                      for adapter in result["adapters"])], rows)


# --- conflict -----------------------------------------------------------------------------------

MATCHED = 0.05  # of the smaller loss: adapters whose losses differ by more are not compared


def of_conflict(result):
    """Title, sentences and tables of the command `conflict`."""
    adapters = result["adapters"]
    facts = [f"Rows: {result['about']}.", *map(decided, adapters), *map(steps, adapters),
             *comparisons(adapters),
             "A conflict here is PCGrad's, a negative cosine of two tasks' gradients, told from "
             "noise; the look-ahead is the lookahead affinity of task grouping with the sign "
             "reversed. Cosines in a method's own weights depend on its parametrisation and rank "
             "no methods."]
    return ("Do tasks' gradients conflict, and do steps hurt", facts,
            [whole_table(result), effective_table(result), lookahead_table(result),
             norm_table(result)])


def decided(adapter):
    """Fact 6, of one adapter."""
    whole = adapter["whole"]
    if whole is None:
        return f"{adapter['name']}: conflict is not measured, a task has no gradient."
    conflict, undecided, agreement = whole["decided"]
    return (f"{adapter['name']}, loss {adapter['loss']:.2f}: {whole['negative']:.0%} of the pairs "
            f"of tasks have a negative cosine; {1 - undecided:.0%} can be told from zero: "
            f"{conflict:.0%} in conflict, {agreement:.0%} in agreement (orthogonal tasks give 1 "
            f"to 6% in all). Median reliability {whole['median_reliability']:.2f} (0: "
            "noise, 1: none).")


def steps(adapter):
    found = adapter["lookahead"]
    if found is None:
        return f"{adapter['name']}: no step was measured (--lookahead 0)."
    if found["reason"]:
        return f"{adapter['name']}: interference is not measured: {found['reason']}."
    return (f"{adapter['name']}: a step for one task raises the loss of another in "
            f"{found['interference_share']:.0%} of the cases; harm is "
            f"{number(found['harm_ratio'])} of all change, and another task gains "
            f"{found['transfer']:.2f} (median) of what the own task gains.")


def comparisons(adapters):
    """Which of two adapters interferes less, where their losses allow to say so."""
    for index, one in enumerate(adapters):
        for other in adapters[:index]:
            pair = f"{other['name']} (loss {other['loss']:.3f}) and {one['name']} " \
                   f"(loss {one['loss']:.3f})"
            if abs(one["loss"] - other["loss"]) > MATCHED * min(one["loss"], other["loss"]):
                yield (f"{pair} are not compared: their losses differ by more than {MATCHED:.0%}, "
                       "and conflict changes as tasks are learnt, whatever the method.")
                continue
            looks = [adapter["lookahead"] for adapter in (other, one)]
            if any(look is None or look["harm_ratio"] is None for look in looks):
                yield f"{pair} have matched losses, but the look-ahead of one is not measured."
                continue
            first, second = (look["harm_ratio"] for look in looks)
            less = ("harms other tasks as much as" if first == second else "harms other tasks "
                    f"{'less' if first < second else 'more'} than")
            yield (f"At matched losses {other['name']} {less} {one['name']}: harm ratio "
                   f"{first:.3f} and {second:.3f}, interference share "
                   f"{looks[0]['interference_share']:.3f} and "
                   f"{looks[1]['interference_share']:.3f}; one training of each is no test of the "
                   "methods.")


def shares(values):
    return "–" if values is None else " / ".join(f"{value:.2f}" for value in values)


def whole_table(result):
    rows = []
    for adapter in result["adapters"]:
        whole, experts = adapter["whole"] or {}, adapter["by_expert"]
        rows.append([adapter["name"], adapter["variant"], number(adapter["loss"]),
                     number(whole.get("cosine"), 3), number(whole.get("negative")),
                     number(whole.get("median_reliability")), shares(whole.get("decided")),
                     f"{number(whole.get('corrected'), 3)} ({whole.get('corrected_pairs', 0)} of "
                     f"{whole.get('pairs', 0)})", number(whole.get("cancellation"), 3),
                     f"{number(experts.get('cosine'), 3)}, {number(experts.get('negative'))}, "
                     f"{shares(experts.get('decided'))} ({experts['measured']} of "
                     f"{experts['groups']})" if experts["groups"] else "no experts",
                     number(adapter["energy"], 3)])
    return Table("conflict", "Conflict in the trained weights", "Cosine of the mean gradients, "
                 "mean over pairs of tasks; share below zero; reliability; decided shares: "
                 "conflict / undecided / agreement; cosine corrected for noise (pairs where both "
                 "tasks are reliable); rho: 1 all pull alike, 0 orthogonal; by expert: cosine, "
                 "negative, decided (groups in which all tasks have a gradient); nats that the "
                 "energy of a task's gradient over experts tells of the task.",
                 ["adapter", "method", "loss", "cosine", "negative", "R", "decided", "corrected",
                  "rho", "by expert", "energy"], rows)


def effective_table(result):
    rows = [[adapter["name"], line["layer"], number(line["cosine"], 3), number(line["negative"]),
             number(line["median_reliability"]), shares(line["decided"])]
            for adapter in result["adapters"] for line in adapter["effective"] if "cosine" in line]
    return Table("effective", "Conflict in the effective weight", "The same of the gradient of the "
                 "weight that the adapter makes: one space for all methods.",
                 ["adapter", "layer", "cosine", "negative", "R", "decided"], rows)


def lookahead_table(result):
    rows = [[adapter["name"], adapter["variant"], number(adapter["loss"]),
             f"{found['improved']} of {found['tasks']}", f"{found['own_gain']:.2e}",
             *(number(found[key], 3) for key in ("interference_share", "harm_ratio", "transfer",
                                                 "prediction_correlation")),
             f"{found['step_size']:g}"]
            for adapter in result["adapters"] if (found := adapter["lookahead"])]
    return Table("lookahead", "One step for each task", "Steps that help their own task, and by "
                 "how much; share of other tasks whose loss rises; harm as a share of all change; "
                 "gain of another task over own gain, median; correlation of the change with its "
                 "first-order prediction; size of the step.",
                 ["adapter", "method", "loss", "improved", "own gain", "interference share",
                  "harm ratio", "transfer", "predicted", "step"], rows)


def norm_table(result):
    rows = [[short(task["name"]), task["category"], task["rows"], *(
        cell for adapter in result["adapters"] for cell in (
            number(adapter["losses"][t]),
            number(adapter["whole"] and adapter["whole"]["norms"][t], 3),
            number(adapter["whole"] and adapter["whole"]["reliability"][t])))]
        for t, task in enumerate(result["tasks"])]
    return Table("norms", "Tasks", "Mean loss of the rows, norm of the mean gradient, reliability.",
                 ["task", "category", "rows", *(
                     f"{adapter['name']}, {what}" for adapter in result["adapters"]
                     for what in ("loss", "norm", "R"))], rows)


PARTS = {"sharing": of_sharing, "experts": of_experts, "mmlu": of_mmlu, "conflict": of_conflict}
DRAWN = {"sharing": figures.of_sharing, "experts": figures.of_experts,
         "mmlu": figures.of_experts, "conflict": figures.of_conflict}
