"""`pmi-band`: which stretches of an answer belong to its question, by one checkpoint and without training.

Two causes, each a mean over a window of tokens, because noise comes in stretches and a single token's value says more
about what kind of word it is than about where it stands:

- what the prompt makes likelier belongs to the answer: pointwise mutual information, `loss_unconditional - loss`.
  Stock phrases, fillers, other answers' sentences and repeated ones gain nothing from the prompt;
- what is unlikely in its place is broken, and what is certain teaches nothing: the distance of the mean loss from
  `level`. Shuffled words, typing errors and wrong numbers are unlikely; copies are certain.

Plain arithmetic that works on numpy arrays and on torch tensors, on their device.
"""

from typing import Any

WINDOW = 4
CLIP = 2.0
LEVEL = 1.0
WEIGHT = 0.5
MOST_LOSS = 8.0
"""Nats: a token's loss counts for no more, so that one token does not rule its window."""


def pmi_band(
    loss: Any,
    loss_unconditional: Any,
    offsets: Any,
    *,
    window: int = WINDOW,
    clip: float = CLIP,
    level: float = LEVEL,
    weight: float = WEIGHT,
) -> Any:
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


def window_mean(values: Any, offsets: Any, window: int) -> Any:
    """The mean of the values at most `window` places away, within the example: [N], of the type of `values`.

    Summed in the order of the tokens: the same bits on numpy and torch, whatever examples stand beside.
    """
    import numpy as np

    starts = np.asarray(offsets)
    counts = np.diff(starts)
    at = np.arange(starts[-1])
    first, end = np.repeat(starts[:-1], counts), np.repeat(starts[1:], counts)
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
