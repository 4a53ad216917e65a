"""Run a stage without the runner."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sstoken.stages.stage import Context, Progress, Task, Worker, no_progress_bar


class PlainWorker:
    device = None

    def advance(self, amount: int = 1) -> None:
        pass


class PlainEngine:
    """The simplest engine: one task after the other, in this process."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def map(
        self, function: Callable[[Any, Worker], Any], tasks: Iterable[Task[Any]], progress: Progress
    ) -> Iterator[Any]:
        for task in tasks:
            result = function(task.work, PlainWorker())
            progress.advance(task.size)
            yield result


class ProcessEngine(PlainEngine):
    """An engine that runs every task in a worker process."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def map(
        self, function: Callable[[Any, Worker], Any], tasks: Iterable[Task[Any]], progress: Progress
    ) -> Iterator[Any]:
        with ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(function, task.work, PlainWorker()) for task in tasks]
            yield from (future.result() for future in futures)


def make_context(
    out: Path,
    inputs: Mapping[str, Path] | None = None,
    seed: int = 0,
    progress: Callable[[str, int | None], AbstractContextManager[Progress]] = no_progress_bar,
) -> Context:
    """Make a context as the runner would; creates `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return Context(
        inputs=dict(inputs or {}),
        out=out,
        seed=seed,
        fingerprint="0" * 16,
        engine=PlainEngine(),
        progress=progress,
    )
