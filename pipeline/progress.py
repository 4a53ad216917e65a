"""Progress bars: on a terminal, and as lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sstoken.stages.stage import Progress

if TYPE_CHECKING:
    import rich.progress


@contextmanager
def progress_bar(unit: str, total: int | None) -> Iterator[Progress]:
    """A progress bar with rate and remaining time on a terminal, a line now and then elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        plain = _PlainProgress(unit, total)
        yield plain
        plain.finish()
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(unit, total=total, rate="")
        yield _RichProgress(bar, task)


@contextmanager
def no_progress_bar(unit: str, total: int | None) -> Iterator[Progress]:
    """For all but one of several processes that do the same work."""
    yield _NoProgress()


class _NoProgress:
    def advance(self, amount: int = 1) -> None:
        pass


class _RichProgress:
    def __init__(self, bar: "rich.progress.Progress", task: "rich.progress.TaskID") -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: int = 1) -> None:
        self._bar.advance(self._task, amount)
        speed = self._bar.tasks[0].speed
        if speed:
            self._bar.update(self._task, rate=f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2f}/s")


class _PlainProgress:
    def __init__(self, unit: str, total: int | None) -> None:
        self._unit, self._total = unit, total
        self._seconds_to_next_line = 5.0
        self._done = self._printed = 0
        self._start = self._last = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        if time.monotonic() - self._last >= self._seconds_to_next_line:
            self._seconds_to_next_line = min(60.0, 1.5 * self._seconds_to_next_line)  # a log stays short
            self._print()

    def finish(self) -> None:
        if self._last != self._start and self._printed != self._done:  # short work needs no line
            self._print()

    def _print(self) -> None:
        self._last, self._printed = time.monotonic(), self._done
        rate = self._done / (self._last - self._start)
        line = f"{self._done:,} {self._unit}"
        if self._total is not None:
            line = f"{self._done:,}/{self._total:,} {self._unit}"
        if rate > 0:
            line += f", {rate:,.1f}/s"
            if self._total is not None and self._done:
                line += f", {(self._total - self._done) / rate:,.0f} s left"
        print(line, file=sys.stderr, flush=True)
