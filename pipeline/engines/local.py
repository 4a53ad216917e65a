"""The local engine: tasks in this process, or in several on this machine, one task a process at a time.

Each process is a pool of its own, so that one that dies costs its own task and no other.
"""

import atexit
import os
import signal
import tempfile
import time
from collections import deque
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

from sstoken.errors import SstokenError
from sstoken.stages.stage import EngineOptions, Progress, Task, Worker

T = TypeVar("T")
R = TypeVar("R")
ATTEMPTS = 3
"""Times that a task is tried whose worker process dies."""
_LOOK_EVERY = 0.2
"""Seconds between two looks at what the workers have done, and at whether their parent lives."""
_AHEAD = 4
"""Results a worker that may wait for an earlier one."""
_IDLE = 60
"""Seconds after which a process without work ends; until then the next stage finds it warm."""


@dataclass
class _InProcess:
    """A worker that is this process."""

    progress: Progress
    device: str | None = None
    done: int = 0

    def advance(self, amount: int) -> None:
        self.done += amount
        self.progress.advance(amount)


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
                yield from _Spread(self._workers, self._devices, Path(folder), progress).run(
                    function, chain(first, tasks)
                )
            return
        for task in chain(first, tasks):
            worker = _InProcess(progress, self._devices[0])
            result = function(task.work, worker)
            progress.advance(task.size - worker.done)
            yield result


def _cores() -> int:
    from joblib import cpu_count  # knows the limits of a container

    return int(cpu_count())


@dataclass
class _Attempt:
    index: int
    task: Task[Any]
    number: int
    slot: int


class _Spread:
    """One call of `map` over several processes."""

    def __init__(self, workers: int, devices: list[str | None], folder: Path, progress: Progress) -> None:
        self._workers, self._devices, self._progress = workers, devices, progress
        self._board = folder / "done"
        self._done = np.memmap(self._board, np.int64, "w+", shape=(workers,))
        """[workers]: how far each process is with its task; the processes write it."""
        self._shown = [0] * workers
        self._running: dict[Future[Any], _Attempt] = {}
        self._results: dict[int, Any] = {}
        self._lost: list[Task[Any]] = []

    def run(self, function: Callable[[Any, Worker], R], tasks: Iterator[Task[Any]]) -> Iterator[R]:
        fresh = enumerate(tasks)
        again: deque[_Attempt] = deque()
        next_index, more = 0, True
        try:
            while True:
                free = set(range(self._workers)) - {attempt.slot for attempt in self._running.values()}
                while free and (again or (more and len(self._results) < _AHEAD * self._workers)):
                    if again:
                        attempt = again.popleft()
                    elif (found := next(fresh, None)) is not None:
                        attempt = _Attempt(*found, number=1, slot=0)
                    else:
                        more = False
                        break
                    attempt.slot = free.pop()
                    self._start(function, attempt)
                if not self._running:
                    break
                for future in wait(self._running, _LOOK_EVERY, FIRST_COMPLETED).done:
                    self._end(future, again)
                self._show()
                while next_index in self._results:
                    result = self._results.pop(next_index)
                    next_index += 1
                    if result is not _LOST:
                        yield result
        except BaseException:
            _stop_all()
            raise
        if self._lost:
            names = ", ".join(str(task.output) for task in self._lost)
            raise SstokenError(
                f"{names}: the process that made it died {ATTEMPTS} times (often for want of memory: try fewer "
                "workers); all others are done, the same command tries again"
            )

    def _start(self, function: Callable[[Any, Worker], Any], attempt: _Attempt) -> None:
        slot = attempt.slot
        self._done[slot] = self._shown[slot] = 0
        device = self._devices[slot % len(self._devices)]
        place = (os.getpid(), os.getcwd(), str(self._board), self._workers, slot, device)
        with _interrupts_later():
            future = _process(slot).submit(_in_worker, place, function, attempt.task.work)
        self._running[future] = attempt

    def _end(self, future: Future[Any], again: deque[_Attempt]) -> None:
        attempt = self._running.pop(future)
        try:
            result = future.result()
        except BrokenExecutor:
            _kill(_PROCESSES.pop(attempt.slot))
            self._progress.advance(-self._shown[attempt.slot])
            if attempt.number == ATTEMPTS:
                self._lost.append(attempt.task)
                result = _LOST
            else:
                attempt.number += 1
                again.append(attempt)
                return
        else:
            self._progress.advance(attempt.task.size - self._shown[attempt.slot])
        self._shown[attempt.slot] = 0
        self._results[attempt.index] = result

    def _show(self) -> None:
        for attempt in self._running.values():
            now = int(self._done[attempt.slot])
            self._progress.advance(now - self._shown[attempt.slot])
            self._shown[attempt.slot] = now


_LOST = object()
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
