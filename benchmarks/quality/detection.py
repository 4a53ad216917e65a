"""How well each score tells planted noise from content, and why."""

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.intervals import auroc, average_precision, over_examples, spearman
from benchmarks.quality.planting import KINDS
from benchmarks.quality.scores import SCORES, position, rel
from benchmarks.quality.tokens import CONTENT, END
from sstoken.selection import minmax

if TYPE_CHECKING:
    from benchmarks.quality.study import Cells


def _pooled(cells: "Cells") -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """Signals, kinds and offsets of the first training sets of all seeds that have been measured."""
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
    return signals, np.concatenate([e.kinds for e in examples]), offsets


def found_noise(cells: "Cells") -> dict[str, Any]:
    """AUROC of every score that the measured signals allow: over all noise, each kind, the mean of the kinds."""
    pooled = _pooled(cells)
    if pooled is None:
        return {}
    signals, kinds, offsets = pooled
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
            "average_precision": over_examples(average_precision, values, content, noise, offsets),
        }
    return found


def causes(cells: "Cells") -> dict[str, float]:
    """Why ssToken ranks as it does: figures of its two halves."""
    pooled = _pooled(cells)
    if pooled is None or "current.attention" not in pooled[0]:
        return {}
    signals, _, offsets = pooled
    place, gain = position(offsets), rel(signals)
    scaled = minmax(gain, offsets)
    spans = list(zip(offsets[:-1], offsets[1:], strict=True))

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    return {
        "Spearman correlation of attention with position, mean over answers": mean(
            [spearman(signals["current.attention"][a:b], place[a:b]) for a, b in spans]
        ),
        "Spearman correlation of REL with the history's loss, mean over answers": mean(
            [spearman(gain[a:b], signals["history.loss"][a:b]) for a, b in spans]
        ),
        "Standard deviation within an answer of min-max REL": mean(
            [float(scaled[a:b].std()) for a, b in spans]
        ),
        "Standard deviation within an answer of attention": mean(
            [float(signals["current.attention"][a:b].std()) for a, b in spans]
        ),
    }
