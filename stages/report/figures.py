"""The charts of a report, drawn from `statistics`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import UsageError
from sstoken.stages.report.drawing import DASHES, DROPPED, FORMATS, GRID, INK, KEPT, SERIES, Chart
from sstoken.stages.report.folders import SignalFacts
from sstoken.stages.report.statistics import NUM_DECILES, RHO_BINS, Statistics
from sstoken.stages.report.token_classes import ALL_CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS, _DENSITY_BINS = 48, 56
_SHOWN = (0.002, 0.998)
"""Quantiles between which a histogram is drawn: a few far outliers would flatten it."""
_LEAST_SHARE = 0.005
"""Smallest share of the tokens for which a class gets a line of its own."""


def charts(stats: Statistics) -> dict[str, Chart]:
    """Return every chart that these folders have data for, by its name in `plot`."""
    found = [
        *_breakdowns(stats),
        *_histograms(stats),
        *_density(stats),
        *_by_rho(stats),
        *_snapshots(stats),
        *_agreement(stats),
    ]
    return {chart.name: chart for chart in found}


NAMES = (
    "positions",
    "classes",
    "density",
    "rho",
    "snapshots",
    "agreement",
    "histogram:score",
    "histogram:SIGNAL",
)
"""All names; which charts exist depends on what was recorded."""


def check_name(name: str, path: Path) -> None:
    """Refuse an unknown figure or file format, before reading anything.

    Raises:
        UsageError: lists the legal ones.
    """
    if name not in NAMES and not name.startswith("histogram:"):
        raise UsageError(f"no figure {name!r}; legal: {', '.join(NAMES)}")
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: the name must end in {', '.join(FORMATS)}")


def pick(stats: Statistics, name: str) -> Chart:
    """Return one chart.

    Raises:
        UsageError: there is no such chart, or no data for it.
    """
    there = charts(stats)
    if name not in there:
        raise UsageError(f"no figure {name!r} for {stats.folders.first.path}; legal: {', '.join(there)}")
    return there[name]


def _breakdowns(stats: Statistics) -> Iterator[Chart]:
    if stats.folders.first.kind != "masked":
        return
    tenth = stats.by["decile"]

    def draw_positions(axes: "Axes") -> None:
        for i, opened in enumerate(stats.folders.all):
            share = 100 * tenth.kept[i] / np.maximum(1, tenth.tokens)
            if len(stats.folders.all) == 1:
                axes.bar(np.arange(NUM_DECILES) + 0.5, share, 0.86, color=KEPT)
            else:
                axes.plot(
                    np.arange(NUM_DECILES) + 0.5, share, DASHES[i % 7], color=SERIES[i % 7], label=opened.name
                )
        if len(stats.folders.all) > 1:
            axes.legend()
        axes.set(xlim=(0, NUM_DECILES), ylim=(0, 100), xlabel="place in the response", ylabel="kept (%)")
        axes.set_xticks([0, NUM_DECILES / 2, NUM_DECILES], ["start", "middle", "end"])

    yield Chart(
        "positions", "Kept share along the response", "Share of the tokens kept in each tenth of the response.",
        draw_positions,
    )  # fmt: skip

    def draw_classes(axes: "Axes") -> None:
        by = stats.by["class"]
        shown = [i for i in range(len(ALL_CLASSES)) if by.tokens[i]][::-1]
        share = 100 * by.kept[0][shown] / by.tokens[shown]
        axes.barh(np.arange(len(shown)), share, 0.72, color=KEPT)
        axes.set_yticks(np.arange(len(shown)), [ALL_CLASSES[i] for i in shown])
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.grid(visible=False, axis="y")
        axes.set(xlim=(0, 100), xlabel="kept (%)")

    yield Chart(
        "classes", "Kept share by kind of token", "Share of the tokens kept of each kind.", draw_classes
    )


def _histograms(stats: Statistics) -> Iterator[Chart]:
    columns = stats.sample.columns()
    if not columns:
        return
    keep = columns["keep"].astype(bool)
    for signal in stats.present():
        values = columns[signal.key].astype(np.float64)
        cut = stats.cuts.columns().get("cut") if signal.key == "score" and stats.selective else None
        line = None if cut is None or not cut.size else float(np.median(cut.astype(float)))
        caption = f"{capitalized(signal.meaning)}."
        if line is not None:
            everywhere = stats.folders.first.facts.get("scope") == "global"
            caption += (
                f" The line is the lowest kept score{'' if everywhere else ', the median over examples'}."
            )
        draw = _draw_histogram(signal, values, keep, line, stats.selective)
        yield Chart(f"histogram:{signal.key}", capitalized(signal.label), caption, draw)


def capitalized(text: str) -> str:
    """Return a text with its first letter in upper case and the others as they are."""
    return f"{text[:1].upper()}{text[1:]}"


def _draw_histogram(
    signal: SignalFacts,
    values: NDArray[np.float64],
    keep: NDArray[np.bool_],
    line: float | None,
    selective: bool,
) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        known = np.isfinite(values)
        low, high = np.quantile(values[known], _SHOWN)
        high = high if high > low else low + 1
        whole = signal.unit == "tokens"
        edges = np.linspace(low, high, _BINS + 1)
        if whole:
            low, high = max(0.0, low), max(1.0, high)
            edges = (
                np.concatenate([[0], np.geomspace(1, high + 1, 24)])
                if high > 40
                else np.arange(high + 2) - 0.5
            )
        kept, dropped = (np.histogram(values[known & mask], edges)[0] for mask in (keep, ~keep))
        total = max(1, int(known.sum()))
        axes.stairs(100 * kept / total, edges, fill=True, color=KEPT, label="kept")
        if selective:
            axes.stairs(
                100 * (kept + dropped) / total, edges, baseline=100 * kept / total, fill=True, color=DROPPED,
                label="dropped",
            )  # fmt: skip
            axes.legend(loc="best", handlelength=1, handleheight=1)
        if whole and high > 40:
            axes.set_xscale("symlog", linthresh=1)
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1.2, linestyle="--")
        unit = f" ({signal.unit})" if signal.unit else ""
        axes.set(xlabel=f"{signal.label}{unit}", ylabel="response tokens (%)")
        axes.set_ylim(bottom=0)

    return draw


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two signals over the tokens that have both, NaN if undefined."""
    import polars as pl

    known = np.isfinite(a) & np.isfinite(b)
    frame = pl.DataFrame({"a": a[known], "b": b[known]})
    found = frame.select(pl.corr("a", "b", method="spearman")).item()
    return float("nan") if found is None else float(found)


