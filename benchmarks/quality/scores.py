"""What ranks tokens, by name: the scores of the literature, baselines and combinations with a cause behind them.

Higher is kept first. Each reads signals by the name `role.signal`; all arrays are flat, [N], example after example.
"""

from collections.abc import Callable

import numpy as np

from benchmarks.quality.signals import FloatArray, Signals
from sstoken.methods.instruction import pmi_band
from sstoken.selection import IntArray, minmax

Score = Callable[[Signals, IntArray], FloatArray]


def ranks(values: FloatArray, offsets: IntArray) -> FloatArray:
    """Each value's place within its example, in (0, 1): what one outlier cannot rule, as it rules min-max."""
    order = np.lexsort((values, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))))
    place = np.empty(len(values))
    place[order] = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    return (place + 0.5) / np.repeat(np.diff(offsets), np.diff(offsets))


def without_position(values: FloatArray, offsets: IntArray, width: int = 4) -> FloatArray:
    """Values less the mean, over all examples, of those at the same place (in steps of `width` tokens)."""
    place = np.concatenate([np.arange(n) for n in np.diff(offsets)]) // width
    mean = np.bincount(place, values) / np.maximum(np.bincount(place), 1)
    return values - mean[place]


def position(offsets: IntArray) -> FloatArray:
    """The place of each token in its response, from 0."""
    return np.concatenate([np.arange(n) for n in np.diff(offsets)]).astype(np.float64)


def rel(s: Signals) -> FloatArray:
    """Retrospective excess loss: history less current, nats."""
    return s["history.loss"] - s["current.loss"]


def _pmi_band(role: str) -> Score:
    return lambda s, o: pmi_band(s[f"{role}.loss"], s[f"{role}.loss_unconditional"], o)


SCORES: dict[str, Score] = {
    "sstoken": lambda s, o: 0.5 * minmax(rel(s), o) + 0.5 * s["current.attention"],
    "sstoken-debiased": lambda s, o: (
        0.5 * ranks(rel(s), o) + 0.5 * ranks(without_position(s["current.attention_no_sink"], o), o)
    ),
    "rel": lambda s, o: rel(s),
    "t3s": lambda s, o: -rel(s),
    "attention": lambda s, o: s["current.attention"],
    "attention-predictor": lambda s, o: s["current.attention_predictor"],
    "attention-no-position": lambda s, o: without_position(s["current.attention_no_sink"], o),
    "loss": lambda s, o: s["current.loss"],
    "low-loss": lambda s, o: -s["current.loss"],
    "low-loss-history": lambda s, o: -s["history.loss"],
    "entropy": lambda s, o: s["history.entropy"],
    "low-entropy": lambda s, o: -s["history.entropy"],
    "surprise": lambda s, o: s["history.entropy"] - s["history.loss"],
    "low-rank": lambda s, o: -s["history.log_rank"],
    "pmi": lambda s, o: s["history.loss_unconditional"] - s["history.loss"],
    "tshirt": lambda s, o: np.abs(s["history.loss_unconditional"] - s["history.loss"]),
    "pmi-band": _pmi_band("history"),
    "pmi-band-current": _pmi_band("current"),
    "prefix": lambda s, o: -position(o),
    "suffix": lambda s, o: position(o),
}
"""`random`, `noise` (drops exactly what was planted) and `worst` (the reverse of `pmi-band`) are made in `study.py`."""
