"""Check a scores folder: is every response token measured, and do the values differ?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.signals import get_signal, is_signal
from sstoken.stages import tables
from sstoken.stages.auditing.context import Context
from sstoken.stages.auditing.kinds import Family

FAMILY = Family("scores")
MISSING = FAMILY.kind(
    "signal-missing",
    "error",
    "rows with response tokens that were not measured",
    "score them again (--force)",
)
CONSTANT = FAMILY.kind(
    "signal-constant",
    "warning",
    "rows, all of them, in which a signal is the same number on every token",
    "a method learns nothing from it: check that the right checkpoint was scored",
)


@dataclass
class Signals:
    """Counts over a scores folder."""

    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: int = 0

    def read(self, scores: Path, tokens: Path, context: Context) -> None:
        """Compare the shards of a scores folder with those of its tokens."""
        for part in tables.parts(scores):
            signals = [name for name in tables.columns(part) if name != "example_id"]
            table = tables.read_table(part)
            masks = tables.rows(tables.read_table(tokens / part.name, ["response_mask"])["response_mask"])
            names = table["example_id"].to_pylist()
            for name in signals:
                for number, (values, mask) in enumerate(zip(tables.rows(table[name]), masks, strict=True)):
                    of_response = values.astype(float)[mask.astype(bool)]
                    if lost := self._count(name, of_response):
                        detail = f"{name} is null on {lost} of {of_response.size} tokens of {names[number]!r}"
                        context.found.place(MISSING, f"{part.name} row {number}", self.rows + number, detail)
            self.rows += len(names)

    def _count(self, name: str, values: NDArray[np.float64]) -> int:
        """Widen the range of a signal; return how many values are missing."""
        known = values[np.isfinite(values)]
        if known.size:
            low, high = self.ranges.get(name, (np.inf, -np.inf))
            self.ranges[name] = min(low, float(known.min())), max(high, float(known.max()))
        return values.size - known.size

    def finish(self, context: Context) -> None:
        """Report constant signals."""
        same = [
            f"{name} is {low:g}"
            for name, (low, high) in self.ranges.items()
            if low == high and not (is_signal(name) and get_signal(name).may_be_constant)
        ]
        if same:
            context.found.count(CONSTANT, self.rows, None, ", ".join(same))

    def facts(self) -> dict[str, Any]:
        """Return the range of each signal."""
        return {name: {"min": low, "max": high} for name, (low, high) in self.ranges.items()}
