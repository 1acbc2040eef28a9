"""Scores of predictions, and the metrics over tasks of Appendix G.5."""

import functools
import math
import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction, reference):
    """Rouge-L F1 with Porter stemming, 0 to 100."""
    return 100.0 * _rouge_scorer().score(reference, prediction)["rougeL"].fmeasure


@functools.cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # not above: it takes most of a second to load
    return RougeScorer(["rougeL"], use_stemmer=True)


def exact_match(prediction, reference):
    """100.0 if both are equal after lower-casing, dropping punctuation and folding white space."""
    return 100.0 if _normalise(prediction) == _normalise(reference) else 0.0


def _normalise(text):
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


SCORERS = {"rouge_l": rouge_l, "accuracy": exact_match}


def scorer(metric):
    """The function behind a metric's name. Raises ValueError for an unknown name."""
    if metric not in SCORERS:
        raise ValueError(f"metric {metric!r} is unknown; allowed: {', '.join(SCORERS)}")
    return SCORERS[metric]


def score(prediction, references, metric):
    """Score against the best and against the first of several references, 0 to 100."""
    scores = [scorer(metric)(prediction, reference) for reference in references]
    return {"best": max(scores), "first": scores[0]}


def as_evaluate_metric(metric):
    """The same scores as an `evaluate.Metric` (whose `load` would need a hub).

    compute(predictions=[...], references=[[...], ...]) -> {"best": mean, "first": mean}.
    """
    scorer(metric)
    return _evaluate_class()(config_name=metric)


@functools.cache
def _evaluate_class():
    import datasets  # not above: both are slow, and training needs neither
    import evaluate

    class SuperNIMetric(evaluate.Metric):
        """Mean score of predictions against the best and the first of their references."""

        def _info(self):
            return evaluate.MetricInfo(
                description=self.__doc__, citation="", inputs_description="",
                features=datasets.Features({
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string"))}))

        def _compute(self, predictions, references):
            scores = [score(*pair, self.config_name)
                      for pair in zip(predictions, references, strict=True)]
            return {key: mean(each[key] for each in scores) for key in ("best", "first")}

    return SuperNIMetric


def mean(values):
    """Arithmetic mean, or None where there is no value or one is missing (None)."""
    values = list(values)
    if not values or any(value is None for value in values):
        return None
    return math.fsum(values) / len(values)


def _difference(left, right):
    return None if left is None or right is None else left - right


def _check_matrix(score_matrix, order):
    T = len(order)
    if len(set(order)) != T or not T:
        raise ValueError(f"order {order} must name at least one task, and each once")
    if len(score_matrix) not in (1, T):
        raise ValueError(f"{len(score_matrix)} rows do not fit {T} tasks: "
                         f"mixed training has 1, sequential training {T}")
    for row in score_matrix:
        if len(row) != T:
            raise ValueError(f"a row of {len(row)} scores does not fit {T} tasks")
        if any(value is not None and not math.isfinite(value) for value in row):
            raise ValueError(f"scores must be finite numbers or None, found {row}")


def continual_metrics(score_matrix, order, single_task_scores):
    """Appendix G.5 from a[j][i], the score on task order[i] after the j-th stage, None = missing.

    One row is mixed training, len(order) rows sequential training. `single_task_scores` maps task
    to the score of the same method trained on it alone, or is None. Returns rouge, forward,
    forget_rate and backward, in points; one that would need a missing score is None.
    Raises ValueError for a malformed matrix or a score of a task that is not in `order`.
    """
    _check_matrix(score_matrix, order)
    single = single_task_scores or {}
    if set(single) - set(order):
        raise ValueError(f"single-task scores of {sorted(set(single) - set(order))}, "
                         f"which are not among {list(order)}")
    for task, value in single.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"the single-task score of {task} is {value}")
    a, T = score_matrix, len(order)
    learned = [a[min(i, len(a) - 1)][i] for i in range(T)]  # after training on task i
    sequential = len(a) > 1
    return {
        "rouge": mean(a[-1]),
        "forward": mean(_difference(learned[i], single.get(order[i])) for i in range(T)),
        "forget_rate": mean(_difference(_highest(a[j][i] for j in range(i, T - 1)), a[-1][i])
                            for i in range(T - 1)) if sequential else None,
        "backward": mean(_difference(a[-1][i], learned[i])
                         for i in range(T - 1)) if sequential else None,
    }


def paper_metrics(score_matrix, order):
    """Backward and Forget Rate as the released scripts compute them, for sequential training.

    Backward is divided by T, the maximum of Forget Rate is over all rows before the last, also
    those before the task was trained. None where a score is missing, and under mixed training.
    """
    _check_matrix(score_matrix, order)
    a, T = score_matrix, len(order)
    if len(a) == 1:
        return {"backward_paper": None, "forget_rate_paper": None}
    return {
        "backward_paper": mean(_difference(a[-1][i], a[i][i]) for i in range(T)),
        "forget_rate_paper": mean(_difference(_highest(a[j][i] for j in range(T - 1)), a[-1][i])
                                  for i in range(T - 1)),
    }


def _highest(values):
    values = list(values)
    return None if any(value is None for value in values) else max(values)


def score_table(results):
    """Lines: scores per task, before (if evaluated) and after training, then the metrics.

    `results` is the content of a results.json.
    """
    args, order, matrix = results["args"], results["task_order"], results["scores"]["best"]
    before = matrix[0] if args["eval_before"] else None
    last = matrix[-1]
    if args["setting"] == "single":
        last = [row[i] for i, row in enumerate(matrix[-len(order):])]
    width = max(map(len, order))
    yield f"\n{'task':{width}}  {'metric':8}  {'before':>7}  {'after':>7}"
    for i, task in enumerate(order):
        cells = [before and before[i], last[i]]
        yield (f"{task:{width}}  {results['tasks'][task]['metric']:8}  "
               + "  ".join(f"{'' if cell is None else f'{cell:.2f}':>7}" for cell in cells))
    means = [before and mean(before), mean(last)]
    yield (f"{'mean':{width}}  {'':8}  "
           + "  ".join(f"{'' if cell is None else f'{cell:.2f}':>7}" for cell in means))
    for name, value in results["metrics"].items():
        yield f"{name}: {'not measured' if value is None else f'{value:.2f}'}"
    if "forward_needs" in results:
        yield f"forward needs the single-task scores: {results['forward_needs']}"
        yield "and then --single_task_results with its results.json"
