"""Progress: a bar on a terminal, lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sstoken.pipeline.saying import is_quiet
from sstoken.stages.stage import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

_FIRST_LINE = 5.0
"""Seconds until the first line; shorter work prints none."""
_LONGEST_WAIT = 60.0
"""Longest interval between two lines, in seconds; intervals grow, so that logs stay short."""
_FIRST_ESTIMATE = 20.0
"""Seconds after which the rate is steady enough to estimate the remaining time."""
_LONG = 600.0
"""Faster settings are suggested if more than this many seconds remain."""


@contextmanager
def progress_bar(unit: str, total: int | None, faster: Callable[[], str] = str) -> Iterator[Progress]:
    """Show how many units are done of `total` (None: unknown), how fast, and the remaining time.

    `faster` returns what would speed the work up; it is shown once, if the work turns out to take long.
    """
    if is_quiet():
        yield Progress()
        return
    from tqdm import tqdm

    counted = "{n_fmt}/{total_fmt}{unit}" if total is not None else "{n_fmt}{unit}"
    figures = (
        counted + ", {rate_noinv_fmt}" + (", {remaining} left" if total is not None else "") + "{postfix}"
    )
    common: dict[str, Any] = {
        "total": total,
        "unit": f" {unit}",
        "unit_scale": True,
        "miniters": 0,
        "smoothing": 0.02,
    }
    tqdm.monitor_interval = 0  # no monitor thread; the work itself updates the bar
    if sys.stderr.isatty() and _has_size():
        bar = tqdm(
            **common, file=sys.stderr, leave=False, dynamic_ncols=True, bar_format="{l_bar}{bar}| " + figures
        )
    else:
        lines = _Lines()
        bar = tqdm(**common, file=lines, bar_format=figures, delay=_FIRST_LINE, mininterval=_FIRST_LINE)
        lines.bar = bar
    with bar:
        yield _Bar(bar, faster)


def _has_size() -> bool:
    """Whether a bar can be drawn: a terminal of unknown size, as in some containers, would show none."""
    try:
        return min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError):
        return True


class _Bar(Progress):
    """A `Progress` shown by tqdm."""

    def __init__(self, bar: "tqdm[Any]", faster: Callable[[], str]) -> None:
        self._bar = bar
        self._faster: Callable[[], str] | None = None if bar.total is None else faster
        self._first: tuple[float, float] | None = None
        """When the first units were done, and how many: what came before is loading, too."""

    def advance(self, amount: int = 1) -> None:
        if self._first is None:
            self._begin(amount)
            return
        self._bar.update(amount)
        elapsed = time.monotonic() - self._first[0]
        if self._faster is not None and elapsed >= _FIRST_ESTIMATE:
            self._estimate(elapsed, self._bar.n - self._first[1])

    def _begin(self, amount: int) -> None:
        """Count the first units; rate and time left start from here."""
        bar = self._bar
        if bar.n + amount == bar.total:
            bar.update(amount)
            return
        self.skip(amount)
        if bar.format_dict["elapsed"] >= bar.delay:
            bar.refresh()
        bar.unpause()
        self._first = time.monotonic(), bar.n

    def _estimate(self, elapsed: float, done: float) -> None:
        """Print once how long the work will take and what would speed it up."""
        bar, faster, self._faster = self._bar, self._faster, None
        left = (bar.total - bar.n) * elapsed / max(1, done)
        advice = faster() if faster is not None and left >= _LONG else ""
        if advice:
            bar.write(f"about {bar.format_interval(left)} to go; faster: {advice}", file=sys.stderr)

    def skip(self, amount: int) -> None:
        if self._first is not None:
            self._first = self._first[0], self._first[1] + amount
        self._bar.initial += amount
        self._bar.n += amount
        self._bar.last_print_n += amount

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)


class _Lines:
    """The file to which tqdm writes its lines if there is no terminal."""

    bar: Any = None

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr, flush=True)
            if self.bar is not None:
                self.bar.mininterval = min(_LONGEST_WAIT, 1.5 * self.bar.mininterval)

    def flush(self) -> None:
        sys.stderr.flush()
