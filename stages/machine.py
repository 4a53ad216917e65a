"""Where this process runs: installed packages, the processor."""

from functools import cache
from importlib import metadata
from pathlib import Path

_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""Names in Linux's /proc/cpuinfo: two of x86, one of ARM."""


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 natively; False where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    lines = (
        line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features"))
    )
    return not _FLAGS.isdisjoint(next(lines, "").split())
