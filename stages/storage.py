"""Storage: stages and the runner write, publish and delete through here alone.

An address is a `Path` on a local disk, or a `RemotePath`, which reads from an object store with `Path`'s methods.
`address` makes one from a user's text, and `of` returns its storage.

Writes are atomic: a file is complete or does not exist, even after a kill or a power cut. A folder is published by
its manifest, written last; readers use only the files that the manifest lists.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from sstoken.errors import UsageError
from sstoken.stages.local_disk import CLAIM as CLAIM
from sstoken.stages.local_disk import MARKS as MARKS
from sstoken.stages.local_disk import UNFINISHED as UNFINISHED
from sstoken.stages.local_disk import LocalDisk, Storage
from sstoken.stages.local_disk import stamp as stamp

_LOCAL = LocalDisk()


def of(address: PurePath) -> Storage:
    """Return the storage that holds an address."""
    if isinstance(address, Path):
        return _LOCAL
    from sstoken.stages.object_store import ObjectStore

    return cast(Storage, ObjectStore())


def expanded(text: str | PurePath) -> Path:
    """Return a user's path with `~` expanded; `~name` of an unknown user stays as it is."""
    return Path(os.path.expanduser(text))


def address(text: str | PurePath) -> Path:
    """Return the address for a user's text: a path, or a URL such as s3://bucket/tokens.

    Raises:
        UsageError: the URL contains credentials or chains several, or no file can have that name.
    """
    if isinstance(text, PurePath):
        return cast(Path, text)
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):  # not in UTF-8: libraries refuse it late
        raise UsageError(f"{text}: no file can have such a name; name another")
    scheme, separator, rest = text.partition("://")
    if not separator:
        if (path := expanded(text)).parts[:1] and path.parts[0].startswith("~") and path.parts[0] != "~":
            raise UsageError(
                f"{text}: there is no user {path.parts[0][1:]!r}; write ./{text} if a folder is called so"
            )
        return path
    if scheme == "file":
        return Path(rest)
    if "@" in rest.partition("/")[0]:
        raise UsageError(
            f"{scheme}://...: the address contains credentials; set them in the environment instead"
        )
    if "::" in scheme:
        raise UsageError(
            f"{text}: chained URLs are not supported; name the folder, such as s3://bucket/tokens"
        )
    from sstoken.stages.remote_path import RemotePath

    return cast(Path, RemotePath(text))


def local(place: Path) -> Path:
    """Return a path on the local disk that other libraries can read: the place itself, or a copy of a remote one."""
    return of(place).local(place)


def atomic_file(file: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file for writing; it appears, or replaces an earlier one, when the context ends without an error."""
    return of(file).put(file)


def write_atomic(file: Path, text: str) -> None:
    """Write or replace a UTF-8 text file atomically."""
    with atomic_file(file) as opened:
        opened.write(text.encode())
