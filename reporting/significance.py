"""What a difference between two methods is worth: a paired bootstrap, put in plain words."""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def paired_bootstrap(differences, resamples=RESAMPLES, level=LEVEL):
    """(mean, low, high) of a difference of scores, with a percentile confidence interval.

    `differences` {task: array (seeds, items)} of one method's score minus the other's, on the same
    seeds and items. Seeds and items are drawn jointly, with replacement: one draw of seeds for all
    tasks, and within each task, which is a stratum, one draw of items for all seeds. The statistic
    is the mean over tasks. Its random numbers are its own.
    """
    generator = np.random.default_rng(0)
    seeds = len(next(iter(differences.values())))
    weight_s = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (R, S)
    total = np.zeros(resamples)
    for values in differences.values():
        items = values.shape[1]
        weight_i = generator.multinomial(items, np.full(items, 1 / items), resamples) / items
        total += ((weight_s @ values) * weight_i).sum(1)  # (R, S) (S, I) * (R, I)
    statistics = total / len(differences)
    mean = float(np.mean([values.mean() for values in differences.values()]))
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def smallest_wilcoxon_p(seeds):
    """The smallest two-sided p that Wilcoxon's signed-rank test can give for so many pairs."""
    return min(1.0, 2.0 ** (1 - seeds))


def sentence(ours, theirs, where, mean, low, high, seeds, items):
    """What the data show, and what they do not, about the difference ours - theirs."""
    side = "higher" if mean >= 0 else "lower"
    text = (f"{where}: {ours} scores {abs(mean):.2f} points {side} than {theirs} "
            f"(95 % interval {low:+.2f} to {high:+.2f}; {seeds} seed{'s' * (seeds > 1)}, "
            f"{items} items). ")
    if low > 0 or high < 0:
        text += f"The interval excludes 0: on these seeds and items {ours} is {side}. "
    else:
        text += "The interval includes 0: the data do not show which is better. "
    if seeds == 1:
        text += "One seed says nothing about the variation between trainings."
    else:
        text += (f"With {seeds} seeds Wilcoxon's test over seeds could not give a two-sided p "
                 f"below {smallest_wilcoxon_p(seeds):g}, whatever the scores")
        text += (", and so few seeds make the interval too narrow." if seeds < 5 else ".")
    return text
