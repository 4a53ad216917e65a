"""The interface of a storage, and the local disk.

Writes are atomic: a file is complete or does not exist, even after a kill or a power cut.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from sstoken.stages import faults

MARKS = ("manifest.json", ".fingerprint", "whole.json")
"""Files that mark a folder as usable: finished work, a partial folder, a trainer's checkpoint. Deleted first."""
UNFINISHED = ".tmp"
"""Suffix of a file or folder that is being written."""
CLAIM = ".publishing"
"""File that names the run publishing to a remote folder, and keeps a second one out."""
_OURS = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(UNFINISHED)}$")


class Storage(Protocol):
    """A local disk or an object store. Object stores have neither renames nor empty folders."""

    def open(self, file: Path) -> BinaryIO:
        """Open a complete file for reading; it can seek."""

    def list(self, folder: Path) -> list[Path]:
        """Return every file below a folder, sorted; [] if there is no such folder."""

    def sizes(self, folder: Path, names: Sequence[str]) -> dict[str, int | None]:
        """Return the sizes in bytes of files below a folder, by name; None for a missing file."""

    def put(self, file: Path) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing; it appears, or replaces an earlier one, when the context ends without an error."""

    def put_if_absent(self, file: Path, content: bytes) -> bool:
        """Write a small file unless it exists; return whether it was written. Of several writers, one wins."""

    def commit(self, file: Path, content: bytes) -> bool:
        """Write a manifest; return False if another machine wrote it first (in an object store)."""

    def put_folder(self, folder: Path) -> AbstractContextManager[Path]:
        """Yield a local folder to fill; its files become `folder`, replacing it, when the context ends well."""

    def take(self, local: Path, file: Path) -> None:
        """Move a finished file of the local disk to `file`."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder and its parents, if missing."""

    def flush(self, folder: Path) -> None:
        """Make files that a library wrote into a folder survive a power cut."""

    def delete(self, place: Path) -> None:
        """Delete a file or a folder, its marks first, so that a half-deleted folder is never resumed."""

    def sweep(self, folder: Path, name: str = "") -> None:
        """Delete what killed writers left below a folder, or of the file `name` in it. No writer may be running."""

    def workplace(self, place: Path) -> Path:
        """Return the partial folder in which the folder `place` is made."""

    def publish(self, place: Path) -> None:
        """Replace the folder `place` by its partial folder, whose manifest is written."""

    def recover(self, place: Path) -> None:
        """Finish or undo a `publish` that was interrupted."""

    def is_interrupted(self, place: Path) -> bool:
        """Return whether there is something to `recover`."""

    def local(self, place: Path) -> Path:
        """Return a path on the local disk that other libraries can read: the place itself, or a copy."""

    def local_work(self, folder: Path) -> AbstractContextManager[Path]:
        """Yield the local folder for work on `folder`; when the context ends, what is new goes to `folder`."""

    def keep_work(self, scratch: Path, folder: Path) -> None:
        """Save the local folder of `local_work` to `folder` as it is now, for a later run to resume."""

    def on_this_machine(self, place: Path) -> Path:
        """Return the local path for files that concern this machine only: locks, cached digests."""

    def vouches_for(self, file: Path) -> bool:
        """Return whether the storage itself records that a file is intact, so that nobody needs to read it."""

    def digest(self, file: Path) -> tuple[int, str]:
        """Return a file's size in bytes and its SHA-256."""


class LocalDisk:
    """A file system with atomic renames; see `Storage` for what each method does."""

    def open(self, file: Path) -> BinaryIO:
        return open(file, "rb")

    def list(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def sizes(self, folder: Path, names: Sequence[str]) -> dict[str, int | None]:
        files = {name: folder / name for name in names}
        return {name: file.stat().st_size if file.is_file() else None for name, file in files.items()}

    @contextmanager
    def put(self, file: Path) -> Iterator[BinaryIO]:
        """The temporary name is random, so that no left-over process can move a half-written file."""
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
            named = getattr(error, "filename", None)
            if isinstance(error, OSError) and error.errno is not None and named in (None, str(temporary)):
                # a failed write names no file, and a failed rename the temporary one
                error.filename = str(file)
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise

    def put_if_absent(self, file: Path, content: bytes) -> bool:
        if file.exists():
            return False
        temporary = _temporary(file)
        with self.put(temporary) as opened:
            opened.write(content)
        try:
            faults.point("rename", file)
            os.link(temporary, file)  # fails if the file exists, unlike a rename
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def commit(self, file: Path, content: bytes) -> bool:
        with self.put(file) as opened:
            opened.write(content)
        return True

    @contextmanager
    def put_folder(self, folder: Path) -> Iterator[Path]:
        temporary = _temporary(folder)
        temporary.mkdir()
        try:
            yield temporary
            _apply_umask(temporary)
            self.flush(temporary)
            self.delete(folder)
            faults.point("rename", folder)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            self.delete(temporary)  # only there if writing failed, or another process was first

    def take(self, local: Path, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        faults.point("rename", file)
        os.replace(local, file)

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def delete(self, place: Path) -> None:
        faults.point("delete", place)
        if place.is_dir() and not place.is_symlink():
            for mark in MARKS:
                (place / mark).unlink(missing_ok=True)
            faults.point("delete", place)
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def sweep(self, folder: Path, name: str = "") -> None:
        for left in list(folder.glob(f"{name}.*{UNFINISHED}") if name else folder.rglob(f"*{UNFINISHED}")):
            if _OURS.search(left.name):
                self.delete(left)

    def workplace(self, place: Path) -> Path:
        """Lies beside it, on the same disk."""
        return place.with_name(place.name + ".partial")

    def publish(self, place: Path) -> None:
        if place.exists():
            faults.point("commit", place)
            place.rename(_replaced(place))
        faults.point("commit", place)
        self.workplace(place).rename(place)
        _flush_names(place.parent)
        with suppress(OSError):
            self.delete(_replaced(place))

    def recover(self, place: Path) -> None:
        if not self.is_interrupted(place):
            return
        if place.exists():
            self.delete(_replaced(place))
        else:
            _replaced(place).rename(place)

    def is_interrupted(self, place: Path) -> bool:
        return _replaced(place).exists()

    def local(self, place: Path) -> Path:
        return place

    @contextmanager
    def local_work(self, folder: Path) -> Iterator[Path]:
        yield folder

    def keep_work(self, scratch: Path, folder: Path) -> None:
        """The work is in `folder` already."""

    def on_this_machine(self, place: Path) -> Path:
        return place

    def vouches_for(self, file: Path) -> bool:
        """Always False: a disk keeps no digests."""
        return False

    def digest(self, file: Path) -> tuple[int, str]:
        with open(file, "rb") as opened:
            return file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()

    def flush(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                faults.point("fsync", path)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())


def _apply_umask(folder: Path) -> None:
    """Give files that a library made private (safetensors does) the folder's permissions."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != rights:
            path.chmod(rights)


def _flush_names(folder: Path) -> None:
    """Make renames in a folder survive a power cut, if the file system supports it."""
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


def stamp(file: Path) -> tuple[int, ...]:
    """Return numbers that change when a file does. Copying can set the times back, except for ctime."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
