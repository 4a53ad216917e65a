"""Count a dataset's tokens by role and by turn."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.findings import Audit

_TURNS_TOLD = 8
"""Turns of a conversation that are counted separately; the last count includes all later turns."""


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
                stop = example.end(turn, audit.shape.closers, audit.vocabulary.is_control)
            length, trained = stop - start, int(example.trained[start:stop].sum())
            start = stop
            role = self.roles[turn.role]
            role[0], role[1] = role[0] + length, role[1] + trained
            if turn.role == "assistant":
                number += 1
                counts = self.turns[min(number, _TURNS_TOLD)]
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
