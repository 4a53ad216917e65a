"""A time limit for templates that loop forever."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sstoken.errors import SstokenError

MOST_SECONDS = 120.0
"""CPU time of this process for one row, independent of other load. The longest rows take a few seconds."""
_AGAIN = 1.0
"""Seconds until the signal repeats, in case the first is lost in a finalizer."""


class _TooLong(BaseException):
    """Not an `Exception`, so that no library catches it."""


def interruptible() -> bool:
    """Return whether a signal can interrupt this thread."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextmanager
def limited(what: str) -> Iterator[Callable[[str], None]]:
    """Stop a template that computes for longer than `MOST_SECONDS`.

    There is no limit where signals are unavailable (in a thread, on Windows).

    Args:
        what: the row or unit of work, for the message.

    Yields:
        A function that restarts the timer; call it before each row with the row's name.

    Raises:
        SstokenError: the time limit was exceeded.
    """
    if not interruptible():
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
