"""Ctrl-C and SIGTERM end a command in time, whatever it does, with one line; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sstoken.pipeline import stopping
from sstoken.stages import shard_border
from tests.pipeline.small_run import environment
from tests.support import PATIENCE, ROOT, messages

STUBBORN = """
import sys, time
from sstoken.pipeline import cli, stopping
stopping.MOST_SECONDS = float(sys.argv[2])

def work(*arguments, **options):
    while True:
        try:
            print("working", flush=True)
            time.sleep(1000)
        except KeyboardInterrupt:
            print("held up", flush=True)
            if sys.argv[1] == "obeys":
                raise

cli.cli.main = work
cli.main([])
"""


def _take_signals() -> None:
    """Ignored signals are inherited: of these tests too when they run under nohup or in the background."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def start(kind: str, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, kind, str(seconds)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_take_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped by SIGHUP",
}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("kind", ["obeys", "swallows it"])
def test_one_signal_ends_it_with_one_line(kind: str, number: signal.Signals) -> None:
    process = start(kind, 0.5 if kind != "obeys" else PATIENCE)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == CODES[number]
    (line,) = messages(err)
    assert line == f"error: {WORDS[number]}; {shard_border.GOES_ON}"


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_it_at_once(number: signal.Signals) -> None:
    process = start("swallows it", PATIENCE)
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "held up\n"
    time.sleep(2 * shard_border.SAME)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == CODES[number]
    assert messages(err) == [f"error: {WORDS[number]}; {shard_border.GOES_ON}"]


def test_the_end_comes_within_ten_seconds() -> None:
    assert stopping.MOST_SECONDS < 10


def test_without_a_signal_everything_is_as_before() -> None:
    before = [signal.getsignal(number) for number in CODES], threading.active_count()
    with stopping.stopping_safely():
        assert signal.getsignal(signal.SIGTERM) != before[0][1]
    assert [signal.getsignal(number) for number in CODES] == before[0]
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stopping_safely():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_forked_process_ends_as_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is not its parent's."""
    monkeypatch.setattr(stopping, "MOST_SECONDS", 0.1)
    with stopping.stopping_safely():
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        time.sleep(0.5)
