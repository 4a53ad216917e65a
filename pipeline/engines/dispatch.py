"""Hands out tasks, whatever runs them: a bounded window, retries, and quarantine of tasks that keep failing.

An engine provides a `Pool`. The policy here (how far to read ahead, what to retry, what stops the run) is the same for
every engine; `benchmarks/scale_sim.py` runs it with simulated workers.
"""

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sstoken.errors import QuarantinedError
from sstoken.stages.stage import Progress, Task

ATTEMPTS = 3
"""Attempts at a task before it is quarantined."""
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "EREMOTEIO",
        "EAGAIN",
    )
    if hasattr(errno, name)
}
"""Temporary errors of network file systems."""


@dataclass(eq=False)
class Attempt:
    """One attempt at one task."""

    index: int
    """Index of the task."""
    task: Task[Any]
    number: int = 1
    """From 1 to `ATTEMPTS`."""
    shown: int = 0
    """Units of this attempt that the progress bar counts now."""

    def show(self, done: int, progress: Progress) -> None:
        """Make the progress bar count `done` units of this attempt in total."""
        progress.advance(done - self.shown)
        self.shown = done


@dataclass(frozen=True)
class Died:
    """The process of an attempt died."""

    reason: str
    """Such as `killed by SIGKILL`."""


@dataclass(frozen=True)
class Raised:
    """An attempt raised."""

    error: BaseException


class Pool(Protocol):
    """Where attempts run."""

    @property
    def window(self) -> int:
        """Limit on the attempts under way; may change from call to call."""

    def start(self, attempt: Attempt) -> None:
        """Start an attempt."""

    def ended(self) -> Iterable[tuple[Attempt, Any]]:
        """Wait briefly; return the attempts that have ended, each with its result, `Died` or `Raised`."""

    def stop(self) -> None:
        """Kill every attempt: the results are no longer wanted."""


def dispatch(pool: Pool, tasks: Iterable[Task[Any]], progress: Progress) -> Iterator[Any]:
    """Run every task; yield results as they arrive, in any order. A task is read once there is room for it.

    A task is retried, at most twice, if its process died or a network disk failed. Any other error would recur, in a
    retry as in other tasks, and stops the run.

    Raises:
        QuarantinedError: some tasks failed at every attempt; names them. All others are done.
    """
    try:
        yield from _dispatch(pool, tasks, progress)
    except BaseException:
        pool.stop()
        raise


def _dispatch(pool: Pool, tasks: Iterable[Task[Any]], progress: Progress) -> Iterator[Any]:
    fresh = (Attempt(index, task) for index, task in enumerate(tasks))
    again: deque[Attempt] = deque()
    failed: list[tuple[str, str]] = []
    running = 0
    while True:
        window = pool.window
        while running < window and (attempt := again.popleft() if again else next(fresh, None)):
            pool.start(attempt)
            running += 1
        if not running:
            break
        for attempt, result in pool.ended():
            running -= 1
            if isinstance(result, Raised) and not _is_transient(result.error):
                raise result.error
            if not isinstance(result, (Died, Raised)):
                attempt.show(attempt.task.size, progress)
                yield result
                continue
            attempt.show(0, progress)
            if attempt.number < ATTEMPTS:
                attempt.number += 1
                again.append(attempt)
            else:
                failed.append((str(attempt.task.output), _reason(result)))
    if failed:
        raise QuarantinedError(sorted(failed), ATTEMPTS)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and error.errno in _TRANSIENT
    )


def _reason(result: Died | Raised) -> str:
    if isinstance(result, Died):
        return result.reason
    return f"{type(result.error).__name__}: {' '.join(str(result.error).split())}"
