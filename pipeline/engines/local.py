"""The local engine: a function mapped over shards in this process or several."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    pass

T = TypeVar("T")
R = TypeVar("R")
_LOOK_EVERY = 0.2
"""Seconds."""


def local_map(function: Callable[[T], R], tasks: Iterable[T], *, workers: int = 1) -> Iterator[R]:
    """Results in the order of the tasks, which are read lazily. See `sstoken.stages.stage.Map`."""
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
