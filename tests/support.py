"""What tests of every layer share: paths, patience and conditions. Imports nothing of the packages under test."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
"""The root of the repository."""
SHARED = ROOT.parent / "shared"
"""Trained models and real data beside a checkout; absent elsewhere."""
needs_shared = pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs ../shared")
PATIENCE = 1800
"""Seconds that a process may take. No test depends on the clock: even on a busy machine only a hang takes longer."""
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
"""Starts the program that follows in two processes that can reach each other."""
_PROGRESS = re.compile(
    r"[\d.]+[kMGT]?(/[\d.]+[kMGT]?)? \w+, (\?|[\d.]+[kMGT]?) \w+/s(, [\d:?]+ left)?(, .*)?"
)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and not os.environ.get("CI"),
    reason="torch.compile needs a C++ compiler, which the user installs; CI has one and runs this",
)


def slow_but(quick: Iterable[object], all_: Iterable[object]) -> list[object]:
    """Return the parameters of a test: all but the `quick` ones are for `make test-slow`."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in all_]


def messages(err: str) -> list[str]:
    """Return the lines of a standard error without progress lines, which appear when work takes seconds."""
    return [line for line in err.splitlines() if line and not _PROGRESS.fullmatch(line)]


def end_process() -> NoReturn:
    """End a program that ran in several processes; see `sstoken.stages.processes.end_process`."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most `PATIENCE` seconds."""
    for _ in range(PATIENCE * 10):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("never")
