"""Ending at a shard's border when the machine is about to be taken away: SIGTERM, as SLURM and Kubernetes send it."""

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
"""Seconds after the signal that a shard may take to its end; then the process ends, and the shard is made again."""
STATUS = 128 + signal.SIGTERM
"""Exit code of a process that ended so, in time or not."""
replaceable: list[Any] = [signal.SIG_DFL]
"""Handlers of SIGTERM that may be replaced meanwhile: the system's, and the command line's own. Not a user's."""
SAME = 0.3
"""Seconds within which a second signal is the first one, sent to the process and to its group."""
GOES_ON = "what is finished is kept, the same command goes on from there"


class StoppedError(SstokenError):
    """SIGTERM came; the shards that were under way are done, the others are not begun."""

    exit_code = STATUS


@contextmanager
def at_a_border() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether SIGTERM has come since; end the process if `GRACE` passes after it.

    A second signal ends it at once. Only in a process's main thread, and where the handler is `replaceable`; elsewhere
    nothing changes.

    Raises:
        StoppedError: at the end, where the signal came.
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
    """End the process here and now. Worker processes notice, and end, too."""
    with suppress(OSError):
        os.write(2, f"\nerror: stopped by SIGTERM; {GOES_ON}\n".encode())
    os._exit(STATUS)
