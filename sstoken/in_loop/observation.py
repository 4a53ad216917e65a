"""`Observation`: what observers of in-loop training get for each example. Does not import torch."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Observation:
    """One example as a training step saw it; n tokens."""

    step: int
    """Optimizer steps finished before this one."""
    input_ids: NDArray[np.int64]
    """[n]."""
    response_mask: NDArray[np.bool_]
    """[n]; never the first token."""
    keep_mask: NDArray[np.bool_]
    """[n]."""
    loss: NDArray[np.float32]
    """[n] nats under the model in training; NaN off the response."""
    attention: NDArray[np.float32] | None
    """[n] in [0, 1], NaN off the response; None if the selection does not use it."""
    weight: NDArray[np.float64] | None = None
    """[n], 0 off the response; None if the method gives no weights."""

    @property
    def key(self) -> bytes:
        """Identifies the example by its tokens and response mask, in whatever batch it appears."""
        return example_key(self.input_ids, self.response_mask)


Observer = Callable[[Observation], None]


def example_key(input_ids: NDArray[Any], response_mask: NDArray[np.bool_]) -> bytes:
    """Return 16 bytes that identify an example; whether its first token is a response token is ignored."""
    digest = hashlib.blake2b(input_ids.astype(np.int64).tobytes(), digest_size=16)
    digest.update(response_mask[1:].tobytes())
    return digest.digest()
