"""What runs on a Ray node. A module of its own that imports no Ray, so that worker processes find it by name."""

import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sstoken.errors import SstokenError

_SAY_EVERY = 1.0
"""Seconds between two messages of a task on how far it is."""


@dataclass(frozen=True)
class Place:
    """Where an attempt belongs."""

    folder: str
    """The driver's working directory: relative paths are meant from there."""
    key: tuple[int, int]
    """The task's position, and which attempt it is."""
    board: Any
    """The actor that counts."""


class Board:
    """An actor that keeps how far each attempt is."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], int] = {}

    def add(self, key: tuple[int, int], amount: int) -> None:
        """Count `amount` units more."""
        self._done[key] = self._done.get(key, 0) + amount

    def end(self, key: tuple[int, int]) -> None:
        """Forget an attempt that has ended."""
        self._done.pop(key, None)

    def all(self) -> dict[tuple[int, int], int]:
        """How far each attempt is that has said so."""
        return self._done


class _Reporting:
    """A `Worker` of Ray: it speaks once a second, and of short tasks not at all."""

    device = None  # Ray shows a process its own GPUs alone

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
    """Do one task; return whether it raised, and its result or its error."""
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
    """The error itself if it pickles, with where it was raised as its cause; else its text."""
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(where)
    error.add_note(where)
    return error
