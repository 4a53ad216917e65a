"""Locks that keep other runs off an output folder, or off a rank's part of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path, PurePath
from typing import TypeVar

from filelock import FileLock, Timeout

from sstoken.errors import SstokenError
from sstoken.pipeline import lease
from sstoken.pipeline.disk import naming_full_disk
from sstoken.pipeline.saying import say
from sstoken.stages import storage
from sstoken.stages.remote_path import RemotePath

P = TypeVar("P", bound=PurePath)
_NO_LEASE = ("hf",)
"""Every file put there is a commit of a repository."""


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
    with ExitStack() as held:
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            by = lease.holder(_lease_file(out, part))
            raise SstokenError(
                f"{out}: another run is writing {part or 'it'}{f': {by}' if by else ''}; wait for that, or choose "
                "another folder"
            ) from None
        held.callback(
            lock.release
        )  # the file stays: after unlinking it, two runs could lock two of that name
        leases = [lease.Lease(_lease_file(out, part), fingerprint)]
        if (shared := _store_lease(out, part, fingerprint)) is not None:
            leases.append(shared)
        for own in leases:
            with naming_full_disk(out):
                own.take(wait, _say_watched)
            held.callback(own.release)

        def check() -> None:
            for own in leases:
                own.check()

        yield check


def is_at_work(out: Path) -> bool:
    """Whether an output folder is locked now."""
    file = _lock_file(out)
    return file.exists() and _is_held(file)


def ranks_at_work(out: Path) -> list[str]:
    """List the parts of an output folder that ranks have locked now, such as `rank-00003-of-00007`."""
    held = filter(_is_held, _rank_locks(out))
    return [file.name.removeprefix(f".{out.name}.").removesuffix(".lock") for file in held]


def forget_dead_run(out: Path) -> None:
    """Delete the lease of a run that was killed after it published, unless another run is at work on the folder."""
    file = _lease_file(out)
    if file.exists() and lease.is_of_this_machine(file):
        lock = FileLock(_lock_file(out))
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            if (shared := _store_lease(out)) is not None:
                shared.forget()
            file.unlink(missing_ok=True)
        lock.release()


def forget_ranks(out: Path) -> None:
    """Delete the ranks' lock files, once the folder is finished."""
    for file in _rank_locks(out):
        file.unlink(missing_ok=True)


def _rank_locks(out: Path) -> list[Path]:
    own = storage.of(out).on_this_machine(out)
    return list(own.parent.glob(f"{escape(f'.{own.name}.')}rank-*-of-*.lock"))


def _lock_file(out: Path, part: str = "", suffix: str = ".lock") -> Path:
    return _hidden(storage.of(out).on_this_machine(out), part, suffix)


def _lease_file(out: Path, part: str = "") -> Path:
    return _lock_file(out, part, ".lease")


def _store_lease(out: PurePath, part: str = "", fingerprint: str = "") -> lease.StoreLease | None:
    """The lease that keeps other machines off a folder in an object store; None: a disk's folder has one already."""
    if not isinstance(out, RemotePath) or out.scheme in _NO_LEASE:
        return None
    return lease.StoreLease(_hidden(out, part, ".lease"), fingerprint)


def _hidden(out: P, part: str, suffix: str) -> P:
    return out.with_name(f".{out.name}.{part}{suffix}" if part else f".{out.name}{suffix}")


def _say_watched(other: lease.Holder) -> None:
    say(f"{other} holds the lease; watching it for {lease.PATIENCE:.0f} s", err=True)


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
