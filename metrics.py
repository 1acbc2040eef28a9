"""Scores of predictions, and the metrics over tasks of Appendix G.5."""

import functools
import math
import types
import unicodedata

import regex  # `re` knows neither categories nor scripts

# Characters that count as the text on the left: they differ in typography alone.
_FORMS = {
    "'": "\u2018\u2019\u201a\u201b\u02bc",  # curly, low and reversed quotes, letter apostrophe
    '"': "\u201c\u201d\u201e\u201f",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63",  # hyphens, dashes, minus sign
    "..": "\u2025",
    "...": "\u2026",
    # Invisible: soft hyphen, zero width space and no-break space, word joiner, marks of
    # direction, selectors of plain or coloured emoji. Tatweel only makes a word longer.
    "": "\u00ad\u200b\ufeff\u2060\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
        "\u2066\u2067\u2068\u2069\ufe0e\ufe0f\u0640",
}
_WIDTHS = {code: unicodedata.decomposition(chr(code)).split() for code in range(0xFF01, 0xFFEF)}
_TO_ONE_FORM = {
    **{ord(form): one for one, forms in _FORMS.items() for form in forms},
    # Letters, digits and signs of full or half width: "<wide> 0041" is how Unicode writes an A.
    **{code: int(width[1], 16) for code, width in _WIDTHS.items() if width},
}

# Full stops, commas, colons, question marks and so on of all scripts, but not # % & * @ / \ + -.
# Unicode's own list lacks three marks of Armenian.
_STOP = r"\p{Terminal_Punctuation}\u055b\u055c\u055e"
_QUOTE = r"\p{Quotation_Mark}\p{Pi}\p{Pf}"
_OPENING = rf"\s\p{{Ps}}\u00a1\u00bf\u2e18{_QUOTE}"  # with the inverted marks of Spanish
# Stops before a digit or a symbol end no sentence: .5 is not 5, and != is not =.
_LEFT_EDGE = regex.compile(rf"^(?:[{_OPENING}]|[{_STOP}]++(?=[\p{{L}}{_OPENING}]))+")
# A bracket that was opened within the text is a part of it: f() is not f. (?r) searches from the
# end: from the start, it would try every run of punctuation.
_RIGHT_EDGE = regex.compile(rf"(?r)(?:[\s{_STOP}{_QUOTE}]|(?<!\p{{Ps}}[^\p{{Pe}}]*)\p{{Pe}})+\Z")

# Letters of scripts that put no spaces between words; Complex_Context holds Thai, Lao,
# Khmer and others. Tibetan is left out: a mark ends each of its syllables.
_UNSPACED = (r"[\p{L}&&[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}"
             r"\p{Line_Break=Complex_Context}]]")
_SPACED = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}]"
_WORD = regex.compile(rf"(?V1){_UNSPACED}\p{{M}}*+|(?:{_SPACED}++\p{{M}}*+)++")

def rouge_l(prediction, reference):
    """Return Rouge-L F1 over words of any script, English ones Porter-stemmed, 0 to 100.

    Two texts without any word, such as "+" and "-", are compared whole, as `exact_match` does.
    """
    predicted, expected = _words(prediction), _words(reference)
    if not predicted and not expected:
        return exact_match(prediction, reference)
    return 100.0 * _rouge().score(expected, predicted)["rougeL"].fmeasure


@functools.cache
def _rouge():
    from nltk.stem.porter import PorterStemmer  # here, as it doubles the start-up time
    from rouge_score.rouge_scorer import RougeScorer  # this as well

    stem = PorterStemmer().stem

    def stemmed(words):  # those that rouge_score stems
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in words]

    return RougeScorer(["rougeL"], tokenizer=types.SimpleNamespace(tokenize=stemmed))


def _words(text):
    """Return runs of letters and digits; in scripts without spaces, single letters."""
    return _WORD.findall(_in_one_form(text))


def _in_one_form(text):
    """Return text without differences of Unicode form, case and typography."""
    # Case is folded between both normal forms, since folding composed letters misses some pairs.
    text = unicodedata.normalize("NFD", text).casefold().translate(_TO_ONE_FORM)
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(prediction, reference):
    """Return 100.0 if the texts differ only in case, typography and punctuation at the ends.

    Punctuation that is all of a text, and any within it, counts; so do symbols everywhere: "-1" is
    not "1", "1.5" not "15", "C#" not "C++", "." not "".
    """
    return 100.0 if bare(prediction) == bare(reference) else 0.0


def bare(text):
    """Return what accuracy compares of a text."""
    text = _in_one_form(text)
    return _RIGHT_EDGE.sub("", _LEFT_EDGE.sub("", text)) or text


SCORERS = {"rouge_l": rouge_l, "accuracy": exact_match}
_COUNTED = {"rouge_l": _words, "accuracy": bare}


def counts_anything(reference, metric):
    """Return whether a reference has anything to score: a word for rouge_l, any text for accuracy.

    If not, its score is 100 or 0, by equality.
    """
    return bool(_COUNTED[metric](reference))


def score(prediction, references, metric):
    """Return the scores against the best and the first of several references, 0 to 100.

    Raises ValueError for an unknown metric.
    """
    if metric not in SCORERS:
        raise ValueError(f"metric {metric!r} is unknown; allowed: {', '.join(SCORERS)}")
    scores = [SCORERS[metric](prediction, reference) for reference in references]
    return {"best": max(scores), "first": scores[0]}


