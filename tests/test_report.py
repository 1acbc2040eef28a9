"""What a report reads, leaves out, computes and draws, on tiny runs."""

import csv
import gzip
import io
import itertools
import json
import math
import os
import shutil
import statistics
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import SMALL, TASKS, imported_by, lines_of, results_of, snapshot, succeed, write_json
from scipy import stats

import report
from grouping import component_gram, gradient_angles, grouping_from_gram
from inputs.suites import SUPERNI
from registry import METHODS, variant_of
from reporting import figures, page, readme, runs, study_report, tables, tuning, verdicts

GONE = object()


@pytest.fixture(scope="module")
def folder(llama, suite, tmp_path_factory):
    """Runs of badit, lora and the bare model; badit also on every task alone."""
    root = tmp_path_factory.mktemp("runs")
    common = ("--model", llama, "--suite", suite, *SMALL[4:])
    train = (*common, "--epochs", 2, "--learning_rate", "1e-2")
    for method, setting in itertools.product(("badit", "lora"), ("mixed", "sequential")):
        succeed(*train, "--method", method, "--setting", setting,
                "--output_dir", root / f"{method}-{setting}-1")
    for task in TASKS:
        succeed(*train, "--method", "badit", "--setting", "single", "--tasks", task,
                "--output_dir", root / "single" / task)
    succeed(*common, "--method", "zero_shot", "--output_dir", root / "zero_shot")
    return root


@pytest.fixture
def study(folder, tmp_path):
    """A copy, with a second seed of which every score is four fifths."""
    root = tmp_path / "study"
    shutil.copytree(folder, root)
    for run in sorted(root.glob("*-1")):
        other = run.with_name(run.name[:-1] + "2")
        shutil.copytree(run, other)
        scale(other, 0.8, seed=2)
    return root


def all_runs(study):
    return [path.parent for path in study.rglob("results.json")]


def change(folder, edit):
    """Edit results.json with a function."""
    content = results_of(folder)
    edit(content)
    write_json(folder / "results.json", content)


def put(folder, where, value):
    """Set what stands at a path in results.json, such as "scores.best.-1.0"; GONE deletes it."""
    def edit(content):
        *way, last = [int(key) if key.lstrip("-").isdigit() else key for key in where.split(".")]
        for key in way:
            content = content[key]
        if value is GONE:
            del content[last]
        else:
            content[last] = value
    change(folder, edit)


def set_flags(folder, **flags):
    """As if the run had had these flags."""
    def edit(content):
        args = content["args"]
        args |= flags
        cls = METHODS[args["method"]].settings
        content["settings"] = {name: args[name] for name in cls.names()}
        content["variant"] = variant_of(args["method"],
                                        cls.from_values(content["settings"], "settings"))
        for name in content["comparable"]:
            content["comparable"][name] = args[name.removeprefix("--").partition(",")[0]]
    change(folder, edit)


def edit_lines(path, edit):
    """Replace every line of a file of JSON lines by what a function makes of it, if anything."""
    path.write_text("".join(f"{json.dumps(line)}\n" for line in map(edit, lines_of(path)) if line))


def answers(folder):
    """The file of the predictions after all training."""
    return max((folder / "predictions").iterdir())


def scale(folder, factor, **flags):
    """Multiply all scores of a run, and change some of its flags."""
    def edit(content):
        for rows in content["scores"].values():
            rows[:] = [[score * factor for score in row] for row in rows]
    change(folder, edit)
    edit_lines(answers(folder), lambda line: line | {"scores": {
        metric: {name: factor * score for name, score in scores.items()}
        for metric, scores in line["scores"].items()}})
    set_flags(folder, **flags)


def refused(capsys, *argv):
    """The one line with which report.main ends."""
    assert report.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    return err


# --- what is read, and what is left out ---------------------------------------------------------


def assert_left_out(study, reason):
    """The second seed of lora is named and never averaged in."""
    kept, left_out = runs.collect([study])
    assert [folder.name for folder, _ in left_out] == ["lora-sequential-2"]
    assert reason in left_out[0][1], left_out
    assert [run.seed for run in kept if run.group[1:] == ("lora", "sequential")] == [1]


