"""Seal unfinished training, so that it resumes only if no file was changed: it has no manifest yet."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages import folders, plain_json, storage
from sstoken.stages.storage import write_atomic
from sstoken.stages.training.history_index import read_index

SEAL = "trainer/seal.json"
"""File in the partial folder of training that has ended, with the digests of everything it wrote."""
_FILES, _ENTRIES = "files", "entries"


class Seals:
    """Digests of the files of a growing history; each snapshot is read once."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._known: dict[str, str] = {}

    def upto(self, step: int, others: Iterable[Path]) -> dict[str, Any]:
        """Return the index entries up to a step, and the digests of their snapshots and of other files and folders."""
        entries = [entry for entry in read_index(self._out) if entry.step <= step]
        snapshots = [self._out / entry.path for entry in entries if entry.kind != "reference"]
        for snapshot in snapshots:
            for file in _files(snapshot):
                name = file.relative_to(self._out).as_posix()
                self._known.setdefault(name, folders.hash_file(file))
        files = dict(self._known)
        for file in (file for other in others for file in _files(other)):
            files[file.relative_to(self._out).as_posix()] = folders.hash_file(file)
        return {_FILES: files, _ENTRIES: [asdict(entry) for entry in entries]}


def seal_ended(out: Path, step: int, log: str, name: str) -> None:
    """Write the seal of training that has ended, before its log is written."""
    seal = Seals(out).upto(step, ())
    seal[_FILES][name] = hashlib.sha256(log.encode()).hexdigest()
    storage.of(out).make_folder((out / SEAL).parent)
    write_atomic(out / SEAL, json.dumps(seal))


def check_ended(out: Path) -> None:
    """Refuse training that has ended but was changed before its folder was finished."""
    if (out / SEAL).is_file():  # older versions wrote none
        try:
            seal = plain_json.parse((out / SEAL).read_bytes())
        except ValueError:
            seal = None
        if not isinstance(seal, dict) or not {_FILES, _ENTRIES} <= set(seal):
            raise _damaged(out / SEAL, out)
        check(out, seal)


def check(out: Path, seal: dict[str, Any]) -> None:
    """Refuse files that changed after `Seals.upto`; other files are not checked."""
    files, entries = seal.get(_FILES), seal.get(_ENTRIES)
    if files is None and entries is None and set(seal) <= {"processes"}:
        return  # older versions wrote none
    if not isinstance(files, dict) or not isinstance(entries, list):
        raise _damaged(out, out)
    for name, digest in files.items():
        file = out / name
        if not file.is_file() or folders.hash_file(file) != digest:
            raise _damaged(file, out)
    try:
        steps = [int(entry["step"]) for entry in entries]
    except (TypeError, ValueError, KeyError):
        raise _damaged(out, out) from None
    there = [asdict(entry) for entry in read_index(out) if entry.step <= max(steps, default=0)]
    if there != entries:
        raise _damaged(out / "history.json", out)


def _damaged(file: Path, out: Path) -> SstokenError:
    return SstokenError(
        f"{file}: changed since training was interrupted; put it back, or remove {out} to start over"
    )


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
