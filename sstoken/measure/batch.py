"""Sequences laid out in batches, and the positions at which signals are read.

Shapes: B rows, T positions, N response tokens of a batch, R positions that are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sstoken.measure.prompt_attention import Segment

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """Sequences laid out in [B, T], on the host."""

    indices: list[int]
    segments: list[Segment]
    ids: Tensor
    """[B, T]."""
    response: Tensor
    """[B, T] bool."""

    @cached_property
    def tokens(self) -> Tensor:
        """[N] positions of the response tokens in the flattened batch."""
        return self.response.flatten().nonzero()[:, 0]

    @property
    def predicting(self) -> Tensor:
        """[B, T] bool: the positions that predict a response token."""
        return self.response.roll(-1, 1)  # token 0 of a row is no response token


@dataclass(frozen=True)
class Reading:
    """The positions of a batch whose hidden states are read."""

    positions: Tensor
    """[R] in the flattened batch, ascending."""
    targets: Tensor
    """[R] the id that follows each position; 0 if that is no response token."""
    predicting: Tensor
    """[N] indices into `positions`: the position that predicts each response token."""
    at: Tensor
    """[N] indices into `positions`: each response token's own position; empty: not read."""


def read_positions(batch: Batch, *, at: bool) -> Reading:
    """Choose the positions that predict the response tokens and, with `at`, the tokens' own positions."""
    before, number = batch.tokens - 1, batch.tokens.numel()
    positions, where = torch.cat([before, batch.tokens] if at else [before]).unique(return_inverse=True)
    targets = torch.zeros_like(positions)
    targets[where[:number]] = batch.ids.flatten()[batch.tokens]
    return Reading(positions, targets, where[:number], where[number:])


def segments_of(lengths: Sequence[int]) -> list[Segment]:
    """Segments of a packed batch, in the form that `AttentionCapture.expect` takes."""
    return [(0, start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def lay_out(
    indices: list[int], sequences: Sequence[Ids], response_masks: Sequence[Mask], layout: str
) -> Batch:
    """Lay sequences out: "padded" on the right, one per row, or "packed" back to back into one row."""
    lengths = [len(sequences[i]) for i in indices]
    shape = (1, sum(lengths)) if layout == "packed" else (len(lengths), max(lengths))
    padded = [(row, 0, length) for row, length in enumerate(lengths)]
    segments = segments_of(lengths) if layout == "packed" else padded
    ids, response = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for index, (row, start, stop) in zip(indices, segments, strict=True):
        ids[row, start:stop] = sequences[index]
        response[row, start:stop] = response_masks[index]
    return Batch(indices, segments, torch.from_numpy(ids), torch.from_numpy(response))
