"""This machine's cache: copies of remote files, and its own locks, digests and scratch folders."""

import hashlib
import os
import secrets
import tempfile
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock

from sstoken.errors import UsageError
from sstoken.stages import plain_json
from sstoken.stages.listed_files import check_digest
from sstoken.stages.local_disk import LocalDisk
from sstoken.stages.remote_path import RemotePath, explained, version

_NOT_FETCHED = ("optimizer*", "scheduler*", "rng_state*", "scaler.pt", "global_step*/*", "*.tmp")
"""Files of a trainer's checkpoint that are never read here, so not downloaded."""


def cache() -> Path:
    """Return this user's cache folder; it may be deleted while nothing runs."""
    own = os.environ.get("SSTOKEN_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or Path(home) / "sstoken").expanduser()


def fetched(place: RemotePath) -> Path:
    """Return a local copy of a file or folder, downloaded once per machine and content.

    Raises:
        UsageError: there is no such file or folder.
        SstokenError: the content is not what a manifest lists.
    """
    below = {file.relative_to(place).as_posix(): info for file, info in place.files().items()}
    files = {n: info for n, info in below.items() if not any(fnmatch(n, each) for each in _NOT_FETCHED)}
    if not files:
        info = place.info()
        if info is None:
            raise UsageError(f"{place}: no such file or folder")
        files = {"": info}
    versions = {name: version(info) for name, info in files.items()}
    target = cache() / "fetched" / plain_json.digest([str(place), versions])[:16] / place.name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as name:
                copy = Path(name) / place.name
                for file in files:
                    fetch(place / file, copy / file)
                copy.rename(target)
    return target


def fetch(file: RemotePath, copy: Path) -> None:
    """Download a file; refuse it if a manifest lists another digest."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    filesystem, key = file.located()
    with explained(file):
        filesystem.get_file(key, str(copy))
    check_digest(file, LocalDisk().digest(copy)[1])  # type: ignore[arg-type]


def own_place(place: RemotePath) -> Path:
    """Return the local path for a remote folder's locks and cached digests."""
    own = cache() / "own" / _hash(str(place.parent)) / place.name
    own.parent.mkdir(parents=True, exist_ok=True)
    return own


def machine() -> str:
    """Return the name of this machine, shared by all processes with this cache."""
    file = cache() / "machine"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as own:
            own.write(secrets.token_hex(8))
        with suppress(FileExistsError):
            os.link(own.name, file)
        os.unlink(own.name)
    return file.read_text()


def workshop(folder: RemotePath, made_by: str) -> Path:
    """Return the local scratch folder for work with the fingerprint `made_by` on a remote folder."""
    scratch = cache() / "work" / _hash(f"{folder} {made_by}") / folder.name
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
