"""Finished folders: what their manifest lists is all there is to read, and it is read only as it was written.

Every reader of a folder that a stage wrote goes through here (`sstoken.stages.tables` for shards,
`sstoken.stages.checkpoints` for models and tokenizers), so that none can take a damaged file, or one that does not
belong.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.stages import plain_json, storage

MANIFEST = "manifest.json"
_OWN_DIGEST = re.compile(rb'"digest": ?"([0-9a-f]{64})"\s*\}\s*\Z')
"""The last field of a manifest: the sha256 of its text with zeros in this place."""
_REMAINS = re.compile(rb'digest|[0-9a-f]{64}"\s*\}\s*\Z')
"""At the end of a manifest: of that field, once one of its bytes was changed. Older manifests have none."""
_KEYS = ("stage", "fingerprint", "settings", "inputs", "sources", "metrics", "files")
NO_DIGEST = "0" * 64
_WORTH_REMEMBERING = 1 << 24
"""Bytes: from here on hashing takes longer than the system's clock of files ticks."""


@dataclass(frozen=True)
class Listed:
    """One file of a finished folder, as the manifest has it."""

    folder: Path
    """The finished folder."""
    sha256: str
    """SHA-256 of the content, in hexadecimal."""


def read_manifest_text(folder: Path) -> bytes | None:
    """The manifest of a folder as it was written, or None where there is none.

    Raises:
        SstokenError: it was changed since, or cannot be read.
    """
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
    """Whether a text was a manifest of ours, also with some of its bytes changed; others use that name, too."""
    return sum(f'"{key}"'.encode() in text for key in _KEYS) > len(_KEYS) // 2


def damaged_manifest(folder: Path) -> SstokenError:
    """The error for a manifest that cannot be what was written."""
    return SstokenError(f"{folder / MANIFEST}: damaged manifest; remove {folder} and make it again")


def seal(text: bytes) -> str:
    """The digest that a manifest's last field holds."""
    return hashlib.sha256(_OWN_DIGEST.sub(lambda m: m[0].replace(m[1], NO_DIGEST.encode()), text)).hexdigest()


def listed(path: Path) -> Listed | None:
    """What the manifest of the finished folder that holds `path` says of it, if any does."""
    path = path.absolute()
    for folder in path.parents:
        if (listing := _listing(folder)) is not None:
            digest = listing.get(path.relative_to(folder).as_posix())
            return None if digest is None else Listed(folder, digest)
    return None


def check_digest(path: Path, digest: str) -> None:
    """Refuse a file whose content is not the one that its folder's manifest lists.

    Raises:
        SstokenError: names the file.
    """
    said = listed(path)
    if said is not None and said.sha256 != digest:
        raise SstokenError(
            f"{path}: damaged: its content is not what {said.folder / MANIFEST} says; put the file back, or make "
            f"{said.folder} again (--force)"
        )


def read_file(path: Path) -> bytes:
    """A file's content, checked in the same pass.

    Raises:
        SstokenError: it is not what the manifest lists.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if listed(path) is not None:
        check_digest(path, hashlib.sha256(content).hexdigest())
    elif _listing(path.parent) is not None:
        raise SstokenError(f"{path}: {path.parent / MANIFEST} does not list it; move it out of the folder")
    return content


def check_file(path: Path) -> None:
    """Refuse a damaged file that another library is about to read.

    Raises:
        SstokenError: it is not what the manifest lists.
    """
    if listed(path) is not None:
        check_digest(path, sha256(path))


def listed_in(folder: Path) -> list[Path] | None:
    """The files of a finished folder, or of a folder within one; None where there is no manifest.

    Raises:
        SstokenError: the manifest is damaged.
    """
    above = folder.absolute()
    for place in (above, *above.parents):
        if (listing := _listing(place)) is not None:
            start = "" if place == above else f"{above.relative_to(place).as_posix()}/"
            names = [name.removeprefix(start) for name in listing if name.startswith(start)]
            return sorted(folder / name for name in names) if names or place == above else None
    return None


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, also behind links to folders; each folder once, wherever links lead."""
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
    """Copy the files of a folder, checked while they are read; replace those that `target` holds.

    Raises:
        SstokenError: one is damaged or missing.
    """
    found = listed_in(source)
    for path in sorted(p for p in source.rglob("*") if p.is_file()) if found is None else found:
        place = target / path.relative_to(source)
        storage.of(place).make_folder(place.parent)
        with storage.atomic_file(place) as file:
            file.write(read_file(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    stat = path.stat()
    if stat.st_size < _WORTH_REMEMBERING:
        return hash_file(path)
    return _remembered(path, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


def hash_file(path: Path) -> str:
    """As `sha256`, read anew whenever it is asked."""
    return storage.of(path).digest(path)[1]


@lru_cache(maxsize=1024)
def _remembered(path: Path, key: tuple[int, ...]) -> str:
    """Weights are hashed for a fingerprint and checked when they load: once is enough while the file stands."""
    return hash_file(path)


def _listing(folder: Path) -> dict[str, str] | None:
    """Digests by name. Not one of ours, such as a web application's `manifest.json`: None."""
    try:
        stat = (folder / MANIFEST).stat()
    except OSError:
        return None
    return _parsed(folder, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


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
