"""What every storage does; `sstoken.stages.storage` finds the one that holds an address."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol


class Storage(Protocol):
    """One kind of place. An object store needs no rename, and no folder before its first file."""

    def open(self, file: Path) -> BinaryIO:
        """Open a complete file for reading; it can seek."""

    def list(self, folder: Path) -> list[Path]:
        """Return every file below a folder, sorted; none where there is no folder."""

    def size(self, file: Path) -> int | None:
        """Return a file's bytes; None where there is no such file."""

    def sizes(self, folder: Path, names: Sequence[str]) -> dict[str, int | None]:
        """Return the bytes of files below a folder, by name; None where there is no such file."""

    def put(self, file: Path) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing: it appears, or replaces an earlier one, when the context ends well."""

    def put_if_absent(self, file: Path, content: bytes) -> bool:
        """Write a small file unless there is one; return whether it was written. Of several writers, one wins."""

    def commit(self, file: Path, content: bytes) -> bool:
        """Write a manifest; False where another machine was first, in a store that several may write."""

    def put_folder(self, folder: Path) -> AbstractContextManager[Path]:
        """Give a local folder to fill: its files appear as `folder` when the context ends well.

        Where `folder` is there already, it is replaced.
        """

    def has_folder(self, folder: Path) -> bool:
        """Whether `put_folder` filled it."""

    def take(self, local: Path, file: Path) -> None:
        """Put a finished file of the local disk, which is given up."""

    def make_folder(self, folder: Path) -> None:
        """Have a folder to put files into."""

    def flush(self, folder: Path) -> None:
        """Make files that a library wrote into a folder survive a power cut."""

    def delete(self, place: Path) -> None:
        """Delete a file or a folder, its marks first: a half-deleted folder is never taken for work to go on from."""

    def sweep(self, folder: Path, name: str = "") -> None:
        """Delete what killed writers left below a folder, or of the file `name` in it. None may be at work."""

    def workplace(self, place: Path) -> Path:
        """Return where the folder `place` is made."""

    def publish(self, place: Path) -> None:
        """Put what was made in the workplace, its manifest written, at `place`, in the place of what is there."""

    def recover(self, place: Path) -> None:
        """Finish or undo a `publish` that was interrupted."""

    def is_interrupted(self, place: Path) -> bool:
        """Whether there is something to `recover`."""

    def local(self, place: Path) -> Path:
        """Return a copy of a file or folder on the local disk, for other libraries to read; there, itself."""

    def local_work(self, folder: Path) -> AbstractContextManager[Path]:
        """Give the local folder in which work on `folder` goes on; what is new in it is put there in the end."""

    def keep_work(self, scratch: Path, folder: Path) -> None:
        """Put what there is in the local folder of `local_work` at a moment at which a later run can go on from it."""

    def on_this_machine(self, place: Path) -> Path:
        """Return the local path at which to keep what concerns this machine alone: locks, remembered digests."""

    def vouches_for(self, file: Path) -> bool:
        """Whether the storage itself knows that a file is what was put, so that nobody needs to read it."""

    def digest(self, file: Path) -> tuple[int, str]:
        """Return a file's bytes and SHA-256."""
