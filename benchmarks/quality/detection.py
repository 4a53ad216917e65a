"""How well each score tells planted noise from content, and why."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.quality.intervals import (
    Interval,
    auroc,
    average_precision,
    over_examples,
    paired_difference,
    spearman_interval,
)
from benchmarks.quality.planting import KINDS
from benchmarks.quality.scores import SCORES, position, rel
from benchmarks.quality.tokens import CONTENT, END
from sstoken.selection import keep_per_example, minmax

if TYPE_CHECKING:
    from benchmarks.quality.study import Cells


RHO = 0.6
"""The share of each answer that the masks keep whose content is counted."""


class Pooled(NamedTuple):
    """The training answers of all seeds that have been measured, together."""

    signals: dict[str, Any]
    kinds: np.ndarray
    classes: np.ndarray
    offsets: np.ndarray


def pooled_signals(cells: "Cells") -> Pooled | None:
    """The signals that have been measured; None: none."""
    parts = []
    for seed in cells.study.seeds:
        if not (cells.folder / "signals" / f"history-{seed.key}.npz").exists():
            continue
        training = cells.training_set(seed)
        parts.append((cells.signals(seed, training), training))
    if not parts:
        return None
    names = set.intersection(*(set(signals) for signals, _ in parts))
    signals = {name: np.concatenate([s[name] for s, _ in parts]).astype(np.float64) for name in sorted(names)}
    examples = [e for _, training in parts for e in training]
    offsets = np.concatenate([[0], np.cumsum([e.num_response for e in examples])]).astype(np.int64)
    kinds, classes = (np.concatenate([getattr(e, what) for e in examples]) for what in ("kinds", "classes"))
    return Pooled(signals, kinds, classes, offsets)


def found_noise(cells: "Cells") -> dict[str, Any]:
    """AUROC of every score that the measured signals allow: over all noise, each kind, the mean of the kinds."""
    pooled = pooled_signals(cells)
    if pooled is None:
        return {}
    signals, kinds, _, offsets = pooled
    content, noise = kinds == CONTENT, (kinds != CONTENT) & (kinds != END)
    found: dict[str, Any] = {}
    for name, score in SCORES.items():
        try:
            values = np.asarray(score(signals, offsets))
        except KeyError:  # not measured
            continue
        own = {"all": over_examples(auroc, values, content, noise, offsets)}
        for kind in KINDS:
            if (kinds == kind).any():
                own[kind] = over_examples(auroc, values, content, kinds == kind, offsets)
        of_kinds = [own[k] for k in KINDS if k in own]
        held = [own[k][0] for k, half in KINDS.items() if k in own and half == "held"]
        own["mean of kinds"] = tuple(float(np.mean([o[i] for o in of_kinds])) for i in range(3))  # type: ignore[assignment]
        found[name] = {
            "auroc": own,
            "held_back_kinds": float(np.mean(held)) if held else None,
            "kept": kept_shares(values, pooled),
            "average_precision": over_examples(average_precision, values, content, noise, offsets),
        }
    return found


def kept_shares(scores: np.ndarray, pooled: Pooled, rho: float = RHO) -> dict[str, Interval]:
    """Which share of some classes of tokens a mask of each answer keeps, with intervals over answers.

    Returns:
        `end` of turns, digits of the `result`, `content`, `noise`, and `content less noise`: the difference of the two.
    """
    _, kinds, classes, offsets = pooled
    keep = keep_per_example(np.asarray(scores, dtype=np.float64), offsets, rho)
    content = kinds == CONTENT
    groups = {END: kinds == END, "result": content & (classes == "result"), "content": content}
    groups |= {"noise": ~content & (kinds != END)}
    counts = {
        name: tuple(np.add.reduceat(x.astype(float), offsets[:-1])[None] for x in (keep & group, group))
        for name, group in groups.items()
    }
    nothing = np.zeros((1, len(offsets) - 1)), np.ones((1, len(offsets) - 1))
    found = {name: paired_difference(*count, *nothing) for name, count in counts.items()}
    return found | {"content less noise": paired_difference(*counts["content"], *counts["noise"])}


def causes(cells: "Cells") -> dict[str, Interval]:
    """The base's loss, and why ssToken ranks as it does: figures of its two halves, with intervals over answers."""
    pooled = pooled_signals(cells)
    if pooled is None:
        return {}
    signals, offsets = pooled.signals, pooled.offsets
    content = (pooled.kinds == CONTENT).astype(float)
    noise = 1 - content - (pooled.kinds == END)
    found = {}
    if noise.any():
        chance = _token_mean(noise, noise + content, offsets)
        found["Noise among tokens of noise and content (the AUPRC of chance)"] = chance
    base_loss = _token_mean(signals["history.loss"] * content, content, offsets)
    found["The base's loss of the answers' content, nats"] = base_loss
    if "current.attention" not in signals:
        return found
    gain, loss, attention = rel(signals), signals["history.loss"], signals["current.attention"]
    scaled = minmax(gain, offsets)
    combined = SCORES["sstoken"](signals, offsets)
    found |= {
        "Spearman correlation of attention with position": spearman_interval(
            attention, position(offsets), offsets
        ),
        "Spearman correlation of REL with the history's loss": spearman_interval(gain, loss, offsets),
        "Spearman correlation of sstoken with attention": spearman_interval(combined, attention, offsets),
        "Spearman correlation of sstoken with REL": spearman_interval(combined, gain, offsets),
    }
    of_answers = {
        "Median of min-max REL (one outlier squeezes the rest; ranks have 0.5)": lambda a, b: np.median(
            scaled[a:b]
        ),
        "Standard deviation of min-max REL": lambda a, b: scaled[a:b].std(),
        "Standard deviation of attention": lambda a, b: attention[a:b].std(),
    }
    return found | {name: _answer_mean(of, offsets) for name, of in of_answers.items()}


def _token_mean(total: np.ndarray, number: np.ndarray, offsets: np.ndarray) -> Interval:
    sums = [np.add.reduceat(x, offsets[:-1])[None] for x in (total, number)]
    return paired_difference(*sums, np.zeros_like(sums[0]), np.ones_like(sums[0]))


def _answer_mean(of: Callable[[int, int], float], offsets: np.ndarray) -> Interval:
    """The mean over answers of a figure of each answer's tokens."""
    values = np.array([[float(of(a, b)) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]])
    return paired_difference(values, np.ones_like(values), np.zeros_like(values), np.ones_like(values))
