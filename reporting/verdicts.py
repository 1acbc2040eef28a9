"""Judge claims by the runs of a study: differences, their intervals, and a sentence for each.

A difference is ours minus theirs of the mean over tasks of ln(loss), so below zero is better for
ours: losses separate methods where the scores of few items cannot, and in a mean of logarithms no
task outweighs the others.
"""

import math
import statistics
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy import stats

import metrics
from inputs.errors import InputError
from inputs.settings import did_you_mean
from registry import FORMER, VARIANTS
from reporting.runs import SMALLEST, forgets, group_runs, label

RESAMPLES = 10_000
LEVEL = 0.95  # of an interval
ALPHA = 0.05  # a corrected p below it shows a claim
FEWEST = 2  # seeds that judge a claim
TARGET = 0.05  # smallest difference of ln(loss), or of nats of forgetting, worth detecting
POWER = 2.8  # standard errors that p < 0.05 needs in 80 % of studies: 1.96 + 0.84
BASELINES = ("lora-matched", "pissa-matched", "olora_qr-matched", "lora", "pissa", "olora",
             "olora_qr", "loramoe", "gainlora")


class Claim(NamedTuple):
    """`ours` has a lower loss than `theirs`, or forgets less.

    Of several `theirs` the one with the lowest loss is the rival, also for forgetting: a method
    that learns nothing forgets nothing.
    """

    text: str
    ours: str
    theirs: tuple
    forgets: bool = False


BEST = Claim("BADIT is better than the best baseline", "badit", BASELINES)
DOG = Claim("regrouping by gradients (DOG) is better than at random", "badit", ("badit-random",))
BAD = Claim("starting from the decomposition (BAD) is better than LoRAMoE's start", "badit",
            ("badit-no_bad",))
HALF = Claim("BADIT is better than PiSSA of half the rank, which routes nothing", "badit",
             ("half",))
ENERGY_HALF = Claim("routing by energy is better than PiSSA of half the rank", "badit-energy",
                    ("half",))
ENERGY_BEST = Claim("routing by energy is better than the best baseline", "badit-energy",
                    BASELINES)
ENERGY_BADIT = Claim("routing by energy is better than BADIT", "badit-energy", ("badit",))
ENERGY_DOG = Claim("under routing by energy DOG is better than regrouping at random",
                   "badit-energy", ("badit-energy-random",))

PAPER = (
    BEST,
    Claim("BADIT forgets less than the best baseline", "badit", BASELINES, forgets=True),
    DOG,
    Claim("regrouping by gradients (DOG) is better than none", "badit", ("badit-no_dog",)),
    BAD,
)
BEYOND = (
    HALF,
    ENERGY_HALF,
    ENERGY_BADIT,
    ENERGY_BEST,
    Claim("routing by energy forgets less than BADIT", "badit-energy", ("badit",), forgets=True),
    Claim("routing by energy forgets less than the best baseline", "badit-energy", BASELINES,
          forgets=True),
    ENERGY_DOG,
    Claim("under routing by energy DOG is better than none", "badit-energy",
          ("badit-energy-no_dog",)),
    Claim("one learnt weight an expert (static) is better than BADIT", "badit-static", ("badit",)),
)
README = (BEST, HALF, DOG, BAD, ENERGY_BEST, ENERGY_HALF, ENERGY_BADIT, ENERGY_DOG)


# --- intervals ----------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A difference, its interval, and its two-sided p."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(studies, measure=np.asarray, resamples=RESAMPLES):
    """Return the Interval of a difference between two methods by Student's t over seeds.

    `studies` is a list of {task: (ours, theirs)}, each an array (settings, seeds, items) for the
    same seeds and items; all settings of all studies have the same weight. The statistic is the
    mean over settings, tasks and seeds of measure(mean over items), ours minus theirs.
    Its standard error is that of a bootstrap: seeds are drawn with replacement once for everything,
    items within each task once for all settings and seeds. Its percentiles would be too narrow: on
    five seeds without a difference, one interval in six would leave 0 out. With one seed the
    interval is infinite and p is 1.
    """
    generator = np.random.default_rng(0)
    shapes = [next(iter(pairs.values()))[0].shape for pairs in studies]
    settings, seeds = sum(shape[0] for shape in shapes), shapes[0][1]
    weight_s = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (R, S)
    total, mean = np.zeros(resamples), 0.0
    for pairs in studies:
        for ours, theirs in pairs.values():
            items = ours.shape[2]
            weight_i = generator.multinomial(items, np.full(items, 1 / items), resamples) / items
            drawn = measure(ours @ weight_i.T) - measure(theirs @ weight_i.T)  # (settings, S, R)
            total += (weight_s.T * drawn.sum(0)).sum(0) / len(pairs)
            by_seed = measure(ours.mean(2)) - measure(theirs.mean(2))  # (settings, S)
            mean += float(by_seed.mean(1).sum()) / len(pairs)
    mean, total = mean / settings, total / settings
    if seeds == 1:
        return Interval(mean, -math.inf, math.inf, 1.0)
    error = float(total.std()) * math.sqrt(seeds / (seeds - 1))  # drawing with replacement: too low
    half = float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, seeds - 1)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, p)