@pytest.mark.parametrize("damage, reason", [
    (lambda run: put(run, "versions", GONE), "its results.json has no 'versions'"),
    (lambda run: put(run, "args.seed", GONE), "its results.json has no 'args.seed'"),
    (lambda run: put(run, "args.method", "badix"), "'badix' is unknown; allowed"),
    (lambda run: put(run, "code_sha256", "x"), "mixed settings: code"),
    (lambda run: put(run, "base_sha256", "x"), "weights of llama"),
    (lambda run: put(run, "precision", "bf16"), "precision \"bf16\""),
    (lambda run: put(run, "global_batch_size", 4), "global batch 4"),
    (lambda run: put(run, "compiler", "inductor"), "compiler"),
    (lambda run: put(run, "tasks.say_both.sha256", "x"), "data of say_both"),
    (lambda run: put(run, "scores.first.-1.0", None), "not evaluated on all of its tasks"),
    (lambda run: (run / "results.json").unlink(), "incomplete: it has no results.json"),
    (lambda run: (run / "results.json").write_text("{"), "its results.json is not readable JSON"),
    (lambda run: (run / "results.json").write_text("[1]"), "its results.json is damaged"),
    (lambda run: (run / "log.jsonl").unlink(), "incomplete: it has no log.jsonl"),
    (lambda run: (run / "log.jsonl").write_text('{"loss": null}\n'), "its log.jsonl, line 1: E"),
    (lambda run: shutil.rmtree(run / "predictions"), "no scores per item"),
    (lambda run: put(run, "scores.first.-1", [None] * 3), "not evaluated on all of its tasks"),
    (lambda run: set_flags(run, epochs=3), "mixed settings: --epochs 3, most have 2"),
    (lambda run: set_flags(run, task_order=list(TASKS)), "--task_order"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_run_that_cannot_be_compared_is_left_out(study, damage, reason):
    damage(study / "lora-sequential-2")
    assert_left_out(study, reason)


def test_the_last_stage_is_the_one_of_the_largest_number(study):
    """Also with more than 99 stages: 120 comes after 99."""
    run = study / "lora-sequential-1"
    last, items = answers(run), runs.read(run).items
    for number in (99, 120):
        shutil.copy(last, last.with_name(f"{number}_x.jsonl"))
    edit_lines(last.with_name("99_x.jsonl"), lambda line: None)
    assert runs.read(run).items == items


def test_zero_shot_on_other_items_is_left_out(study):
    """An untrained run has no training data to compare, but items."""
    edit_lines(answers(study / "zero_shot"), lambda line: line | {"id": f"other {line['id']}"})
    _, left_out = runs.collect([study])
    assert [folder.name for folder, _ in left_out] == ["zero_shot"]
    assert "test items of " in left_out[0][1]


def test_other_code_can_be_let_in(study, capsys):
    put(study / "lora-mixed-2", "code_sha256", "x")
    file = study / "out.jsonl.gz"
    words = [str(study), "--export", str(file)]
    assert report.main(words) == 0
    assert "lora-mixed-2: mixed settings: code" in capsys.readouterr().err
    assert report.main([*words, "--allow_other", "code", "versions"]) == 0
    assert capsys.readouterr() == (f"12 records in {file}\n", "")


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "run" / "checkpoints").mkdir(parents=True)
    out = ("--out", tmp_path / "out")
    assert "no run in it" in refused(capsys, tmp_path / "empty", *out)
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere", *out)
    assert "no finished run" in refused(capsys, tmp_path / "begun", *out)
    assert "several runs" in refused(capsys, folder)
    assert "--out DIR" in refused(capsys, folder / "zero_shot", folder / "lora-mixed-1")
    assert "--out" in refused(capsys, folder / "zero_shot", "--allow_other", "code")
    assert "--readme takes no --out" in refused(capsys, folder, *out, "--readme", "x")
    assert "'speed'" in refused(capsys, folder, *out, "--allow_other", "speed")
    assert "incomplete" in refused(capsys, tmp_path / "begun" / "run")
    assert "holds other files" in refused(capsys, folder, "--out", tmp_path / "begun")
    assert not (tmp_path / "out").exists()


# --- tables -------------------------------------------------------------------------------------


def table(study, name):
    """One table, and its rows by method and, where there is one, setting."""
    kept, _ = runs.collect([study])
    found = {made.name: made for made in tables.all_tables(kept)}[name]
    key = 3 if "setting" in found.header else 2
    return found, {tuple(row[1:key]): dict(zip(found.header, row, strict=True))
                   for row in found.rows}


def test_table1(study):
    """Means, sample deviations, and Forward from the runs on one task alone, by hand."""
    _, rows = table(study, "table1")
    single = {task: results_of(study / "single" / task)["scores"]["first"][0][0] for task in TASKS}
    mixed = [results_of(study / f"badit-mixed-{seed}") for seed in (1, 2)]
    rouge = [sum(run["scores"]["first"][-1]) / 3 for run in mixed]
    badit = rows["badit",]
    assert badit["mixed score"].values == pytest.approx(rouge)
    assert badit["mixed score"].mean == pytest.approx(sum(rouge) / 2)
    assert badit["mixed score"].std == pytest.approx(abs(rouge[0] - rouge[1]) / 2**0.5)
    assert badit["seeds"] == "2 + 2"
    # Only seed 1 has single-task runs.
    gains = [score - single[task] for task, score in zip(
        mixed[0]["task_order"], mixed[0]["scores"]["first"][-1], strict=True)]
    assert badit["mixed Forward"].values == pytest.approx([sum(gains) / 3])
    a = results_of(study / "badit-sequential-1")["scores"]["first"]
    backward = ((a[2][0] - a[0][0]) + (a[2][1] - a[1][1])) / 2
    forget = ((max(a[0][0], a[1][0]) - a[2][0]) + (a[1][1] - a[2][1])) / 2
    assert badit["sequential Backward"].values[0] == pytest.approx(backward)
    assert badit["sequential Forget"].values[0] == pytest.approx(forget)
    assert rows["lora",]["sequential Forward"].text() == ""  # no single-task run of lora
    zero = results_of(study / "zero_shot")["scores"]["first"][0]
    assert rows["zero-shot",]["mixed score"].values == pytest.approx([sum(zero) / 3])
    assert all(cell.text() == "" for name, cell in rows["zero-shot",].items()
               if name.startswith("sequential"))


def test_regroupings(study):
    """Of methods with experts. What was before leaves out the first, whose groups nobody chose;
    what is after leaves out a stage's last step, which measures and does not regroup."""
    _, rows = table(study, "regroupings")
    assert set(rows) == {("badit", "mixed"), ("badit", "sequential")}
    for setting in ("mixed", "sequential"):
        events = results_of(study / f"badit-{setting}-1")["regroupings"]
        row = rows["badit", setting]
        done = [event for event in events if event["grouping"] == "dog"]
        assert 0 < len(done) < len(events)
        for column, name, used in (("inside, before", "intra_before", events[1:]),
                                   ("between, before", "inter_before", events[1:]),
                                   ("inside, after", "intra_after", done),
                                   ("moved", "moved", done), ("drift", "regroup_drift", done)):
            hand = [sum(event[name] for event in used) / len(used)] * 2 if used else []
            assert row[column].values == pytest.approx(hand), column
    undefined = study / "badit-mixed-2"
    put(undefined, "regroupings.0.intra_after", None)  # an expert of one component has no angle
    _, rows = table(study, "regroupings")
    assert len(rows["badit", "mixed"]["inside, after"].values) == 1


def test_losses(study):
    """By hand, with Forward from single-task runs; below zero Backward is forgetting."""
    kept, _ = runs.collect([study])
    assert "losses" not in {made.name for made in tables.all_tables(kept)}
    give_losses(study / "badit-sequential-1", [[2.0, 3.5, 4.5], [2.5, 1.0, 4.0], [2.25, 1.5, 0.5]])
    give_losses(study / "zero_shot", [[4.0, 4.0, 4.0]])
    for task in TASKS:
        give_losses(study / "single" / task, [[1.25]])
    _, rows = table(study, "losses")
    row = {name: score.values for name, score in rows["badit", "sequential"].items()
           if isinstance(score, tables.Score)}
    order = results_of(study / "badit-sequential-1")["task_order"]
    bare = results_of(study / "zero_shot")["task_order"]
    assert sorted(order) == sorted(bare) and len(rows) == 2
    ratios = [math.log(loss / 4) for loss in (2.25, 1.5, 0.5)]
    assert row == {"ln(loss / zero-shot)": pytest.approx([sum(ratios) / 3]),
                   "its median task": pytest.approx([ratios[1]]),
                   "loss": pytest.approx([4.25 / 3]), "Forget": pytest.approx([0.375]),
                   "Forward": pytest.approx([(1.25 - 2 + 1.25 - 1 + 1.25 - 0.5) / 3]),
                   "Backward": pytest.approx([-0.375])}


def test_a_task_of_unlearnable_rows_is_not_counted(study, tmp_path, monkeypatch):
    """It is trained and evaluated, but in no number of the report, which says so."""
    monkeypatch.setattr(runs, "UNLEARNABLE", {"bad"})
    for run in all_runs(study):
        if "say_both" in results_of(run)["tasks"]:
            put(run, "tasks.say_both.sha256", "bad")
    record = runs.read(study / "lora-sequential-1")
    scores = results_of(study / "lora-sequential-1")["scores"]["first"]
    counted = [i for i, task in enumerate(record.order) if task != "say_both"]
    assert list(record.final("first").values()) == [scores[-1][i] for i in counted]
    made = runs.scores_of(record, [])
    assert made["rouge"] == pytest.approx(statistics.fmean(scores[-1][i] for i in counted))
    assert made["backward"] == pytest.approx(statistics.fmean(
        scores[-1][i] - scores[i][i] for i in counted if i < 2))
    monkeypatch.setattr(figures, "of_study", lambda *_: {})
    assert report.main([str(study), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No number counts say_both" in text and "| say_both |" not in text
    assert report.main([str(study / "lora-sequential-1")]) == 0
    before = [10.0 * (task != "say_both") for task in record.order]
    change(study / "lora-sequential-1", lambda content: (
        content["args"].update(eval_before=True),
        [matrix.insert(0, before) for matrix in content["scores"].values()]))
    *_, mean = page.scores(runs.read(study / "lora-sequential-1"))
    assert mean[3] == 10.0


def give_losses(run, matrix):
    """Make a run one with --eval_loss: every answer has three tokens of its task's last loss."""
    put(run, "losses", matrix)
    last = dict(zip(results_of(run)["task_order"], matrix[-1], strict=True))
    edit_lines(answers(run), lambda line: line | {"loss": [3 * last[line["task"]], 3]})


TAKEN = {  # loss of the three tasks after each stage, by method and seed, and what is forgotten
    ("badit", 1): ([[1.0, 9, 9], [1.25, 1.0, 9], [1.5, 1.25, 1.0]], 0.375),
    ("badit", 2): ([[1.0, 9, 9], [1.0, 1.0, 9], [1.5, 1.0, 1.0]], 0.25),
    ("lora", 1): ([[0.5, 9, 9], [1.0, 1.0, 9], [1.75, 2.0, 1.0]], 1.125),
    ("lora", 2): ([[1.0, 9, 9], [1.0, 1.0, 9], [2.0, 1.5, 1.5]], 0.75)}


def logs(values):
    return statistics.fmean(map(math.log, values))


def test_verdicts(study):
    """By hand: BADIT's loss is lower and forgets less on both seeds; mixed nothing is measured."""
    for (method, seed), (matrix, _) in TAKEN.items():
        give_losses(study / f"{method}-sequential-{seed}", matrix)
    kept, _ = runs.collect([study])
    better, less = verdicts.verdicts(kept)
    final = {key: matrix[-1] for key, (matrix, _) in TAKEN.items()}
    assert better.interval.mean == pytest.approx(statistics.fmean(
        logs(final["badit", seed]) - logs(final["lora", seed]) for seed in (1, 2)))
    assert better.nats == pytest.approx(statistics.fmean(
        statistics.fmean(final["badit", seed]) - statistics.fmean(final["lora", seed])
        for seed in (1, 2)))
    assert less.interval.mean == pytest.approx(((0.375 - 1.125) + (0.25 - 0.75)) / 2)
    for verdict in (better, less):
        assert (verdict.against, verdict.seeds, verdict.claims) == ("lora", 2, 2)
        assert "lower on 2 of 2 seeds" in verdict.sentence()
        assert verdict.interval.low <= verdict.interval.mean <= verdict.interval.high
    assert better.interval.high > 0 and better.word() == "open"  # two seeds: t is 12.7
    assert less.by_seed == pytest.approx([0.375 - 1.125, 0.25 - 0.75])
    (axes,) = figures.claims([better, less]).axes  # the one of losses
    assert axes.lines[0].get_xdata() == pytest.approx(better.by_seed)
    assert ["against lora" in text.get_text() for text in axes.get_yticklabels()] == [True]
    figures.plt.close("all")


def test_chosen_claims(study, tmp_path):
    """They replace the built-in ones, and the correction counts them alone."""
    for (method, seed), (matrix, _) in TAKEN.items():
        give_losses(study / f"{method}-sequential-{seed}", matrix)
    kept, _ = runs.collect([study])
    found = verdicts.verdicts(kept)
    first, _ = sorted(found, key=lambda verdict: verdict.interval.p)
    assert first.corrected == pytest.approx(2 * first.interval.p) and not found[0].claim.forgets
    words = ["beats", "forgets less than"][first.claim.forgets]
    assert report.main([str(study), "--out", str(tmp_path / "out"), "--claims",
                        f"badit {words} lora"]) == 0
    (said,) = [line for line in (tmp_path / "out/report.md").read_text().split("\n")
               if line.startswith("- ") and "corrected p" in line]
    assert f"badit {words} lora: **" in said and f"corrected p {first.interval.p:.2g};" in said
    (turned,) = verdicts.verdicts(kept, verdicts.read_claims(["lora beats badit"], kept))
    assert turned.interval.mean == pytest.approx(-found[0].interval.mean)


def test_several_chosen_claims_by_short_and_full_names(study, tmp_path, capsys):
    """A variant has two names; the figure of an earlier report does not stay."""
    for (method, seed), (matrix, _) in TAKEN.items():
        give_losses(study / f"{method}-sequential-{seed}", matrix)
        if method == "lora":
            set_flags(study / f"lora-sequential-{seed}", match_parameters="badit", rank=33,
                      alpha=264)
    out, full = tmp_path / "out", "lora --match_parameters badit"
    words = [str(study), "--out", str(out), "--claims"]
    assert report.main([*words, f"badit beats {full}", "badit forgets less than lora-matched"]) == 0
    text = (out / "report.md").read_text()
    assert f"badit beats {full}: **" in text and "than lora-matched: **" in text
    assert text.count("(against lora-matched ") == 2 and list(out.glob("figures/claims.*"))
    assert report.main([*words, "badit forgets less than lora-matched"]) == 0
    assert not list(out.glob("figures/claims.*"))
    for claims, said in (
            (["lora-matched beats " + full], "compares a variant with itself"),
            (["badit beats lora-matched", f"badit beats {full}"], "is given twice"),
            (["badit beats zero-shot"], "no trained run of 'zero-shot'")):
        capsys.readouterr()
        assert report.main([*words, *claims, "--unpack", str(tmp_path / "unpacked")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "unpacked").exists()


def test_former_variants_can_be_claimed():
    records = runs.read_records(ROOT / "results/compare-mini/records.jsonl.gz")
    claims = verdicts.read_claims(["badit-energy-squared beats badit-energy"], records)
    assert verdicts.verdicts(records, claims)


@pytest.mark.parametrize("claim, said", [
    ("badit < lora", 'write "A beats B" or "A forgets less than B"'),
    ("badit beats lora", "no seed of both with --eval_loss"),
    ("badit forgets less than lora", "no seed of both with --eval_loss in sequence"),
    ("badit beats loar", "no trained run of 'loar': did you mean lora?; allowed: badit, ")])
def test_a_claim_that_cannot_be_judged_is_refused(claim, said, study, tmp_path, capsys):
    assert report.main([str(study), "--out", str(tmp_path / "out"), "--claims", claim]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("interval, corrected, seeds, said, cell", [
    ((-0.4, -0.5, -0.2, 0.01), 0.02, 5, "**shown** (against lora -0.400",
     "-0.40 (-0.50 to -0.20) [1]"),
    ((0.1, 0.05, 0.2, 0.01), 0.02, 7, "**the reverse** (against lora +0.100",
     "+0.10 (+0.05 to +0.20) [1]"),
    ((0.1, -0.31, 0.2, 0.5), 1, 7, "**open**: the interval allows a gain of up to 0.310; to show "
     "0.05 takes about 38 seeds", "+0.10 (-0.31 to +0.20) [1]"),
    ((-0.1, -0.2, -0.05, 0.03), 0.09, 7, "**open**: the interval excludes 0, but not after "
     "correction for 3", "-0.10 (-0.20 to -0.05) [1]"),
    ((0.1, 0.05, 0.2, 0.03), 0.09, 7, "**no gain of 0.05** (against lora",
     "+0.10 (+0.05 to +0.20) [1]"),
    ((0.0, -0.05, 0.05, 1), 1, 7, "**open**", "+0.00 (-0.05 to +0.05) [1]"),
    ((0.0, -0.04, 0.05, 1), 1, 7, "**no gain of 0.05**", "+0.00 (-0.04 to +0.05) [1]"),
    ((-0.02, -0.04, -0.01, 0.02), 0.06, 7, "**no gain of 0.05**",
     "-0.02 (-0.04 to -0.01) [1]"),
    ((0.1, -math.inf, math.inf, 1), 1, 1, "**not judged**: one seed (against lora +0.100, no "
     "interval;", "+0.10 [1]")])
def test_what_a_verdict_says(interval, corrected, seeds, said, cell):
    """Nothing is shown without Holm's correction; no gain means that 0.05 is excluded."""
    by_seed = [0.1 * (-1) ** seed for seed in range(seeds)]
    verdict = verdicts.Verdict(verdicts.BEST, "m", "mixed", "lora", verdicts.Interval(*interval),
                               by_seed, 0.0, 0.0, corrected, 3)
    assert said in verdict.sentence() and verdict.difference() == cell
    assert ("**" in readme.overall(verdict, [None])[1]) == (corrected == 0.02)


def test_holm():
    """The smallest of n counts n times, the next n - 1 times, and none less than one before it."""
    assert verdicts.holm([0.02, 0.01, 0.04, 0.9]) == pytest.approx([0.06, 0.04, 0.08, 0.9])
    assert verdicts.holm([0.04, 0.03]) == pytest.approx([0.06, 0.06]) and verdicts.holm([]) == []


def test_verdicts_take_the_best_baseline_on_the_same_seeds(study):
    """Of two baselines the better one; one with fewer seeds is no rival."""
    for (method, seed), (matrix, _) in TAKEN.items():
        give_losses(study / f"{method}-sequential-{seed}", matrix)
    for seed, lower in ((1, 0.5), (2, 0.75)):
        shutil.copytree(study / f"lora-sequential-{seed}", study / f"matched-{seed}")
        set_flags(study / f"matched-{seed}", match_parameters="badit", rank=33, alpha=264)
        give_losses(study / f"matched-{seed}", [[lower] * 3] * 3)
    records = runs.collect([study])[0]
    assert [verdict.against for verdict in verdicts.verdicts(records)] == ["lora-matched"] * 2
    for seed in (1, 2):  # what learns nothing forgets nothing, and is no rival
        give_losses(study / f"matched-{seed}", [[9.0] * 3] * 3)
    idle = runs.collect([study])[0]
    assert [verdict.against for verdict in verdicts.verdicts(idle)] == ["lora"] * 2
    # The best of two beats BADIT: its p counts twice. Alone it counts once.
    matched = [run for run in records if run.variant != "lora"]
    (two, _), (one, _) = verdicts.verdicts(records), verdicts.verdicts(matched)
    assert two.interval.mean > 0 and two.interval.p == min(1, 2 * one.interval.p)
    fewer = [record for record in records if record.folder.name != "matched-2"]
    assert [verdict.against for verdict in verdicts.verdicts(fewer)] == ["lora"] * 2
    assert not verdicts.verdicts([run for run in records if run.variant == "badit"])


RATES = {1e-4: (3.0, 4.0), 1e-3: (1.0, 1.5), 1e-2: (2.0, 2.5)}


def test_learning_rates(folder, tmp_path, capsys):
    """Of two methods at three rates and two seeds: the table, the best, words for a study.

    Runs with fewer training rows have lines of their own.
    """
    each = itertools.product(("badit", "lora"), RATES.items(), (1, 2))
    for method, (rate, losses), seed in each:
        if (method, rate) == ("lora", 1e-2):
            continue
        run = tmp_path / f"{method}-{rate}-{seed}"
        shutil.copytree(folder / f"{method}-mixed-1", run)
        set_flags(run, learning_rate=rate, seed=seed, validation=4)
        give_losses(run, [[losses[seed - 1] * 2**i for i in (-1, 0, 1)]])  # geometric mean
    argv = [str(tmp_path), "--tuning", "--out", str(tmp_path / "out")]
    assert report.main(argv) == 0
    assert capsys.readouterr().out == f"10 runs, 0 left out: {tmp_path / 'out' / 'tuning.md'}\n"
    said = (tmp_path / "out" / "tuning.md").read_text()
    steps = len((run / "log.jsonl").read_text().splitlines()) // 3
    assert (f"| badit | mixed | {steps} | 3.500 ± 0.707 | 1.250 ± 0.354 | 2.250 ± 0.354 | 0.001 |"
            in said)
    assert (f"| lora | mixed | {steps} | 3.500 ± 0.707 | 1.250 ± 0.354 |  | 0.001 (at the edge of "
            "those tried)" in said)
    assert f"mixed, {steps} steps a task:\n\n`--methods 'badit --learning_rate 0.001' 'lora" in said
    assert matplotlib.image.imread(tmp_path / "out" / "tuning.png").shape[0] > 300
    assert "steps.png" not in said
    fewer = shutil.copytree(tmp_path / "lora-0.001-1", tmp_path / "fewer")
    set_flags(fewer, max_train_per_task=1)
    lines = (fewer / "log.jsonl").read_text().splitlines(keepends=True)
    (fewer / "log.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "out" / "tuning.md").unlink()  # as a report that was stopped leaves the folder
    assert report.main(argv) == 0
    said = (tmp_path / "out" / "tuning.md").read_text()
    assert "| lora | mixed | 1 |  | 1.000 |  | 0.001 |" in said and "(steps.png)" in said
    assert matplotlib.image.imread(tmp_path / "out" / "steps.png").shape[0] > 300


def test_rates_are_adjusted_for_seeds():
    """Seed 2, which ran with one rate, says nothing of the rates; equal seeds give plain means."""
    values = {1e-4: {1: 3.0}, 2e-4: {1: 2.0, 2: 9.0}}
    assert tuning.adjusted(values) == pytest.approx({1e-4: 6.5, 2e-4: 5.5})
    assert tuning.best(values) == 2e-4
    assert tuning.adjusted({1e-4: {1: 3.0, 2: 4.0}, 2e-4: {1: 2.0, 2: 9.0}}) == pytest.approx(
        {1e-4: 3.5, 2e-4: 5.5})
    # A third rate is compared with the first through the second.
    values = {1e-4: {1: 1.0, 2: 3.0}, 2e-4: {2: 4.0, 3: 6.0}, 5e-4: {3: 5.0}}
    low, middle, high = tuning.adjusted(values).values()
    assert (middle - low, high - middle) == pytest.approx((1.0, -1.0))
    assert tuning.adjusted_losses({1e-4: {1: 2.0, 2: 8.0}}) == pytest.approx({1e-4: 4.0})


def test_what_is_learnt_and_forgotten(study, tmp_path):
    """By hand, two seeds: the loss after a task's own stage, and its rise; mixed runs have none."""
    for (method, seed), (matrix, _) in TAKEN.items():
        give_losses(study / f"{method}-sequential-{seed}", matrix)
        give_losses(study / f"{method}-mixed-{seed}", matrix[-1:])
    measured = [run for run in runs.collect([study])[0] if run.losses()]
    ((_, mine),) = tuning.learning_and_forgetting(measured).items()
    assert {variant: list(points.values()) for variant, points in mine.items()} == {
        "badit": [pytest.approx((1.0, (0.375 + 0.25) / 2))],
        "lora": [pytest.approx(((2.5 / 3 + 3.5 / 3) / 2, 1.875 / 2))]}
    table = tuning.forgetting_table(tuning.learning_and_forgetting(measured))
    assert [row[1] for row in table.rows] == ["badit", "lora"]
    assert [float(value) for row in table.rows for value in row[4:]] == pytest.approx(
        [1, 0.3125, 1, 0.9375], abs=0.0006)  # three digits
    figures.save(tuning.forgetting_figure(tuning.learning_and_forgetting(measured)),
                 tmp_path / "forgetting", ["png"])
    mixed = [run for run in measured if run.setting == "mixed"]
    assert len(mixed) == 4 and not tuning.learning_and_forgetting(mixed)


def test_the_interval_of_a_tuned_loss():
    """Student's t on three seeds, by the table's 4.303; one seed has no interval."""
    assert tuning.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 * 1 / 3**0.5, rel=1e-4)
    assert math.isnan(tuning.half_width([1.0]))


def test_a_run_for_learning_rates_needs_held_out_rows(folder, tmp_path, capsys):
    for rate in RATES:
        shutil.copytree(folder / "lora-mixed-1", tmp_path / f"lora-{rate}-1")
        set_flags(tmp_path / f"lora-{rate}-1", learning_rate=rate, validation=4)
        give_losses(tmp_path / f"lora-{rate}-1", [[1.0] * 3])
    argv = [str(tmp_path), "--tuning", "--out", str(tmp_path / "out")]
    set_flags(tmp_path / "lora-0.001-1", validation=None)
    assert "--tuning and --allow_other need --out" in refused(capsys, tmp_path, "--tuning")
    assert "--claims needs --out DIR" in refused(capsys, tmp_path, "--claims", "a beats b")
    assert "--claims needs --out DIR" in refused(capsys, tmp_path, "--out", tmp_path / "out",
                                                 "--tuning", "--claims", "a beats b")
    assert report.main(argv) == 0
    assert "mixed settings: --validation null" in capsys.readouterr().err
    assert "--validation N and --eval_loss" in refused(capsys, folder / "lora-mixed-1", *argv[1:])


def test_each_variant_has_one_learning_rate(study, tmp_path, capsys):
    """Rates may differ between methods, which the report says, and not within one."""
    for seed in (1, 2):
        set_flags(study / f"lora-mixed-{seed}", learning_rate=0.5)
        set_flags(study / f"lora-sequential-{seed}", learning_rate=0.5)
    kept, left_out = runs.collect([study])
    assert not left_out and {run.rate for run in kept} == {None, 1e-2, 0.5}
    said = study_report.shared_settings(kept)
    assert "--learning_rate, lora: 0.5" in said and "--learning_rate, badit: 0.01" in said
    set_flags(study / "lora-mixed-1", learning_rate=0.25)
    _, left_out = runs.collect([study])
    assert [folder.name for folder, _ in left_out] == ["lora-mixed-1"]
    assert "--learning_rate, lora 0.25, most have 0.5" in left_out[0][1]


def test_a_schedule_counts_only_where_something_regroups(study):
    """With --no_dog it says when angles are logged, and nothing else."""
    other = study / "badit-sequential-2"
    set_flags(other, regroup_every=3)
    assert [folder for folder, _ in runs.collect([study])[1]] == [other]
    set_flags(other, regroup_every=3, no_dog=True)
    assert runs.collect([study])[1] == []


@pytest.mark.parametrize("change_one", [
    lambda run: set_flags(run, learning_rate=1.0), lambda run: set_flags(run, regroup_every=3),
    lambda run: set_flags(run, seed=7), shutil.rmtree], ids=["protocol", "schedule", "seed", "no"])
def test_forward_needs_the_same_run_on_every_task(study, change_one):
    change_one(study / "single" / "say_both")
    _, rows = table(study, "table1")
    assert rows["badit",]["mixed Forward"].values == rows[
        "badit",]["sequential Forward"].values == ()


def test_the_papers_figures_stand_beside_runs_on_all_of_its_tasks():
    """[paper, difference], and nothing beside a subset of the tasks."""
    paper = json.loads(tables.PAPER.read_text())
    fake = type("Run", (), {"order": list(SUPERNI)})
    where = ("table1", "qwen3-8b", "badit", "mixed/rouge")
    assert tables.paper_figure(paper, *where, [fake]) == 55.87
    assert tables.Score((55.0, 56.0), 55.87).text() == "55.50 ± 0.71 [55.87, -0.37]"
    assert tables.Score((55.0,), 55.87).text() == "55.00 [55.87, -0.87]"
    assert tables.Score((), 55.87).text() == ""
    fake.order = fake.order[1:]
    assert tables.paper_figure(paper, *where, [fake]) is None
    assert tables.paper_figure(paper, *where, []) is None


def test_table2_sums_what_is_lost(study):
    """Delta = lost Rouge (both settings) + gained Forget; empty while one is missing."""
    for setting, seed in itertools.product(("mixed", "sequential"), (1, 2)):
        other = study / f"no_dog-{setting}-{seed}"
        shutil.copytree(study / f"badit-{setting}-{seed}", other)
        scale(other, 0.5, no_dog=True)
    _, rows = table(study, "table2")
    assert set(rows) == {("badit",), ("badit-no_dog",)}
    assert rows["badit",]["Δ"].values == ()
    whole, less = (rows[name,] for name in ("badit", "badit-no_dog"))
    expected = sum(sign * (whole[name].mean - less[name].mean) for name, sign in (
        ("sequential score", 1), ("sequential Forget", -1), ("mixed score", 1)))
    assert less["Δ"].values == pytest.approx([expected]) and expected > 4
    shutil.rmtree(study / "no_dog-mixed-1"), shutil.rmtree(study / "no_dog-mixed-2")
    _, rows = table(study, "table2")
    assert rows["badit-no_dog",]["Δ"].values == ()


def test_table3_is_relative_to_loramoe(study):
    """Same seed, same kind of machine; else the row is not there."""
    for name, seconds in (("loramoe", (1.0, 9.0, 0.0)), ("badit", (2.0, 8.0, 2.5))):
        other = study / f"{name}-mixed-3"
        shutil.copytree(study / "badit-mixed-1", other)
        set_flags(other, method=name, seed=3)
        put(other, "run.seconds", dict(zip(("decompose", "train", "regroup"), seconds,
                                           strict=True)))
    _, rows = table(study, "table3")
    assert rows["badit",]["relative"].values == pytest.approx([1.25])
    assert rows["loramoe",]["relative"].values == (1.0,)
    assert set(rows) == {("badit",), ("loramoe",)}  # lora has no run with seed 3
    for name, seconds in (("loramoe", 20.0), ("badit", 30.0)):  # another machine, another row
        shutil.copytree(study / f"{name}-mixed-3", study / f"{name}-mixed-4")
        set_flags(study / f"{name}-mixed-4", seed=4)
        put(study / f"{name}-mixed-4", "run.device", "other")
        put(study / f"{name}-mixed-4", "run.seconds", {"train": seconds})
    made = tables.table3(runs.collect([study])[0], json.loads(tables.PAPER.read_text()))
    assert [(row[1], row[2] == "other", row[3].values) for row in made.rows] == [
        ("loramoe", False, (1.0,)), ("loramoe", True, (1.0,)),
        ("badit", False, (1.25,)), ("badit", True, (1.5,))]
    for name in ("loramoe", "badit"):
        shutil.rmtree(study / f"{name}-mixed-4")
    put(study / "badit-mixed-3", "run.threads", 64)
    _, rows = table(study, "table3")
    assert set(rows) == {("loramoe",)}
    put(study / "loramoe-mixed-3", "run.seconds", {})
    kept, _ = runs.collect([study])
    assert not tables.table3(kept, json.loads(tables.PAPER.read_text())).rows  # no time, no ratio


def test_forms_of_a_table(study):
    """CSV gives all digits back; LaTeX is escaped; Markdown has a line for each row."""
    made, rows = table(study, "table1")
    lines = list(csv.DictReader(io.StringIO(made.csv())))
    assert [line["method"] for line in lines] == ["zero-shot", "lora", "badit"]
    assert float(lines[2]["mixed score mean"]) == rows["badit",]["mixed score"].mean
    assert lines[2]["mixed score n"] == "2" and lines[2]["mixed score paper"] == ""
    assert lines[0]["sequential score mean"] == ""
    assert made.markdown().count("\n| ") == 2 + 3
    assert made.latex().count(r"\\") == 1 + 3 and r"\begin{tabular}{llllr" in made.latex()
    odd = tables.Table("x", "X", "", ["a", "Δ"], [["a_b & 5 % --x", tables.Score((1.0, 2.0))]])
    assert r"a\_b \& 5 \% -{}-x & 1.50 $\pm$ 0.71 \\" in odd.latex()
    assert r"a & $\Delta$ \\" in odd.latex()


# --- significance -------------------------------------------------------------------------------


def test_an_interval_of_seeds_is_students():
    """Of one item a task: scipy's t-test of the differences by seed; of one seed there is none."""
    ours, theirs = np.random.default_rng(0).normal(size=(2, 1, 5, 1))
    found = verdicts.paired_bootstrap([{"": (ours, theirs)}])
    wanted = stats.ttest_rel(ours[0, :, 0], theirs[0, :, 0])
    assert found.p == pytest.approx(wanted.pvalue, rel=0.05)
    assert found[1:3] == pytest.approx(tuple(wanted.confidence_interval()), rel=0.02)
    one = verdicts.paired_bootstrap([{"": (ours[:, :1], theirs[:, :1])}])
    assert one[1:] == (-math.inf, math.inf, 1.0)
    assert verdicts.paired_bootstrap([{"": (ours, ours)}])[1:] == (0, 0, 1)


def test_bootstrap_against_loops():
    """The standard error of the same resampling, one draw after the other; the mean is exact.

    One study of two tasks in two settings, which share their items, and one of a single task.
    """
    measure, generator = np.log, np.random.default_rng(1)
    shapes = ({"a": (2, 4, 6), "b": (2, 4, 9)}, {"a": (1, 4, 5)})
    # Items differ more than seeds and alike in both settings, so that sharing them is seen.
    studies = [{name: (generator.gamma(4, 1, shape) + generator.gamma(1, 9, shape[2]),
                       generator.gamma(4, 1, shape)) for name, shape in tasks.items()}
               for tasks in shapes]

    def statistic(seeds, draw):
        settings = []
        for study in studies:
            items = {name: draw(ours.shape[2]) for name, (ours, _) in study.items()}
            for i in range(len(study["a"][0])):
                settings.append(np.mean([
                    measure(side[i][seeds][:, items[name]].mean(1)).mean() * sign
                    for name, sides in study.items()
                    for side, sign in zip(sides, (2, -2), strict=True)]))
        return np.mean(settings)

    found = verdicts.paired_bootstrap(studies, measure, 20_000)
    assert found.mean == pytest.approx(statistic(np.arange(4), np.arange))
    error = math.sqrt(4 / 3) * np.std([
        statistic(generator.integers(0, 4, 4), lambda n: generator.integers(0, n, n))
        for _ in range(5_000)])
    assert (found.high - found.mean) / 3.1824 == pytest.approx(error, rel=0.04)  # t of 3, 97.5 %
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean) / error, 3), abs=0.02)
    assert verdicts.paired_bootstrap(studies, measure, 20_000) == found


# --- whole reports ------------------------------------------------------------------------------


def assert_drawn(path):
    """A picture with something on it, neither tiny nor of one colour."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 150 and pixels.std() > 0.02, path


def test_a_report_and_one_of_its_export(study, tmp_path, capsys):
    """Every part is there and drawn; the export holds no text and gives the same report.

    Nothing takes the dollars in a name for a formula.
    """
    for run in all_runs(study):
        put(run, "args.model", "models/a$_$b")
    one, small, two = (tmp_path / name for name in ("one", "small.jsonl.gz", "two"))
    (one / "tables").mkdir(parents=True)  # left by a report that was stopped
    assert report.main([str(study), "--out", str(one)]) == 0
    assert "left out" not in capsys.readouterr().err
    names = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    assert names == {"report.md", "figures/angles.png", "figures/angles.pdf",
                     *(f"tables/{name}.{kind}" for name in ("table1", "regroupings", "tasks")
                       for kind in ("tex", "csv"))}
    assert_drawn(one / "figures" / "angles.png")
    assert r"a\$\_\$b" in (one / "tables" / "table1.tex").read_text()
    text = (one / "report.md").read_text()
    assert "# Report" in text and "No claim is judged: that needs runs" in text
    assert report.main([str(study), "--export", str(small)]) == 0
    assert "Now complete" not in gzip.decompress(small.read_bytes()).decode()  # no texts
    assert report.main([str(small), "--out", str(two)]) == 0
    assert (two / "report.md").read_text() == text
    for path in one.rglob("*.p*"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


def test_a_study_goes_on_from_its_records(study, tmp_path, capsys):
    """Unpacked, each run has its folder and finished files, and packs to the same bytes."""
    packed, again, unpacked = (tmp_path / name for name in ("a.jsonl.gz", "b.jsonl.gz", "runs"))
    give_losses(study / "lora-mixed-1", [[1.0, 2.0, 3.0]])
    assert report.main([str(study), "--export", str(packed)]) == 0
    assert report.main([str(packed), "--unpack", str(unpacked)]) == 0
    found = {path.parent.relative_to(study) for path in study.rglob("results.json")}
    assert found == {path.parent.relative_to(unpacked) for path in unpacked.rglob("results.json")}
    assert Path("single/say_both") in found
    assert results_of(unpacked / "lora-mixed-1") == results_of(study / "lora-mixed-1")
    assert report.main([str(unpacked), "--export", str(again)]) == 0
    assert packed.read_bytes() == again.read_bytes()
    capsys.readouterr()
    before = snapshot(unpacked)
    assert "would overwrite" in refused(capsys, packed, "--unpack", unpacked)
    assert snapshot(unpacked) == before


def test_files_of_records_are_read_with_suspicion(folder, tmp_path, capsys):
    """A cut or foreign file, a missing key, a name that leads elsewhere: one line each."""
    good, bad, out = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz", ("--out", tmp_path / "out")
    assert report.main([str(folder / "lora-mixed-1"), "--export", str(good)]) == 0
    capsys.readouterr()
    line = json.loads(gzip.decompress(good.read_bytes()))
    for content, reason in (
            (good.read_bytes()[:-20], "not a readable file of records"),
            (b"x", "not a readable file of records"), (gzip.compress(b"[1]"), "not a readable"),
            (gzip.compress(json.dumps(line | {"results": {}}).encode()), "has no 'args'")):
        bad.write_bytes(content)
        assert reason in refused(capsys, bad, *out)
    for name in ("../x", "/x"):
        bad.write_bytes(gzip.compress(json.dumps(line | {"name": name}).encode()))
        assert "leads out of" in refused(capsys, bad, "--unpack", tmp_path / "runs")
    assert report.main([str(good), "--unpack", str(tmp_path / "x" / ".." / "there")]) == 0
    capsys.readouterr()
    bad.write_bytes(gzip.compress(json.dumps(line | {"results": line["results"] | {
        "args": line["results"]["args"] | {"seed": 2}}}).encode()))
    assert "two runs have the name" in refused(capsys, good, bad, "--unpack", tmp_path / "runs")
    assert "is a file of records: give --out" in refused(capsys, good)
    shutil.copytree(folder / "lora-mixed-1", tmp_path / "more" / "lora-mixed-1")
    set_flags(tmp_path / "more" / "lora-mixed-1", seed=5)
    assert "two runs have the name 'lora-mixed-1'" in refused(
        capsys, folder, tmp_path / "more", "--export", bad)
    assert "must end with .jsonl.gz" in refused(capsys, folder, "--export", tmp_path / "x")


def test_angles_show_both_moments(study):
    """Before a regrouping, and after it where there is one."""
    records, _ = runs.collect([study])
    badit = next(record for record in records if record.variant == "badit")
    lines = figures.angles([badit]).axes[0].lines
    keys = ("inter_before", "inter_after", "intra_before", "intra_after")
    assert [line.get_linestyle() for line in lines] == ["-", ":", "-", ":", "-"]  # last: 90 degrees
    for line, key in zip(lines, keys, strict=False):
        assert line.get_ydata() == pytest.approx(
            [event[key] for event in badit.results["regroupings"]])
    still = badit._replace(results=badit.results | {"regroupings": [
        event | {"inter_after": event["inter_before"], "intra_after": event["intra_before"]}
        for event in badit.results["regroupings"]]})
    assert len(figures.angles([still]).axes[0].lines) == 3
    figures.plt.close("all")


def test_angles_of_noise():
    """DOG on isotropic noise of the size of SmolLM2's gate_proj: angles near 90 degrees."""
    generator = torch.Generator().manual_seed(0)
    gram = torch.stack([component_gram(torch.randn(32, 576 + 1536, generator=generator))
                        for _ in range(20)])
    new, _ = grouping_from_gram(gram, 8, torch.arange(32).expand(20, -1) // 4)
    inter, intra = gradient_angles(gram, new, 8)
    assert (float(intra.mean()), float(inter.mean())) == pytest.approx((88.9, 90.4), abs=0.1)


def test_sensitivity_needs_two_values(study):
    """Fig. 12: a line over K, at r = 4; nothing for one value."""
    kept, _ = runs.collect([study])
    assert figures.sensitivity(kept) is None
    shutil.copytree(study / "badit-mixed-1", study / "K4")
    set_flags(study / "K4", num_experts=4, top_k=2)
    kept, _ = runs.collect([study])
    figure = figures.sensitivity(kept)
    (axes,) = [axes for axes in figure.axes if axes.lines]
    line = next(line for line in axes.lines if line.get_label() == "mixed")
    assert list(line.get_xdata()) == [4, 8]
    seeds = [list(mark.get_ydata()) for mark in axes.lines if mark.get_marker() == "_"]
    assert line.get_ydata()[1] in [pytest.approx(sum(each) / 2) for each in seeds if len(each) == 2]
    figures.save(figure, study / "K", ("png",))
    assert_drawn(study / "K.png")


# --- one run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, pictures", [("badit-sequential-1", 2), ("zero_shot", 0),
                                            ("single/say_both", 1)])
def test_one_run(folder, tmp_path, capsys, name, pictures):
    """Its table in the terminal, a figure, and a page that needs nothing else."""
    run = tmp_path / "run"
    shutil.copytree(folder / name, run)
    edit_lines(answers(run), lambda line: line | {"prediction": "<script>alert(1)</script>"})
    if pictures:
        put(run, "regroupings.0.intra_before", None)  # of a layer whose gradients are not finite
    assert report.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert ("rouge: " if name == "single/say_both" else "mean score: ") in out
    assert "report.html" in out
    text = (run / "report.html").read_text()
    assert text.startswith("<!doctype html>") and "<script>" not in text
    assert "&lt;script&gt;" in text and "://" not in text  # no address: pictures are inline
    assert text.count('src="data:image/png;base64,') == pictures == text.count("<img")
    assert ("figure.png" in out) == (run / "figure.png").exists() == (name != "zero_shot")
    assert "<td>learning_rate</td><td>0.01</td>" in text or name == "zero_shot"
    for task in results_of(run)["task_order"]:
        assert task in text and task in out


def test_examples_are_the_best_and_the_worst_answer(folder):
    """Of each task; of equal ones the first. Nothing is right at 0 and nothing wrong at 100."""
    record = runs.read(folder / "badit-mixed-1")
    given = [(task, number, score) for task, scores in zip(
        record.tasks, ([0, 60, 100, 100, 0], [0, 0], [100, 100]), strict=True)
        for number, score in enumerate(scores)]
    found = page.examples(record, [
        {"task": task, "prompt": str(number), "scores": {record.tasks[task]["metric"]: {
            "best": score}}} for task, number, score in given])
    first, second, third = record.tasks
    assert [(each["task"], each["prompt"], each["verdict"]) for each in found] == [
        (first, "2", "right"), (first, "0", "wrong"), (second, "0", "wrong"), (third, "0", "right")]


def test_one_run_with_forward(folder, tmp_path, capsys, monkeypatch):
    """From single-task runs of the same method and seed; others are refused.

    A task that is not counted needs none.
    """
    shutil.copytree(folder, tmp_path / "study")
    run, single = (tmp_path / "study" / name for name in ("badit-sequential-1", "single"))
    matrix = results_of(run)["scores"]["best"]
    alone = {task: results_of(single / task)["scores"]["best"][0][0] for task in TASKS}
    forward = statistics.fmean(matrix[i][i] - alone[task]
                               for i, task in enumerate(results_of(run)["task_order"]))
    assert report.main([str(run), str(single)]) == 0
    assert f"\nforward: {forward:.2f}\n" in capsys.readouterr().out
    assert report.main([str(run), str(tmp_path / "study")]) == 0  # which holds other runs as well
    assert f"\nforward: {forward:.2f}\n" in capsys.readouterr().out
    assert "there is none on which_is, colour_name" in refused(capsys, run, single / "say_both")
    assert "none on" in refused(capsys, tmp_path / "study" / "lora-mixed-1", single)
    monkeypatch.setattr(runs, "UNLEARNABLE", {"bad"})
    for folder_of in all_runs(tmp_path / "study"):
        if "say_both" in results_of(folder_of)["tasks"]:
            put(folder_of, "tasks.say_both.sha256", "bad")
    shutil.rmtree(single / "say_both")
    forward = statistics.fmean(matrix[i][i] - alone[task] for i, task in
                               enumerate(results_of(run)["task_order"]) if task != "say_both")
    assert report.main([str(run), str(single)]) == 0
    assert f"\nforward: {forward:.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [
    lambda run: put(run, "scores", GONE),
    lambda run: edit_lines(answers(run), lambda line: line | {"prediction": "\ud800"}),
], ids=["results", "no UTF-8"])
def test_one_damaged_run(folder, tmp_path, capsys, damage):
    """Named before anything is printed or written."""
    shutil.copytree(folder / "badit-mixed-1", tmp_path / "run")
    damage(tmp_path / "run")
    before = snapshot(tmp_path)
    message = refused(capsys, tmp_path / "run")
    assert "damaged" in message or "surrogate" in message
    assert message.startswith(f"error: {tmp_path / 'run'}: its ") and snapshot(tmp_path) == before


