"""Pictures of a masked dataset: the distribution of its scores, and the share kept along the response."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sstoken.stages import tables
from sstoken.stages.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _DROPPED, _GRID = "#21918c", "#b4b4b4", "#b8c4d0"
_FINE_BINS, _BARS = 6000, 60
_SHOWN = 0.998
"""Share of tokens whose scores the picture shows: a few far outliers would flatten it."""


def draw_scores(masked: Path, metrics: dict[str, Any], path: Path) -> None:
    """Draw the scores of kept and dropped tokens, and the share kept along the response, as an SVG.

    Reads one shard's scores at a time. Without scores (a lean dataset) only the second panel is drawn. The same
    dataset gives the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    counts = score_histogram(tables.parts(masked))
    with mpl.rc_context({"svg.hashsalt": "sstoken", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = FigureCanvasSVG(figure).figure.subplots(1, 1 if counts is None else 2, squeeze=False)[0]
        if counts is not None:
            _draw_histogram(axes[0], *counts)
        _draw_positions(axes[-1], metrics["kept_share_by_decile"])
        for each in axes:
            each.grid(axis="y", color=_GRID, alpha=0.4, linewidth=0.6)
            each.set_axisbelow(True)
            each.spines[["top", "right"]].set_visible(False)
        with atomic_file(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def score_histogram(parts: Sequence[Path]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None:
    """Return bin edges [B + 1] of the scores, and how many kept [B] and dropped [B] tokens fall into each bin.

    None if no token has a score. The outermost `1 - _SHOWN` of the tokens is left out.
    """
    if not parts or "score" not in pq.read_schema(parts[0]).names:
        return None
    low, high = np.inf, -np.inf
    for _, scores in _scores(parts):
        if scores.size:
            low, high = min(low, scores.min()), max(high, scores.max())
    if low > high:
        return None
    edges = np.linspace(low, high if high > low else low + 1, _FINE_BINS + 1)
    kept, dropped = np.zeros(_FINE_BINS, np.int64), np.zeros(_FINE_BINS, np.int64)
    for keep, scores in _scores(parts):
        kept += np.histogram(scores[keep], edges)[0]
        dropped += np.histogram(scores[~keep], edges)[0]
    cumulative = np.cumsum(kept + dropped)
    outside = (1 - _SHOWN) / 2 * cumulative[-1]
    first = int(np.searchsorted(cumulative, outside, side="right"))
    last = int(np.searchsorted(cumulative, cumulative[-1] - outside, side="left")) + 1
    width = max(1, -(-(last - first) // _BARS))
    starts = np.arange(first, last, width)
    kept, dropped = (np.add.reduceat(counts[:last], starts) for counts in (kept, dropped))
    return np.append(edges[starts], edges[last]), kept, dropped


def _scores(parts: Sequence[Path]) -> Any:
    """Yield the keep flags and scores of each shard's tokens that have a finite score."""
    for part in parts:
        table = tables.read_table(part, ["keep_mask", "score"])
        keep = tables.flatten(table["keep_mask"])[0].astype(bool)
        if table["score"].null_count:  # a method without scores
            continue
        scores = tables.flatten(table["score"])[0]
        measured = np.isfinite(scores)
        yield keep[measured], scores[measured].astype(np.float64)


def _draw_histogram(axes: "Axes", edges: NDArray[Any], kept: NDArray[Any], dropped: NDArray[Any]) -> None:
    axes.stairs(kept, edges, fill=True, color=_KEPT, label="kept")
    axes.stairs(kept + dropped, edges, baseline=kept, fill=True, color=_DROPPED, label="dropped")
    axes.set_xlabel("score")
    axes.set_ylabel("response tokens")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_positions(axes: "Axes", share_D: Sequence[float | None]) -> None:
    percent = [100 * (share or 0.0) for share in share_D]
    axes.bar(np.arange(len(percent)) + 0.5, percent, 0.9, color=_KEPT)
    axes.set_xlim(0, len(percent))
    axes.set_ylim(0, 100)
    axes.set_xticks([0, len(percent) / 2, len(percent)], ["start", "middle", "end"])
    axes.set_xlabel("position in the response")
    axes.set_ylabel("kept (%)")
