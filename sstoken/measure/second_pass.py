"""Signals that need another pass over the data: responses without their prompts, and noise on the embeddings.

Shapes: T positions of a sequence, n response tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sstoken.measure.batch import Ids, Mask
from sstoken.measure.noise import draw_noise
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
    columns = {s.name: _measure(scorer, sequences, response_masks, int(s.argument or 0)) for s in wanted}
    return [{name: values[i] for name, values in columns.items()} for i in range(len(sequences))]


def _measure(
    scorer: Scorer, sequences: Sequence[Ids], response_masks: Sequence[Mask], draw: int
) -> list[NDArray[np.float32]]:
    """Losses without the prompts; with the noise of a draw (from 1), losses beside the prompts minus these."""

    def beside(index: int, size: int) -> NDArray[np.float32]:
        return draw_noise(sequences[index], size, draw)

    def measure(
        responses: list[Ids], masks: list[Mask], indices: list[int]
    ) -> Iterator[tuple[int, Measured]]:
        def alone(at: int, size: int) -> NDArray[np.float32]:  # what these tokens get beside their prompts
            return beside(indices[at], size)[response_masks[indices[at]]]

        return scorer.measure(responses, masks, noise=alone if draw else None)

    found = losses_alone(sequences, response_masks, measure)
    if draw:
        for index, signals in scorer.measure(sequences, response_masks, noise=beside):
            found[index] = signals["loss"][1:] - found[index]
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
