"""The expected rank of a distribution over the vocabulary, from histograms that are filled tile by tile, unsorted.

The sum of rank times probability is a sum over buckets of logits: a bucket's mass times the number of tokens in higher
buckets, plus a term for the order within the bucket. The bucket's width bounds that term; `values` returns the bound
too, so that the caller can sort the few rows that need more accuracy.

Shapes: N rows, W entries of a tile, S entries of a sample, B buckets.
"""

import torch
from torch import Tensor

_BUCKETS = 2048
_PER_DEVIATION = 128
"""Buckets per standard deviation of a row's logits."""
_ROWS = 64
"""Rows whose buckets fit a CPU's cache."""
_BELOW = 4
"""The buckets begin this many standard deviations below the mean; they end 12 above it."""


class ExpectedRank:
    """Sorts the tokens of each row into buckets by logit."""

    def __init__(self, sample: Tensor) -> None:
        """Lay out each row's buckets from a sample of its logits, [N, S]."""
        rows = sample.shape[0]
        mean, deviation = sample.mean(1), sample.std(1, correction=0)
        tiny = 1e-6 * sample.abs().amax(1).clamp_min(1e-6)
        self._scale = _PER_DEVIATION / torch.maximum(deviation, tiny)
        self._offset = _BELOW * _PER_DEVIATION - mean * self._scale
        self._counts = sample.new_zeros(rows, _BUCKETS)
        self._mass = sample.new_zeros(rows, _BUCKETS)
        self._memory: tuple[Tensor, Tensor, Tensor] | None = None

    def see(self, logits: Tensor, exponentials: Tensor) -> None:
        """Add a tile: logits [N, W], and their exponentials up to a factor per row."""
        width = logits.shape[1]
        if self._memory is None:  # no tile is wider than the first
            self._memory = (
                torch.empty_like(logits),
                torch.empty_like(logits, dtype=torch.int32),
                torch.empty_like(logits, dtype=torch.int64),
            )
            self._ones = logits.new_ones(width).expand_as(logits)
        places, narrow, wide = (m.flatten()[: logits.numel()].view_as(logits) for m in self._memory)
        torch.mul(logits, self._scale[:, None], out=places)
        places += self._offset[:, None]
        # Through int32, which is faster; NaN becomes some integer, and the clamp makes it legal.
        narrow.copy_(places).clamp_(0, _BUCKETS - 1)
        wide.copy_(narrow)
        self._mass.scatter_add_(1, wide, exponentials)
        self._counts.scatter_add_(1, wide, self._ones[:, :width])

    def values(self) -> tuple[Tensor, Tensor]:
        """The expected ranks, and bounds on their relative errors; [N] float64 each."""
        width = (1 / self._scale).double().clamp_max(3)  # from there on, the bound is the whole term
        parts = zip(self._counts.split(_ROWS), self._mass.split(_ROWS), width.split(_ROWS), strict=True)
        ranks, off = zip(*(_rank(*part) for part in parts), strict=True)
        return torch.cat(ranks), torch.cat(off)


def _rank(counts: Tensor, mass: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """`values` for a few rows, from buckets [N, B] of width [N]."""
    higher = counts.sum(1, keepdim=True) - counts.cumsum(1)
    total = mass.sum(1).double()
    within = (torch.linalg.vecdot(mass, counts).double() - total) / 2
    # Probabilities within a bucket differ by a factor of at most exp(width). For evenly spread tokens, the less likely
    # of a pair is on average a sixth of the width below the pair's mean. The deficit is 0 for ties, and largest if
    # half of the tokens lie at either end.
    lacking = within * width / 6
    ranks = total + torch.linalg.vecdot(mass, higher).double() + within - lacking
    off = torch.minimum(2 * lacking, lacking + total * width / 12)
    for end in (0, -1):
        off += (mass[:, end] * (counts[:, end] - 1).clamp_min(0)).double() / 2
    return ranks / total, off / ranks
