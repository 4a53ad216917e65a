"""A memory limit for templates whose output grows without bound."""

from collections.abc import Iterator
from contextlib import contextmanager

from sstoken.stages.encoding.time_limit import interruptible

MOST_BYTES = 4 << 30
"""Bytes that rendering one conversation may add to the process; a few megabytes are usual."""


@contextmanager
def memory_limited() -> Iterator[None]:
    """Make allocations beyond `MOST_BYTES` raise MemoryError, before the system kills a process.

    Does nothing where the system has no limit (Windows, macOS), and in a thread, since other threads allocate, too.
    """
    size = _address_space() if interruptible() else None
    if size is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, size + MOST_BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Return the size of this process's address space in bytes; None without Linux's /proc."""
    import resource

    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(64).split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
