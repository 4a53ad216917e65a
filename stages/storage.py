"""Where folders lie: the one place through which stages and the runner write, publish and delete.

An address is a `Path`, on a local disk, or a `RemotePath`, which looks and reads in an object store as a `Path` does.
`address` makes either from what a user names, and `of` finds the storage by its kind.

A file is complete or not there, also after a kill or a power cut. A folder is published by its manifest, which is
written last: readers go by what the manifest lists, never by what happens to lie there.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from sstoken.errors import UsageError
from sstoken.stages import faults
from sstoken.stages.storage_protocol import Storage

MARKS = ("manifest.json", ".fingerprint", "whole.json")
"""Files that make a folder usable: of finished work, of unfinished work, of a trainer's checkpoint."""
UNFINISHED = ".tmp"
"""Suffix of a file or folder being written."""
CLAIM = ".publishing"
"""In a remote folder that is being published: for whom. It keeps a second publisher out."""
_OURS = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}$")


class LocalDisk:
    """A file system with atomic renames."""

    def open(self, file: Path) -> BinaryIO:
        """See `Storage`."""
        return open(file, "rb")

    def list(self, folder: Path) -> list[Path]:
        """See `Storage`."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def size(self, file: Path) -> int | None:
        """See `Storage`."""
        return file.stat().st_size if file.is_file() else None

    def sizes(self, folder: Path, names: Sequence[str]) -> dict[str, int | None]:
        """See `Storage`."""
        return {name: self.size(folder / name) for name in names}

    @contextmanager
    def put(self, file: Path) -> Iterator[BinaryIO]:
        """See `Storage`. Until it is complete its name is its own: no left-over process can move it half-written."""
        temporary = _temporary(file)
        try:
            with faults.create(temporary) as opened:
                yield opened
                opened.flush()
                faults.point("fsync", file)
                os.fsync(opened.fileno())
            faults.point("commit" if file.name in MARKS else "rename", file)
            os.replace(temporary, file)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(file)  # the system does not say which
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise

    def put_if_absent(self, file: Path, content: bytes) -> bool:
        """See `Storage`."""
        if file.exists():
            return False
        temporary = _temporary(file)
        with self.put(temporary) as opened:
            opened.write(content)
        try:
            faults.point("rename", file)
            os.link(temporary, file)  # fails where there is one, unlike a rename
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def commit(self, file: Path, content: bytes) -> bool:
        """See `Storage`."""
        with self.put(file) as opened:
            opened.write(content)
        return True

    def has_folder(self, folder: Path) -> bool:
        """See `Storage`."""
        return folder.exists()

    @contextmanager
    def put_folder(self, folder: Path) -> Iterator[Path]:
        """See `Storage`."""
        temporary = _temporary(folder)
        temporary.mkdir()
        try:
            yield temporary
            _as_umask_says(temporary)
            self.flush(temporary)
            self.delete(folder)
            faults.point("rename", folder)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            self.delete(temporary)  # nothing there, unless the writing failed or another was first

    def take(self, local: Path, file: Path) -> None:
        """See `Storage`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        faults.point("rename", file)
        os.replace(local, file)

    def make_folder(self, folder: Path) -> None:
        """See `Storage`."""
        folder.mkdir(parents=True, exist_ok=True)

    def delete(self, place: Path) -> None:
        """See `Storage`."""
        faults.point("delete", place)
        if place.is_dir() and not place.is_symlink():
            for mark in MARKS:
                (place / mark).unlink(missing_ok=True)
            faults.point("delete", place)
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def sweep(self, folder: Path, name: str = "") -> None:
        """See `Storage`."""
        for left in list(folder.glob(f"{name}.*{UNFINISHED}") if name else folder.rglob(f"*{UNFINISHED}")):
            if _OURS.search(left.name):
                self.delete(left)

    def workplace(self, place: Path) -> Path:
        """See `Storage`. Beside it, so on the same disk."""
        return place.with_name(place.name + ".partial")

    def publish(self, place: Path) -> None:
        """See `Storage`."""
        if place.exists():
            faults.point("commit", place)
            place.rename(_replaced(place))
        faults.point("commit", place)
        self.workplace(place).rename(place)
        _flush_names(place.parent)
        with suppress(OSError):
            self.delete(_replaced(place))

    def recover(self, place: Path) -> None:
        """See `Storage`."""
        if not self.is_interrupted(place):
            return
        if place.exists():
            self.delete(_replaced(place))
        else:
            _replaced(place).rename(place)

    def is_interrupted(self, place: Path) -> bool:
        """See `Storage`."""
        return _replaced(place).exists()

    def local(self, place: Path) -> Path:
        """See `Storage`."""
        return place

    @contextmanager
    def local_work(self, folder: Path) -> Iterator[Path]:
        """See `Storage`."""
        yield folder

    def keep_work(self, scratch: Path, folder: Path) -> None:
        """See `Storage`. It is there."""

    def on_this_machine(self, place: Path) -> Path:
        """See `Storage`."""
        return place

    def vouches_for(self, file: Path) -> bool:
        """See `Storage`. A disk does not."""
        return False

    def digest(self, file: Path) -> tuple[int, str]:
        """See `Storage`."""
        with open(file, "rb") as opened:
            return file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()

    def flush(self, folder: Path) -> None:
        """See `Storage`."""
        for path in folder.rglob("*"):
            if path.is_file():
                faults.point("fsync", path)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())


def _as_umask_says(folder: Path) -> None:
    """Give files that a library made for its user alone the rights that files made here have."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != rights:
            path.chmod(rights)


def _flush_names(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the file system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _temporary(place: Path) -> Path:
    return place.with_name(f"{place.name}.{secrets.token_hex(4)}{UNFINISHED}")


def _replaced(place: Path) -> Path:
    return place.with_name(place.name + ".replaced")


_LOCAL = LocalDisk()


def of(address: PurePath) -> Storage:
    """Return the storage that holds an address."""
    if isinstance(address, Path):
        return _LOCAL
    from sstoken.stages.object_store import ObjectStore

    return cast(Storage, ObjectStore())


def expanded(text: str | PurePath) -> Path:
    """Return the path that a user typed, with `~` as the home folder; of a user that there is not, as it stands."""
    return Path(os.path.expanduser(text))


def address(text: str | PurePath) -> Path:
    """Return the address of a file or folder as a user names it: a path, or a URL such as s3://bucket/tokens.

    Raises:
        UsageError: a URL that holds credentials, a chain of URLs, or a name that no file can have.
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
            f"{scheme}://...: an address with credentials in it; set them in the environment instead"
        )
    if "::" in scheme:
        raise UsageError(f"{text}: a chain of addresses; name the folder itself, such as s3://bucket/tokens")
    from sstoken.stages.remote_path import RemotePath

    return cast(Path, RemotePath(text))


def local(place: Path) -> Path:
    """Return a file or folder on the local disk, for other libraries to read: itself, or a copy of the remote one."""
    return of(place).local(place)


def atomic_file(file: Path) -> AbstractContextManager[BinaryIO]:
    """Open a file for writing: it appears, or replaces an earlier one, when the context ends well."""
    return of(file).put(file)


def write_atomic(file: Path, text: str) -> None:
    """Write or replace a text file (UTF-8) in one step."""
    with atomic_file(file) as opened:
        opened.write(text.encode())
