"""The local engine: runs tasks in this process, or in several on this machine, one task per process at a time.

Each process is a pool of its own, so that its death costs only its own task.
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
"""Seconds between looks at the workers' progress, and of each worker at its parent."""
_IDLE = 60
"""Seconds after which an idle process ends; until then, the next stage can use it without a restart."""


@dataclass
class _InProcess:
    """The `Worker` of tasks in this process."""

    attempt: Attempt
    progress: Progress
    device: str | None
    done: int = 0

    def advance(self, amount: int) -> None:
        self.done += amount
        self.attempt.show(self.done, self.progress)


class _Here:
    """A `Pool` of this process alone."""

    window = 1

    def __init__(
        self, function: Callable[[Any, Worker], Any], device: str | None, progress: Progress
    ) -> None:
        self._function, self._device, self._progress = function, device, progress
        self._ended: list[tuple[Attempt, Any]] = []

    def start(self, attempt: Attempt) -> None:
        """See `Pool`. Returns only when the attempt has ended."""
        try:
            result = self._function(attempt.task.work, _InProcess(attempt, self._progress, self._device))
        except Exception as error:
            result = Raised(error)
        self._ended.append((attempt, result))

    def ended(self) -> list[tuple[Attempt, Any]]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        pass  # `start` returns only once its attempt has ended


class LocalEngine:
    """Processes on this machine; see `Engine`."""

    def __init__(self, options: EngineOptions, rank: int = 0, world_size: int = 1) -> None:
        named = getattr(options, "device", "auto")
        self._devices: list[str | None] = [*named.split(",")] if "," in named else [None]
        self._workers = options.workers or (num_cores() if options.every_core else len(self._devices))
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


def num_cores() -> int:
    """Cores that this process may use."""
    from joblib import cpu_count  # respects a container's limits

    return int(cpu_count())


class _Processes:
    """The pool of one call of `map`: one process per worker, one task per process at a time."""

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
        """[workers]: units that each process has done of its task; written by the processes."""
        self._running: dict[Future[Any], tuple[Attempt, int]] = {}
        """Attempts under way, each with the slot of its process."""

    def start(self, attempt: Attempt) -> None:
        slot = (set(range(self.window)) - {slot for _, slot in self._running.values()}).pop()
        self._done[slot] = 0
        device = self._devices[slot % len(self._devices)]
        place = (os.getpid(), os.getcwd(), str(self._board), self.window, slot, device)
        with _interrupts_later():
            pool = _process(slot)
            future = pool.submit(_in_worker, place, self._function, attempt.task.work)
            _watch(pool)
        self._running[future] = attempt, slot

    def ended(self) -> Iterator[tuple[Attempt, Any]]:
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
        _stop_all()


def _how(error: BrokenExecutor) -> str:
    """How a process died, in a few words."""
    found = re.search(r"(SIG[A-Z]+)\(|EXIT\((\d+)\)", str(error))
    if found is None:
        return "its process ended"
    return f"killed by {found[1]}" if found[1] else f"its process ended with code {found[2]}"


_PROCESSES: dict[int, Any] = {}
"""Single-process pools by slot. They outlive a call of `map`, and end when idle."""


def _process(slot: int) -> Any:
    if slot not in _PROCESSES:
        from joblib.externals.loky import ProcessPoolExecutor  # users' scripts need no `if __name__` guard

        _start_tracker()
        _PROCESSES[slot] = ProcessPoolExecutor(max_workers=1, timeout=_IDLE)
    return _PROCESSES[slot]


def _start_tracker() -> None:
    """Start loky's tracker of semaphores without its warnings, unless it runs.

    A thread that removes a semaphore as this process ends may not come to tell the tracker, which then warns that one
    was left or is gone. It removes what was left: there is nothing that a user could do.
    """
    from joblib.externals.loky.backend import resource_tracker as tracker

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
    try:
        tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _watch(pool: Any) -> None:
    """Make the pool's own thread look at its process again.

    Where the idle process has ended, loky's `submit` wakes that thread before it starts another: the thread may then
    wait without knowing the new process, and would wait forever if that died.
    """
    with pool._flags.shutdown_lock:
        pool._executor_manager_thread_wakeup.wakeup()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM in this context; processes started in it inherit that, as this process ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # started here, as its start unblocks the signals
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
    # Not shutdown(kill_workers=True): its thread raises a KeyError for work submitted just before.
    from joblib.externals.loky.backend.utils import kill_process_tree

    for process in list(pool._processes.values()):
        kill_process_tree(process)
    pool.shutdown()


class _Board:
    """The `Worker` of tasks in one of several processes; reports progress through a shared array."""

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
    os.chdir(folder)  # a reused process may have started elsewhere
    end_with(parent)
    process_executor._USE_PSUTIL = (
        False  # loky would mistake a loaded model for a memory leak and restart the process
    )
    return function(work, _Board(board, workers, slot, device))


@cache
def end_with(parent: int) -> None:
    """End this process when its parent is gone, for whatever reason; otherwise it would go on writing."""

    def watch() -> None:
        with suppress(OSError):
            while os.getppid() == parent:
                time.sleep(_LOOK_EVERY)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
