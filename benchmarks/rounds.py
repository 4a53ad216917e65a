"""How often benchmarks measure: a single round says as much of the machine's other work as of what is measured."""

import statistics
from collections.abc import Callable
from typing import Any

ROUNDS = 3
"""The fewest, also with `--quick`, which shrinks the work."""


def at_least(asked: int) -> int:
    """Return how many rounds to take where `asked` were asked for."""
    return max(ROUNDS, asked)


def middle(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure `ROUNDS` times; return the median of each number, and of the rest what the last round gave."""
    rounds = [measure() for _ in range(ROUNDS)]
    return {
        name: statistics.median(found[name] for found in rounds) if isinstance(value, (int, float)) else value
        for name, value in rounds[-1].items()
    }
