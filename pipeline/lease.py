"""A lease beside a lock: which process works on a folder, since when, and whether it is still alive.

The lock keeps processes of one machine apart, and ends with its process. Some network file systems do not share locks
between machines, so the holder also writes a lease, and rewrites it every few seconds. A process that gets the lock but
finds another machine's lease watches it: as long as it changes, its holder lives; once it has not changed for
`PATIENCE` seconds, the holder is dead and the lease is taken over. Clocks of two machines are never compared.
"""

import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from threading import Event, Thread

from sstoken.errors import SstokenError
from sstoken.stages import conditional_write, plain_json, remote_cache
from sstoken.stages.remote_path import RemotePath
from sstoken.stages.storage import UNFINISHED

BEAT = 5.0
"""Seconds between two heartbeats."""
PATIENCE = 60.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""
_LOOK = 0.5


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    owner: str
    """The user's name."""
    host: str
    boot: str
    """The machine's boot id; containers of one machine share it, and see each other's locks."""
    pid: int
    since: str
    """When it began, in its local time."""
    fingerprint: str
    """Fingerprint of the work; empty: unknown."""
    token: str
    """Random; identifies this lease."""

    def __str__(self) -> str:
        work = f", of work {self.fingerprint}" if self.fingerprint else ""
        return f"process {self.pid} of {self.owner} on {self.host} since {self.since}{work}"


class Lease:
    """Holds a lease from `take` to `release`, in a file whose lock this process holds."""

    def __init__(self, file: Path, fingerprint: str = "") -> None:
        self._file = file
        self._beats = 0
        self._own = Holder(
            owner=_user(),
            host=socket.gethostname(),
            boot=self._machine(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            fingerprint=fingerprint,
            token=secrets.token_hex(8),
        )
        self._ended = Event()
        self._opened = -1
        self._thread = Thread(target=self._live, daemon=True)

    def take(self, wait: float = 0, watched: Callable[[Holder], None] = lambda holder: None) -> None:
        """Write the lease, once no other holder is alive.

        Args:
            wait: seconds to wait for a living holder to release it.
            watched: called before another machine's lease is watched, which takes up to `PATIENCE` seconds.

        Raises:
            SstokenError: its holder is alive; names it.
        """
        found = holder(self._file)
        if found is not None:
            self._outlive(found, wait, watched)
        for left in self._file.parent.glob(f"{escape(self._file.name)}.*{UNFINISHED}"):
            left.unlink(missing_ok=True)
        temporary = self._file.with_name(f"{self._file.name}.{secrets.token_hex(4)}{UNFINISHED}")
        self._opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._beat()
            os.replace(temporary, self._file)
        except OSError as error:
            os.close(self._opened)
            temporary.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):  # swept away by a process that took the lease meanwhile
                raise _taken(self._file, holder(self._file)) from error
            raise
        self._thread.start()

    def check(self) -> None:
        """Check, before publishing, that no other process took over while this one was suspended.

        Raises:
            SstokenError: another process has the lease; names it.
        """
        found = holder(self._file)
        if found is not None and found.token != self._own.token:
            raise SstokenError(
                f"{self._file.parent}: {found} took over while this process was suspended; let it finish"
            )

    def release(self) -> None:
        """Give the lease up."""
        self._ended.set()
        self._thread.join()
        self._close()
        with suppress(OSError, SstokenError):
            found = holder(self._file)
            if found is not None and found.token == self._own.token:
                self._remove()

    def _outlive(self, found: Holder, wait: float, watched: Callable[[Holder], None]) -> None:
        """Return once a holder on another machine is dead; a living one on this machine would hold the lock."""
        if found.boot != self._own.boot:
            watched(found)
            _wait_for_end(self._file, found, wait)

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError, SstokenError):  # others may then count it as dead, which `check` notices
                self._beat()

    def _text(self) -> bytes:
        """Return the lease with one more sign of life, always of the same length."""
        self._beats += 1
        return json.dumps({**asdict(self._own), "beats": f"{self._beats:012d}"}).encode()

    def _machine(self) -> str:
        return _boot()

    def _beat(self) -> None:
        """Overwrite the lease through the open file: never a successor's file of that name."""
        os.pwrite(self._opened, self._text(), 0)
        os.fsync(self._opened)

    def _close(self) -> None:
        os.close(self._opened)

    def _remove(self) -> None:
        self._file.unlink(missing_ok=True)


class StoreLease(Lease):
    """A lease in an object store, which has no locks: its conditional write lets one of several machines in.

    Processes of this machine have been kept apart before, by a lock in the cache that they share.
    """

    def __init__(self, file: RemotePath, fingerprint: str = "") -> None:
        self._place = file
        super().__init__(file, fingerprint)  # type: ignore[arg-type]

    def take(self, wait: float = 0, watched: Callable[[Holder], None] = lambda holder: None) -> None:
        """See `Lease`."""
        end = time.monotonic() + wait
        while not self._is_taken(wait, watched):
            if time.monotonic() > end:
                raise _taken(self._file, holder(self._file))
            time.sleep(_LOOK)
        self._thread.start()

    def forget(self) -> None:
        """Delete the lease of a killed run on this machine. The caller holds its lock, so no living run does."""
        found = holder(self._file)
        if found is not None and found.boot == self._own.boot:
            self._remove()

    def _is_taken(self, wait: float, watched: Callable[[Holder], None]) -> bool:
        found = holder(self._file)
        if found is not None:
            self._outlive(found, wait, watched)
        before, now = conditional_write.version_of(self._place), holder(self._file)
        if before is None:
            return conditional_write.create(self._place, self._text())
        # It did not change while it was watched, or it is of this machine, whose lock we hold.
        is_dead = now is None or now.boot == self._own.boot or (found and now.token == found.token)
        return bool(is_dead) and conditional_write.replace(self._place, self._text(), before)

    def _machine(self) -> str:
        return remote_cache.machine()

    def _beat(self) -> None:
        before, found = conditional_write.version_of(self._place), holder(self._file)
        if before is not None and found is not None and found.token == self._own.token:
            conditional_write.replace(self._place, self._text(), before)

    def _close(self) -> None:
        """Nothing is open."""

    def _remove(self) -> None:
        conditional_write.remove(self._place)


def is_of_this_machine(file: Path) -> bool:
    """Whether a lease was taken on this machine, so that the lock beside it tells whether its run is alive."""
    found = holder(file)
    return found is not None and found.boot == _boot()


def holder(file: Path) -> Holder | None:
    """Read a lease; None if there is none, or none that can be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = plain_json.parse(file.read_bytes())
        return Holder(**{key: found[key] for key in Holder.__dataclass_fields__})
    return None


def _wait_for_end(file: Path, found: Holder, wait: float) -> None:
    began = changed = time.monotonic()
    last = _content(file)
    while time.monotonic() < changed + PATIENCE:
        time.sleep(_LOOK)
        now = _content(file)
        if now is None:
            return
        if now != last:
            last, changed = now, time.monotonic()
            if changed >= began + wait:
                raise _taken(file, holder(file) or found)


def _taken(file: Path, by: Holder | None) -> SstokenError:
    return SstokenError(
        f"{file.parent}: another run is writing here{f': {by}' if by else ''}; wait for that, or choose another folder"
    )


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return str(os.getuid())


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
