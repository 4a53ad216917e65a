"""`history.json`: the checkpoints of a training run, in training order."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import plain_json, storage
from sstoken.stages.folders import read_file
from sstoken.stages.storage import write_atomic

INDEX = "history.json"

Kind = Literal["reference", "full", "lora", "ema"]


@dataclass(frozen=True)
class Entry:
    """One checkpoint of a history."""

    name: str
    """`step-<K>`, or `step-<K>-ema`."""
    path: str
    """Its path, relative to the history's folder in the file; for a reference, possibly a Hub id with its commit."""
    step: int
    """Optimizer steps taken before it was saved. 0: the base model."""
    tokens_seen: int | None
    """Tokens trained on so far, without padding. None: the trainer did not count them."""
    loss: float | None
    """Training loss in nats, mean over the steps since the previous log line. None for the base model."""
    kind: Kind
    """`reference`: the base model, not copied. `full`: all weights. `lora`: an adapter. `ema`: averaged weights."""
    absolute: str | None = None
    """For a reference to a folder, its original path, in case the history is moved without it."""


_ENTRIES = TypeAdapter(list[Entry])


def read_history(folder: Path) -> list[Entry]:
    """Return the checkpoints of a history with loadable paths.

    Raises:
        UsageError: `folder` has no history.
        SstokenError: its index is damaged, or a checkpoint in it is missing.
    """
    place = storage.address(folder)
    return [replace(entry, path=_loadable(place, entry), absolute=None) for entry in read_index(folder)]


def reference(folder: Path, base: str) -> Entry:
    """Return the base model's entry: a Hub id, or an absolute path that is also stored relative to the history."""
    if not Path(base).is_absolute():
        return Entry("step-0", base, 0, 0, None, "reference")
    relative = Path(os.path.relpath(base, storage.address(folder).resolve())).as_posix()
    return Entry("step-0", relative, 0, 0, None, "reference", absolute=base)


def _loadable(folder: Path, entry: Entry) -> str:
    """Return the current path of a checkpoint; of a base, the one moved together with the history goes first."""
    place = folder / entry.path
    if entry.kind != "reference":
        if not place.is_dir():
            raise SstokenError(f"{folder / INDEX}: names {entry.path}, which is missing; run anchor again")
        return str(place)
    if entry.absolute is None:
        return entry.path
    beside = place.resolve()
    return str(beside) if beside.is_dir() else entry.absolute


def read_index(folder: Path) -> list[Entry]:
    """Return the entries as stored.

    Raises:
        UsageError: `folder` has no history.
        SstokenError: the file is damaged.
    """
    path = storage.address(folder) / INDEX
    try:
        return _ENTRIES.validate_python(plain_json.parse(read_file(path)))
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {INDEX}; name the folder that `anchor` wrote") from None
    except (OSError, ValueError, TypeError) as error:
        raise SstokenError(f"{path}: damaged ({type(error).__name__}); run anchor again") from error


def write_index(folder: Path, entries: Iterable[Entry]) -> None:
    """Replace the file atomically."""
    lines = ",\n".join(" " + json.dumps(asdict(entry)) for entry in entries)
    write_atomic(storage.address(folder) / INDEX, f"[\n{lines}\n]\n")


def too_few_steps(steps: int, num_snapshots: int | None, every_steps: int | None) -> list[str]:
    """Return a note where training is too short for the snapshots that were asked for."""
    if num_snapshots is not None and num_snapshots > steps:
        return [
            f"{num_snapshots} snapshots were asked for, but training has {steps} steps: it left one a step"
        ]
    if every_steps is not None and every_steps > steps:
        return [f"a snapshot every {every_steps} steps was asked for, but training has {steps}: it left one"]
    return []
