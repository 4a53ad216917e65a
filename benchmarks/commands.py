"""The command line as a process of its own: what it prints, its seconds and its peak memory."""

import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """One run of the command line."""

    lines: list[str]
    """Lines of its output."""
    seconds: float
    cpu_seconds: float
    peak_mib: float

    def figures(self) -> dict[str, float]:
        """Return what was measured, ready for JSON."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_mib": self.peak_mib}


def run(*arguments: str) -> Measured:
    """Run `sstoken-curate` with these arguments; exit with its error where it fails."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", _COMMAND, *arguments], capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said, _, status = done.stdout.rpartition(_MARK)
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    return Measured(said.splitlines(), seconds, cpu, peak)


_MARK = "\n--- status\n"
_COMMAND = f"""
import sys
from sstoken.pipeline.cli import main
try:
    main(sys.argv[1:])
finally:
    print({_MARK!r} + open("/proc/self/status").read())
"""
"""A process's own peak: what `wait4` says of a child begins with its parent's."""
