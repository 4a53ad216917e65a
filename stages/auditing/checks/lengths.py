"""Count tokens by role and turn; count lengths, and what a maximum length would cut off."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sstoken.selection import BoolArray
from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.findings import Audit, Family
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
_MOST_TURNS = 8
"""Turns of a conversation to count separately; the last count includes all later turns."""


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
            if limit == self.max_length and kept < total:
                at = limit - example.offset
                audit.report(CUT if kept else LOST, example, (at - 1, at))

    def _limits(self) -> list[int]:
        return sorted({*CURVE, *([self.max_length] if self.max_length else [])})

    def finish(self, audit: Audit) -> None:
        """Say how much the maximum length cuts."""
        if self.max_length is not None:
            share = 1 - self._kept[self.max_length] / max(1, self.trained)
            detail = f"at {self.max_length:,} tokens {share:.1%} of what is trained is lost"
            audit.explain(CUT, detail)
            audit.explain(LOST, detail)

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


@dataclass
class Tally:
    """Counts of tokens over the dataset."""

    examples: int = 0
    tokens: int = 0
    trained: int = 0
    padding: int = 0
    roles: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    turns: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    without_turns: int = 0

    def add(self, example: Example, audit: Audit) -> None:
        """Count an example."""
        self.examples += 1
        self.tokens += len(example.ids)
        self.trained += int(example.trained.sum())
        self.padding += 0 if example.padding is None else int(example.padding.sum())
        self.without_turns += not example.turns
        number = start = 0
        for turn in example.turns:
            stop = turn.stop
            if audit.vocabulary is not None:
                stop = example.end(turn, audit.shape.closers, audit.vocabulary)
            length, trained = stop - start, int(example.trained[start:stop].sum())
            start = stop
            role = self.roles[turn.role]
            role[0], role[1] = role[0] + length, role[1] + trained
            if turn.role == "assistant":
                number += 1
                counts = self.turns[min(number, _MOST_TURNS)]
                for i, count in enumerate((1, length, trained)):
                    counts[i] += count

    def facts(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "trained": self.trained,
            "trained_share": round(self.trained / max(1, self.tokens), 6),
            "padding": self.padding,
            "roles": {name: {"tokens": t, "trained": k} for name, (t, k) in self.roles.items()},
            "turns": [
                {"turn": n, "rows": r, "tokens": t, "trained": k}
                for n, (r, t, k) in sorted(self.turns.items())
            ],
            "examples_without_turns": self.without_turns,
        }
