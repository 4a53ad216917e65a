"""The interface of a storage; `sstoken.stages.storage.of` returns the one for an address."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol


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
