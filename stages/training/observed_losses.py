"""`ObservedLosses`: record each token's loss during in-loop training, so that one epoch also scores the data.

trainer = SelfModulatedTrainer(..., observers=[ObservedLosses("runs/observed")])
"""

import sqlite3
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import SstokenError, UsageError
from sstoken.in_loop.observation import Observation
from sstoken.stages.processes import is_main_process, rank

PATTERN = "observed-*.sqlite"


class Seen(NamedTuple):
    """An example's signals as last seen in training; n tokens."""

    step: int
    loss: NDArray[np.float32]
    """[n] nats; NaN outside the response."""
    attention: NDArray[np.float32] | None
    """[n], in [0, 1]; None if not measured."""


class ObservedLosses:
    """An in-loop training observer that stores each example's last losses in a file per process.

    Examples are identified by their tokens, however they are batched; a truncated example is a different one.

    Args:
        folder: folder of the files; created if missing.
        resume: continue an earlier recording, for training that resumes.

    Raises:
        UsageError: the folder has an earlier recording and `resume` is false.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False) -> None:
        self._folder = Path(folder)
        if not resume and is_main_process() and any(self._folder.glob(PATTERN)):
            raise UsageError(
                f"{self._folder}: has the losses of an earlier training; choose another folder, or set resume=True"
            )

    def __call__(self, observation: Observation) -> None:
        """Store the losses of one step."""
        attention = None if observation.attention is None else observation.attention.tobytes()
        self._database.execute(
            "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)",
            (observation.key, observation.step, observation.loss.tobytes(), attention),
        )

    @cached_property
    def _database(self) -> sqlite3.Connection:
        self._folder.mkdir(parents=True, exist_ok=True)
        return _open(self._folder / PATTERN.replace("*", str(rank())))


class SeenExamples:
    """The recordings of all processes of a training run. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Open the recordings.

        Raises:
            UsageError: there are none.
        """
        paths = sorted(folder.glob(PATTERN))
        if not paths:
            raise UsageError(f"{folder}: no {PATTERN}; name the folder given to ObservedLosses")
        self._databases = [_open(path) for path in paths]

    def __enter__(self) -> "SeenExamples":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for database in self._databases:
            database.close()

    def last(self, key: bytes) -> Seen | None:
        """Return the signals last recorded for an example; None if there are none."""
        return max(self._found(key), key=lambda seen: seen.step, default=None)

    def _found(self, key: bytes) -> Iterator[Seen]:
        for database in self._databases:
            try:
                row = database.execute(
                    "SELECT step, loss, attention FROM seen WHERE key = ?", (key,)
                ).fetchone()
            except sqlite3.DatabaseError as error:
                raise SstokenError(f"a file of observed losses is damaged ({error}); train again") from error
            if row is not None:
                step, loss, attention = row
                yield Seen(step, _floats(loss), None if attention is None else _floats(attention))


def _open(path: Path) -> sqlite3.Connection:
    """Commit each statement at once: a killed process loses nothing."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = TRUNCATE")
    database.execute("PRAGMA synchronous = OFF")
    database.execute(
        "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, step INT, loss BLOB, attention BLOB)"
    )
    return database


def _floats(raw: bytes) -> NDArray[np.float32]:
    return np.frombuffer(raw, np.float32)