def holm(values):
    """Return p values corrected for their number by Holm's step-down method, in their order."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


# --- verdicts -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A claim in one setting, and what the runs say of it."""

    claim: Claim
    model: str
    setting: str
    against: str  # the best of `theirs`
    interval: Interval
    by_seed: list  # the difference of each seed
    median: float  # over tasks, of the differences
    nats: float  # difference of the plain mean over tasks, nats per token
    corrected: float = 1.0  # p after Holm's correction over `claims`
    claims: int = 1
    places: int = 1  # studies, models and settings that it is a mean of

    @property
    def seeds(self):
        return len(self.by_seed)

    def word(self):
        """Return shown, the reverse, no gain of TARGET, open, or not judged.

        Shown and the reverse hold after Holm's correction. No gain of TARGET: the uncorrected
        interval excludes it.
        """
        _, low, high, _ = self.interval
        if self.seeds < FEWEST:
            return "not judged"
        if self.corrected < ALPHA and not low <= 0 <= high:
            return "shown" if high < 0 else "the reverse"
        return f"no gain of {TARGET}" if low > -TARGET else "open"

    def reason(self):
        """Return why a claim is neither shown nor the reverse, with a colon before it."""
        _, low, high, _ = self.interval
        if self.seeds < FEWEST:
            return ": one seed"
        if self.word() != "open":
            return ""
        if high < 0:
            return f": the interval excludes 0, but not after correction for {self.claims} claims"
        return (f": the interval allows a gain of up to {-low:.3f}; to show {TARGET} takes about "
                f"{self.needed()} seeds")

    def sentence(self):
        mean, low, high, _ = self.interval
        judged = "no interval" if self.seeds < FEWEST else (
            f"95 % interval {low:+.3f} to {high:+.3f}, corrected p {self.corrected:.2g}")
        others = "" if self.claim.forgets else (
            f"; median task {self.median:+.3f}; plain mean {self.nats:+.3f} nats")
        return (f"{self.model}, {self.setting}: {self.claim.text}: **{self.word()}**"
                f"{self.reason()} (against {self.against} {mean:+.3f}, {judged}{others}; lower on "
                f"{sum(value < 0 for value in self.by_seed)} of {seeds(self.seeds)}).")

    def needed(self):
        """Return the seeds that show a difference of TARGET in 80 % of studies, uncorrected."""
        spread = statistics.stdev(self.by_seed)
        return math.ceil((POWER * spread / TARGET) ** 2) + 2  # 2: Student's t is wider

    def difference(self):
        """Return the mean, its interval and, in brackets, the number of places."""
        mean, low, high, _ = self.interval
        interval = f" ({low:+.2f} to {high:+.2f})" if self.seeds >= FEWEST else ""
        return f"{mean:+.2f}{interval} [{self.places}]"


def seeds(number):
    return f"{number} seed{'s' * (number > 1)}"


class Place(NamedTuple):
    """The runs of one study with one model and setting that measured losses."""

    study: object  # any name; the settings of one study have the same test items
    model: str
    setting: str
    runs: dict  # {variant: {seed: Record}}


def places(records, study=None):
    """Return the Places of a study, sorted by model and setting."""
    found = defaultdict(dict)
    for (model, variant, setting), each in group_runs(records).items():
        found[model, setting][variant] = {run.seed: run for run in each if run.losses()}
    return [Place(study, *key, runs) for key, runs in sorted(found.items())]


def read_claims(texts, records):
    """Return the Claims that `texts` state: "A beats B" or "A forgets less than B".

    A and B are variants, by their names in the report or in full. Raises InputError for another
    form, a name that no trained run has, a claim of a variant against itself or made before, or a
    pair without a common seed.
    """
    names = {name: label(variant) for _, variant, setting in group_runs(records)
             if setting != "eval" for name in (label(variant), variant)}
    claims, where = {}, places(records)
    for text in texts:
        words = " forgets less than " if " forgets less than " in text else " beats "
        ours, found, theirs = text.partition(words)
        if not found:
            raise InputError(f'--claims {text!r}: write "A beats B" or "A forgets less than B"')
        for name in (ours, theirs):
            if name not in names:
                raise InputError(f"--claims {text!r}: no trained run of {name!r}"
                                 f"{did_you_mean(name, names)}; allowed: "
                                 f"{', '.join(sorted(names))}")
        ours, theirs = names[ours], names[theirs]
        key = ours, theirs, words
        if ours == theirs or key in claims:
            reason = "compares a variant with itself" if ours == theirs else "is given twice"
            raise InputError(f"--claims {text!r} {reason}")
        claims[key] = Claim(text, ours, (theirs,), forgets=words != " beats ")
        if not any(against_best(claims[key], [place]) for place in where):
            raise InputError(f"--claims {text!r}: no seed of both with --eval_loss"
                             + " in sequence" * claims[key].forgets)
    return tuple(claims.values())


def verdicts(records, claims=PAPER + BEYOND):
    """Return a Verdict for each claim, model and setting whose runs measured losses for it."""
    found = places(records)
    judged = (judge(claim, [place]) for claim in claims for place in found)
    return corrected([verdict for verdict in judged if verdict])


