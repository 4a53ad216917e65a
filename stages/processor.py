"""What this machine's processor multiplies natively."""

from functools import cache
from pathlib import Path

_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
"""As Linux lists them: x86's two, and ARM's."""


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; False where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    lines = (
        line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features"))
    )
    return not _FLAGS.isdisjoint(next(lines, "").split())
