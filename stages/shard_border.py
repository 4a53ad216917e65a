"""Stop between two shards on SIGTERM, which SLURM and Kubernetes send before they take the machine away."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sstoken.errors import SstokenError

GRACE = 8.0
"""Seconds that a shard may take after the signal; then the process exits, and the next run makes the shard again."""
STATUS = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM stopped, in time or not."""
replaceable: list[Any] = [signal.SIG_DFL]
"""Handlers of SIGTERM that may be replaced meanwhile: the system's and the command line's, never a user's."""
SAME = 0.3
"""Seconds within which a second signal is a duplicate: sent to the process, and to its group."""
GOES_ON = "what is finished is kept, the same command goes on from there"


class StoppedError(SstokenError):
    """SIGTERM arrived: shards that were being written are complete, the others were not started."""

    exit_code = STATUS


@contextmanager
def at_a_border() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM has arrived; exit `GRACE` seconds after the signal.

    A second signal exits at once. Does nothing outside the main thread, or if the handler is not `replaceable`.

    Raises:
        StoppedError: on leaving the context after a signal.
    """
    asked: list[float] = []
    over = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(time.monotonic())
            threading.Thread(target=_end_late, args=(over,), daemon=True).start()
        elif time.monotonic() - asked[0] > SAME:
            _end()

    before = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and before in replaceable
    if ours:
        signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda: bool(asked)
    finally:
        over.set()
        if ours:
            signal.signal(signal.SIGTERM, before)
    if asked:
        raise StoppedError(f"stopped by SIGTERM at a shard's border; {GOES_ON}")


def _end_late(over: threading.Event) -> None:
    deadline = time.monotonic() + GRACE
    while not over.wait(0.1):
        if time.monotonic() > deadline:
            _end()


def _end() -> None:
    """Exit at once. Worker processes notice and exit, too."""
    with suppress(OSError):
        os.write(2, f"\nerror: stopped by SIGTERM; {GOES_ON}\n".encode())
    os._exit(STATUS)