def test_answers_of_a_single_task_run(folder, tmp_path):
    """Each stage has a file with its own task; the page shows them all."""
    run = shutil.copytree(folder / "single" / "say_both", tmp_path / "run")
    later = shutil.copy(answers(run), answers(run).with_name("02_other.jsonl"))
    edit_lines(later, lambda line: line | {"task": "other"})
    tasks = [line["task"] for line in runs.read_answers(run, single=True)]
    assert tasks == ["say_both"] * 5 + ["other"] * 5
    assert {line["task"] for line in runs.read_answers(run)} == {"other"}


def test_a_line_separator_in_a_prediction(folder, tmp_path):
    """JSON leaves it as it is, so a line of the file is not one of str.splitlines."""
    run, text = tmp_path / "run", "a\u2028b\x85c"
    shutil.copytree(folder / "zero_shot", run)
    lines = [line | {"prediction": text} for line in lines_of(answers(run))]
    answers(run).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                       encoding="utf-8")
    kept, left_out = runs.collect([run])
    assert not left_out and sum(map(len, kept[0].items.values())) == len(lines) == 15
    assert report.main([str(run)]) == 0
    assert f"<b>{text}</b>" in (run / "report.html").read_text(encoding="utf-8")


STRANGE = os.fsdecode(b"a\n\x1b[31mb\xff")
SHOWN = r"a\n\x1b[31mb\udcff"


