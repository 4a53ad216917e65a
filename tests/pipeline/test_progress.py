"""Progress: figures in tokens with rate and time left, as lines where there is no terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from sstoken.pipeline import progress, saying
from tests.support import PATIENCE, ROOT, messages


def shown(capsys: pytest.CaptureFixture[str], total: int | None) -> list[str]:
    with progress.progress_bar("tokens", total) as bar:
        bar.skip(40_000)
        for _ in range(6):
            bar.note("loss 1.234")
            bar.advance(10_000)
    return capsys.readouterr().err.splitlines()


def test_lines_have_counts_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE", 1e-9)
    lines = shown(capsys, 100_000)
    assert re.fullmatch(r"100k/100k tokens, [\d.]+[kMGT]? tokens/s, 00:00 left, loss 1.234", lines[-1])
    assert lines[0].startswith("50.0k/100k tokens, ")
    assert messages("\n".join(lines)) == []
    assert all(" left" not in line for line in shown(capsys, None))


def test_short_work_needs_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, 100_000) == []


def test_lines_grow_rarer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE", 1e-9)
    lines = progress._Lines()
    lines.bar = type("Bar", (), {"mininterval": 50.0})()
    for _ in range(3):
        lines.write("\rsome figures\n")
    assert lines.bar.mininterval == 60
    assert capsys.readouterr().err == "some figures\n" * 3


def test_long_work_says_once_what_would_be_faster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_FIRST_ESTIMATE", 0.0)
    monkeypatch.setattr(progress, "_LONG", 0.0)
    with progress.progress_bar("tokens", 100, faster=lambda: "a GPU") as bar:
        for _ in range(5):
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"about [\d:]+ to go; faster: a GPU", lines[0])


def test_loading_is_not_part_of_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar("tokens", 10_000, faster=lambda: "a GPU") as bar:
        for at in (90.0, 100.0, 110.0):
            now[0] = at
            bar.advance(100)
    assert capsys.readouterr().err.splitlines() == ["about 16:10 to go; faster: a GPU"]


def test_lines_do_not_count_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress.progress_bar("tokens", 1000) as bar:
        for at in (90.0, 100.0):
            now[0] = at
            bar.advance(100)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "100/1.00k tokens, ? tokens/s, ? left",
        "200/1.00k tokens, 10.0 tokens/s, 01:20 left",
    ]


def test_short_work_does_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_ESTIMATE", 0.0)
    with progress.progress_bar("tokens", 100, faster=lambda: "a GPU") as bar:
        bar.advance(99)
    assert capsys.readouterr().err == ""


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE", 1e-9)
    monkeypatch.setattr(saying, "_level", "quiet")
    assert shown(capsys, 100_000) == []


@pytest.mark.parametrize(("size", "bar"), [((120, 40), True), ((0, 0), False), ((120, 0), False)])
def test_a_terminal_without_a_size_gets_lines(size: tuple[int, int], bar: bool) -> None:
    program = (
        "import time; from sstoken.pipeline import progress; progress._FIRST_LINE = 0.0\n"
        "with progress.progress_bar('tokens', 3) as shown:\n"
        "    for _ in range(3): time.sleep(0.2); shown.advance()\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True, cwd=ROOT, timeout=PATIENCE)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "tokens/s" in shown
    assert ("%|" in shown) == bar