def _density(stats: Statistics) -> Iterator[Chart]:
    columns, pair = stats.sample.columns(), stats.pair
    if pair is None or any(name not in columns for name in pair):
        return
    facts = {signal.key: signal for signal in stats.folders.signals()}
    x, y = (columns[name].astype(np.float64) for name in pair)
    a, b = (facts[name] for name in pair)
    rank = correlation(x, y)

    def draw(axes: "Axes") -> None:
        known = np.isfinite(x) & np.isfinite(y)
        limits = [np.quantile(v[known], _SHOWN) for v in (x, y)]
        bins = int(np.clip(np.sqrt(known.sum()) / 2, 8, _DENSITY_BINS))
        edges = [np.linspace(low, high if high > low else low + 1, bins + 1) for low, high in limits]
        counts = np.histogram2d(x[known], y[known], edges)[0]
        shown = np.ma.masked_equal(np.log1p(counts.T), 0)
        extent = (edges[0][0], edges[0][-1], edges[1][0], edges[1][-1])
        lowest = -0.35 * float(shown.max())  # one token is to be seen on a dark page too
        axes.imshow(
            shown, extent=extent, origin="lower", aspect="auto", cmap="cividis", interpolation="nearest",
            vmin=lowest,
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set(xlabel=f"{a.label} ({a.unit})", ylabel=b.label)

    yield Chart(
        "density", f"{capitalized(a.label)} and {b.label}",
        f"Density of the response tokens on a log scale; lighter is more. Their rank correlation is {rank:+z.2f} "
        "(Spearman's; 0: unrelated, 1: the same order).", draw,
    )  # fmt: skip


def _by_rho(stats: Statistics) -> Iterator[Chart]:
    tokens_C = stats.by_rho.sum(axis=1)
    total = tokens_C.sum()
    if not total or not stats.selective:
        return
    rho = stats.folders.first.facts.get("rho")

    def draw(axes: "Axes") -> None:
        shares = np.arange(RHO_BINS + 1) / RHO_BINS * 100
        axes.plot([0, 100], [0, 100], color=GRID, linewidth=1.2)
        shown = [c for c in range(len(ALL_CLASSES)) if tokens_C[c] >= max(1, _LEAST_SHARE * total)]
        for i, c in enumerate(shown):
            kept = np.concatenate([[0], np.cumsum(stats.by_rho[c])]) / tokens_C[c] * 100
            axes.plot(shares, kept, color=SERIES[i], linestyle=DASHES[i], linewidth=1.7, label=ALL_CLASSES[c])
        if rho is not None:
            axes.axvline(100 * rho, color=INK, linewidth=1, linestyle="--")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.03), handlelength=2.2, borderaxespad=0.2)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="rho (%)", ylabel="kept of the kind (%)")

    yield Chart(
        "rho", "Kept share against rho",
        "Share of each kind of token that would be kept if each example kept its share rho of highest scores. On the "
        "thin line, a kind is kept as often as by chance."
        + ("" if rho is None else " The dashed line is the rho that was used."),
        draw,
    )  # fmt: skip


def _snapshots(stats: Statistics) -> Iterator[Chart]:
    losses = {name: sums for name, sums in stats.losses.items() if sums[1] and sums[3]}
    if len(losses) < 2:
        return
    kept = [sums[0] / sums[1] for sums in losses.values()]
    dropped = [sums[2] / sums[3] for sums in losses.values()]

    def draw(axes: "Axes") -> None:
        places = np.arange(len(losses))
        axes.plot(places, kept, "o-", color=KEPT, linewidth=1.8, markersize=5, label="kept")
        axes.plot(places, dropped, "s--", color=DROPPED, linewidth=1.8, markersize=5, label="dropped")
        axes.set_xticks(places, list(losses), rotation=30 if len(losses) > 5 else 0)
        axes.set(
            xlim=(-0.3, len(losses) - 0.7), ylim=(0, 1.08 * max(*kept, *dropped)), ylabel="mean loss (nats)"
        )
        axes.legend()

    yield Chart(
        "snapshots", "Loss over the checkpoints",
        "Mean loss of the kept and of the dropped tokens under each scored checkpoint.", draw,
    )  # fmt: skip


def _agreement(stats: Statistics) -> Iterator[Chart]:
    opened = stats.folders.all
    if len(opened) < 2:
        return
    jaccard = stats.agreement["jaccard"]
    names = [each.name for each in opened]

    def draw(axes: "Axes") -> None:
        axes.imshow(jaccard, cmap="cividis", vmin=0, vmax=1)
        axes.grid(visible=False)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for (i, j), value in np.ndenumerate(np.array(jaccard)):
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white"
            )

    yield Chart("agreement", "Agreement", "Jaccard: tokens kept by both over tokens kept by either.", draw)