def as_evaluate_metric(metric):
    """Return the same scores as an `evaluate.Metric`; `evaluate.load` would need a hub.

    compute(predictions=[...], references=[[...], ...]) -> {"best": mean, "first": mean}.
    """
    import datasets  # both here: they are slow, and training does not need them
    import evaluate  # as above

    class SuperNIMetric(evaluate.Metric):
        def _info(self):
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="Mean score against the best and the first reference.", citation="",
                features=datasets.Features({"predictions": text,
                                            "references": datasets.Sequence(text)}))

        def _compute(self, predictions, references):
            scores = [score(*pair, metric) for pair in zip(predictions, references, strict=True)]
            return {key: mean(each[key] for each in scores) for key in ("best", "first")}

    return SuperNIMetric()


# Printed wherever Backward is shown.
BACKWARD = "Backward: change after later tasks; below zero means forgetting, for score and loss."


def mean(values):
    """Return the arithmetic mean, or None if there is no value or one is None."""
    values = list(values)
    if not values or any(value is None for value in values):
        return None
    return math.fsum(values) / len(values)


def _difference(left, right):
    return None if left is None or right is None else left - right


def _check_shape(matrix, order):
    if len(matrix) not in (1, len(order)) or any(len(row) != len(order) for row in matrix):
        raise ValueError(f"rows of {[len(row) for row in matrix]} scores do not fit {len(order)} "
                         "tasks: mixed training has one row, sequential training a row a task")


def continual_metrics(score_matrix, order, single_task_scores, without=()):
    """Compute the metrics of Appendix G.5 from a[j][i], the score on order[i] after stage j.

    A missing score is None. Mixed training has one row, sequential training len(order) rows.
    `single_task_scores` maps a task to the score of the same method trained on it alone, or is
    None. `without` names tasks that no mean counts. Returns rouge, forward, forget_rate and
    backward in points, None if a score that it needs is missing.
    Raises ValueError for a malformed matrix.
    """
    _check_shape(score_matrix, order)
    single = single_task_scores or {}
    a, T = score_matrix, len(order)
    counted = [i for i in range(T) if order[i] not in without]
    earlier = [i for i in counted if i < T - 1]  # no task is trained after the last one
    learned = [a[min(i, len(a) - 1)][i] for i in range(T)]  # after training on task i
    sequential = len(a) > 1
    return {
        "rouge": mean(a[-1][i] for i in counted),
        "forward": mean(_difference(learned[i], single.get(order[i])) for i in counted),
        "forget_rate": mean(_difference(_highest(a[j][i] for j in range(i, T - 1)), a[-1][i])
                            for i in earlier) if sequential else None,
        "backward": mean(_difference(a[-1][i], learned[i])
                         for i in earlier) if sequential else None,
    }


def loss_metrics(loss_matrix, order, single_task_losses, without=()):
    """Compute loss, forward, forget_rate and backward of losses, in nats per token.

    The signs are those of scores: Forward and Backward above zero are lower losses, a Forget Rate
    above zero is a loss that has risen again.
    """
    negated = [[None if loss is None else -loss for loss in row] for row in loss_matrix]
    single = {task: None if loss is None else -loss
              for task, loss in (single_task_losses or {}).items()}
    values = continual_metrics(negated, order, single, without)
    loss = values.pop("rouge")
    return {"loss": None if loss is None else -loss, **values}


def paper_metrics(score_matrix, order):
    """Compute Backward and Forget Rate as the released scripts do, for sequential training.

    Backward is divided by T, the maximum of Forget Rate is over all rows before the last, also
    those before the task was trained. None where a score is missing, and under mixed training.
    """
    _check_shape(score_matrix, order)
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


def headline(types):
    """Return the name of a mean over tasks of these metrics: rouge if all are Rouge-L."""
    return "rouge" if set(types) == {"rouge_l"} else "mean score"


def named_metrics(results):
    """Return [(name, value or None)] of the metrics over tasks of a results.json."""
    named = {"rouge": headline(task["metric"] for task in results["tasks"].values())}
    return [(named.get(name, name), value) for name, value in results["metrics"].items()]


def score_table(results):
    """Yield lines: scores of each task before (if evaluated) and after training, and the metrics.

    `results` is the content of a results.json.
    """
    args, order, matrix = results["args"], results["task_order"], results["scores"]["best"]
    before = matrix[0] if args["eval_before"] else [None] * len(order)
    last = matrix[-1]
    if args["setting"] == "single":
        last = [row[i] for i, row in enumerate(matrix[-len(order):])]
    width = max(map(len, order))
    yield f"\n{'task':{width}}  {'metric':8}  {'before':>7}  {'after':>7}"
    for name, metric, *scores in (
            *zip(order, (results["tasks"][task]["metric"] for task in order), before, last,
                 strict=True), ("mean", "", mean(before), mean(last))):
        yield f"{name:{width}}  {metric:8}  " + "  ".join(
            f"{'' if score is None else f'{score:.2f}':>7}" for score in scores)
    for name, value in named_metrics(results):
        if value is not None:
            yield f"{name}: {value:.2f}"
    for name, value in results.get("loss_metrics", {}).items():
        if value is not None:
            yield f"{name if name == 'loss' else f'{name} of the loss'}: {value:.4f}"
    if results["metrics"]["backward"] is not None:
        yield BACKWARD
