"""What a folder's manifest lists: the only files of it that count, each with its digest."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.stages import plain_json
from sstoken.stages.local_disk import stamp

MANIFEST = "manifest.json"
_OWN_DIGEST = re.compile(rb'"digest": ?"([0-9a-f]{64})"\s*\}\s*\Z')
"""The last field of a manifest: the SHA-256 of its text with zeros in place of the digest."""
_REMAINS = re.compile(rb'digest|[0-9a-f]{64}"\s*\}\s*\Z')
"""What is left of that field, at the end of a manifest, if one of its bytes was changed. Older manifests lack it."""
_KEYS = ("stage", "fingerprint", "settings", "inputs", "sources", "metrics", "files")
NO_DIGEST = "0" * 64


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
        if (listing := listing_of(folder)) is not None:
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


def listing_of(folder: Path) -> dict[str, str] | None:
    """Return the digests by file name; None without a manifest, or with one of another tool (a web application's)."""
    try:
        key = stamp(folder / MANIFEST)
    except OSError:
        return None
    return _parsed(folder, key)


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
