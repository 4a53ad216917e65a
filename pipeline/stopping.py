"""Ctrl-C and SIGTERM end a command soon and safely: every file is complete or absent.

The first signal raises `KeyboardInterrupt` in the main thread. If that does not end the process within `MOST_SECONDS`,
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
"""Longest time from the first signal to the end of the process."""
_HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Stop:
    """The signals that this process has received."""

    def __init__(self) -> None:
        self.signal = 0
        """The first signal; 0: none."""
        self.at = 0.0
        """When it arrived."""
        self.told = False
        """Whether the user was told."""
        self.at_work = False
        """Whether signals are being handled."""
        self.process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread; at the second signal, end the process."""
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
        """End the process at once. Worker processes notice and end, too."""
        if not self.told:
            with suppress(OSError):
                os.write(2, f"\nerror: {reason()}; {GOES_ON}\n".encode())
        os._exit(code())


_stop = _Stop()


def _in_forked_process() -> None:
    """Stop recording signals in a forked process: the pipe belongs to its parent."""
    if _stop.at_work:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_process)


def reason() -> str:
    """Say what stopped the command, for its last line."""
    _stop.told = True
    return {0: "interrupted", signal.SIGINT: "interrupted"}.get(_stop.signal) or (
        f"stopped by {signal.Signals(_stop.signal).name}"
    )


def code() -> int:
    """The exit code by shell convention: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_stop.signal or signal.SIGINT)


@contextmanager
def stopping_safely() -> Iterator[None]:
    """Handle signals within this context and, after a first one, until the process ends; ignored ones stay ignored."""
    global _stop
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _stop = stop = _Stop()
    before: dict[int, Any] = {}
    for number in _HANDLED:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, stop.handle)
    # Stages that work by shards replace this handler: SIGTERM then waits for the end of the shard.
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
    """Wait for a signal in the pipe, which the system writes even while a library keeps the main thread busy."""
    with open(read, "rb", buffering=0) as signals:
        while noted := signals.read(1):
            if noted[0] in _HANDLED and signal.getsignal(noted[0]) == stop.handle:
                time.sleep(MOST_SECONDS)
                stop.signal = stop.signal or noted[0]
                stop.end()
