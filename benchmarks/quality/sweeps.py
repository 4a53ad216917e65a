"""Why ssToken ranks noise as it does, on signals that are measured already: small tables with intervals."""

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.detection import Pooled, kept_shares, pooled_signals
from benchmarks.quality.intervals import Interval, auroc, over_examples, spearman_interval
from benchmarks.quality.planting import KINDS
from benchmarks.quality.scores import SCORES, position, ranks, rel
from benchmarks.quality.signals import FloatArray
from benchmarks.quality.tokens import CONTENT, END
from sstoken.methods.instruction import PmiBandParams, pmi_band
from sstoken.selection import minmax

if TYPE_CHECKING:
    from benchmarks.quality.study import Cells

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RHOS = (0.4, 0.6, 0.8)
_LAYERS = "Prompt attention of the base by layer"
_HALVES = "AUROC of `pmi-band` on kinds of noise and on answers that its settings were not chosen on"
_HISTORIES = "AUROC by checkpoint: REL from a history to a current model, and `sstoken` of the two"
PMI_GRID = {
    "window": (0, 2, 4, 8),
    "clip": (1.0, 2.0, 4.0),
    "level": (0.5, 1.0, 1.5, 2.0),
    "weight": (0.0, 0.25, 0.5, 1.0),
}
OF_RHO = ("sstoken", "rel", "t3s", "low-loss", "pmi-band", "prefix")


def sweeps(cells: "Cells") -> dict[str, Any]:
    """Tables by name, each with `columns` and `rows` of intervals by name; none without a current model."""
    pooled = pooled_signals(cells)
    if pooled is None:
        return {}
    found = {_LAYERS: _by_layer(pooled)} if "history.attention@0" in pooled.signals else {}
    if "history.loss_unconditional" in pooled.signals:
        found[_HALVES] = _by_half_of_kinds(pooled)
    if "current.attention" not in pooled.signals:
        return found
    if cells.study.checkpoints:
        found[_HISTORIES] = _by_checkpoint(pooled, cells.study.checkpoints)
    return found | {
        "AUROC by gamma (1: REL alone, 0: attention alone), as published and with ranks": _by_gamma(pooled),
        "Kept content, less kept noise, by rho": _by_rho(pooled),
        "Spearman correlation with the position in the answer": _with_position(pooled),
    }


def _by_gamma(pooled: Pooled) -> dict[str, Any]:
    signals, kinds, _, offsets = pooled
    content, noise = kinds == CONTENT, (kinds != CONTENT) & (kinds != END)
    gain, attention = rel(signals), signals["current.attention"]
    ways: dict[str, tuple[FloatArray, FloatArray]] = {
        "min-max of REL, attention": (minmax(gain, offsets), attention),
        "ranks of both": (ranks(gain, offsets), ranks(attention, offsets)),
        "min-max of the opposite of REL, attention": (minmax(-gain, offsets), attention),
        "ranks of the opposite of REL and of attention": (ranks(-gain, offsets), ranks(attention, offsets)),
    }
    return {
        "columns": [f"{gamma:g}" for gamma in GAMMAS],
        "rows": {
            name: [
                over_examples(auroc, gamma * a + (1 - gamma) * b, content, noise, offsets) for gamma in GAMMAS
            ]
            for name, (a, b) in ways.items()
        },
    }


def _by_rho(pooled: Pooled) -> dict[str, Any]:
    """A mask that knows nothing has 0; one that drops noise alone has the most."""
    rows = {
        name: [
            kept_shares(SCORES[name](pooled.signals, pooled.offsets), pooled, rho)["content less noise"]
            for rho in RHOS
        ]
        for name in OF_RHO
        if name != "pmi-band" or "history.loss_unconditional" in pooled.signals
    }
    return {"columns": [f"{rho:g}" for rho in RHOS], "rows": rows}


def _with_position(pooled: Pooled) -> dict[str, Any]:
    signals, _, _, offsets = pooled
    place = position(offsets)
    named: dict[str, FloatArray] = {
        "attention": signals["current.attention"],
        "attention of the row that predicts the token": signals["current.attention_predictor"],
        "attention without the first token (sink)": signals["current.attention_no_sink"],
        "REL": rel(signals),
        "history's loss": signals["history.loss"],
        "sstoken": SCORES["sstoken"](signals, offsets),
    }
    return {
        "columns": ["mean over answers"],
        "rows": {name: [spearman_interval(values, place, offsets)] for name, values in named.items()},
    }


