"""The local engine: tasks in this process, or in several on this machine, one task a process at a time.

Each process is a pool of its own, so that one that dies costs its own task and no other.
"""

import atexit
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from multiprocessing import resource_tracker
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from sstoken.pipeline.engines.dispatch import Attempt, Died, Raised, dispatch
from sstoken.stages.stage import EngineOptions, Progress, Task, Worker

T = TypeVar("T")
R = TypeVar("R")
_LOOK_EVERY = 0.2
"""Seconds between two looks at what the workers have done, and at whether their parent lives."""
_IDLE = 60
"""Seconds after which a process without work ends; until then the next stage finds it warm."""


@dataclass
class _InProcess:
    """A worker that is this process."""

    attempt: Attempt
    progress: Progress
    device: str | None
    done: int = 0

    def advance(self, amount: int) -> None:
        self.done += amount
        self.attempt.show(self.done, self.progress)


class _Here:
    """A `Pool` that is this process."""

    window = 1

    def __init__(
        self, function: Callable[[Any, Worker], Any], device: str | None, progress: Progress
    ) -> None:
        self._function, self._device, self._progress = function, device, progress
        self._ended: list[tuple[Attempt, Any]] = []

    def start(self, attempt: Attempt) -> None:
        """See `Pool`. Returns when the attempt has ended."""
        try:
            result = self._function(attempt.task.work, _InProcess(attempt, self._progress, self._device))
        except Exception as error:
            result = Raised(error)
        self._ended.append((attempt, result))

    def ended(self) -> list[tuple[Attempt, Any]]:
        """See `Pool`."""
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        """See `Pool`."""


class LocalEngine:
    """Processes on this machine; see `Engine`."""

    def __init__(self, options: EngineOptions, rank: int = 0, world_size: int = 1) -> None:
        named = getattr(options, "device", "auto")
        self._devices: list[str | None] = [*named.split(",")] if "," in named else [None]
        self._workers = options.workers or (_cores() if options.every_core else len(self._devices))
        self.rank, self.world_size = rank, world_size

    def map(
        self, function: Callable[[T, Worker], R], tasks: Iterable[Task[T]], progress: Progress
    ) -> Iterator[R]:
        """See `Engine.map`."""
        tasks = iter(tasks)
        first = list(islice(tasks, 2))
        if self._workers > 1 and len(first) > 1:
            with tempfile.TemporaryDirectory(prefix="sstoken-") as folder:
                pool = _Processes(function, self._workers, self._devices, Path(folder), progress)
                yield from dispatch(pool, chain(first, tasks), progress)
            return
        yield from dispatch(_Here(function, self._devices[0], progress), chain(first, tasks), progress)


def _cores() -> int:
    from joblib import cpu_count  # knows the limits of a container

    return int(cpu_count())


class _Processes:
    """The pool of one call of `map`: as many processes as workers, one task each at a time."""

    def __init__(
        self,
        function: Callable[[Any, Worker], Any],
        window: int,
        devices: list[str | None],
        folder: Path,
        progress: Progress,
    ) -> None:
        self.window = window
        self._function, self._devices, self._progress = function, devices, progress
        self._board = folder / "done"
        self._done = np.memmap(self._board, np.int64, "w+", shape=(window,))
        """[workers]: how far each process is with its task; the processes write it."""
        self._running: dict[Future[Any], tuple[Attempt, int]] = {}
        """Each attempt with the slot of its process."""

    def start(self, attempt: Attempt) -> None:
        """See `Pool`."""
        slot = (set(range(self.window)) - {slot for _, slot in self._running.values()}).pop()
        self._done[slot] = 0
        device = self._devices[slot % len(self._devices)]
        place = (os.getpid(), os.getcwd(), str(self._board), self.window, slot, device)
        with _interrupts_later():
            future = _process(slot).submit(_in_worker, place, self._function, attempt.task.work)
        self._running[future] = attempt, slot

    def ended(self) -> Iterator[tuple[Attempt, Any]]:
        """See `Pool`."""
        for future in wait(self._running, _LOOK_EVERY, FIRST_COMPLETED).done:
            attempt, slot = self._running.pop(future)
            result: Any
            try:
                result = future.result()
            except BrokenExecutor as error:
                _kill(_PROCESSES.pop(slot))
                result = Died(_how(error))
            except Exception as error:
                result = Raised(error)
            yield attempt, result
        for attempt, slot in self._running.values():
            attempt.show(int(self._done[slot]), self._progress)

    def stop(self) -> None:
        """See `Pool`."""
        _stop_all()


def _how(error: BrokenExecutor) -> str:
    """How a process ended, in a few words."""
    found = re.search(r"(SIG[A-Z]+)\(|EXIT\((\d+)\)", str(error))
    if found is None:
        return "its process ended"
    return f"killed by {found[1]}" if found[1] else f"its process ended with code {found[2]}"


_PROCESSES: dict[int, Any] = {}
"""The pools of one process each, by slot. They outlive a call, and end when idle."""


def _process(slot: int) -> Any:
    if slot not in _PROCESSES:
        from joblib.externals.loky import ProcessPoolExecutor  # needs no guard in a user's script

        _PROCESSES[slot] = ProcessPoolExecutor(max_workers=1, timeout=_IDLE)
    return _PROCESSES[slot]


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends; processes started in it never see them: this one ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # when it starts, it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _stop_all() -> None:
    while _PROCESSES:
        _kill(_PROCESSES.popitem()[1])


def _kill(pool: Any) -> None:
    # Not shutdown(kill_workers=True): its thread fails with a KeyError on work that was submitted a moment before.
    from joblib.externals.loky.backend.utils import kill_process_tree

    for process in list(pool._processes.values()):
        kill_process_tree(process)
    pool.shutdown()


class _Board:
    """A worker that is one of several processes."""

    def __init__(self, board: str, workers: int, slot: int, device: str | None) -> None:
        self.device = device
        self._done, self._slot = np.memmap(board, np.int64, "r+", shape=(workers,)), slot

    def advance(self, amount: int) -> None:
        self._done[self._slot] += amount


def _in_worker(
    place: tuple[int, str, str, int, int, str | None], function: Callable[[Any, Worker], R], work: Any
) -> R:
    from joblib.externals.loky import process_executor

    parent, folder, board, workers, slot, device = place
    os.chdir(folder)  # a process that was kept warm may have begun elsewhere
    end_with(parent)
    process_executor._USE_PSUTIL = False  # it would take a model that was loaded for a leak, and start anew
    return function(work, _Board(board, workers, slot, device))


@cache
def end_with(parent: int) -> None:
    """Have this process end when `parent`, which started it, does, however that is: else it would write on."""

    def watch() -> None:
        with suppress(OSError):
            while os.getppid() == parent:
                time.sleep(_LOOK_EVERY)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
