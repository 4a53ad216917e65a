"""A limit for templates that never end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sstoken.errors import SstokenError

MOST_SECONDS = 120.0
"""Of this process's computing for one row, whatever else the machine does. The longest rows take a few."""
_AGAIN = 1.0
"""Seconds until it is said once more, should the first time be lost in a finaliser."""


class _TooLong(BaseException):
    """Not an `Exception`, so that no library takes it for its own."""


@contextmanager
def limited(what: str) -> Iterator[Callable[[str], None]]:
    """Stop a template that computes for longer than `MOST_SECONDS`.

    Where signals do not go (in a thread, on Windows) there is no limit.

    Args:
        what: the row or the part of the work, for the message.

    Yields:
        A function to call before each row, with its name: the time starts anew.

    Raises:
        SstokenError: it was stopped.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
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
            f"{what}: the chat template did not come to an end in {MOST_SECONDS:g} s of computing and was stopped; "
            "mend its loops, or name another one with --chat-template"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