def _by_layer(pooled: Pooled) -> dict[str, Any]:
    """Each layer; the mean of all; the best on every other answer, judged on those between."""
    signals, kinds, _, offsets = pooled
    content, noise = kinds == CONTENT, (kinds != CONTENT) & (kinds != END)
    place = position(offsets)
    layers = sorted(
        (n for n in signals if n.startswith("history.attention@")), key=lambda n: int(n.split("@")[1])
    )
    odd = np.repeat(np.arange(len(offsets) - 1) % 2 == 1, np.diff(offsets))
    judged_offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[1::2])]).astype(np.int64)

    def chosen_by(values: FloatArray) -> float:
        return over_examples(auroc, values, content & ~odd, noise & ~odd, offsets, num_resamples=1).value

    def row(values: FloatArray) -> list[Interval]:
        return [
            over_examples(auroc, values, content, noise, offsets),
            spearman_interval(values, place, offsets),
        ]

    rows = {f"layer {name.split('@')[1]}": row(signals[name]) for name in layers}
    rows["mean of all layers"] = row(np.mean([signals[name] for name in layers], axis=0))
    best = max(layers, key=lambda name: chosen_by(signals[name]))
    own = signals[best][odd]
    rows[f"layer {best.split('@')[1]}, chosen on every other answer, on the rest"] = [
        over_examples(auroc, own, content[odd], noise[odd], judged_offsets),
        spearman_interval(own, place[odd], judged_offsets),
    ]
    return {"columns": ["AUROC", "Spearman correlation with position"], "rows": rows}


def _by_half_of_kinds(pooled: Pooled) -> dict[str, Any]:
    """Settings chosen on half of the kinds in every other answer, judged on the other half in the answers between."""
    signals, kinds, _, offsets = pooled
    loss, alone = signals["history.loss"], signals["history.loss_unconditional"]
    odd = np.repeat(np.arange(len(offsets) - 1) % 2 == 1, np.diff(offsets))
    judged_offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[1::2])]).astype(np.int64)
    content = kinds == CONTENT
    settings = [dict(zip(PMI_GRID, values, strict=True)) for values in product(*PMI_GRID.values())]
    scores = [pmi_band(loss, alone, offsets, PmiBandParams(**s)) for s in settings]
    rows = {}
    for half in ("tune", "held"):
        own = np.isin(kinds, [kind for kind, of in KINDS.items() if of == half])
        others = ~own & ~content & (kinds != END)
        chosen_by = [
            over_examples(auroc, s, content & ~odd, own & ~odd, offsets, num_resamples=1).value
            for s in scores
        ]
        best = int(np.argmax(chosen_by))
        names = ", ".join(kind for kind, of in KINDS.items() if of == half)
        text = ", ".join(f"{name} {value:g}" for name, value in settings[best].items())
        rows[f"chosen on {names}: {text}"] = [
            over_examples(auroc, s[odd], content[odd], others[odd], judged_offsets)
            for s in (scores[best], pmi_band(loss, alone, offsets), -loss)
        ]
    return {"columns": ["so chosen", "its defaults", "low loss"], "rows": rows}


def _by_checkpoint(pooled: Pooled, steps: tuple[int, ...]) -> dict[str, Any]:
    signals, kinds, _, offsets = pooled
    content, noise = kinds == CONTENT, (kinds != CONTENT) & (kinds != END)
    losses = {"the base": signals["history.loss"]}
    losses |= {f"after step {step}": signals[f"step{step}.loss"] for step in steps}
    losses["after all steps"] = signals["current.loss"]
    names = list(losses)
    pairs = [(names[0], name) for name in names[1:]] + [(name, names[-1]) for name in names[1:-1]]

    def row(gain: FloatArray) -> list[Interval]:
        both = 0.5 * minmax(gain, offsets) + 0.5 * signals["current.attention"]
        return [over_examples(auroc, values, content, noise, offsets) for values in (gain, both)]

    return {
        "columns": ["REL", "`sstoken`"],
        "rows": {f"{early} to {late}": row(losses[early] - losses[late]) for early, late in pairs},
    }
