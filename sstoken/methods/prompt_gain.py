"""`pmi-band`: finds the stretches of an answer that belong to its question, with one checkpoint and no training.

The score has two terms. Both are means over a window of tokens: noise comes in stretches, and a single token's value
tells more about the kind of word than about its place.

- Pointwise mutual information, `loss_unconditional - loss`: what the prompt makes likelier belongs to the answer.
  Stock phrases, fillers, repetitions and sentences from other answers gain nothing from the prompt.
- The distance of the mean loss from `level`: unlikely text (shuffled words, typos, wrong numbers) is broken, and
  certain text (copies) teaches nothing.

Plain arithmetic, on numpy arrays or on torch tensors on any device.
"""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from sstoken.methods.base import Method
from sstoken.methods.excess_loss import KEEP_SHARE, Share
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import IntArray

MOST_LOSS = 8.0
"""Nats; a token's loss is clipped to this, so that one token does not dominate its window."""


class PmiBandParams(Share):
    """Parameters of pmi-band."""

    window: Annotated[int, Field(ge=0)] = 4
    """Tokens on either side that a mean includes."""
    clip: Annotated[float, Field(gt=0)] = 2.0
    """One token's gain from the prompt is clipped to plus or minus this many nats."""
    level: Annotated[float, Field(ge=0)] = 1.0
    """The mean loss, in nats, that costs nothing."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """The cost of each nat of distance from `level`."""


def pmi_band(
    loss: Array,
    loss_unconditional: Array,
    offsets: IntArray,
    *,
    window: int = 4,
    clip: float = 2.0,
    level: float = 1.0,
    weight: float = 0.5,
) -> Array:
    """Score each response token, in nats; higher is kept first. Scores are comparable across examples.

    Args:
        loss: [N] float64, nats: the response tokens of E examples, back to back.
        loss_unconditional: [N], the loss of the response alone, without its prompt. NaN, as at an example's first
            token, counts as no gain from the prompt.
        offsets: [E + 1], where each example starts.
        window: tokens on either side that a mean includes, within the example.
        clip: nats; a token's gain from the prompt is clipped to plus or minus this.
        level: nats; the mean loss that costs nothing.
        weight: the cost of each nat of distance from `level`.

    Returns:
        [N], of the same type as `loss`.
    """
    gain = loss_unconditional - loss
    gain = gain.clip(-clip, clip)
    gain[gain != gain] = 0.0  # NaN
    near = window_mean(loss.clip(0.0, MOST_LOSS), offsets, window)
    return window_mean(gain, offsets, window) - weight * abs(near - level)


def window_mean(values: Array, offsets: IntArray, window: int) -> Array:
    """Mean of the values at most `window` tokens away, within the example: [N], of the same type as `values`.

    Sums in token order, so that numpy and torch give the same bits, whatever examples share the batch.
    """
    counts = np.diff(offsets)
    at = np.arange(offsets[-1])
    first, end = np.repeat(offsets[:-1], counts), np.repeat(offsets[1:], counts)
    total, num = 0.0 * values, 0.0 * values
    for distance in range(-window, window + 1):
        inside: Any = ((at + distance >= first) & (at + distance < end)).astype(np.float64)
        near: Any = np.clip(at + distance, 0, max(0, len(at) - 1))
        if not isinstance(values, np.ndarray):
            import torch

            inside, near = (torch.from_numpy(x).to(values.device) for x in (inside, near))
        total = total + values[near] * inside
        num = num + inside
    return total / num


def _score(tokens: Tokens, params: PmiBandParams) -> Array:
    return pmi_band(
        tokens["history.loss"],
        tokens["history.loss_unconditional"],
        tokens.offsets,
        window=params.window,
        clip=params.clip,
        level=params.level,
        weight=params.weight,
    )


METHODS = (
    Method(
        name="pmi-band",
        family="instruction",
        inputs=("history.loss", "history.loss_unconditional"),
        formula="mean(clip(loss_unconditional - loss)) - weight * "
        f"|mean(min(loss, {MOST_LOSS:g})) - level|, means over a window of tokens",
        source="this project; measured in docs/choosing.md",
        score=_score,
        policy=KEEP_SHARE,
        params=PmiBandParams,
        scopes=("global", "sample"),
    ),
)
