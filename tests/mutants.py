"""Count the mutants of `make test-mutants` by file; fail if more than a tenth survive, or some were not tried."""

import json
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

RESULTS = {0: "survived", 1: "killed", 3: "killed", 5: "untested", 33: "untested", None: "untried"}
"""By the exit codes that mutmut stores: pytest's own, and 33 if no test runs the function."""
STOPPED = "timed out"
"""All other exit codes: the tests hung, or the process was killed."""
KINDS = ("survived", "untested", STOPPED, "untried", "killed")
MOST = 0.1


def main(pattern: str = "*") -> int:
    total: Counter[str] = Counter()
    for path in sorted(Path("mutants").rglob("*.py.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        found = {name: RESULTS.get(code, STOPPED) for name, code in codes.items() if fnmatch(name, pattern)}
        if not found:
            continue
        for name, result in found.items():
            if result != "killed":
                print(f"{result:9} {name}")
        total += (counts := Counter(found.values()))
        print_counts(str(path.relative_to("mutants")).removesuffix(".meta"), counts)
    print_counts("together", total)
    return bool(total["untried"]) or alive(total) > MOST


def alive(counts: Counter[str]) -> float:
    """Return the share of mutants that no test noticed."""
    return (counts["survived"] + counts["untested"]) / max(1, counts.total())


def print_counts(what: str, counts: Counter[str]) -> None:
    each = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    print(f"{what}: {counts.total()} mutants: {each}; {alive(counts):.1%} alive")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
