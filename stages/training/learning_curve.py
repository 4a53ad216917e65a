"""A picture of an anchor run: its loss and its snapshots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sstoken.stages.storage import atomic_file
from sstoken.stages.training.history_index import Entry

_INK, _FAINT, _ACCENT = "#1f2933", "#b8c4d0", "#c2410c"


def draw(log: Sequence[dict[str, Any]], entries: Sequence[Entry], path: Path) -> None:
    """Draw loss over steps, raw and smoothed, with the snapshots marked, as a PNG.

    Args:
        log: lines with `step` and `loss` (nats per token), in order.
        entries: the history's entries; the base model and averaged weights are not marked.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    steps = np.array([line["step"] for line in log])
    losses = np.array([line["loss"] for line in log])
    curve = smooth(losses, window=max(1, len(losses) // 40))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.plot(steps, losses, color=_FAINT, linewidth=0.8, label="each step")
    axes.plot(steps, curve, color=_INK, linewidth=1.8, label="smoothed")
    taken = [e for e in entries if e.kind in ("full", "lora")]
    at = [e.step for e in taken]
    heights = np.interp(at, steps, curve)
    axes.vlines(at, 0, heights, color=_ACCENT, linewidth=0.8, linestyle=":")
    axes.plot(at, heights, "o", color=_ACCENT, markersize=6, label="snapshot", zorder=3)
    if len(taken) <= 12:
        for entry, height in zip(taken, heights, strict=True):
            axes.annotate(
                entry.name,
                (entry.step, height),
                (0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_ACCENT,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    axes.set_xlim(0, steps[-1] * 1.04)
    low, high = min(losses.min(), curve.min()), losses.max()
    margin = 0.12 * (high - low) or 0.1
    axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per response token)")
    axes.grid(axis="y", color=_FAINT, alpha=0.4, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over up to `window` neighbours on either side, fewer at the ends.

    numpy.convolve would count zeros beyond the ends, and pandas is no dependency.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - window, 0), np.minimum(centre + window + 1, len(values))
    means: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return means
