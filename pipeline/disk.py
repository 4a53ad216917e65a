"""Where outputs may not be written, and full disks, explained in one line."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.folders import is_finished
from sstoken.stages.manifest import read_manifest
from sstoken.stages.shard_border import GOES_ON


def check_writable(folder: PurePath) -> None:
    """Refuse (`SstokenError`) a folder whose nearest existing parent cannot be written to."""
    if not isinstance(folder, Path):
        return  # an object store refuses the first file instead
    existing = _existing(folder)
    parent = existing if existing != folder.absolute() else existing.parent
    if not parent.is_dir() or not _writable(parent):
        raise SstokenError(
            f"{parent}: cannot be written to; choose another output folder or fix its permissions"
        )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _writable(folder: Path) -> bool:
    """Whether a file can be created there. Tries it: permissions tell nothing about root or a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # usually has no name, so that a kill leaves nothing behind
            return True
    except OSError:
        return False


def check_not_inside(out: PurePath) -> None:
    """Refuse an output inside a finished folder, which may hold only what its stage wrote."""
    if not isinstance(out, Path):
        return
    for folder in out.absolute().parents:
        if is_finished(folder) and (made := read_manifest(folder)) is not None:
            raise UsageError(
                f"{out}: lies in {folder}, which {made.stage!r} wrote; choose a place outside it"
            )


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "os error 28", "Disk quota exceeded")
"""The same in the texts of libraries' own errors."""
_TORCH_TEXTS = ("inline_container", "iostream error", "PytorchStreamWriter")
"""Texts of torch.save when a write fails; they do not say why."""
_NO_ROOM = 1 << 20
"""With fewer bytes free than this, torch's failed write counts as a full disk."""


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Turn errors of a full disk into one line: which disk, how much is free, and which file did not fit.

    Errors that do not name a file are put down to `folder`.
    """
    try:
        yield
    except Exception as error:
        told = full_disk(error, folder)
        if told is None or told is error:
            raise
        raise told from error


class FullDiskError(SstokenError):
    """A disk is full; says which, and how full."""


def full_disk(error: BaseException, folder: Path) -> SstokenError | None:
    """Return the error to show if a full disk caused `error`, directly or through a library; else None."""
    if isinstance(error, FullDiskError):
        return error
    place = _without_room(error, folder)
    if place is None:
        return None
    disk = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.ismount(p))
    usage = shutil.disk_usage(disk)
    return FullDiskError(
        f"{place}: no space left on the disk at {disk} ({size_text(usage.free)} free of {size_text(usage.total)}); "
        f"make room there; {GOES_ON}"
    )


def _without_room(error: BaseException | None, folder: Path) -> Path | None:
    """The file or folder on the full disk that caused an error; None: it had another cause."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    full = [each for each in chain if isinstance(each, OSError) and each.errno in _FULL]
    if named := [each.filename for each in full if each.filename]:
        return Path(os.fsdecode(named[0]))
    texts = " ".join(map(str, chain))
    by_torch = any(text in texts for text in _TORCH_TEXTS) and shutil.disk_usage(folder).free < _NO_ROOM
    return folder if full or by_torch or any(text in texts for text in _FULL_TEXTS) else None


def free_bytes(folder: PurePath) -> int | None:
    """Bytes free on the disk of an existing or future folder; None: it is remote."""
    if not isinstance(folder, Path):
        return None
    return shutil.disk_usage(_existing(folder)).free


def size_text(count: int) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 10_000:
            return f"{count:,} {unit}"
        count //= 1000
    return f"{count:,} TB"
