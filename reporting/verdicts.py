"""What a study says of the paper's claims: differences, their intervals, and a sentence for each.

Differences are of losses (lower is better), ours minus theirs, in nats per token: a forward pass
over the answers separates methods where the scores of few items cannot.
"""

from typing import NamedTuple

import numpy as np

import metrics
from registry import FORMER, VARIANTS
from reporting.groups import cells, final_loss, forgets, forgetting
from reporting.significance import paired_bootstrap, smallest_wilcoxon_p

ENOUGH = 6  # seeds: fewer give no p below 0.05 by themselves, and too narrow an interval
BASELINES = ("lora-matched", "pissa-matched", "lora", "pissa", "olora", "loramoe", "gainlora")


class Claim(NamedTuple):
    """`ours` has a lower loss than `theirs`, or forgets less; the best of several is that of the
    lowest loss, as what learns nothing forgets nothing."""

    text: str
    ours: str
    theirs: tuple
    forgets: bool = False


PAPER = (
    Claim("BADIT is better than the best baseline", "badit", BASELINES),
    Claim("BADIT forgets less than the best baseline", "badit", BASELINES, forgets=True),
    Claim("regrouping by gradients (DOG) is better than at random", "badit", ("badit-random",)),
    Claim("regrouping by gradients (DOG) is better than none", "badit", ("badit-no_dog",)),
    Claim("starting from the decomposition (BAD) is better than LoRAMoE's start", "badit",
          ("badit-no_bad",)),
)
BEYOND = (
    Claim("routing by energy is better than BADIT", "badit-energy", ("badit",)),
    Claim("routing by energy is better than the best baseline", "badit-energy", BASELINES),
    Claim("routing by energy forgets less than BADIT", "badit-energy", ("badit",), forgets=True),
    Claim("routing by energy forgets less than the best baseline", "badit-energy", BASELINES,
          forgets=True),
    *(Claim(f"under routing by energy DOG is better than {what}", "badit-energy", (theirs,))
      for what, theirs in (("regrouping at random", "badit-energy-random"),
                           ("none", "badit-energy-no_dog"),
                           ("by squared cosines", "badit-energy-squared"))),
)


class Verdict(NamedTuple):
    """A claim in one setting: the difference, its 95 % interval, and over what."""

    claim: Claim
    where: str  # model, setting
    against: str  # the best of `theirs`
    mean: float
    low: float
    high: float
    seeds: int
    lower: int  # of the seeds, those on which ours is lower

    def sentence(self):
        """Shown, the reverse shown, or not shown and how large it can be."""
        size = max(abs(self.low), abs(self.high))
        on = f" on these {self.seeds} seeds" if self.seeds < ENOUGH else ""
        if self.seeds == 1:
            found = "**not judged**: one seed says nothing about the next"
        elif self.high < 0:
            found = f"**shown{on}**"
        elif self.low > 0:
            found = f"**the reverse is shown{on}**"
        else:
            found = f"**not shown**: if there is a difference, it is below {size:.3f}"
        few = ""
        if 1 < self.seeds < ENOUGH:
            few = (f"; {self.seeds} seeds alone could show nothing below "
                   f"p = {smallest_wilcoxon_p(self.seeds):g}")
        return (f"{self.where}: {self.claim.text}: {found} (against {self.against} "
                f"{self.mean:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}; lower on "
                f"{self.lower} of {self.seeds} seed{'s' * (self.seeds > 1)}{few}).")


def verdicts(records, claims=PAPER + BEYOND):
    """A Verdict for each claim and each model and setting whose runs measured losses for it."""
    measured = {key: {run.seed: run for run in runs if run.losses()}
                for key, runs in cells(records).items()}
    found = []
    for claim in claims:
        for (model, variant, setting), ours in measured.items():
            if variant == VARIANTS[claim.ours] and ours and (
                    not claim.forgets or all(map(forgets, ours.values()))):
                found += judge(claim, measured, model, setting, ours)
    return found


def judge(claim, measured, model, setting, ours):
    """[the Verdict], or [] without a pair of runs. The best of several is so on the same seeds."""
    pairs = {}
    for name in claim.theirs:
        theirs = measured.get((model, (VARIANTS | FORMER)[name], setting), {})
        both = sorted(ours.keys() & theirs.keys())
        if both:
            pairs[name] = [(ours[seed], theirs[seed]) for seed in both]
    if not pairs:
        return []
    most = max(map(len, pairs.values()))
    pairs = {name: each for name, each in pairs.items() if len(each) == most}
    measure = forgetting if claim.forgets else final_loss
    best = min(pairs, key=lambda name: metrics.mean(final_loss(run) for _, run in pairs[name]))
    differences = (forgotten if claim.forgets else answer_losses)(pairs[best])
    by_seed = [measure(mine) - measure(theirs) for mine, theirs in pairs[best]]
    return [Verdict(claim, f"{model}, {setting}", best, *paired_bootstrap(differences), most,
                    sum(value < 0 for value in by_seed))]


def answer_losses(pairs):
    """{task: (seeds, items)} of which the mean is the difference of the task's losses."""
    differences = {}
    for task in pairs[0][0].order:
        names = sorted(pairs[0][0].items[task])
        tokens = np.array([pairs[0][0].items[task][name]["loss"][1] for name in names])
        sums = np.array([[mine.items[task][name]["loss"][0] - theirs.items[task][name]["loss"][0]
                          for name in names] for mine, theirs in pairs])
        differences[task] = sums / tokens.mean()
    return differences


def forgotten(pairs):
    """{"tasks": (seeds, tasks)} of which the mean is the difference of `forgetting`.

    Tasks take the place of items. The last task of a seed's order cannot be forgotten: it is 0,
    and the others weigh the more.
    """
    def by_task(run):
        losses, last = run.losses(), run.losses()[-1]
        return {task: last[i] - losses[i][i] for i, task in enumerate(run.order)}

    names = sorted(pairs[0][0].order)
    gained = [(by_task(mine), by_task(theirs)) for mine, theirs in pairs]
    scale = len(names) / (len(names) - 1)
    return {"tasks": scale * np.array([[mine[name] - theirs[name] for name in names]
                                       for mine, theirs in gained])}


def lines(records, claims):
    """The sentences for some claims."""
    return [verdict.sentence() for verdict in verdicts(records, claims)]
