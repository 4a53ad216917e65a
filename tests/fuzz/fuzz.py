"""Fuzz the readers with atheris: `python -m tests.fuzz.fuzz --minutes 10`; prints counts, exits with 1 after a crash.

Inputs that crash are kept in `tests/fuzz/corpus/TARGET`, for `tests/fuzz/test_corpus.py` to try for ever.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support import ROOT

_UNITS = re.compile(r"stat::number_of_executed_units: (\d+)|Done (\d+) runs")
_SLOWEST = 30
"""Seconds that one input may take."""


def main() -> int:
    """Share the time among the targets; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", action="append", help="one of them, by name")
    asked = parser.parse_args()
    from tests.fuzz.targets import TARGETS, seeds

    names = asked.target or list(TARGETS)
    folder = Path(tempfile.mkdtemp(prefix="sstoken-fuzz-corpus-"))
    seeds(folder)
    seconds = max(5, int(asked.minutes * 60 * asked.processes / len(names)))
    with ThreadPoolExecutor(asked.processes) as pool:
        results = list(pool.map(lambda name: _fuzz(name, folder, seconds), names))
    shutil.rmtree(folder, ignore_errors=True)
    summary = {
        "inputs tried": sum(result["inputs"] for result in results),
        "by target": {result["target"]: result["inputs"] for result in results},
        "failures": sum(result["failed"] for result in results),
    }
    print(json.dumps(summary, indent=1))
    for result in results:
        if result["failed"]:
            print(f"{result['target']}:\n{result['log'][-3000:]}", file=sys.stderr)
    return 1 if summary["failures"] else 0


def _fuzz(name: str, folder: Path, seconds: int) -> dict[str, Any]:
    from tests.fuzz.targets import CORPUS

    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-timeout={_SLOWEST}", "-rss_limit_mb=4096", "-max_len=65536"]
    options += [f"-artifact_prefix={kept}/", "-print_final_stats=1", "-verbosity=1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.one", name, *options, str(folder / name), str(kept)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = done.stdout + done.stderr
    counted = [int(a or b) for a, b in _UNITS.findall(log)]
    failed = done.returncode != 0 or not counted
    return {"target": name, "inputs": max(counted, default=0), "failed": failed, "log": log}


if __name__ == "__main__":
    sys.exit(main())
