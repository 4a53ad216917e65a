"""AUROC, average precision, and paired intervals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

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
    total: FloatArray,
    number: FloatArray,
    base_total: FloatArray,
    base_number: FloatArray,
    level: float = LEVEL,
) -> Interval:
    """The mean of one method less that of another, over the same seeds and the same items.

    Several seeds: both seeds and items are drawn (a crossed design), and the interval is Student's, since resampling
    as few as five seeds gives one that is too narrow. One seed: items are resampled.

    Args:
        total: [S, I], the sum over item i of the model trained with seed s.
        number: [S, I], of how many tokens (or 1).
        base_total: [S, I], of the method compared with.
        base_number: [S, I].
        level: of the interval.
    """
    mean, base_mean = (t.sum() / max(n.sum(), 1e-12) for t, n in ((total, number), (base_total, base_number)))
    value = float(mean - base_mean)
    if len(total) == 1:
        drawn = _resampled_mean(total[0], number[0]) - _resampled_mean(base_total[0], base_number[0])
        return _interval(value, drawn, level)
    parts = (total - mean * number) / max(number.sum(), 1e-12)
    parts = parts - (base_total - base_mean * base_number) / max(base_number.sum(), 1e-12)
    error, freedom = _crossed_error(parts * parts.size)
    half = float(error * stats.t.ppf((1 + level) / 2, freedom))
    return Interval(value, value - half, value + half)


def _resampled_mean(total: FloatArray, number: FloatArray) -> FloatArray:
    """[NUM_RESAMPLES]: the same draws of items whatever is given."""
    items = len(total)
    weights = np.random.default_rng(0).multinomial(items, np.full(items, 1 / items), NUM_RESAMPLES)
    return (weights @ total) / np.maximum(weights @ number, 1e-12)


def _crossed_error(values: FloatArray) -> tuple[float, float]:
    """The standard error of the mean of values [S, I], S and I both drawn, and its degrees of freedom (Satterthwaite).

    From the mean squares of the rows, the columns and what is left; never less than that of rows or columns alone.
    """
    rows, columns = values.mean(1) - values.mean(), values.mean(0) - values.mean()
    left = values - values.mean() - rows[:, None] - columns
    free = [len(rows) - 1, len(columns) - 1]
    free.append(free[0] * free[1])
    sums = len(columns) * (rows**2).sum(), len(rows) * (columns**2).sum(), (left**2).sum()
    squares = [total / max(1, f) for total, f in zip(sums, free, strict=True)]
    both = squares[0] + squares[1] - squares[2]
    alone = int(np.argmax(squares[:2]))
    if both <= squares[alone]:
        return (squares[alone] / values.size) ** 0.5, max(1, free[alone])
    freedom = both**2 / sum(m**2 / max(1, f) for m, f in zip(squares, free, strict=True))
    return (both / values.size) ** 0.5, max(1, free[0], freedom)


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


def _interval(value: float, drawn: FloatArray, level: float = LEVEL) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
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
