"""Selection: from scores to a keep mask. Pure functions over numpy arrays and, for training loops, torch tensors.

Flat arrays hold the response tokens of several examples back to back: N tokens, E examples. `offsets` [E + 1] says
where each example starts (`offsets[e]:offsets[e + 1]`). Scores are float64. Ties always go to the earlier token, so
that every engine agrees.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor  # selecting offline loads no torch

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MINMAX_EPSILON = 1e-8
"""Added to the min-max range, as in the authors' code: a constant signal gives 0 everywhere."""


def places(offsets: NDArray[np.integer[Any]]) -> IntArray:
    """Return each token's place in its example, from 0, [N]."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def sums(values: NDArray[Any], offsets: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Return the sum of each example's values [N], [E]."""
    totals = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return totals[offsets[1:]] - totals[offsets[:-1]]


def runs(mask: BoolArray, offsets: NDArray[np.integer[Any]]) -> IntArray:
    """Return [U + 1] into the True tokens of a mask [N]: where each run of them within one example starts."""
    true = np.flatnonzero(mask)
    begins = np.diff(true, prepend=-2) != 1
    first = np.searchsorted(true, offsets[:-1])
    begins[first[first < true.size]] = True
    return np.append(np.flatnonzero(begins), true.size)


def num_kept(num_tokens: int, rho: float) -> int:
    """`ceil(rho * n)`, with rho taken as the decimal it is written as: 0.55 of 100 tokens is 55, not 56.

    Raises:
        UsageError: rho is outside (0, 1].
    """
    if not (isinstance(rho, int | float) and 0 < rho <= 1):
        raise UsageError(f"rho is {rho}; legal is 0 < rho <= 1 (the share of response tokens to keep)")
    return math.ceil(Fraction(str(rho)) * num_tokens)


def minmax(values: Float64Array, offsets: IntArray) -> Float64Array:
    """Scale each example's values to [0, 1) by their own minimum and range (paper, equation 6).

    Args:
        values: [N].
        offsets: [E + 1].

    Returns:
        [N]; 0 throughout an example whose values are all equal.
    """
    counts = np.diff(offsets)
    starts = offsets[:-1][counts > 0]  # reduceat cannot express an empty segment
    if starts.size == 0:
        return np.zeros(0)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    counts = counts[counts > 0]
    low_N, range_N = np.repeat(low, counts), np.repeat(high - low, counts)
    return (values - low_N) / (range_N + MINMAX_EPSILON)


def minmax_tensor(values: "Tensor", example: "Tensor", num_examples: int) -> "Tensor":
    """`minmax` of a tensor [N] float64, on its device; equal to the numpy version bit for bit.

    `example` [N] is the index of each token's example.
    """
    low = values.new_full((num_examples,), math.inf).scatter_reduce(0, example, values, "amin")
    high = values.new_full((num_examples,), -math.inf).scatter_reduce(0, example, values, "amax")
    return (values - low[example]) / ((high - low)[example] + MINMAX_EPSILON)


def keep_top(scores: Float64Array, units: IntArray, quotas: Sequence[int]) -> BoolArray:
    """Keep the `quotas[u]` highest scores of each unit; ties go to the earlier token.

    Args:
        scores: [N], finite.
        units: [U + 1], where each unit starts.
        quotas: [U].

    Returns:
        [N] bool.
    """
    counts = np.diff(units)
    unit = np.repeat(np.arange(counts.size), counts)
    # lexsort is stable: equal scores stay in the order of the tokens.
    order = np.lexsort((-scores, unit))
    rank_N = np.empty(scores.size, dtype=np.int64)
    rank_N[order] = np.arange(scores.size) - np.repeat(units[:-1], counts)
    return rank_N < np.asarray(quotas, dtype=np.int64)[unit]


def keep_top_tensor(scores: "Tensor", unit: "Tensor", quotas: Sequence[int]) -> "Tensor":
    """`keep_top` of a tensor, on its device.

    Args:
        scores: [N] float64, finite.
        unit: [N] index of each token's unit, ascending.
        quotas: [U].

    Returns:
        [N] bool.
    """
    order = (scores + 0.0).argsort(descending=True, stable=True)  # + 0.0 makes -0.0 and 0.0 the same
    order = order[unit[order].argsort(stable=True)]
    ones = unit.new_ones(unit.shape)
    counts = unit.new_zeros(len(quotas)).scatter_add(0, unit, ones)
    place = ones.cumsum(0) - 1 - (counts.cumsum(0) - counts)[unit]
    rank = place.new_empty(place.shape).index_copy(0, order, place)
    return rank < unit.new_tensor(quotas)[unit]


