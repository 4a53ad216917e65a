"""The code that runs on a Ray node. It does not import Ray, and worker processes find it by name."""

import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sstoken.errors import SstokenError

_SAY_EVERY = 1.0
"""Seconds between a task's progress messages."""


@dataclass(frozen=True)
class Place:
    """What an attempt needs to know about the driver."""

    folder: str
    """The driver's working directory, to which relative paths refer."""
    key: tuple[int, int]
    """Index of the task, and number of the attempt."""
    board: Any
    """The actor that collects progress."""


class Board:
    """An actor that collects the progress of attempts."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], int] = {}

    def add(self, key: tuple[int, int], amount: int) -> None:
        """Add `amount` units."""
        self._done[key] = self._done.get(key, 0) + amount

    def end(self, key: tuple[int, int]) -> None:
        """Forget an attempt that has ended."""
        self._done.pop(key, None)

    def all(self) -> dict[tuple[int, int], int]:
        """Units done, by attempt."""
        return self._done


class _Reporting:
    """The `Worker` of Ray tasks: reports at most once a second, and not at all for short tasks."""

    device = None  # Ray makes only the task's own GPUs visible

    def __init__(self, place: Place) -> None:
        self._place, self._held, self._said = place, 0, time.monotonic()
        self.has_said = False

    def advance(self, amount: int) -> None:
        self._held += amount
        now = time.monotonic()
        if now - self._said > _SAY_EVERY:
            self._place.board.add.remote(self._place.key, self._held)
            self._held, self._said, self.has_said = 0, now, True


def run(function: Callable[[Any, Any], Any], work: Any, place: Place) -> tuple[bool, Any]:
    """Run one task; return whether it raised, and its result or error."""
    worker = _Reporting(place)
    try:
        _enter(place.folder)
        return False, function(work, worker)
    except Exception as error:
        return True, _portable(error)
    finally:
        if worker.has_said:
            place.board.end.remote(place.key)


def _enter(folder: str) -> None:
    if os.getcwd() == folder:
        return
    try:
        os.chdir(folder)
    except OSError as error:
        raise SstokenError(
            f"node {os.uname().nodename}: no folder {folder}; a run's folder has to be on a disk that all nodes share, "
            "at the same path"
        ) from error


def _portable(error: Exception) -> Exception:
    """The error itself if it pickles, with its traceback as a note; else an error with the traceback as its text."""
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(where)
    error.add_note(where)
    return error
