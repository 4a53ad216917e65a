"""`ObservedLosses`: record each token's loss during in-loop training, so that one epoch also scores the data.

trainer = SelfModulatedTrainer(..., observers=[ObservedLosses("runs/observed")])
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
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
        row = (observation.key, observation.step, observation.loss.tobytes(), attention)
        self._database.execute(
            "INSERT OR REPLACE INTO seen (key, step, loss, attention, digest) VALUES (?, ?, ?, ?, ?)",
            (*row, _digest(*row)),
        )

    @cached_property
    def _database(self) -> sqlite3.Connection:
        """The file of this process. Each statement is committed at once: a killed process loses nothing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        database = _connect(self._folder / PATTERN.replace("*", str(rank())), "rwc")
        database.execute("PRAGMA journal_mode = TRUNCATE")
        database.execute("PRAGMA synchronous = OFF")
        database.execute(
            "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, step INT, loss BLOB, attention BLOB, digest BLOB)"
        )
        if not _has_digests(database):
            database.execute("ALTER TABLE seen ADD COLUMN digest BLOB")
        return database


class SeenExamples:
    """The recordings of all processes of a training run. A context manager."""

    def __init__(self, folder: Path) -> None:
        """Open the recordings, and check them.

        Raises:
            UsageError: there are none.
            SstokenError: one is damaged.
        """
        paths = sorted(folder.glob(PATTERN))
        if not paths:
            raise UsageError(f"{folder}: no {PATTERN}; name the folder given to ObservedLosses")
        self._databases = {path: _connect(path, "rw") for path in paths}
        self._digests: dict[Path, str] = {}
        for path, database in self._databases.items():
            with _naming(path):  # rows are found by their keys, which have an index
                if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    raise sqlite3.DatabaseError("its pages contradict each other")
                self._digests[path] = "digest" if _has_digests(database) else "NULL"  # older: none

    def __enter__(self) -> "SeenExamples":
        return self

    def __exit__(self, *error: object) -> None:
        for database in self._databases.values():
            database.close()

    def last(self, key: bytes) -> Seen | None:
        """Return the signals last recorded for an example; None if there are none."""
        return max(self._found(key), key=lambda seen: seen.step, default=None)

    def _found(self, key: bytes) -> Iterator[Seen]:
        for path, database in self._databases.items():
            with _naming(path):
                row = database.execute(
                    f"SELECT step, loss, attention, {self._digests[path]} FROM seen WHERE key = ?", (key,)
                ).fetchone()
                if row is None:
                    continue
                step, loss, attention, digest = row
                if digest is not None and digest != _digest(key, step, loss, attention):
                    raise sqlite3.DatabaseError("the losses of an example were changed")
            yield Seen(step, _floats(loss), None if attention is None else _floats(attention))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise SstokenError(f"{path}: damaged ({error}); train again") from error


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
    )


def _has_digests(database: sqlite3.Connection) -> bool:
    return "digest" in {row[1] for row in database.execute("PRAGMA table_info(seen)")}


def _digest(key: bytes, step: int, loss: bytes, attention: bytes | None) -> bytes:
    """Hash a row to 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for value in (key, step, loss, attention):  # of any type, if they are damaged
        text = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.digest()


def _floats(raw: bytes) -> NDArray[np.float32]:
    return np.frombuffer(raw, np.float32)
