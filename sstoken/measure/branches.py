"""Input and output of greedy generation."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int32]


@dataclass(frozen=True)
class Branch:
    """A prefix of a sequence, optionally followed by another token than the sequence has."""

    sequence: int
    """Index of the sequence."""
    length: int
    """Length of the prefix, at least 1."""
    token: int | None = None
    """The token after the prefix; None: the continuation follows the prefix directly."""


@dataclass(frozen=True)
class Continuation:
    """What the model generates after a branch."""

    ids: IdArray
    """[T], without the stop token."""
    ended: bool
    """Whether it reached a stop token; False: it was cut at the limit."""
