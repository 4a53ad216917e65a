"""The two kinds of error a user can cause. Anything else that escapes is a defect of ours."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


class SstokenError(Exception):
    """The work failed. The message is one line: what was given, what is legal, what to do. Exit code 1."""

    exit_code = 1


class UsageError(SstokenError, ValueError):
    """The request itself is wrong: a value out of range, a path that does not exist. Exit code 2."""

    exit_code = 2


class NothingLeftError(SstokenError):
    """The work finished with an empty result; rerunning needs other data or settings."""


class ChangedError(SstokenError):
    """An input changed while the work read it. Its results may mix both contents, so they are dropped."""


class QuarantinedError(SstokenError):
    """Some shards failed at every attempt. All others are done."""

    _NAMED = 5

    def __init__(self, failed: Sequence[tuple[str, str]], attempts: int) -> None:
        """`failed`: each shard's file, and how its last attempt ended."""
        self.failed, self.attempts = tuple(failed), attempts
        named = ", ".join(f"{file} ({reason})" for file, reason in self.failed[: self._NAMED])
        more = len(self.failed) - self._NAMED
        memory = any("SIGKILL" in reason or "memory" in reason for _, reason in self.failed)
        super().__init__(
            f"{len(self.failed)} of the shards failed {attempts} times and {'is' if len(self.failed) == 1 else 'are'} "
            f"in quarantine: {named}{f' and {more} more' if more > 0 else ''}; all others are done, the same command "
            f"tries {'it' if len(self.failed) == 1 else 'these'} again"
            + (" (a kill is often for want of memory: try fewer workers)" if memory else "")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failed, self.attempts)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: the known one that is nearest, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def in_one_line(text: object, longest: int) -> str:
    """Return a text, or an error's message, without line breaks and cut to `longest` characters."""
    return " ".join(str(text).split())[:longest]


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its type, for a one-line message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def first_line(error: BaseException) -> str:
    """Return the type and first line of an error, for a one-line message, without the query of a signed URL."""
    lines = str(error).strip().splitlines()
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", lines[0])[:200] if lines else ""
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
