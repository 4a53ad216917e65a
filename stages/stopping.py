"""Ending at a shard's border when the machine is about to be taken away: SIGTERM, as SLURM and Kubernetes send it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sstoken.errors import SstokenError

GRACE = 8.0
"""Seconds after the signal that a shard may take to its end; then the process ends, and the shard is made again."""
STATUS = 128 + signal.SIGTERM
"""Exit code of a process that ended so, in time or not."""


class StoppedError(SstokenError):
    """SIGTERM came; the shards that were under way are done, the others are not begun."""

    exit_code = STATUS


@contextmanager
def at_a_border() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether SIGTERM has come since; end the process if `GRACE` passes after it.

    Only in a process's main thread, and where nobody else handles the signal; elsewhere nothing changes.
    """
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if not asked.is_set():
            asked.set()
            threading.Thread(target=_end_late, args=(over,), daemon=True).start()

    over = threading.Event()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, handle)
    try:
        yield asked.is_set
    finally:
        over.set()
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if asked.is_set():
        raise StoppedError(
            "stopped by SIGTERM at a shard's border; what is finished is kept, the same command goes on from there"
        )


def _end_late(over: threading.Event) -> None:
    deadline = time.monotonic() + GRACE
    while not over.wait(0.1):
        if time.monotonic() > deadline:
            os._exit(STATUS)
