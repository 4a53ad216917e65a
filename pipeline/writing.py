"""Access to output folders: whether they can be written, locks against other runs, and full disks."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from filelock import FileLock, Timeout

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline import lease
from sstoken.pipeline.saying import say
from sstoken.stages import storage
from sstoken.stages.folders import is_finished
from sstoken.stages.manifest import read_manifest
from sstoken.stages.remote_path import RemotePath
from sstoken.stages.shard_border import GOES_ON


def check_writable(folder: PurePath) -> None:
    """Refuse a folder that cannot be created or replaced.

    Raises:
        SstokenError: its nearest existing parent cannot be written to.
    """
    if not isinstance(folder, Path):
        return  # an object store refuses the first file instead
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    parent = existing if existing != folder.absolute() else existing.parent
    if not parent.is_dir() or not _writable(parent):
        raise SstokenError(
            f"{parent}: cannot be written to; choose another output folder or fix its permissions"
        )


def _writable(folder: Path) -> bool:
    """Whether a file can be created there. Tries it: permissions tell nothing about root or a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # usually has no name, so that a kill leaves nothing behind
            return True
    except OSError:
        return False


_NO_LEASE = ("hf",)
"""Every file put there is a commit of a repository."""
RANKS = "rank-*-of-*"
"""Pattern of the parts that ranks lock; see `one_run_at_a_time` and `at_work`."""


@contextmanager
def one_run_at_a_time(
    out: Path, part: str = "", wait: float = 0, fingerprint: str = ""
) -> Iterator[Callable[[], None]]:
    """Lock an output folder, or a part of it, against other runs; the end of the process releases the lock.

    Args:
        out: the folder.
        part: such as `rank-00003-of-00007`; empty: the whole folder.
        wait: seconds to wait for another run.
        fingerprint: of the work, shown to runs that find the folder locked.

    Yields:
        A check to call before publishing: it raises if another run has taken the folder over.

    Raises:
        SstokenError: another run holds the lock; names it.
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
            with _one_machine_at_a_time(out, part, wait, fingerprint) as check:

                def check_both() -> None:
                    own.check()
                    check()

                yield check_both
        finally:
            own.release()
    finally:
        lock.release()  # the lock file stays: after unlinking it, two runs could lock two files of that name


@contextmanager
def _one_machine_at_a_time(
    out: PurePath, part: str, wait: float, fingerprint: str
) -> Iterator[Callable[[], None]]:
    """Keep other machines off a folder in an object store; a folder on a disk has its lease already."""
    if not isinstance(out, RemotePath) or out.scheme in _NO_LEASE:
        yield lambda: None
        return
    own = lease.StoreLease(_store_lease(out, part), fingerprint)
    own.take(wait, _say_watched)
    try:
        yield own.check
    finally:
        own.release()


def at_work(out: Path, parts: str) -> list[str]:
    """List the parts of an output folder, among those that match a pattern, that are locked now."""
    held = filter(_is_held, _lock_files(out, parts))
    return [file.name.removeprefix(f".{out.name}.").removesuffix(".lock") for file in held]


def forget_dead_run(out: Path) -> None:
    """Delete the lease of a run that was killed after it published, unless another run is at work on the folder."""
    file = _lease_file(out, "")
    if file.exists() and lease.is_of_this_machine(file):
        lock = FileLock(_lock_file(out, ""))
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            place: PurePath = out
            if isinstance(place, RemotePath) and place.scheme not in _NO_LEASE:
                lease.StoreLease(_store_lease(place, "")).forget()
            file.unlink(missing_ok=True)
        lock.release()


def forget_parts(out: Path, parts: str) -> None:
    """Delete the lock files of parts, once the folder is finished."""
    for file in _lock_files(out, parts):
        file.unlink(missing_ok=True)


def _lock_files(out: Path, parts: str) -> list[Path]:
    pattern = _lock_file(out, parts)
    return list(pattern.parent.glob(pattern.name))


def _lock_file(out: Path, part: str) -> Path:
    out = storage.of(out).on_this_machine(out)
    return out.with_name(f".{out.name}.{part}.lock" if part else f".{out.name}.lock")


def _store_lease(out: RemotePath, part: str) -> RemotePath:
    return out.with_name(f".{out.name}.{part}.lease" if part else f".{out.name}.lease")


def _say_watched(other: lease.Holder) -> None:
    say(f"{other} holds the lease; watching it for {lease.PATIENCE:.0f} s", err=True)


def _lease_file(out: Path, part: str) -> Path:
    return _lock_file(out, part).with_suffix(".lease")


def _is_held(file: Path) -> bool:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # on a disk that takes no files, where nobody works
    lock.release()
    return False


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

    Args:
        folder: where the work is done, for errors that do not name a file.
    """
    try:
        yield
    except Exception as error:
        told = full_disk(error, folder)
        if told is None:
            raise
        raise told from error


def full_disk(error: BaseException, folder: Path) -> SstokenError | None:
    """Return the error to show if a full disk caused `error`, directly or through a library; else None."""
    place = _without_room(error, folder)
    if place is None:
        return None
    disk = next(p for p in (place.absolute(), *place.absolute().parents) if os.path.ismount(p))
    usage = shutil.disk_usage(disk)
    return SstokenError(
        f"{place}: no space left on the disk at {disk} ({size_text(usage.free)} free of {size_text(usage.total)}); "
        f"make room there; {GOES_ON}"
    )


def _without_room(error: BaseException | None, folder: Path) -> Path | None:
    """The file or folder on the full disk that caused an error; None: it had another cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return Path(os.fsdecode(error.filename)) if error.filename else folder
        if any(text in str(error) for text in _FULL_TEXTS):
            return folder
        if any(text in str(error) for text in _TORCH_TEXTS) and shutil.disk_usage(folder).free < _NO_ROOM:
            return folder
        error = error.__cause__ or error.__context__
    return None


def check_not_inside(out: PurePath) -> None:
    """Refuse an output inside a finished folder, which may hold only what its stage wrote.

    Raises:
        UsageError: names the finished folder.
    """
    if not isinstance(out, Path):
        return
    for folder in out.absolute().parents:
        if is_finished(folder) and (made := read_manifest(folder)) is not None:
            raise UsageError(
                f"{out}: lies in {folder}, which {made.stage!r} wrote; choose a place outside it"
            )


def free_bytes(folder: PurePath) -> int | None:
    """Bytes free on the disk of an existing or future folder; None: it is remote."""
    if not isinstance(folder, Path):
        return None
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def size_text(count: int) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 10_000:
            return f"{count:,} {unit}"
        count //= 1000
    return f"{count:,} TB"
