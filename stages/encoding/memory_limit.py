"""A memory limit for templates whose output grows without bound."""

from collections.abc import Iterator
from contextlib import contextmanager

from sstoken.stages.encoding.time_limit import interruptible

MOST_BYTES = 4 << 30
"""Memory that rendering one conversation may take, beyond what the process has. A few megabytes are usual."""


@contextmanager
def memory_limited() -> Iterator[None]:
    """Have allocations beyond `MOST_BYTES` raise MemoryError, rather than fill the machine until a process is killed.

    There is no limit where the system has none (Windows, macOS), nor in a thread, beside which others allocate.
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
    """The bytes of this process's address space; None where Linux's /proc is not there."""
    import resource

    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(64).split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
