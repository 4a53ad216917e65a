"""Where work may be written, and by whom."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sstoken.errors import SstokenError


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, or made anew.

    Raises:
        SstokenError: its parent, or what there is of it, takes no files.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    parent = existing if existing != folder.absolute() else existing.parent
    if not parent.is_dir() or not _writable(parent):
        raise SstokenError(f"{parent}: cannot be written to; choose another output folder or mend its rights")


def _writable(folder: Path) -> bool:
    """Whether a file can be made there: tried, as rights alone do not tell for root or a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # without a name where the system can: a kill leaves nothing
            return True
    except OSError:
        return False


@contextmanager
def one_run_at_a_time(out: Path) -> Iterator[None]:
    """One run at a time on an output folder; released when the process ends, however it ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SstokenError(
            f"{out}: another run is writing it; wait for that, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()  # its file stays: unlinking it would let two runs lock two files of that name
