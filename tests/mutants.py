"""Count the mutants of `make test-mutants` by file; fails where more than a tenth survive."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

SURVIVED, UNTESTED = 0, 33
"""Exit codes that mutmut stores: the tests passed; no test runs the line."""
MOST = 0.1


def main() -> int:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted(Path("mutants").rglob("*.py.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        for name, code in codes.items():
            survived = code in (SURVIVED, UNTESTED)
            counts[path.name.removesuffix(".meta")]["all"] += code is not None
            counts[path.name.removesuffix(".meta")]["survived"] += survived
            if survived:
                print("untested" if code == UNTESTED else "survived", name)
    for file, count in counts.items():
        print(f"{file:22} {count['survived']:4} of {count['all']:4} survived")
    survived, total = (sum(count[key] for count in counts.values()) for key in ("survived", "all"))
    print(f"{'together':22} {survived:4} of {total:4} survived, {survived / max(total, 1):.1%}")
    return survived > MOST * total


if __name__ == "__main__":
    sys.exit(main())