def test_strange_folder_names_in_a_report(folder, tmp_path, capsys):
    """Line breaks, escape codes and what is not UTF-8: each folder in one line that shows them."""
    shutil.copytree(folder / "zero_shot", tmp_path / "runs" / "base")
    shutil.copytree(folder / "zero_shot", tmp_path / "runs" / STRANGE)
    (tmp_path / "runs" / "c" / STRANGE / "checkpoints").mkdir(parents=True)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / STRANGE)]) == 0
    out, err = capsys.readouterr()
    assert out == f"1 runs, 2 left out: {tmp_path}/{SHOWN}/report.md\n"  # one is a copy of it
    assert err.count("\n") == 2 and err.count(SHOWN) == 2
    text = (tmp_path / STRANGE / "report.md").read_text()
    assert f"runs/c/{SHOWN}`: incomplete" in text
    assert any(line.endswith(f"setting and seed as {tmp_path}/runs/{SHOWN}")
               for line in text.splitlines())
    assert SHOWN in refused(capsys, tmp_path / "runs" / "c" / STRANGE)


# --- start-up -----------------------------------------------------------------------------------


def test_a_report_reads_files_alone(folder, tmp_path):
    """Nothing that trains is loaded; and before there is something to draw, nothing that draws."""
    shutil.copytree(folder / "badit-mixed-1", tmp_path / "run")
    train = {"torch", "transformers", "accelerate", "datasets", "harness", "train", "data"}
    draw = {"matplotlib", "numpy", "pandas", "jinja2"}
    assert not imported_by("report.py", "--help")[1] & (train | draw)
    assert imported_by("report.py", tmp_path / "run")[1] & (train | draw) == draw - {"pandas"}


