"""`pmi-band`: which stretches of an answer belong to its question, by one checkpoint and without training.

Two causes, each a mean over a window of tokens, because noise comes in stretches and a single token's value says more
about what kind of word it is than about where it stands:

- what the prompt makes likelier belongs to the answer: pointwise mutual information, `loss_unconditional - loss`.
  Stock phrases, fillers, other answers' sentences and repeated ones gain nothing from the prompt;
- what is unlikely in its place is broken, and what is certain teaches nothing: the distance of the mean loss from
  `level`. Shuffled words, typing errors and wrong numbers are unlikely; copies are certain.

Plain arithmetic that works on numpy arrays and on torch tensors, on their device.
"""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from sstoken.methods.base import Method
from sstoken.methods.excess_loss import KEEP_SHARE, Share
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import IntArray

MOST_LOSS = 8.0
"""Nats: a token's loss counts for no more, so that one token does not rule its window."""


class PmiBandParams(Share):
    """pmi-band's."""

    window: Annotated[int, Field(ge=0)] = 4
    """How many tokens on either side a mean takes in."""
    clip: Annotated[float, Field(gt=0)] = 2.0
    """The most nats that one token's gain from the prompt counts for."""
    level: Annotated[float, Field(ge=0)] = 1.0
    """The mean loss, in nats, that costs nothing."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """What a nat of distance from `level` costs."""


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
    """The score of each response token, nats; higher is kept first. Comparable across examples.

    Args:
        loss: [N] float64, nats, of the response tokens of E examples, one after the other.
        loss_unconditional: [N], of the response alone, without the prompt. NaN (an example's first token has none)
            counts as no gain from the prompt.
        offsets: [E + 1], where each example starts.
        window: a mean takes in so many tokens on either side, within the example.
        clip: a token's gain from the prompt counts for at most so many nats.
        level: nats; the mean loss that costs nothing.
        weight: what a nat of distance from `level` costs.

    Returns:
        [N], of the type of `loss`.
    """
    gain = loss_unconditional - loss
    gain = gain.clip(-clip, clip)
    gain[gain != gain] = 0.0  # NaN
    near = window_mean(loss.clip(0.0, MOST_LOSS), offsets, window)
    return window_mean(gain, offsets, window) - weight * abs(near - level)


def window_mean(values: Array, offsets: IntArray, window: int) -> Array:
    """The mean of the values at most `window` places away, within the example: [N], of the type of `values`.

    Summed in the order of the tokens: the same bits on numpy and torch, whatever examples stand beside.
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
        formula="mean(clip(loss_unconditional - loss)) - weight * |mean(loss) - level|, means over a window of tokens",
        source="this project; measured in docs/choosing.md",
        score=_score,
        policy=KEEP_SHARE,
        params=PmiBandParams,
        scopes=("global", "sample"),
    ),
)
