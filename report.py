"""Show one run: `python report.py runs/X` draws runs/X/figure.png, loss and expert angles."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from errors import InputError
from utils import atomic_path

SMOOTHING = 10  # steps in the running mean of the loss


def read_run(folder):
    """results.json and the lines of log.jsonl of a finished run. Raises InputError."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines]
    except OSError as error:
        raise InputError(f"{folder} holds no finished training run: {error}") from None
    except ValueError as error:
        raise InputError(f"{folder} is damaged: {error}") from None
    if not isinstance(results, dict) or not {"args", "regroupings"} <= results.keys() or not log:
        raise InputError(f"{folder} holds no finished training run: its results.json or log.jsonl "
                         "is of another kind")
    return results, log


def draw_loss(axes, log):
    """Loss per optimizer step, with its running mean; stages follow one another."""
    loss = np.array([record["loss"] for record in log])
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, label="each step")
    window = min(SMOOTHING, len(loss))
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1:], smooth, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="optimizer step", ylabel="loss per target token", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.legend()


def draw_angles(axes, regroupings):
    """Mean angles between and inside experts, before and after every regrouping."""
    for angle, color in (("inter", "tab:green"), ("intra", "tab:red")):
        points = [(index + shift, event[f"{angle}_{moment}"])
                  for index, event in enumerate(regroupings, start=1)
                  for moment, shift in (("before", -0.12), ("after", 0.12))
                  if event[f"{angle}_{moment}"] is not None]
        place = "between experts" if angle == "inter" else "inside experts"
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=place)
    axes.axhline(90, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="regrouping (left: before it, right: after it; the last only measures)",
             ylabel="degrees, mean over layers", title="Angles between gradients")
    axes.set_xticks(range(1, len(regroupings) + 1))
    axes.set_xlim(0.5, len(regroupings) + 0.5)
    axes.legend()


def draw(folder):
    """Write `folder`/figure.png and return its path."""
    results, log = read_run(folder)
    panels = 2 if results["regroupings"] else 1
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4), squeeze=False,
                                layout="constrained")
    draw_loss(axes[0, 0], log)
    if results["regroupings"]:
        draw_angles(axes[0, 1], results["regroupings"])
    args = results["args"]
    figure.suptitle(f"{args['method']}, {args['setting']} training, {Path(args['model']).name}, "
                    f"{args['suite']}, seed {args['seed']}")
    with atomic_path(folder / "figure.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    return folder / "figure.png"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --output_dir of a finished training run")
    args = parser.parse_args(argv)
    try:
        print(f"figure: {draw(args.run)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
