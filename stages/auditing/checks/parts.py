"""Check whether reasoning and tool calls within answers are trained."""

import re
from dataclasses import dataclass, field

import numpy as np

from sstoken.stages.auditing.examples import Example, Turn
from sstoken.stages.auditing.findings import Audit, Family

FAMILY = Family("reasoning and tool calls", "template")
REASONING = FAMILY.warning(
    "reasoning-not-trained",
    "rows with an answer that is trained without its reasoning",
    "train the reasoning too, or take it out of the rows: else the model learns to answer, but not to reason",
)
CALL = FAMILY.warning(
    "tool-call-not-trained",
    "rows with an answer that is trained without its tool call",
    "train the call too, or take it out of the rows",
)


@dataclass
class Parts:
    """Counts over the dataset."""

    tokens: dict[str, int] = field(default_factory=lambda: {"reasoning": 0, "tool_calls": 0})
    trained: dict[str, int] = field(default_factory=lambda: {"reasoning": 0, "tool_calls": 0})
    _patterns: tuple[re.Pattern[bytes], re.Pattern[bytes] | None] | None = None
    _closes: bytes = b""

    def check(self, example: Example, audit: Audit) -> None:
        """Check the reasoning and tool calls of each answer."""
        if audit.vocabulary is None or not example.turns:
            return
        if self._patterns is None:
            self._patterns = _patterns(audit)
            self._closes = audit.vocabulary.marked(audit.shape.thoughts[1])
        for turn in example.turns:
            if turn.role == "assistant":
                self._check(example, turn, audit)

    def _check(self, example: Example, turn: Turn, audit: Audit) -> None:
        assert self._patterns is not None
        assert audit.vocabulary is not None
        thoughts, calls = self._patterns
        begin, end = int(example.starts[turn.start]), int(example.starts[turn.stop])
        spans: list[tuple[str, int, int]] = []
        said = example.text[begin:end]
        for match in thoughts.finditer(said) if self._closes in said else ():
            if (thought := match["thought"]).strip():
                start = match.start("thought") + len(thought) - len(thought.lstrip())
                spans.append(("reasoning", begin + start, begin + start + len(thought.strip())))
        if calls is not None and (call := calls.search(said)):
            spans.append(("tool_calls", begin + call.start(), end))
        learned = example.learned
        for name, start, stop in spans:
            first, last = (int(np.searchsorted(example.starts, at)) for at in (start, stop))
            # Leave out the marks that end the call or the turn.
            ids = example.ids[first:last]
            own = np.flatnonzero(~(audit.vocabulary.is_control(ids) | audit.vocabulary.is_blank(ids)))
            last = first + int(own[-1]) + 1 if own.size else first
            trained = int(learned[first:last].sum())
            self.tokens[name] += last - first
            self.trained[name] += int(example.trained[first:last].sum())
            others = learned[turn.start : first].any() or learned[last : turn.stop].any()
            if not trained and others and last > first:
                reported = REASONING if name == "reasoning" else CALL
                audit.report(reported, example, (first, last))

    def facts(self) -> dict[str, dict[str, int]]:
        """Return the counts."""
        return {name: {"tokens": count, "trained": self.trained[name]} for name, count in self.tokens.items()}


def _patterns(audit: Audit) -> tuple[re.Pattern[bytes], re.Pattern[bytes] | None]:
    vocabulary, shape = audit.vocabulary, audit.shape
    assert vocabulary is not None
    opens, closes = (re.escape(vocabulary.marked(mark)) for mark in shape.thoughts)
    # Where the generation prompt opens the reasoning, the answer begins inside it.
    thoughts = re.compile(rb"(?:%s|\A)(?P<thought>(?:(?!%s).)*?)%s" % (opens, opens, closes), re.DOTALL)
    calls = [re.escape(vocabulary.marked(mark)) for mark in shape.calls]
    return thoughts, re.compile(b"|".join(calls)) if calls else None
