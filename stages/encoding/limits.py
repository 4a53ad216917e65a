"""Limits on time and memory, for chat templates that loop forever or whose output grows without bound."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sstoken.errors import SstokenError

MOST_SECONDS = 120.0
"""CPU time of this process for one row, independent of other load. The longest rows take a few seconds."""
MOST_BYTES = 4 << 30
"""Bytes that rendering one conversation may add to the process; a few megabytes are usual."""
_AGAIN = 1.0
"""Seconds until the signal repeats, in case the first is lost in a finalizer."""


class _TooLong(BaseException):
    """Not an `Exception`, so that no library catches it."""


def _interruptible() -> bool:
    """Return whether a signal can interrupt this thread."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextmanager
def time_limited(what: str) -> Iterator[Callable[[str], None]]:
    """Stop a template that computes for longer than `MOST_SECONDS`.

    There is no limit where signals are unavailable (in a thread, on Windows).

    Args:
        what: the row or unit of work, for the message.

    Yields:
        A function that restarts the timer; call it before each row with the row's name.

    Raises:
        SstokenError: the time limit was exceeded.
    """
    if not _interruptible():
        yield lambda name: None
        return

    def start(name: str) -> None:
        nonlocal what
        what = name
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS, _AGAIN)

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    start(what)
    try:
        yield start
    except _TooLong:
        raise SstokenError(
            f"{what}: the chat template did not finish in {MOST_SECONDS:g} s of CPU time and was stopped; fix its "
            "loops, or use another one with --chat-template"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def memory_limited() -> Iterator[None]:
    """Make allocations beyond `MOST_BYTES` raise MemoryError, before the system kills a process.

    Does nothing where the system has no limit (Windows, macOS), and in a thread, since other threads allocate, too.
    """
    size = _address_space() if _interruptible() else None
    if size is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, size + MOST_BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Return the size of this process's address space in bytes; None without Linux's /proc."""
    import resource

    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(64).split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
