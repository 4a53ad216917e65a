"""How tasks are handed out, whatever runs them: a bounded window, retries, and a list of the tasks that failed.

An engine gives a `Pool`; what is decided here (how far to read ahead, what is tried again, what stops the run) is the
same for every engine, and `benchmarks/scale_sim.py` runs it with simulated workers.
"""

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sstoken.errors import QuarantinedError
from sstoken.stages.stage import Progress, Task

ATTEMPTS = 3
"""Times that a task is tried before it is put in quarantine."""
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
"""What a network disk answers on a bad day."""


@dataclass(eq=False)
class Attempt:
    """One try at one task."""

    index: int
    """Position among the tasks."""
    task: Task[Any]
    number: int = 1
    """From 1 to `ATTEMPTS`."""
    shown: int = 0
    """Units of the progress bar that this attempt has counted."""

    def show(self, done: int, progress: Progress) -> None:
        """Have the progress bar count `done` units of this attempt in all."""
        progress.advance(done - self.shown)
        self.shown = done


@dataclass(frozen=True)
class Died:
    """The process that ran an attempt ended without an answer."""

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
        """Attempts that may be started and not ended; may change from call to call."""

    def start(self, attempt: Attempt) -> None:
        """Start an attempt."""

    def ended(self) -> Iterable[tuple[Attempt, Any]]:
        """Wait a moment; return the attempts that have ended, each with its result, `Died` or `Raised`."""

    def stop(self) -> None:
        """End every attempt at once: the caller has lost interest."""


def dispatch(pool: Pool, tasks: Iterable[Task[Any]], progress: Progress) -> Iterator[Any]:
    """Run every task; yield the results as they come, in no order. Tasks are read when there is room for them.

    A task whose process dies, or which a network disk fails, is tried again, at most twice. Anything else that a task
    raises would be raised again by the next try, and by other tasks: it stops the run.

    Raises:
        QuarantinedError: names the tasks that failed each time; all others are done.
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
