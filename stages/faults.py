"""Fault injection for crash tests: kill the process, or fail, at the n-th write, fsync, rename, deletion or commit.

Crash tests set `SSTOKEN_FAULT` to `KIND:POINT:N`: `kill:rename:7` sends SIGKILL to the process before its seventh
rename, `ENOSPC:write:3+` makes the third write and every later one fail. Without the variable, nothing happens. Each
process counts on its own. What other libraries write (a trainer's checkpoint) is not counted.
"""

import errno
import io
import os
import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from sstoken.errors import UsageError

VARIABLE = "SSTOKEN_FAULT"
KINDS = ("kill", "short", "ENOSPC", "EIO", "EACCES", "none")
"""`short` writes half of the bytes and reports that, as a system may; `none` only counts the points."""
POINTS = ("write", "fsync", "rename", "delete", "commit", "any")
"""A commit is the rename of a manifest, of another mark of a folder, or of a finished folder."""
_PLAN = re.compile(rf"({'|'.join(KINDS)}):({'|'.join(POINTS)}):(\d+)(\+?)")


@dataclass
class _Plan:
    kind: str
    point: str
    at: int
    """The number of the first point that fails, from 1."""
    on: bool
    """Whether all later ones fail, too."""
    passed: Counter[str] = field(default_factory=Counter)

    def due(self, point: str) -> bool:
        """Count a point; return whether it has to fail."""
        self.passed.update({point, "any"} | ({"rename"} if point == "commit" else set()))
        if self.point != "any" and self.point != point and (self.point, point) != ("rename", "commit"):
            return False
        count = self.passed[self.point]
        return count == self.at or (self.on and count > self.at)


@cache
def plan() -> _Plan | None:
    """Return the plan in the environment variable; None in a normal run.

    Raises:
        UsageError: the variable is not a plan.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    asked = _PLAN.fullmatch(text)
    if asked is None:
        raise UsageError(
            f"{VARIABLE} is {text!r}; legal: KIND:POINT:N with KIND {', '.join(KINDS)} and POINT {', '.join(POINTS)}"
        )
    return _Plan(asked[1], asked[2], int(asked[3]), bool(asked[4]))


def point(name: str, place: PurePath) -> None:
    """Fail here if the plan says so.

    Raises:
        OSError: the planned fault.
    """
    active = plan()
    if active is not None and active.due(name):
        _fail(active.kind, str(place))


def _fail(kind: str, place: str | None) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind in ("ENOSPC", "EIO", "EACCES"):
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number), *([] if place is None else [place]))


def create(file: Path) -> BinaryIO:
    """Open a new file for writing, as `open(file, "wb")` does."""
    return open(file, "wb") if plan() is None else cast(BinaryIO, io.BufferedWriter(_Faulty(file, "wb")))


class _Faulty(io.FileIO):
    """A file whose writes fail half-way, without naming the file, as the system's do."""

    def write(self, content: Any) -> int:
        active = plan()
        assert active is not None
        if not active.due("write"):
            return super().write(content)
        half = super().write(memoryview(content).cast("B")[: max(1, len(content) // 2)])
        _fail(active.kind, None)
        return half if active.kind == "short" else half + super().write(memoryview(content).cast("B")[half:])