def keep_per_example(scores: Float64Array, offsets: IntArray, rho: float) -> BoolArray:
    """Keep the `ceil(rho * n)` highest scores of each example: [N] bool, of scores [N] and offsets [E + 1]."""
    lengths, inverse = np.unique(np.diff(offsets), return_inverse=True)
    quotas = [num_kept(int(n), rho) for n in lengths]  # exact and slow, so once for each distinct length
    return keep_top(scores, offsets, np.array(quotas)[inverse].tolist())


class Cut(NamedTuple):
    """The threshold of a global selection: keep every key above `key`, and the first `num_ties` equal to it."""

    key: int
    num_ties: int

    @property
    def value(self) -> float:
        """The score at the cut."""
        key, sign = np.uint64(self.key), np.uint64(1 << 63)
        bits = key ^ sign if key & sign else ~key
        return float(np.array(bits, dtype=np.uint64).view(np.float64))


Chunks = Callable[[], Iterable[Float64Array]]
"""Called once per pass; yields all scores in dataset order, in chunks [n] float64."""


def global_cuts(chunks: Chunks, ks: Sequence[int]) -> list[Cut]:
    """Find the cut that keeps the k highest scores, for each k, in constant memory; k is at most the number of scores.

    Radix selection: four passes over the scores, each fixing 16 of the key's 64 bits.
    """
    prefixes, remaining = [np.uint64(0)] * len(ks), list(ks)
    for shift in (48, 32, 16, 0):
        histograms = [np.zeros(1 << 16, dtype=np.int64) for _ in ks]
        for scores in chunks():
            all_keys = sortable_keys(scores)
            for prefix, histogram in zip(prefixes, histograms, strict=True):
                keys = all_keys
                if shift < 48:
                    keys = keys[(keys >> np.uint64(shift + 16)) == prefix]
                digits = (keys >> np.uint64(shift)) & np.uint64(0xFFFF)
                histogram += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        for i, histogram in enumerate(histograms):
            if not ks[i]:
                continue
            at_least = np.cumsum(histogram[::-1])[::-1]  # number of scores whose digit is >= d
            digit = int(np.flatnonzero(at_least >= remaining[i])[-1])
            remaining[i] -= int(at_least[digit] - histogram[digit])
            prefixes[i] = (prefixes[i] << np.uint64(16)) | np.uint64(digit)
    nothing = Cut((1 << 64) - 1, 0)
    return [Cut(int(p), r) if k else nothing for p, r, k in zip(prefixes, remaining, ks, strict=True)]


def global_quantile(chunks: Chunks, q: float) -> float:
    """The q-quantile of all scores, interpolated as `numpy.quantile` does; 0 if there are no scores."""
    total = sum(scores.size for scores in chunks())
    if not total:
        return 0.0
    below = math.floor((total - 1) * q)
    low, high = global_cuts(chunks, [total - below, max(1, total - below - 1)])
    return float(np.quantile([low.value, high.value], (total - 1) * q - below))


def keep_above(scores: Float64Array, cut: Cut, ties_before: int) -> tuple[BoolArray, int]:
    """Apply a global cut to the next chunk of scores [n].

    `ties_before` scores in earlier chunks equal the cut's. Returns the keep mask [n] and that number after this chunk.
    """
    keys = sortable_keys(scores)
    tied = keys == np.uint64(cut.key)
    tie_rank = np.cumsum(tied) + ties_before
    return (keys > np.uint64(cut.key)) | (tied & (tie_rank <= cut.num_ties)), ties_before + int(tied.sum())


def sortable_keys(scores: Float64Array) -> NDArray[np.uint64]:
    """Map scores to unsigned integers that sort in the same order."""
    bits = (scores + 0.0).view(np.uint64)  # + 0.0 makes -0.0 and 0.0 the same
    sign = np.uint64(1 << 63)
    return np.where(bits & sign != 0, ~bits, bits | sign)
