"""Manifests: the last file written into a folder. It lists the files and records what made them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import plain_json, storage
from sstoken.stages.folders import files_below, hash_file, sha256
from sstoken.stages.listed_files import MANIFEST as MANIFEST
from sstoken.stages.listed_files import NO_DIGEST, check_digest, damaged_manifest, read_manifest_text, seal
from sstoken.stages.storage import write_atomic


class FileEntry(BaseModel):
    """One file of a finished folder."""

    path: str
    """Relative to the folder."""
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of a folder's manifest.json."""

    stage: str
    fingerprint: str
    settings: dict[str, Any]
    """The stage's fields."""
    seed: int
    inputs: dict[str, str]
    """Fingerprint of each input folder."""
    sources: dict[str, Any]
    """Content identities of what was read from outside the run."""
    version: str
    seconds: float
    """Wall time of the last run that worked on it."""
    took: dict[str, float] = Field(default_factory=dict)
    """For stages that work shard by shard: `shards` made, and `worker_seconds` spent on them by all runs and ranks."""
    metrics: dict[str, Any]
    files: list[FileEntry]
    digest: str = NO_DIGEST
    """SHA-256 of the manifest's own text with zeros in place of this digest. Older manifests have none."""


def read_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest, or None if there is none; `SstokenError` if it is damaged."""
    text = read_manifest_text(folder)
    if text is None:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise damaged_manifest(folder) from error


def finished(folder: Path, what: str) -> Manifest:
    """Return the manifest of a finished folder, after checking that every file has its size.

    Args:
        folder: the folder.
        what: what it should hold, for messages.

    Raises:
        UsageError: there is no such folder.
        SstokenError: the folder is unfinished, or a file is missing or truncated.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "no such folder"
        raise UsageError(f"{folder}: {kind}; it should be the folder that holds the {what}")
    manifest = read_manifest(folder)
    if manifest is None:
        if inside := finished_inside(folder):
            raise UsageError(
                f"{folder}: a folder of several, {', '.join(inside)}; name the one that holds the {what}, or make it"
            )
        raise SstokenError(f"{folder}: unfinished (no {MANIFEST}), or not a folder of {what}; make it again")
    for problem in problems(folder, manifest, checksums=False):
        raise SstokenError(f"{problem}; put the file back, or make {folder} again (--force)")
    return manifest


def finished_inside(folder: Path) -> list[str]:
    """Return the finished folders within one, such as the steps of a run, as a user would name them."""
    if not folder.is_dir():
        return []
    return [str(file.parent) for file in sorted(folder.glob(f"*/{MANIFEST}"))][:8]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically.

    Raises:
        SstokenError: in an object store, another machine wrote its manifest first.
    """
    text = manifest.model_copy(update={"digest": NO_DIGEST}).model_dump_json(indent=1)
    start, _, end = text.rpartition(NO_DIGEST)
    sealed = f"{start}{seal(text.encode())}{end}".encode()
    if not storage.of(folder).commit(folder / MANIFEST, sealed):
        raise SstokenError(f"{folder}: another run finished it first; its output stands, run again to see it")


def list_files(folder: Path) -> list[FileEntry]:
    """List every file below the folder except its manifest, with its digest."""
    store = storage.of(folder)
    entries = []
    for path in store.list(folder):
        if path != folder / MANIFEST:
            size, digest = store.digest(path)
            entries.append(FileEntry(path=path.relative_to(folder).as_posix(), bytes=size, sha256=digest))
    return entries


def unlisted(folder: Path, manifest: Manifest) -> list[Path]:
    """Return files below a finished folder that its manifest does not list, except hidden ones and finished folders."""
    listed = {MANIFEST, *(entry.path for entry in manifest.files)}
    there = list(files_below(folder))
    inside = [path.parent for path in there if path.name == MANIFEST and path.parent != folder]
    found = {
        path.relative_to(folder) for path in there if not any(path.is_relative_to(other) for other in inside)
    }
    hidden = {path for path in found if any(part.startswith(".") for part in path.parts)}
    return sorted(folder / path for path in found - hidden if path.as_posix() not in listed)


def problems(folder: Path, manifest: Manifest, *, checksums: bool = True) -> Iterator[str]:
    """Yield one line for each file that differs from the manifest; without `checksums`, compare sizes only."""
    sizes = storage.of(folder).sizes(folder, [entry.path for entry in manifest.files])
    for entry in manifest.files:
        path, size = folder / entry.path, sizes[entry.path]
        if size is None:
            yield f"{path}: missing"
        elif size != entry.bytes:
            yield f"{path}: {size} bytes, the manifest says {entry.bytes}"
        elif checksums and hash_file(path) != entry.sha256:
            yield f"{path}: content changed (checksum differs)"


class Digests:
    """SHA-256 of files, cached until a file's size or times change, so that a finished run is recognised fast."""

    def __init__(self, cache: Path | None = None) -> None:
        """Load the cache from a JSON file; None: cache in memory only."""
        self._cache = cache
        self._known: dict[str, str] = {}
        self._unsaved = self._holding = False
        if cache is not None and cache.is_file():
            with suppress(OSError, ValueError, TypeError, KeyError):  # only a cache
                saved = plain_json.parse(cache.read_bytes())
                if saved["digest"] == plain_json.digest(saved["known"]):
                    self._known = saved["known"]

    def __call__(self, path: Path) -> str:
        """Return the digest of a file.

        Raises:
            SstokenError: the manifest of its folder lists another digest.
        """
        key = ":".join(map(str, (path.resolve(), *storage.stamp(path))))
        if key not in self._known:
            self._known[key] = sha256(path)
            self._unsaved = True
            if not self._holding:
                self.save()
        check_digest(path, self._known[key])
        return self._known[key]

    def save(self) -> None:
        """Write new digests to the cache file, if its folder exists."""
        if self._unsaved and self._cache is not None and self._cache.parent.is_dir():
            with suppress(OSError):  # a full or read-only disk
                storage.of(self._cache).sweep(self._cache.parent, self._cache.name)
                text = json.dumps({"digest": plain_json.digest(self._known), "known": self._known})
                write_atomic(self._cache, text)
            self._unsaved = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write nothing before `save`: the folder may turn out to belong to another run."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
