"""Finished folders: read only the files that the manifest lists, and check each one's digest while reading it.

Every reader of a folder that a stage wrote goes through here (`sstoken.stages.tables` for shards,
`sstoken.stages.checkpoints` for models and tokenizers), so that a damaged or stray file is never used: functions raise
`SstokenError`, which names it.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.stages import plain_json, storage

MANIFEST = "manifest.json"
_OWN_DIGEST = re.compile(rb'"digest": ?"([0-9a-f]{64})"\s*\}\s*\Z')
"""The last field of a manifest: the SHA-256 of its text with zeros in place of the digest."""
_REMAINS = re.compile(rb'digest|[0-9a-f]{64}"\s*\}\s*\Z')
"""What is left of that field, at the end of a manifest, if one of its bytes was changed. Older manifests lack it."""
_KEYS = ("stage", "fingerprint", "settings", "inputs", "sources", "metrics", "files")
NO_DIGEST = "0" * 64
_WORTH_REMEMBERING = 1 << 24
"""Bytes from which digests are cached: hashing smaller files takes less time than a tick of their timestamps."""


def read_manifest_text(folder: Path) -> bytes | None:
    """Return the text of a folder's manifest, or None if there is none."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise SstokenError(f"{path}: cannot be read ({error.strerror})") from error
    own = _OWN_DIGEST.search(text)
    if (seal(text) != own[1].decode() if own else _REMAINS.search(text[-100:])) and _is_ours(text):
        raise damaged_manifest(folder)
    return text


def _is_ours(text: bytes) -> bool:
    """Return whether a text is a manifest of ours, possibly damaged: other tools use that file name, too."""
    return sum(f'"{key}"'.encode() in text for key in _KEYS) > len(_KEYS) // 2


def damaged_manifest(folder: Path) -> SstokenError:
    """Return the error for a manifest that was changed after it was written."""
    return SstokenError(f"{folder / MANIFEST}: damaged manifest; remove {folder} and make it again")


def seal(text: bytes) -> str:
    """Return the digest for the last field of a manifest."""
    return hashlib.sha256(_OWN_DIGEST.sub(lambda m: m[0].replace(m[1], NO_DIGEST.encode()), text)).hexdigest()


def listed(path: Path) -> tuple[Path, str] | None:
    """Return the finished folder that lists a file, and the file's SHA-256; None if there is none."""
    path = path.absolute()
    for folder in path.parents:
        if (listing := _listing(folder)) is not None:
            digest = listing.get(path.relative_to(folder).as_posix())
            return None if digest is None else (folder, digest)
    return None


def check_digest(path: Path, digest: str) -> None:
    """Refuse a file whose digest differs from its folder's manifest; a file that no manifest lists passes."""
    entry = listed(path)
    if entry is not None and entry[1] != digest:
        raise SstokenError(
            f"{path}: damaged: its content is not what {entry[0] / MANIFEST} says; put the file back, or make "
            f"{entry[0]} again (--force)"
        )


def read_file(path: Path) -> bytes:
    """Read a file and check its digest in one pass; refuse one that its finished folder does not list.

    Raises:
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if listed(path) is not None:
        check_digest(path, hashlib.sha256(content).hexdigest())
    elif _listing(path.parent) is not None:
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
        if (listing := _listing(place)) is not None:
            start = "" if place == above else f"{above.relative_to(place).as_posix()}/"
            names = [name.removeprefix(start) for name in listing if name.startswith(start)]
            return sorted(folder / name for name in names) if names or place == above else None
    return None


def is_finished(folder: Path) -> bool:
    """Return whether a folder has a manifest of ours; other programs use that file name, too."""
    return _listing(folder) is not None


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


def _listing(folder: Path) -> dict[str, str] | None:
    """Return the digests by file name; None without a manifest, or with one of another tool (a web application's)."""
    try:
        stamp = storage.stamp(folder / MANIFEST)
    except OSError:
        return None
    return _parsed(folder, stamp)


@lru_cache(maxsize=256)
def _parsed(folder: Path, key: tuple[int, ...]) -> dict[str, str] | None:
    text = read_manifest_text(folder) or b""
    try:
        manifest = plain_json.parse(text)
        if {"stage", "fingerprint", "files"} <= set(manifest):
            return {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    except (ValueError, TypeError, KeyError):
        if b'"fingerprint"' in text:
            raise damaged_manifest(folder) from None
    return None
