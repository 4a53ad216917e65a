"""Count lengths, and what a maximum length would cut off."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sstoken.selection import BoolArray
from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.findings import Audit, Shown
from sstoken.stages.auditing.kinds import Family
from sstoken.stages.encoding.token_stats import percentile

FAMILY = Family("lengths")
CUT = FAMILY.warning(
    "answers-cut",
    "rows whose answers do not fit into the maximum length",
    "raise --max-length, or drop these rows: an answer that breaks off has no end",
)
LOST = FAMILY.error(
    "answers-lost",
    "rows whose answers lie entirely beyond the maximum length",
    "raise --max-length, or drop these rows",
)
CURVE = (1024, 2048, 4096, 8192)


@dataclass
class Lengths:
    """Counts over the dataset."""

    max_length: int | None
    """Length in tokens at which training will cut rows; None if not known."""
    rows: Counter[int] = field(default_factory=Counter)
    """Rows by length."""
    trained: int = 0
    _kept: dict[int, int] = field(default_factory=Counter)
    _cut_rows: dict[int, int] = field(default_factory=Counter)
    _lost_rows: dict[int, int] = field(default_factory=Counter)
    _first: dict[str, Shown] = field(default_factory=dict)

    def add(self, example: Example, trained: BoolArray, audit: Audit) -> None:
        """Count a row: `example` is the row, or the first document in it; `trained` covers the whole row, [T]."""
        length, total = len(trained), int(np.count_nonzero(trained))
        self.rows[length] += 1
        self.trained += total
        for limit in self._limits():
            kept = total if length <= limit else int(np.count_nonzero(trained[:limit]))
            self._kept[limit] += kept
            self._cut_rows[limit] += kept < total
            self._lost_rows[limit] += total > 0 and not kept
        if self.max_length is not None and length > self.max_length and total:
            kept = int(np.count_nonzero(trained[: self.max_length]))
            if kept < total and (name := "cut" if kept else "lost") not in self._first:
                at = self.max_length - example.offset
                self._first[name] = audit.show(example, (at - 1, at))

    def _limits(self) -> list[int]:
        return sorted({*CURVE, *([self.max_length] if self.max_length else [])})

    def finish(self, audit: Audit) -> None:
        """Report what the maximum length cuts."""
        if self.max_length is None:
            return
        lost = self._lost_rows[self.max_length]
        cut = self._cut_rows[self.max_length] - lost
        share = 1 - self._kept[self.max_length] / max(1, self.trained)
        detail = f"at {self.max_length:,} tokens {share:.1%} of what is trained is lost"
        audit.report_count(CUT, cut, self._first.get("cut"), detail)
        audit.report_count(LOST, lost, self._first.get("lost"), detail)

    def facts(self) -> dict[str, Any]:
        """Return percentiles and the curve."""
        lengths = sorted(self.rows.items())
        return {
            "length": {f"p{q}": percentile(lengths, q) for q in (50, 90, 99)}
            | {"max": lengths[-1][0] if lengths else 0},
            "max_length": self.max_length,
            "within": [
                {
                    "length": limit,
                    "trained_share": round(self._kept[limit] / max(1, self.trained), 6),
                    "rows_cut": self._cut_rows[limit],
                    "rows_lost": self._lost_rows[limit],
                }
                for limit in self._limits()
            ],
        }
