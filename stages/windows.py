"""Cut examples that are longer than the model takes into overlapping windows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import UsageError


@dataclass
class Windows:
    """The sequences to measure: each response token is measured in exactly one, in the order of the examples."""

    sequences: list[NDArray[np.int32]] = field(default_factory=list)
    """Token ids, [T] each."""
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    """[T] each: the response tokens measured in this window."""
    examples: list[int] = field(default_factory=list)
    """The example that each window is from."""
    fresh: list[int] = field(default_factory=list)
    """How many of each window's tokens no earlier window has."""

    @property
    def cut(self) -> int:
        """The number of examples in several windows."""
        return int((np.bincount(self.examples) > 1).sum()) if self.examples else 0


def windows(
    sequences: Sequence[NDArray[np.int32]],
    masks: Sequence[NDArray[np.bool_]],
    longest: int | None,
    stride: int | None,
) -> Windows:
    """Cut sequences; what fits stays in one piece.

    Args:
        sequences: token ids, [T] each.
        masks: [T] each, True on response tokens.
        longest: most tokens that the model takes; None: no limit.
        stride: fresh tokens at the end of each later window (the last may have fewer), after at least
            `longest - stride` tokens of context; None: cut nothing.

    Raises:
        UsageError: the stride leaves no token of context.
    """
    found = Windows()
    for example, (ids, mask) in enumerate(zip(sequences, masks, strict=True)):
        ends = [ids.size]
        if longest is not None and stride is not None and ids.size > longest:
            if stride >= longest:
                raise UsageError(
                    f"stride is {stride}, and the model takes {longest} tokens; legal is 1 <= stride < {longest}"
                )
            ends = [*range(longest, ids.size, stride), ids.size]
        seen = 0
        for end in ends:
            start = max(0, end - longest) if len(ends) > 1 and longest is not None else 0
            own = mask[start:end].copy()
            own[: seen - start] = False
            found.sequences.append(ids[start:end])
            found.masks.append(own)
            found.examples.append(example)
            found.fresh.append(end - seen)
            seen = end
    return found
