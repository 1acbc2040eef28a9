"""Scores and continual-learning metrics against numbers by hand and naive loops."""

import copy
import random

import evaluate
import pytest

import metrics

ORDER = ["beta", "alpha", "gamma"]  # not sorted: columns follow the order, not the names
ALONE = {"alpha": 55.0, "gamma": 88.0, "beta": 75.0}
FULL = [
    [80.0, 70.0, 10.0],
    [85.0, 60.0, 30.0],
    [50.0, 65.0, 90.0],
]
# By hand: rouge = (50 + 65 + 90) / 3; forward = ((80 - 75) + (60 - 55) + (90 - 88)) / 3;
# forget rate = ((max(80, 85) - 50) + (60 - 65)) / 2; backward = ((50 - 80) + (65 - 60)) / 2.
OURS = {"rouge": 205 / 3, "forward": 4.0, "forget_rate": 15.0, "backward": -12.5}
# By hand: the same sum over T = 3; ((max(80, 85) - 50) + (max(70, 60) - 65)) / 2.
PAPER = {"backward_paper": -25 / 3, "forget_rate_paper": 20.0}


def without(*missing):
    """The full matrix with the given (row, column) entries not evaluated."""
    rows = copy.deepcopy(FULL)
    for j, i in missing:
        rows[j][i] = None
    return rows


def approx(expected):
    """Compare a dict of floats and Nones: floats within 1e-9, None only with None."""
    return {k: v if v is None else pytest.approx(v, abs=1e-9) for k, v in expected.items()}


# Best and first reference


@pytest.mark.parametrize(
    "prediction, references, metric, expected",
    [
        ("the cat sat", ["dog", "the cat", "the cat sat"], "rouge_l", (100.0, 0.0)),
        ("the cat sat", ["the cat", "dog"], "rouge_l", (80.0, 80.0)),
        ("pos", ["POS"], "accuracy", (100.0, 100.0)),
        ("pos", ["NEG", "POS."], "accuracy", (100.0, 0.0)),
        ("pos", ["NEG", "OTHER"], "accuracy", (0.0, 0.0)),
        ("the cat sat", ["the cat"], "accuracy", (0.0, 0.0)),
    ],
)
def test_score_best_and_first(prediction, references, metric, expected):
    """Score against the best and against the first of several references."""
    best, first = expected
    assert metrics.score(prediction, references, metric) == approx({"best": best, "first": first})


@pytest.mark.parametrize("metric", ["bleu", "", "Rouge_L", "exact_match", None])
def test_unknown_metric_is_refused(metric):
    with pytest.raises(ValueError, match="allowed: rouge_l, accuracy"):
        metrics.score("a", ["a"], metric)


# The four metrics


NO_SEQUENCE = {"forget_rate": None, "backward": None}


@pytest.mark.parametrize("rows, order, alone, ours, paper", [
    (FULL, ORDER, ALONE, OURS, PAPER),
    # The lower triangle is enough for our four; the paper's maximum needs all rows.
    (without((0, 1), (0, 2), (1, 2)), ORDER, ALONE, OURS, PAPER | {"forget_rate_paper": None}),
    # Mixed training; by hand its forward is the mean of -5, 5 and 7.
    ([[70.0, 60.0, 95.0]], ORDER, ALONE, {"rouge": 75.0, "forward": 7 / 3, **NO_SEQUENCE},
     dict.fromkeys(PAPER)),
    ([[70.0, None, 95.0]], ORDER, ALONE, dict.fromkeys(OURS), dict.fromkeys(PAPER)),
    ([[80.0]], ["a"], {"a": 75.0}, {"rouge": 80.0, "forward": 5.0, **NO_SEQUENCE},
     dict.fromkeys(PAPER)),
    ([[0.0, 0.0], [0.0, 0.0]], ["a", "b"], {"a": 0.0, "b": 0.0}, dict.fromkeys(OURS, 0.0),
     dict.fromkeys(PAPER, 0.0)),  # 0 is a score; only None is missing
], ids=["sequential", "seen tasks", "mixed", "a score is missing", "one task", "zeros"])
def test_metrics_by_hand(rows, order, alone, ours, paper):
    assert metrics.continual_metrics(rows, order, alone) == approx(ours)
    assert metrics.paper_metrics(rows, order) == approx(paper)