# --- the committed results ----------------------------------------------------------------------

ROOT = Path(report.__file__).resolve().parent
REPORTS = {"compare-mini": ("--allow_other", "code"), "compare-superni": (),
           "compare-instrument": (), "compare-instrument-other-rates": (),
           "compare-mini-2e-4": ("--allow_other", "versions"), "compare-sequential": (),
           "compare-new-seeds": (), "compare-new-seeds-fp32": (),
           "compare-new-seeds-5e-4": ("--claims", "badit forgets less than lora-matched"),
           "protect-new-seeds": (
               "--allow_other", "code", "--claims",
               "badit --no_dog --protect 0.95 --routing energy beats "
               "badit --protect 0.95 --routing energy",
               "lora --match_parameters badit --protect 0.95 beats lora-matched"),
           "sensitivity-mini": ("--allow_other", "code"),
           "tuning": ("--tuning", "--allow_other", "code"),
           "tuning-instrument": ("--tuning", "--allow_other", "code")}


@pytest.mark.parametrize("name", REPORTS)
def test_the_committed_report_is_made_from_its_records(name, tmp_path, monkeypatch):
    """No number in it is typed by hand."""
    monkeypatch.setattr(figures, "of_study", lambda *_: {})  # they take a minute
    records = ROOT / "results" / name / "records.jsonl.gz"
    assert report.main([str(records), "--out", str(tmp_path), *REPORTS[name]]) == 0
    (file,) = tmp_path.glob("*.md")
    assert file.read_text() == records.with_name(file.name).read_text()


