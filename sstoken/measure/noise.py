"""Noise on a model's input embeddings: NEFTune's, as used by T-SHIRT (arXiv 2506.01317).

Uniform within +-alpha / sqrt(T * D). A sequence's noise depends only on its tokens and the number of the draw, not on
the order of examples or their batches.

Shapes: B rows, T positions, D hidden size.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sstoken.measure.batch import Batch, Ids

ALPHA = 5.0
"""T-SHIRT's setting."""
Noise = Callable[[int, int], NDArray[np.float32]]
"""`noise(index, D)`: [T, D], added to the embeddings of the sequence of that index."""


def draw_noise(ids: Ids, size: int, draw: int) -> NDArray[np.float32]:
    """Draw the noise of a sequence, [T, D]; `draw` counts independent draws."""
    digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=8).digest()
    random = np.random.Generator(np.random.Philox(key=[int.from_bytes(digest), draw]))
    noise = random.random((ids.size, size), np.float32)
    return (2 * noise - 1) * np.float32(ALPHA / (ids.size * size) ** 0.5)


@contextmanager
def noisy_embeddings(model: Any, batch: Batch, noise: Noise | None) -> Iterator[None]:
    """Within this context, a forward pass on the batch adds noise to its embeddings; None adds none."""
    if noise is None:
        yield
        return

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = torch.zeros(output.shape, dtype=output.dtype)
        for index, (row, start, stop) in zip(batch.indices, batch.segments, strict=True):
            added[row, start:stop] = torch.from_numpy(noise(index, output.shape[2])).to(output.dtype)
        return output + added.to(output.device)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
