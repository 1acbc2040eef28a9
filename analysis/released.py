"""The released scripts' reading of neurons and weights, for comparison only (Fig. 1, 5 to 9).

They average 32 neighbouring neurons, or blocks of 32 x 32 weights, before they ask which are
active, and square a task's mean gradient. Axis names as in sharing.py, and
    B     blocks
"""

import numpy as np
import torch
import torch.nn.functional as F

from analysis import sharing

BLOCK, SHARE = 32, 0.1


def block_means(scores):
    """Means of blocks of scores (m,) or (out, in), as (B,); the last along an axis may be smaller.
    """
    pool = F.avg_pool1d if scores.dim() == 1 else F.avg_pool2d
    return pool(scores[None, None], BLOCK, ceil_mode=True).flatten()


def top(scores):
    """The largest tenth of scores (P,)."""
    (mask,) = sharing.top_masks(scores, [round(SHARE * len(scores))])
    return mask


def neuron_masks(z):
    """Active blocks (T, B) of signed mean pre-activations (T, m): one threshold for all tasks."""
    blocks = torch.stack([block_means(each) for each in z])  # (T, B)
    return top(blocks.flatten()).view_as(blocks).numpy()


def matrix_scores(mean, F_t):
    """What their reading needs of a matrix of one task: mean gradient and F_t, both (out, in).

    {"top": largest tenth of the squared mean (P,), "blocks" of it, "fisher": blocks of F_t (B,)}.
    """
    squares = mean.square()
    return {"top": top(squares.flatten()), "blocks": block_means(squares),
            "fisher": block_means(F_t)}


def task_jaccard(M):
    """(mean J of two tasks, by chance, left out) of masks M (T, P).

    Tasks with no unit or all units are left out; None where fewer than two are left.
    """
    k, P = M.sum(1), M.shape[1]
    kept = (k > 0) & (k < P)  # (T,)
    left_out = np.flatnonzero(~kept).tolist()
    if kept.sum() < 2:
        return None, None, left_out
    J = sharing.off_diagonal(sharing.jaccard(M[kept], M[kept]))
    return float(J.mean()), sharing.mean_chance_jaccard(k[kept], P), left_out


def compared(theirs, ours):
    """Their masks of blocks (T, B) beside our masks of units (T, P), both of a tenth."""
    (J, chance, left_out), (our_J, our_chance, _) = task_jaccard(theirs), task_jaccard(ours)
    return {"blocks": theirs.shape[1], "active": theirs.sum(1).tolist(), "left_out": left_out,
            "jaccard": J, "chance": chance, "ours": our_J, "ours_chance": our_chance}


def compared_weights(tops, blocks, fisher, ours):
    """`compared` of a matrix from all tasks' `matrix_scores`, and what their steps change.

    `fisher_blocks` is J of tasks for F_t in their blocks, `overlap` J of their largest tenth of
    single weights `tops` (T, P) with `ours` (T, P), by task.
    """
    theirs, ours_in_blocks = (np.stack([top(each).numpy() for each in scores])
                              for scores in (blocks, fisher))
    overlap = [float(sharing.jaccard(one[None], other[None])[0, 0])
               for one, other in zip(tops, ours, strict=True)]
    return compared(theirs, ours) | {
        "fisher_blocks": task_jaccard(ours_in_blocks)[0], "single": task_jaccard(tops)[0],
        "overlap": overlap}
