"""Methods that compare a response's loss with and without its prompt: T-SHIRT, and this project's `pmi-band`.

`pmi-band` finds the stretches of an answer that belong to its question, with one checkpoint and no training. Its score
has two terms. Both are means over a window of tokens: noise comes in stretches, and a single token's value tells more
about the kind of word than about its place.

- Pointwise mutual information, `loss_unconditional - loss`: what the prompt makes likelier belongs to the answer.
  Stock phrases, fillers, repetitions and sentences from other answers gain nothing from the prompt.
- The distance of the mean loss from `level`: unlikely text (shuffled words, typos, wrong numbers) is broken, and
  certain text (copies) teaches nothing.
"""

from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from sstoken.methods.base import Method, Params, Statistic
from sstoken.methods.excess_loss import KEEP_SHARE, Share
from sstoken.methods.policies import Where
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import IntArray

MOST_LOSS = 8.0
"""Nats; a token's loss is clipped to this, so that one token does not dominate its window."""


class TshirtParams(Params):
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of tokens that count."""


class PmiBandParams(Share):
    window: Annotated[int, Field(ge=0)] = 4
    """Tokens on either side that a mean includes."""
    clip: Annotated[float, Field(gt=0)] = 2.0
    """One token's gain from the prompt is clipped to plus or minus this many nats."""
    level: Annotated[float, Field(ge=0)] = 1.0
    """The mean loss, in nats, that costs nothing."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """The cost of each nat of distance from `level`."""


def _difference(tokens: Tokens, params: Params) -> Array:
    return tokens["current.loss"] - tokens["current.loss_unconditional"]


def _sizes(tokens: Tokens, params: Params) -> Array:
    size = abs(_difference(tokens, params))
    return size[size == size]  # a response's first token has no unconditional loss


def _counts(scores: Array, tokens: Tokens, params: Params) -> Array:
    return abs(scores) > tokens.statistics["q"]


def pmi_band(
    loss: Array, loss_unconditional: Array, offsets: IntArray, params: PmiBandParams | None = None
) -> Array:
    """Score each response token, in nats; higher is kept first. Scores are comparable across examples.

    Args:
        loss: [N] float64, nats: the response tokens of E examples, back to back; numpy or torch.
        loss_unconditional: [N], the loss of the response alone, without its prompt. NaN, as at an example's first
            token, counts as no gain from the prompt.
        offsets: [E + 1], where each example starts.
        params: None: the defaults.

    Returns:
        [N], of the same type as `loss`.
    """
    params = params or PmiBandParams()
    gain = (loss_unconditional - loss).clip(-params.clip, params.clip)
    gain[gain != gain] = 0.0  # NaN
    near = window_mean(loss.clip(0.0, MOST_LOSS), offsets, params.window)
    return window_mean(gain, offsets, params.window) - params.weight * abs(near - params.level)


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


_method = partial(Method, family="instruction")
METHODS = (
    _method(
        name="t-shirt",
        inputs=("current.loss", "current.loss_unconditional"),
        formula="loss - loss_unconditional",
        source="T-SHIRT, Fu et al. 2025, arXiv 2506.01317; Dynamite321/T-SHIRT; its tokens, see also --example",
        score=_difference,
        policy=Where("keeps absolute values above their 1 - ratio quantile", _counts),
        params=TshirtParams,
        scopes=("global",),
        statistics={"q": Statistic(_sizes, lambda params: 1 - params.ratio)},
        evidence="A",
        aliases=("tshirt",),
    ),
    _method(
        name="pmi-band",
        inputs=("history.loss", "history.loss_unconditional"),
        formula="mean(clip(loss_unconditional - loss)) - weight * "
        f"|mean(min(loss, {MOST_LOSS:g})) - level|, means over a window of tokens",
        source="this project; measured in docs/choosing.md",
        score=lambda tokens, params: pmi_band(
            tokens["history.loss"], tokens["history.loss_unconditional"], tokens.offsets, params
        ),
        policy=KEEP_SHARE,
        params=PmiBandParams,
        scopes=("global", "sample"),
    ),
)