def test_the_table_of_the_readme_is_made_from_the_records(tmp_path, monkeypatch):
    """The documented command changes nothing."""
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text()
    (command,) = (words for code in Path("docs/reproduce.md").read_text().split("`")
                  for words in [code.split()]
                  if words[:2] == ["python", "report.py"] and "--readme" in words)
    *words, last = command[2:]
    shutil.copy(last, tmp_path)
    assert report.main([*words, str(tmp_path / last)]) == 0
    assert (tmp_path / last).read_text() == text


def differences(row):
    """The differences in a row of the README's table: of all comparisons, and of each setting."""
    return [float(cell.split()[0]) for cell in row.split("|")[4:-1]]


def test_a_table_of_claims(study, tmp_path, capsys):
    """Between the markers alone: what was run, and what was not."""
    for (method, seed), (matrix, _) in TAKEN.items():
        give_losses(study / f"{method}-sequential-{seed}", matrix)
    file = tmp_path / "a.md"
    file.write_text("above\n<!-- results -->\nold\n<!-- /results -->\nbelow\n")
    assert report.main([str(study), "--readme", str(file)]) == 0
    first, start, head, _, *rows, end, last = file.read_text().splitlines()
    assert (first, start, end, last) == ("above", "<!-- results -->", "<!-- /results -->", "below")
    assert head == "| claim | against | verdict | all | sequential |" and len(rows) == 8
    assert rows[0].startswith("| BADIT is better than the best baseline | lora | open (p 0.")
    assert ", 2 seeds) | -0." in rows[0] and rows[0].count("[1]") == 2
    assert all(row.endswith(" | - | not run | - | - |") for row in rows[1:])
    one, _ = differences(rows[0])
    for run in all_runs(study):  # a second model, where every loss of BADIT is lower
        shutil.copytree(run, study / "other" / run.name)
        set_flags(study / "other" / run.name, model="other")
    for (method, seed), (matrix, _) in TAKEN.items():
        factor = 0.9 if method == "badit" else 1
        give_losses(study / "other" / f"{method}-sequential-{seed}",
                    [[factor * loss for loss in row] for row in matrix])
    assert report.main([str(study), "--readme", str(file)]) == 0
    row = file.read_text().splitlines()[4]
    assert differences(row) == pytest.approx([one + math.log(0.9) / 2] * 2, abs=0.01)
    assert ", 2 seeds) | " in row and row.count("[2]") == 2
    shutil.rmtree(study / "other" / "badit-sequential-2")  # one seed there: not in the mean
    assert report.main([str(study), "--readme", str(file)]) == 0
    row = file.read_text().splitlines()[4]
    assert differences(row) == [one, one] and row.count("[1]") == 2
    for method in ("badit", "lora"):  # two seeds there, but others than here
        shutil.copytree(study / f"{method}-sequential-2", study / "other" / f"{method}-7")
        set_flags(study / "other" / f"{method}-7", model="other", seed=7)
        set_flags(study / "other" / f"{method}-sequential-1", seed=8)
    assert report.main([str(study), "--readme", str(file)]) == 0
    row = file.read_text().splitlines()[4]
    assert row.endswith("| - | no seed is in all comparisons | - | - |")
    shutil.rmtree(study / "other")
    for method, loss in (("badit", 2.0), ("lora", 1.0)):
        for seed in (1, 2):
            give_losses(study / f"{method}-mixed-{seed}", [[loss] * 3])
    assert report.main([str(study), "--readme", str(file)]) == 0
    row = file.read_text().splitlines()[4]
    mixed = math.log(2)
    assert differences(row) == pytest.approx([(mixed + one) / 2, mixed, one], abs=0.01)
    capsys.readouterr()
    file.write_text("no markers")
    assert "<!-- results -->" in refused(capsys, study, "--readme", file)
