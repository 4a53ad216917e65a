"""What greedy generation starts from and gives."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int32]


@dataclass(frozen=True)
class Branch:
    """The beginning of a sequence, and a token of one's own put after it."""

    sequence: int
    """Index of the sequence."""
    length: int
    """How many of its tokens are kept, at least 1."""
    token: int | None = None
    """What comes after them; None: nothing, the continuation begins there."""


@dataclass(frozen=True)
class Continuation:
    """What the model says after a branch."""

    ids: IdArray
    """[T], without the token on which it stopped."""
    ended: bool
    """It stopped by itself; False: it was cut at the limit."""
