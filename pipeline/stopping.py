"""Ctrl-C and SIGTERM end a command soon and safely: all that is written is complete or not there.

The first one is a `KeyboardInterrupt` in the main thread. Where that does not end the process within `MOST_SECONDS`,
because a library is busy or swallows it, a thread ends it; a second signal ends it at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sstoken.stages import shard_border
from sstoken.stages.shard_border import GOES_ON, SAME

MOST_SECONDS = shard_border.GRACE
"""From the first signal to the end."""
_HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Stop:
    """What has been asked of this process."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal; 0: none."""
        self.at = 0.0
        self.told = False
        self.at_work = False
        """Whether the signals are handled now."""
        self.process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread, or end at the second time."""
        if os.getpid() != self.process:  # a forked helper process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if not self.signal:
            self.signal, self.at = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self.at > SAME:
            self.end()

    def end(self) -> None:
        """End the process here and now. Worker processes notice, and end, too."""
        if not self.told:
            with suppress(OSError):
                os.write(2, f"\nerror: {reason()}; {GOES_ON}\n".encode())
        os._exit(code())


_stop = _Stop()


def _in_forked_process() -> None:
    """Take no notes of a forked process's signals: the pipe is its parent's, whom they do not concern."""
    if _stop.at_work:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_process)


def reason() -> str:
    """Return what stopped the command, for its last line."""
    _stop.told = True
    return {0: "interrupted", signal.SIGINT: "interrupted"}.get(_stop.signal) or (
        f"stopped by {signal.Signals(_stop.signal).name}"
    )


def code() -> int:
    """Return the exit code, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_stop.signal or signal.SIGINT)


@contextmanager
def stopping_safely() -> Iterator[None]:
    """Handle the signals meanwhile; after one, until the process has ended. Ignored ones stay ignored."""
    global _stop
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _stop = stop = _Stop()
    before: dict[int, Any] = {}
    for number in _HANDLED:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, stop.handle)
    # Shard by shard, SIGTERM waits for the shard's end.
    shard_border.replaceable.append(stop.handle)
    read, write = os.pipe()
    os.set_blocking(write, False)
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    stop.at_work = True
    threading.Thread(target=_end_in_time, args=(read, stop), daemon=True).start()
    try:
        yield
    finally:
        shard_border.replaceable.remove(stop.handle)
        if not stop.signal:
            stop.at_work = False
            signal.set_wakeup_fd(woken)
            os.close(write)
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_in_time(read: int, stop: _Stop) -> None:
    """Wait for a signal, which the system notes at once, also while a library keeps the main thread busy."""
    with open(read, "rb", buffering=0) as signals:
        while noted := signals.read(1):
            if noted[0] in _HANDLED and signal.getsignal(noted[0]) == stop.handle:
                time.sleep(MOST_SECONDS)
                stop.signal = stop.signal or noted[0]
                stop.end()
