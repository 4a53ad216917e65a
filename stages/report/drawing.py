"""Draw a chart, as an SVG element with the page's colours or into a file for a paper."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError
from sstoken.stages import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, KEPT, DROPPED, ACCENT = "#1d2733", "#5b6875", "#d7dde4", "#2a6db0", "#e09a4f", "#a03c14"
SERIES = ("#2a6db1", "#c2611f", "#3d8f6d", "#7a5195", "#8a7a1c", "#4b5563", "#b0416f")
"""Colours of lines. With any colour vision, lightness and dashes tell them apart."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
PAGE_COLORS = {
    INK: "var(--ink)",
    FAINT: "var(--muted)",
    GRID: "var(--line)",
    KEPT: "var(--kept)",
    DROPPED: "var(--dropped)",
    ACCENT: "var(--accent)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
}
"""The page's own colours (light or dark) that replace these."""
FORMATS = (".svg", ".pdf", ".png")
_SIZE = (4.6, 3.0)


@dataclass(frozen=True)
class Chart:
    """A figure, ready to draw."""

    name: str
    title: str
    caption: str
    draw: Callable[["Axes"], None]


def save(chart: Chart, path: Path) -> None:
    """Draw a figure into an SVG, PDF or PNG file; the same data give the same bytes."""
    kind = path.suffix.lower()
    nothing = {
        ".svg": {"Date": None, "Creator": None},
        ".pdf": {"CreationDate": None},
        ".png": {"Software": None},
    }
    storage.of(path).make_folder(path.parent)
    with _drawn(chart) as figure, storage.atomic_file(path) as file:
        figure.savefig(file, format=kind[1:], dpi=200, metadata=nothing[kind])


def inline_svg(chart: Chart) -> str:
    """Draw a figure as an `<svg>` element for a page, with selectable text and the page's colours."""
    with _drawn(chart) as figure:
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<title>.*?</title>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", chart.name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt" height="[^"]*pt"', r"\1", text)
    text = re.sub(r"<svg ", f'<svg role="img" aria-label="{chart.title}" ', text, count=1)
    for color, of_page in PAGE_COLORS.items():
        text = text.replace(color, of_page)
    return re.sub(r"\n\s*", "\n", text)


def write_file(file: Path, text: str) -> None:
    """Write a picture or a page, and make its folder.

    Raises:
        SstokenError: it cannot be written.
    """
    try:
        storage.of(file).make_folder(file.parent)
        storage.write_atomic(file, text)
    except OSError as error:
        raise SstokenError(f"{file}: cannot be written ({error.strerror}); name another file") from error


@contextmanager
def _drawn(chart: Chart) -> "Iterator[Figure]":
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.hashsalt": "sstoken", "svg.fonttype": "none", "pdf.fonttype": 42, "font.family": "sans-serif",
        "font.size": 10.5, "text.color": INK, "axes.labelcolor": FAINT, "axes.edgecolor": GRID,
        "xtick.color": FAINT, "ytick.color": FAINT, "axes.labelsize": 10, "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5, "legend.frameon": False, "legend.fontsize": 9.5, "xtick.major.size": 0,
        "ytick.major.size": 0, "axes.axisbelow": True,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = FigureCanvasAgg(figure).figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        chart.draw(axes)
        yield figure
