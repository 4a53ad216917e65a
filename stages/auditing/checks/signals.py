"""Scores: whether each response token was measured, and whether the measurements say anything."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sstoken.stages import tables
from sstoken.stages.auditing.context import Context
from sstoken.stages.auditing.kinds import kind

FAMILY = "scores"
MISSING = kind(
    "signal-missing",
    FAMILY,
    "error",
    "rows with response tokens that were not measured",
    "score them again (--force)",
)
CONSTANT = kind(
    "signal-constant",
    FAMILY,
    "warning",
    "rows, all of them, in which a signal is the same number on every token",
    "a method learns nothing from it: look whether the right checkpoint was scored",
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
                    self._look(name, values.astype(float)[mask.astype(bool)], f"{part.name} row {number}",
                               self.rows + number, str(names[number]), context)  # fmt: skip
            self.rows += len(names)

    def _look(self, name: str, values: Any, where: str, row: int, example: str, context: Context) -> None:
        if not values.size:
            return
        known = values[np.isfinite(values)]
        if known.size < values.size:
            lost = values.size - known.size
            context.found.place(
                MISSING, where, row, f"{name} is null on {lost} of {values.size} tokens of {example!r}"
            )
        if known.size:
            low, high = self.ranges.get(name, (np.inf, -np.inf))
            self.ranges[name] = min(low, float(known.min())), max(high, float(known.max()))

    def finish(self, context: Context) -> None:
        """Report signals that are the same everywhere."""
        same = [f"{name} is {low:g}" for name, (low, high) in self.ranges.items() if low == high]
        if same:
            context.found.count(CONSTANT, self.rows, None, ", ".join(same))

    def facts(self) -> dict[str, Any]:
        """Return the range of each signal."""
        return {name: {"min": low, "max": high} for name, (low, high) in self.ranges.items()}
