"""Where work may be written, and by whom."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from filelock import FileLock, Timeout

from sstoken.errors import SstokenError
from sstoken.pipeline import lease
from sstoken.stages import storage
from sstoken.stages.shard_border import GOES_ON


def check_writable(folder: PurePath) -> None:
    """Refuse a folder that cannot be made, or made anew.

    Raises:
        SstokenError: its parent, or what there is of it, takes no files.
    """
    if not isinstance(folder, Path):
        return  # an object store says so when it is asked to take the first file
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


RANKS = "rank-*-of-*"
"""Parts of the work on a folder, as `one_run_at_a_time` and `at_work` have them."""


@contextmanager
def one_run_at_a_time(
    out: Path, part: str = "", wait: float = 0, fingerprint: str = ""
) -> Iterator[Callable[[], None]]:
    """Let one run at a time work on an output folder, or on a part of it; a process's end releases it.

    Args:
        out: the folder.
        part: such as `rank-00003-of-00007`; empty: all of it.
        wait: seconds to wait for another one.
        fingerprint: of the work, for those who find the folder taken.

    Yields:
        A check, to be called before anything is published: it raises if another run has taken the folder over.

    Raises:
        SstokenError: another run works on it; says whose it is.
    """
    storage.of(out).make_folder(out.parent)
    lock = FileLock(_lock_file(out, part))
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        by = lease.holder(_lease_file(out, part))
        raise SstokenError(
            f"{out}: another run is writing {part or 'it'}{f': {by}' if by else ''}; wait for that, or choose another "
            "folder"
        ) from None
    try:
        own = lease.Lease(_lease_file(out, part), fingerprint)
        with naming_full_disk(out):
            own.take(wait, _say_watched)
        try:
            yield own.check
        finally:
            own.release()
    finally:
        lock.release()  # its file stays: unlinking it would let two runs lock two files of that name


def at_work(out: Path, parts: str) -> list[str]:
    """Return the parts of an output folder that a run works on now, of those that a pattern names."""
    return [_part_of(out, file) for file in _lock_files(out, parts) if _is_held(file)]


def forget_parts(out: Path, parts: str) -> None:
    """Delete what marked the parts, once the folder is finished."""
    for file in _lock_files(out, parts):
        file.unlink(missing_ok=True)


def _lock_files(out: Path, parts: str) -> list[Path]:
    pattern = _lock_file(out, parts)
    return list(pattern.parent.glob(pattern.name))


def _lock_file(out: Path, part: str) -> Path:
    out = storage.of(out).on_this_machine(out)
    return out.with_name(f".{out.name}.{part}.lock" if part else f".{out.name}.lock")


def _say_watched(other: lease.Holder) -> None:
    print(f"{other} holds the lease; watching it for {lease.PATIENCE:.0f} s", file=sys.stderr)


def _lease_file(out: Path, part: str) -> Path:
    return _lock_file(out, part).with_suffix(".lease")


def _part_of(out: Path, file: Path) -> str:
    return file.name.removeprefix(f".{out.name}.").removesuffix(".lock")


def _is_held(file: Path) -> bool:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "os error 28", "Disk quota exceeded")
"""How libraries put it in errors of their own kinds."""
_TORCH_TEXTS = ("inline_container", "iostream error", "PytorchStreamWriter")
"""How torch.save says that a write failed; not why."""
_NO_ROOM = 1 << 20
"""Bytes."""


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Say of a disk that is full which it is, what is free, and which file found no room.

    Args:
        folder: where the work is done; its disk is meant where a library does not say the file.
    """
    try:
        yield
    except Exception as error:
        told = full_disk(error, folder)
        if told is None:
            raise
        raise told from error


def full_disk(error: BaseException, folder: Path) -> SstokenError | None:
    """Return the error to show for one that a full disk caused, by itself or through a library; else None."""
    place = _without_room(error, folder)
    if place is None:
        return None
    disk = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.ismount(p))
    usage = shutil.disk_usage(disk)
    return SstokenError(
        f"{place}: no space left on the disk at {disk} ({_size(usage.free)} free of {_size(usage.total)}); make "
        f"room there; {GOES_ON}"
    )


def _without_room(error: BaseException | None, folder: Path) -> Path | None:
    """The file or folder that an error, or what led to it, says has no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return Path(os.fsdecode(error.filename)) if error.filename else folder
        if any(text in str(error) for text in _FULL_TEXTS):
            return folder
        if any(text in str(error) for text in _TORCH_TEXTS) and shutil.disk_usage(folder).free < _NO_ROOM:
            return folder
        error = error.__cause__ or error.__context__
    return None


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 10_000:
            return f"{count:,} {unit}"
        count //= 1000
    return f"{count:,} TB"
