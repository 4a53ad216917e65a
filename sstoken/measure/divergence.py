"""Kullback-Leibler divergence of two checkpoints' distributions, over the full vocabulary, tile by tile.

Shapes: N rows, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from sstoken.measure.precision import without_autocast
from sstoken.measure.token_loss import OutputHead, row_tiles, tiles

Side = tuple[Tensor, OutputHead]
"""Hidden states [N, D], and the output head to apply to them."""


@without_autocast
def measure_divergence(
    hidden: Tensor, head: OutputHead, other_hidden: Tensor, other_head: OutputHead
) -> tuple[Tensor, Tensor]:
    """KL(this || other) and KL(other || this), in nats, [N] each, at least fp32.

    Both sides are hidden states [N, D] at the same positions, with output heads over the same vocabulary.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    forward, reverse = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
    for rows in row_tiles(hidden.shape[0]):
        forward[rows], reverse[rows] = _compare((hidden[rows], head), (other_hidden[rows], other_head))
    return forward, reverse


def _compare(this: Side, other: Side) -> tuple[Tensor, Tensor]:
    """Both directions for the rows of one tile, [N] float64 each."""
    size, device = this[0].shape[0], this[0].device
    sums = torch.zeros(2, 2, size, dtype=torch.float64, device=device)
    """By side: the sum of exponentials, and the sum of these times the difference of logits, this minus other."""
    # Not -inf: all logits of a tile may be -inf, and -inf - -inf is NaN.
    largest = torch.full((2, size), torch.finfo(torch.float32).min, dtype=torch.float64, device=device)
    for (_, ours), (_, theirs) in zip(tiles(*this), tiles(*other), strict=True):
        apart = ours - theirs
        for side, logits in enumerate((ours, theirs)):
            raised = torch.maximum(largest[side], logits.amax(1).double())
            sums[side] *= (largest[side] - raised).exp()
            largest[side] = raised
            weights = logits.sub_(raised.to(logits.dtype)[:, None]).exp_()
            sums[side, 0] += weights.sum(1)
            sums[side, 1] += torch.linalg.vecdot(weights, apart.masked_fill(weights == 0, 0))
    log_totals, means = largest + sums[:, 0].log(), sums[:, 1] / sums[:, 0]
    forward = means[0] - log_totals[0] + log_totals[1]
    reverse = log_totals[0] - means[1] - log_totals[1]
    return forward.clamp_min_(0), reverse.clamp_min_(0)
