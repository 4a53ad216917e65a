"""The K largest logits of each row, found tile by tile.

The maxima of groups of 8 entries rule out most of a tile: the K-th largest maximum is a lower bound of the K largest
logits. Only groups above it are searched, and only their entries above it are kept as candidates.

Shapes: N rows, W entries of a tile, G groups, K logits wanted, C candidates.
"""

import numpy as np
import torch
from torch import Tensor

_GROUP = 8
_CANDIDATES = 128
"""Candidates that a row collects before all but the K largest are dropped."""


class TopLogits:
    """Keeps the K largest logits of each row, over all tiles seen."""

    def __init__(self, number: int) -> None:
        """`number`: K."""
        self._number = number
        self._seen = 0
        self._largest: Tensor | None = None
        """[N, K] ascending: the K largest group maxima; the first is the bound."""
        self._candidates: Tensor | None = None
        """[N, C], filled from the left; -inf elsewhere."""
        self._filled: Tensor | None = None
        """[N]: the number of candidates."""

    def see(self, logits: Tensor) -> None:
        """Look at a tile [N, W], without keeping or changing it."""
        if self._largest is None:
            rows = logits.shape[0]
            self._largest = logits.new_full((rows, self._number), float("-inf"))
            self._candidates = logits.new_full((rows, _CANDIDATES), float("-inf"))
            self._filled = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        whole = logits.shape[1] // _GROUP * _GROUP
        if whole:
            # A group's entries are strided, so that one elementwise maximum serves all groups.
            self._see_groups(logits[:, :whole].unflatten(1, (_GROUP, -1)))
        if whole < logits.shape[1]:
            self._see_groups(logits[:, None, whole:])

    def _see_groups(self, groups: Tensor) -> None:
        """Groups [N, entries, G]."""
        assert self._largest is not None
        maxima = groups.amax(1)
        self._seen += 1
        if not self._seen & (self._seen - 1):  # a power of two: later tiles seldom raise the bound
            self._largest = _largest(torch.cat([self._largest, maxima], 1), self._number)
        bound = self._largest[:, :1]
        rows, places = (maxima > bound).nonzero(as_tuple=True)
        found = groups[rows, :, places]
        kept, entries = (found > bound[rows]).nonzero(as_tuple=True)
        if kept.numel():
            self._keep(rows[kept], found[kept, entries])

    def _keep(self, rows: Tensor, values: Tensor) -> None:
        """Store candidates [M], given with their rows [M] in ascending order."""
        assert self._filled is not None
        assert self._candidates is not None
        counts = torch.bincount(rows, minlength=self._filled.shape[0])
        if int((self._filled + counts).max()) > self._candidates.shape[1]:
            best = self._best()
            room = max(_CANDIDATES, self._number + int(counts.max()))
            self._candidates = best.new_full((best.shape[0], room), float("-inf"))
            self._candidates[:, : self._number] = best
            self._filled.fill_(self._number)  # a row with fewer has them at the end, behind -inf
        starts = counts.cumsum(0) - counts
        within = torch.arange(rows.numel(), device=rows.device) - (starts - self._filled)[rows]
        self._candidates[rows, within] = values
        self._filled += counts

    def _best(self) -> Tensor:
        """The K largest candidates of each row, [N, K]."""
        assert self._candidates is not None
        assert self._filled is not None
        width = max(self._number, int(self._filled.max()))
        return _largest(self._candidates[:, :width], self._number)

    def values(self) -> Tensor:
        """The K largest logits of each row, [N, K], in ascending order; -inf where the vocabulary is smaller."""
        assert self._largest is not None
        # Candidates are strictly above the bound. If they are fewer than K, the rest equal the bound.
        return torch.maximum(self._best(), self._largest[:, :1])


def _largest(values: Tensor, number: int) -> Tensor:
    """The `number` largest values of each row, ascending."""
    if values.device.type == "cpu":  # numpy's sort is faster here than torch's topk
        return torch.from_numpy(np.sort(values.numpy(), axis=1)[:, -number:])
    return values.topk(number, 1).values.flip(1)
