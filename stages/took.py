"""Record how long the work on a folder took, over all runs and ranks.

Shards cannot hold this: they are the same bytes, whoever makes them.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages import plain_json, storage
from sstoken.stages.storage import write_atomic

FOLDER = ".took"
"""Folder in a partial folder, with a file for each run that worked on it."""
_SAVE_EVERY = 30.0
"""Seconds between two saves; a killed run loses the count since the last one."""


class Took:
    """The time that one run spends on shards."""

    def __init__(self, out: Path, part: str) -> None:
        """Start at zero; `part` names the rank."""
        self._file = out / FOLDER / f"{part}-{secrets.token_hex(4)}.json"
        self._shards, self._seconds, self._saved = 0, 0.0, time.monotonic()

    def add(self, seconds: float) -> None:
        """Count a shard."""
        self._shards += 1
        self._seconds += seconds
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the counts so far."""
        self._saved = time.monotonic()
        if self._shards:
            storage.of(self._file).make_folder(self._file.parent)
            write_atomic(self._file, json.dumps({"shards": self._shards, "seconds": self._seconds}))


def total(out: Path) -> dict[str, Any]:
    """Add up `shards` and `worker_seconds` of all runs that worked on a partial folder; {} if there is no record.

    Raises:
        SstokenError: a record is damaged.
    """
    shards, seconds = 0, 0.0
    store = storage.of(out)
    for file in store.list(out / FOLDER):
        with store.open(file) as opened:
            try:
                said = plain_json.parse_object(opened.read())
                shards, seconds = shards + int(said["shards"]), seconds + float(said["seconds"])
            except (ValueError, TypeError, KeyError, OverflowError):
                raise SstokenError(
                    f"{file}: damaged; it only says how long the work took, remove it to go on without"
                ) from None
    return {"shards": shards, "worker_seconds": round(seconds, 3)} if shards else {}
