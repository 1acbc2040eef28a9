"""Scores and continual-learning metrics against numbers by hand and naive loops."""

import copy
import importlib
import math
import random
import sys

import pytest
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

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


def naive_rouge(prediction, reference):
    """100 times the LCS F1 of two token lists, by the full table."""
    table = [[0] * (len(reference) + 1) for _ in range(len(prediction) + 1)]
    for i, p in enumerate(prediction, 1):
        for j, r in enumerate(reference, 1):
            if p == r:
                table[i][j] = table[i - 1][j - 1] + 1
            else:
                table[i][j] = max(table[i - 1][j], table[i][j - 1])
    common = table[-1][-1]
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 100 * 2 * precision * recall / (precision + recall)


# Rouge-L


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("the cat sat", "the cat sat", 100.0),
        ("the cat sat", "the cat", 80.0),  # P = 2/3, R = 1
        ("the cat", "the cat sat", 80.0),
        ("a b c d", "d c b a", 25.0),  # one token in order: P = R = 1/4
        ("a x b y c", "a b c z", 200 / 3),  # P = 3/5, R = 3/4; the match is not contiguous
        ("a a a a", "a", 40.0),  # a repeat counts once: P = 1/4, R = 1
        ("red", "blue", 0.0),
        ("The CAT, sat!", "the cat sat", 100.0),
        ("models running", "model runs", 100.0),  # stemmed
        ("was", "wa", 0.0),  # three letters: not stemmed
        ("", "", 100.0),  # no word on either side: compared whole
        ("", "word", 0.0),
        ("word", "", 0.0),
        ("?!", "word", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, reference, expected):
    """Rouge-L F1 with stemming, times 100; 0 where only one side has a token."""
    value = metrics.rouge_l(prediction, reference)
    assert isinstance(value, float)
    assert value == pytest.approx(expected, abs=1e-6)


def test_rouge_l_against_naive_lcs_with_stems():
    """Words with inflections, case and punctuation, over rouge_score's own tokens."""
    rng = random.Random(1)
    tokenize = DefaultTokenizer(use_stemmer=True).tokenize
    words = "running Runs cats, cat's relational relate! happily HAPPY the it-was 42 models".split()
    changed_by_stemmer = 0
    for _ in range(100):
        a = " ".join(rng.choices(words, k=rng.randint(1, 10)))
        b = " ".join(rng.choices(words, k=rng.randint(1, 10)))
        expected = naive_rouge(tokenize(a), tokenize(b))
        unstemmed = rouge_scorer.RougeScorer(["rougeL"]).score(b, a)["rougeL"].fmeasure
        changed_by_stemmer += abs(100 * unstemmed - expected) > 1e-6
        assert metrics.rouge_l(a, b) == pytest.approx(expected, abs=1e-6)
    assert changed_by_stemmer > 10


# Exact match and score


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("POS", "POS", 100.0),
        ("pos", "POS", 100.0),
        (" Pos.\n", "POS", 100.0),
        ('"POS"', "POS", 100.0),
        ("well-known", "wellknown", 0.0),  # punctuation within a text stays
        ("well-known", "well known", 0.0),
        ("a\t\n b", "a b", 100.0),
        ("a - b", "a b", 0.0),
        ("the cat", "cat", 0.0),  # articles stay
        ("POSITIVE", "POS", 0.0),
        ("POS NEG", "POS", 0.0),
        ("cats", "cat", 0.0),  # no stemming
        ("NEG", "POS", 0.0),
        ("", "POS", 0.0),
        ("POS", "", 0.0),
        ("", "", 100.0),
    ],
)
def test_exact_match(prediction, reference, expected):
    """Equality but for case, white space and punctuation at the ends; see test_scorers.py."""
    value = metrics.exact_match(prediction, reference)
    assert isinstance(value, float)
    assert value == expected


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
    """Against the best and against the first of several references."""
    best, first = expected
    value = metrics.score(prediction, references, metric)
    assert value == approx({"best": best, "first": first})


@pytest.mark.parametrize("metric", ["bleu", "", "Rouge_L", "exact_match", None])
def test_unknown_metric_is_refused(metric):
    """Metrics are rouge_l and accuracy; the message names them."""
    allowed = r"(?s)(?=.*rouge_l)(?=.*accuracy)"
    with pytest.raises(ValueError, match=allowed):
        metrics.score("a", ["a"], metric)
    with pytest.raises(ValueError, match=allowed):
        metrics.as_evaluate_metric(metric)


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


@pytest.mark.parametrize(
    "rows, order",
    [
        ([], ORDER),
        ([[]], ORDER),
        (FULL[:2], ORDER),
        ([*FULL, [1.0, 2.0, 3.0]], ORDER),
        ([[80.0, 70.0], *FULL[1:]], ORDER),
        ([[80.0, 70.0, 10.0, 5.0], *FULL[1:]], ORDER),
        ([[70.0, 60.0]], ORDER),
        (FULL, ORDER[:2]),
        (FULL, []),
        ([[math.nan, *FULL[0][1:]], *FULL[1:]], ORDER),
        ([*FULL[:2], [50.0, math.inf, 90.0]], ORDER),
        ([[70.0, 60.0, -math.inf]], ORDER),
    ],
)
def test_malformed_matrix_is_refused(rows, order):
    """A matrix is T x T, or one row of T; its scores are finite or missing."""
    with pytest.raises(ValueError):
        metrics.continual_metrics(rows, order, {})
    with pytest.raises(ValueError):
        metrics.paper_metrics(rows, order)


# The evaluate wrapper


def test_importing_metrics_does_not_import_evaluate(monkeypatch):
    """`evaluate` is loaded by as_evaluate_metric alone, not at import, not by score."""
    asked = []

    class Watch:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "evaluate":
                asked.append(name)
                raise ImportError(name)

    for name in [n for n in sys.modules if n.partition(".")[0] in ("evaluate", "metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Watch, *sys.meta_path])
    fresh = importlib.import_module("metrics")
    assert fresh is not metrics
    assert fresh.score("a b", ["a b"], "rouge_l")["best"] == pytest.approx(100.0)
    assert asked == []


@pytest.mark.parametrize(
    "metric, predictions, references, expected",
    [
        ("rouge_l", ["the cat sat", "a"], [["dog", "the cat"], ["a"]], (90.0, 50.0)),
        ("accuracy", ["pos", "neg", "x", "y"], [["NEG", "POS"], ["NEG"], ["z"], ["y."]], (75, 50)),
    ],
)
def test_evaluate_metric(monkeypatch, tmp_path, metric, predictions, references, expected):
    """An evaluate.Metric gives the means over items, also when it is used twice."""
    evaluate = importlib.import_module("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    built = metrics.as_evaluate_metric(metric)
    assert isinstance(built, evaluate.Metric)
    best, first = expected
    for _ in range(2):
        value = built.compute(predictions=predictions, references=references)
        assert value == approx({"best": best, "first": first})
    value = built.compute(predictions=predictions[-1:], references=references[-1:])
    assert value == approx({"best": 100.0, "first": 100.0})


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
