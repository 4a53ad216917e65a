"""The local engine: a function mapped over shards in this process or several, with a progress bar."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from stages.base import Progress

if TYPE_CHECKING:
    import rich.progress

T = TypeVar("T")
R = TypeVar("R")
_LOOK_EVERY = 0.2
"""Seconds."""


def local_map(function: Callable[[T], R], tasks: Iterable[T], *, workers: int = 1) -> Iterator[R]:
    """Results in the order of the tasks, which are read lazily. See `stages.base.Map`."""
    if workers == 1:
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    first, second = next(tasks, None), next(tasks, None)
    if first is None or second is None:  # no use for a second process
        yield from map(function, [] if first is None else [first])
        return
    import joblib

    def chained() -> Iterator[T]:
        yield from (first, second)
        yield from tasks

    parallel = joblib.Parallel(n_jobs=workers, return_as="generator", pre_dispatch="2*n_jobs", batch_size=1)
    yield from parallel(joblib.delayed(_in_worker)(os.getpid(), function, task) for task in chained())


def _in_worker(parent: int, function: Callable[[T], R], task: T) -> R:
    end_with(parent)
    return function(task)


@cache
def end_with(parent: int) -> None:
    """Have this process end when `parent`, which started it, does, however that is: else it would write on."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    Thread(target=wait, daemon=True).start()


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