def corrected(found):
    """Return verdicts with p values that are corrected for their number."""
    judged = [verdict for verdict in found if verdict.seeds >= FEWEST]
    values = iter(holm([verdict.interval.p for verdict in judged]))
    return [verdict._replace(corrected=next(values), claims=len(judged))
            if verdict.seeds >= FEWEST else verdict for verdict in found]


def against_best(claim, where):
    """Return (the best rival, {number in `where`: pairs of runs}, number of rivals), or None.

    A pair is (our run, their run) of one seed. Only seeds that ran in all places count. A rival is
    considered only if no other has more pairs.
    """
    pairs = {}  # {rival: {place: [(our run, their run), one a seed]}}
    for name in claim.theirs:
        both = {}  # {place: (our runs, their runs)}
        for number, place in enumerate(where):
            ours, theirs = (place.runs.get((VARIANTS | FORMER).get(side, side), {})
                            for side in (claim.ours, name))
            if ours.keys() & theirs.keys() and (
                    not claim.forgets or all(map(forgets, ours.values()))):
                both[number] = ours, theirs
        everywhere = [ours.keys() & theirs.keys() for ours, theirs in both.values()]
        common = sorted(set.intersection(*everywhere)) if everywhere else ()
        if common:
            pairs[name] = {number: [(ours[seed], theirs[seed]) for seed in common]
                           for number, (ours, theirs) in both.items()}
    if not pairs:
        return None
    counts = {name: sum(map(len, found.values())) for name, found in pairs.items()}
    best = min((name for name in pairs if counts[name] == max(counts.values())),
               key=lambda name: metrics.mean(log_loss(run) for found in pairs[name].values()
                                             for _, run in found))
    return best, pairs[best], len(pairs)


def judge(claim, where):
    """Return the Verdict over the Places `where`, of equal weight, or None without a pair of runs.
    """
    found = against_best(claim, where)
    if found is None:
        return None
    best, pairs, rivals = found
    if claim.forgets:
        (only,) = pairs.values()
        interval, by_seed, median, nats = compare_forgetting(only)
    else:
        studies = defaultdict(list)
        for number, both in pairs.items():
            studies[where[number].study].append(both)
        interval, by_seed, median, nats = compare_losses(studies.values())
    if interval.mean > 0:  # the rival was chosen on these runs, which favours it
        interval = interval._replace(p=min(1.0, rivals * interval.p))
    first = where[next(iter(pairs))]
    return Verdict(claim, first.model, first.setting, best, interval, by_seed, median, nats,
                   places=len(pairs))


def compare_losses(studies):
    """Compare the losses of pairs of runs; `studies` holds settings, a setting a list of pairs.

    Returns (Interval, differences by seed, their median over tasks, difference of the plain means).
    """
    compared = [{task: tuple(np.array([[answer_losses(pair[side], task) for pair in pairs]
                                       for pairs in settings]) for side in (0, 1))
                 for task in settings[0][0][0].tasks} for settings in studies]
    by_task = [log(ours.mean(2)) - log(theirs.mean(2))
               for study in compared for ours, theirs in study.values()]  # (settings, seeds) each
    everything = [pairs for settings in studies for pairs in settings]
    by_seed = np.mean([[log_loss(mine) - log_loss(theirs) for mine, theirs in pairs]
                       for pairs in everything], axis=0)
    nats = metrics.mean(metrics.mean(mine.final_losses().values())
                        - metrics.mean(theirs.final_losses().values())
                        for pairs in everything for mine, theirs in pairs)
    return (paired_bootstrap(compared, log), by_seed.tolist(),
            statistics.median(float(each.mean()) for each in by_task), nats)


def compare_forgetting(pairs):
    """Compare how much runs forget; returns what compare_losses does, all in nats."""
    ours, theirs = (np.array([rises(pair[side]) for pair in pairs]) for side in (0, 1))
    by_task = ours - theirs  # (seeds, tasks)
    interval = paired_bootstrap([{"": (ours[None], theirs[None])}])  # tasks are drawn as items are
    return (interval, by_task.mean(1).tolist(), float(np.median(by_task.mean(0))), interval.mean)


def log(losses):
    return np.log(np.maximum(losses, SMALLEST))


def log_loss(run):
    """Return the mean over tasks of ln(loss) after all training."""
    return float(np.mean(log(np.array(list(run.final_losses().values())))))


def answer_losses(run, task):
    """Return numbers of a task's items, sorted by id, whose mean is the loss a token."""
    losses = np.array([run.items[task][item]["loss"] for item in sorted(run.items[task])])
    return losses[:, 0] / losses[:, 1].mean()  # (items, [sum, tokens]) -> items


def rises(run):
    """Return how far the loss of each task rose after its own stage, by the tasks' names.

    Scaled so that the mean over all tasks is the mean over those that another task followed.
    """
    losses, counted = run.losses(), sorted(run.tasks)
    scale = len(counted) / (len(counted) - (run.order[-1] in counted))
    return [scale * (losses[-1][i] - losses[i][i]) for i in map(run.order.index, counted)]
