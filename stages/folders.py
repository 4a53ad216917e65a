"""Finished folders: read, hash and copy only files that the manifest lists, and check each one's digest meanwhile.

Every reader of a folder that a stage wrote goes through here (`sstoken.stages.tables` for shards,
`sstoken.stages.checkpoints` for models and tokenizers), so that a damaged or stray file is never used: functions raise
`SstokenError`, which names it.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.stages import storage
from sstoken.stages.listed_files import MANIFEST, check_digest, listed, listing_of

_WORTH_REMEMBERING = 1 << 24
"""Bytes from which digests are cached: hashing smaller files takes less time than a tick of their timestamps."""


def read_file(path: Path) -> bytes:
    """Read a file and check its digest in one pass; refuse one that its finished folder does not list.

    Raises:
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if listed(path) is not None:
        check_digest(path, hashlib.sha256(content).hexdigest())
    elif listing_of(path.parent) is not None:
        raise SstokenError(f"{path}: {path.parent / MANIFEST} does not list it; move it out of the folder")
    return content


def check_file(path: Path) -> None:
    """Check the digest of a file that another library is about to read."""
    if listed(path) is not None:
        check_digest(path, sha256(path))


def listed_in(folder: Path) -> list[Path] | None:
    """Return the files of a finished folder, or of a folder within one; None if there is no manifest."""
    above = folder.absolute()
    for place in (above, *above.parents):
        if (listing := listing_of(place)) is not None:
            start = "" if place == above else f"{above.relative_to(place).as_posix()}/"
            names = [name.removeprefix(start) for name in listing if name.startswith(start)]
            return sorted(folder / name for name in names) if names or place == above else None
    return None


def is_finished(folder: Path) -> bool:
    """Return whether a folder has a manifest of ours; other programs use that file name, too."""
    return listing_of(folder) is not None


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, following links to folders but reading each folder once."""
    if "://" in str(folder):  # in an object store, which has none
        yield from (path for path in folder.rglob("*") if path.is_file())
        return
    seen: set[str] = set()
    for place, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside.sort()
        yield from (path for name in sorted(names) if (path := Path(place, name)).is_file())


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder, checking digests while reading; replace files that `target` has already."""
    found = listed_in(source)
    for path in storage.of(source).list(source) if found is None else found:
        place = target / path.relative_to(source)
        storage.of(place).make_folder(place.parent)
        with storage.atomic_file(place) as file:
            file.write(read_file(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, cached for large files until size or times change."""
    stamp = storage.stamp(path)
    return hash_file(path) if stamp[0] < _WORTH_REMEMBERING else _remembered(path, stamp)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, never from a cache."""
    return storage.of(path).digest(path)[1]


@lru_cache(maxsize=1024)
def _remembered(path: Path, key: tuple[int, ...]) -> str:
    """Hash weights once: they are needed for the fingerprint, and again when the model loads."""
    return hash_file(path)
