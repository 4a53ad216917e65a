"""Why ssToken ranks noise as it does, on signals that are measured already: small tables with intervals."""

from typing import TYPE_CHECKING, Any

from benchmarks.quality.detection import Pooled, kept_shares, pooled_signals
from benchmarks.quality.intervals import auroc, over_examples, spearman_interval
from benchmarks.quality.scores import SCORES, position, ranks, rel
from benchmarks.quality.signals import FloatArray
from benchmarks.quality.tokens import CONTENT, END
from sstoken.selection import minmax

if TYPE_CHECKING:
    from benchmarks.quality.study import Cells

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RHOS = (0.4, 0.6, 0.8)
OF_RHO = ("sstoken", "rel", "t3s", "low-loss", "pmi-band", "prefix")


def sweeps(cells: "Cells") -> dict[str, Any]:
    """Tables by name, each with `columns` and `rows` of intervals by name; none without a current model."""
    pooled = pooled_signals(cells)
    if pooled is None or "current.attention" not in pooled.signals:
        return {}
    return {
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