@pytest.mark.parametrize(
    "missing, gone, paper_gone",
    [
        ([(2, 0)], {"rouge", "forget_rate", "backward"}, {"backward_paper", "forget_rate_paper"}),
        ([(2, 2)], {"rouge", "forward"}, set()),
        ([(0, 0)], {"forward", "forget_rate", "backward"}, {"backward_paper", "forget_rate_paper"}),
        ([(1, 0)], {"forget_rate"}, {"forget_rate_paper"}),
        ([(0, 1)], set(), {"forget_rate_paper"}),
        ([(1, 1)], {"forward", "forget_rate", "backward"}, {"backward_paper", "forget_rate_paper"}),
        # Only the last row was evaluated.
        (
            [(j, i) for j in (0, 1) for i in range(3)],
            {"forward", "forget_rate", "backward"},
            {"backward_paper", "forget_rate_paper"},
        ),
        # The last stage has not run yet.
        ([(2, 0), (2, 1), (2, 2)], set(OURS), {"backward_paper", "forget_rate_paper"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_missing_entries(missing, gone, paper_gone):
    """What needs a missing entry is None, everything else keeps its value."""
    rows = without(*missing)
    expected = {k: None if k in gone else v for k, v in OURS.items()}
    assert metrics.continual_metrics(rows, ORDER, ALONE) == approx(expected)
    if missing != [(2, 2)]:  # the last task has no part in the sums, so either answer is honest
        expected = {k: None if k in paper_gone else v for k, v in PAPER.items()}
        assert metrics.paper_metrics(rows, ORDER) == approx(expected)


@pytest.mark.parametrize(
    "alone",
    [{}, {"alpha": 55.0, "gamma": 88.0}, {**ALONE, "beta": None}, dict.fromkeys(ORDER)],
    ids=["none", "one absent", "one null", "all null"],
)
@pytest.mark.parametrize("rows", [FULL, [[70.0, 60.0, 95.0]]], ids=["sequential", "mixed"])
def test_forward_needs_every_single_task_score(rows, alone):
    """Without the single-task scores Forward is null, and only Forward."""
    whole = metrics.continual_metrics(rows, ORDER, ALONE)
    assert whole["forward"] is not None
    assert metrics.continual_metrics(rows, ORDER, alone) == {**whole, "forward": None}


@pytest.mark.parametrize("seed", range(5))
def test_metrics_against_naive_loops(seed):
    """Random 2..7-task matrices against formulas written out with 1-based indices."""
    rng = random.Random(seed)
    T = rng.randint(2, 7)
    order = [f"t{i}" for i in range(T)]
    rng.shuffle(order)
    rows = [[rng.uniform(0, 100) for _ in range(T)] for _ in range(T)]
    alone = {task: rng.uniform(0, 100) for task in sorted(order)}
    a = {(j, i): rows[j - 1][i - 1] for j in range(1, T + 1) for i in range(1, T + 1)}
    rouge = forward = forget = backward = forget_paper = 0.0
    for i in range(1, T + 1):
        rouge += a[T, i] / T
        forward += (a[i, i] - alone[order[i - 1]]) / T
        if i < T:
            forget += (max(a[j, i] for j in range(i, T)) - a[T, i]) / (T - 1)
            forget_paper += (max(a[j, i] for j in range(1, T)) - a[T, i]) / (T - 1)
            backward += (a[T, i] - a[i, i]) / (T - 1)
    ours = {"rouge": rouge, "forward": forward, "forget_rate": forget, "backward": backward}
    kept = copy.deepcopy((rows, order, alone))
    assert metrics.continual_metrics(rows, order, alone) == approx(ours)
    paper = {"backward_paper": backward * (T - 1) / T, "forget_rate_paper": forget_paper}
    assert metrics.paper_metrics(rows, order) == approx(paper)
    assert (rows, order, alone) == kept  # the arguments are left as they were


@pytest.mark.parametrize("rows, order", [
    ([], ORDER), ([[]], ORDER), (FULL[:2], ORDER), ([*FULL, [1.0, 2.0, 3.0]], ORDER),
    ([[80.0, 70.0], *FULL[1:]], ORDER), ([[70.0, 60.0]], ORDER), (FULL, ORDER[:2]), (FULL, [])])
def test_malformed_matrix_is_refused(rows, order):
    """A matrix is T x T, or one row of T."""
    for measure in (metrics.paper_metrics, lambda *args: metrics.continual_metrics(*args, {})):
        with pytest.raises(ValueError, match="do not fit"):
            measure(rows, order)


@pytest.mark.parametrize("metric, predictions, references, expected", [
    ("rouge_l", ["the cat sat", "a"], [["dog", "the cat"], ["a"]], (90.0, 50.0)),
    ("accuracy", ["pos", "neg", "x", "y"], [["NEG", "POS"], ["NEG"], ["z"], ["y."]], (75, 50))])
def test_evaluate_metric(monkeypatch, tmp_path, metric, predictions, references, expected):
    """An evaluate.Metric gives the means over items, also when it is used twice."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    built = metrics.as_evaluate_metric(metric)
    assert isinstance(built, evaluate.Metric)
    for last, scores in ((None, expected), (None, expected), (-1, (100.0, 100.0))):
        value = built.compute(predictions=predictions[last:], references=references[last:])
        assert value == approx(dict(zip(("best", "first"), scores, strict=True)))


def test_tasks_that_do_not_count():
    """They are in no mean; the last task stays the last."""
    found = metrics.continual_metrics(FULL, ORDER, ALONE, without=["beta"])
    assert found == approx({"rouge": 77.5, "forward": 3.5, "forget_rate": -5.0, "backward": 5.0})
    found = metrics.continual_metrics(FULL, ORDER, ALONE, without=["gamma"])
    assert found == approx({"rouge": 57.5, "forward": 5.0, "forget_rate": 15.0, "backward": -12.5})


def test_losses_have_the_same_metrics_with_better_above_zero():
    """By hand: what is lower is better, what came back is forgotten."""
    losses = [[1.0, 3.0, 4.0], [0.5, 2.0, 3.0], [1.5, 2.5, 1.0]]
    alone = {"beta": 1.25, "alpha": 2.5, "gamma": 1.0}
    assert metrics.loss_metrics(losses, ORDER, alone) == approx({
        "loss": 5 / 3, "forward": (0.25 + 0.5 + 0.0) / 3,
        "forget_rate": ((1.5 - 0.5) + (2.5 - 2.0)) / 2,
        "backward": ((1.0 - 1.5) + (2.0 - 2.5)) / 2})
    assert metrics.loss_metrics([[1.0, None, 3.0]], ORDER, None) == {
        "loss": None, "forward": None, "forget_rate": None, "backward": None}


def test_what_backward_means_is_said_beside_one():
    """Not after a sequential run that evaluated nothing."""
    results = {"args": {"eval_before": False, "setting": "sequential"}, "task_order": ORDER,
               "tasks": dict.fromkeys(ORDER, {"metric": "accuracy"})}
    for rows in (FULL, [[None] * 3] * 3):
        lines = list(metrics.score_table(results | {
            "scores": {"best": rows}, "metrics": metrics.continual_metrics(rows, ORDER, None)}))
        assert (metrics.BACKWARD in lines) == (rows is FULL)
