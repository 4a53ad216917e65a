"""AUROC, average precision, and paired bootstrap intervals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
NUM_RESAMPLES = 2000
LEVEL = 0.95
NUM_BINS = 2048
"""Distinct scores are put together to so many before answers are resampled; the estimate itself is exact."""


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def paired_difference(
    total: FloatArray, number: FloatArray, base_total: FloatArray, base_number: FloatArray, seed: int = 0
) -> Interval:
    """The mean of one method less that of another, over the same seeds and the same items, both resampled.

    Args:
        total: [S, I], the sum over item i of the model trained with seed s.
        number: [S, I], of how many tokens (or 1).
        base_total: [S, I], of the method compared with.
        base_number: [S, I].
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    seeds, items = total.shape
    w_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), NUM_RESAMPLES).astype(np.float64)
    w_item = rng.multinomial(items, np.full(items, 1 / items), NUM_RESAMPLES).astype(np.float64)

    def mean(x: FloatArray, n: FloatArray) -> FloatArray:
        return np.einsum("rs,si,ri->r", w_seed, x, w_item) / np.maximum(
            np.einsum("rs,si,ri->r", w_seed, n, w_item), 1e-12
        )

    drawn = mean(total, number) - mean(base_total, base_number)
    value = total.sum() / max(number.sum(), 1e-12) - base_total.sum() / max(base_number.sum(), 1e-12)
    return _interval(float(value), drawn)


def auroc(binned: tuple[FloatArray, FloatArray]) -> float:
    """The probability that noise ranks below content, ties half: from the weights of each distinct score."""
    content, noise = binned
    below = np.cumsum(noise) - noise / 2
    return float((content * below).sum() / max(content.sum() * noise.sum(), 1e-12))


def average_precision(binned: tuple[FloatArray, FloatArray]) -> float:
    """Of dropping the lowest scores first: the mean, over the noise, of the noise's share of what is dropped."""
    content, noise = binned
    dropped_noise = np.cumsum(noise)
    precision = dropped_noise / np.maximum(dropped_noise + np.cumsum(content), 1e-12)
    return float((precision * noise).sum() / max(noise.sum(), 1e-12))


def over_examples(
    measure: Callable[[tuple[FloatArray, FloatArray]], float],
    scores: FloatArray,
    content: NDArray[np.bool_],
    noise: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    num_resamples: int = 200,
) -> Interval:
    """A measure of how scores tell noise from content, with an interval over examples."""
    _, place = np.unique(scores, return_inverse=True)
    size, num = int(place.max()) + 1, len(offsets) - 1
    value = measure((np.bincount(place, content, size), np.bincount(place, noise, size)))
    if size > NUM_BINS:
        place, size = place * NUM_BINS // size, NUM_BINS
    cell = np.repeat(np.arange(num), np.diff(offsets)) * size + place
    weights = (
        np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), num_resamples).astype(np.float64)
    )
    drawn = [weights @ np.bincount(cell, x, num * size).reshape(num, size) for x in (content, noise)]
    return _interval(value, np.array([measure(both) for both in zip(*drawn, strict=True)]))


def _interval(value: float, drawn: FloatArray) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Rank correlation; ties in the order of the tokens."""
    rank_a, rank_b = (np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b))
    return float(np.corrcoef(rank_a, rank_b)[0, 1]) if len(a) > 2 else 0.0


def spearman_interval(a: FloatArray, b: FloatArray, offsets: NDArray[np.int64]) -> Interval:
    """The mean over examples of the rank correlation within each, with an interval over examples."""
    spans = zip(offsets[:-1], offsets[1:], strict=True)
    own = np.array([[spearman(a[i:j], b[i:j]) for i, j in spans]])
    return paired_difference(own, np.ones_like(own), np.zeros_like(own), np.ones_like(own))
