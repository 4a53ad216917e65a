"""Signals that need another pass over the data: responses without their prompts, and noise on the embeddings.

Shapes: T positions of a sequence, n response tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.measure.batch import Ids, Mask
from sstoken.measure.noise import Noise, draw_noise
from sstoken.measure.scorer import Measured, Scorer
from sstoken.signals import Signal

SECOND_PASS = frozenset({"loss_unconditional", "pmi_noisy"})
"""What `measure_second_pass` measures, by name without argument."""
MeasureAlone = Callable[[list[Ids], list[Mask], list[int]], Iterator[tuple[int, Measured]]]
"""Measures the loss of responses by themselves."""


def measure_second_pass(
    scorer: Scorer, sequences: Sequence[Ids], response_masks: Sequence[Mask], wanted: Sequence[Signal]
) -> list[Measured]:
    """Measure signals of every sequence's response tokens except the first, [n - 1] each (empty if n is 0).

    Args:
        scorer: measures the loss.
        sequences: token ids, [T] each.
        response_masks: [T] each. The response alone is the response tokens of all turns, back to back.
        wanted: signals from `SECOND_PASS`.
    """
    found: list[Measured] = [{} for _ in sequences]
    for signal in wanted:
        draw = None if signal.argument is None else int(signal.argument)

        def measure(
            responses: list[Ids], masks: list[Mask], indices: list[int], draw: int | None = draw
        ) -> Iterator[tuple[int, Measured]]:
            noise: Noise | None = None
            if draw is not None:  # what these tokens get beside their prompts
                own = [sequences[i] for i in indices], [response_masks[i] for i in indices]
                noise = partial(_noise_of, *own, draw)
            return scorer.measure(responses, masks, noise=noise)

        alone = losses_alone(sequences, response_masks, measure)
        for measured, losses in zip(found, alone, strict=True):
            measured[signal.name] = losses
        if draw is None:
            continue
        noise = partial(_noise_of, sequences, None, draw)
        for index, signals in scorer.measure(sequences, response_masks, noise=noise):
            found[index][signal.name] = signals["loss"][1:] - found[index][signal.name]
    return found


def losses_alone(
    sequences: Sequence[Ids], response_masks: Sequence[Mask], measure: MeasureAlone
) -> list[NDArray[np.float32]]:
    """Losses of each response without its prompt, [n - 1] each (empty if n is 0).

    `measure` measures responses, given their masks and which of the sequences they are of.
    """
    losses: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(sequences)
    indices = [i for i, mask in enumerate(response_masks) if mask.sum() > 1]
    responses = [sequences[i][response_masks[i]] for i in indices]
    masks = [np.arange(ids.size) > 0 for ids in responses]
    for at, signals in measure(responses, masks, indices):
        losses[indices[at]] = signals["loss"].astype(np.float32, copy=False)
    return losses


def _noise_of(
    sequences: Sequence[Ids], masks: Sequence[Mask] | None, draw: int, index: int, size: int
) -> Any:
    """Noise of one sequence, [T, D]; with masks, only of its response tokens, [n, D]."""
    noise = draw_noise(sequences[index], size, draw)
    return noise if masks is None else noise[masks[index]]
