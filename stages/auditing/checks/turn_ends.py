"""Check that the token that ends each answer is present, trained, and not doubled."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from sstoken.selection import IntArray
from sstoken.stages.auditing.checks.labels import SHIFTED_MASK
from sstoken.stages.auditing.examples import Example, Turn
from sstoken.stages.auditing.findings import Audit, Family, Shown

FAMILY = Family("turn ends", "tokenizer")
NOT_TRAINED = FAMILY.error(
    "end-not-trained",
    "rows with an answer whose end token is not trained: the model does not learn to stop",
    "train the token that ends the turn, also where it opens the next one (as in GLM-4)",
)
MISSING = FAMILY.error(
    "end-missing",
    "rows with an answer that no end token follows: the model does not learn to stop",
    "add the end token after each answer ({{ eos_token }} in the chat template)",
)
TRUNCATED = FAMILY.warning(
    "answer-truncated",
    "rows of the greatest length whose last answer has no end: they were cut",
    "tokenize with a larger maximum length, or drop these rows",
)
DOUBLED = FAMILY.error(
    "end-doubled",
    "rows with an answer that ends in the same token twice, both trained",
    "add the end token once: the template has it already, or the tokenizer adds it",
)
INSIDE = FAMILY.error(
    "end-inside",
    "rows that train a token that stops generation in the middle of an answer",
    "remove it from the text of the answer",
)
NOT_A_STOP = FAMILY.warning(
    "end-not-a-stop-token",
    "rows whose last answer ends with a token that does not stop generation",
    "name it in eos_token_id of generation_config.json, or set the tokenizer's eos_token to it",
    "template",
)
NO_NEXT = FAMILY.warning(
    "end-in-next-header-alone",
    "rows whose last answer has no end: the chat template puts it into the header of the next turn, and no row has one",
    "use a template that also prints it after the last answer, or add rows of several turns",
    "template",
)
DROPPED = FAMILY.warning(
    "turn-ends-dropped",
    "rows of a selection that drops the end of a turn, as it does for most turns",
    "keep them: select with --protect end_of_turn",
)


@dataclass
class TurnEnds:
    """Counts over the dataset. Whether an open end means truncation is only known once all rows are read."""

    max_length: int | None = None
    """Length in tokens at which the rows were cut; None if not known."""
    turns: int = 0
    trained: int = 0
    not_trained: int = 0
    missing: int = 0
    dropped: int = 0
    """End tokens that are in the response but not in the selection."""
    opened_next: int = 0
    """Answers that end with a trained token of the next turn's header."""
    closed_rows: int = 0
    """Rows that end with the trained token that ends their last answer."""
    open_rows: Counter[int] = field(default_factory=Counter)
    """Rows whose last answer has no end, by their length."""
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Rows by their length without padding."""
    _first: dict[str, Shown] = field(default_factory=dict)

    def check(self, example: Example, audit: Audit) -> None:
        """Check the end of each answer."""
        row_length = _shown_length(example, audit)
        if example.whole:
            self.longest = max(self.longest, row_length)
            self.lengths[row_length] += 1
        if audit.vocabulary is None or (example.selected and example.response is None):
            return
        if example.whole and example.learned[1:].all():
            return  # everything is trained: `labels` reports it
        if audit.has(SHIFTED_MASK, example.row):
            return
        for turn in example.answers:
            self._check(example, turn, audit, row_length)

    def _check(self, example: Example, turn: Turn, audit: Audit, row_length: int) -> None:
        vocabulary = audit.vocabulary
        assert vocabulary is not None
        ids, learned, closers = example.ids, example.learned, audit.shape.closers or vocabulary.stops
        limit = example.end(turn, closers, vocabulary)
        own = np.flatnonzero(learned[turn.header : limit]) + turn.header
        own = own[~vocabulary.is_blank(ids[own])]
        if vocabulary.pad not in closers:
            own = own[ids[own] != vocabulary.pad]
        if not own.size:
            return
        self.turns += 1
        last = int(own[-1])
        self._check_inside(example, turn, last, audit)
        if int(ids[last]) in closers or last >= turn.stop:
            self.trained += 1
            self.opened_next += last >= turn.stop
            self._check_once(example, own, audit)
            if example.selected and not example.trained[last]:
                self.dropped += 1
                audit.report(DROPPED, example, last)
            final = turn is example.answers[-1] and limit >= row_length
            self.closed_rows += final
            if final and int(ids[last]) in audit.shape.last_closers - vocabulary.stops:
                audit.report(NOT_A_STOP, example, last)
            return
        visible = example.visible
        end = next((i for i in range(last + 1, limit) if int(ids[i]) in closers and visible[i]), None)
        if end is not None:
            self.not_trained += 1
            audit.report(NOT_TRAINED, example, end)
            return
        self.missing += 1
        if limit >= row_length:
            if not example.whole:
                return  # packing cuts its last document
            self.open_rows[row_length] += 1
            if "open" not in self._first:
                self._first["open"] = audit.show(example, last)
            if row_length == self.longest:
                self._first["longest"] = audit.show(example, last)
        else:
            audit.report(MISSING, example, last)

    def _check_once(self, example: Example, own: IntArray, audit: Audit) -> None:
        ids = example.ids[own]
        same = 1
        while same < len(ids) and ids[-1 - same] == ids[-1]:
            same += 1
        if same == 2:
            audit.report(DOUBLED, example, (int(own[-2]), int(own[-1]) + 1))

    def _check_inside(self, example: Example, turn: Turn, last: int, audit: Audit) -> None:
        vocabulary = audit.vocabulary
        assert vocabulary is not None
        ids = example.ids
        stops = vocabulary.is_stop(ids[turn.start : last])
        for position in np.flatnonzero(stops & example.learned[turn.start : last]) + turn.start:
            rest = ids[position + 1 : last]
            rest = rest[~vocabulary.is_blank(rest)]
            if rest.size and not vocabulary.is_control(rest[0]):
                audit.report(INSIDE, example, int(position))

    def finish(self, audit: Audit) -> None:
        """Report what depends on the whole dataset."""
        if 2 * self.dropped <= self.turns:
            audit.withdraw(DROPPED)
        if audit.shape.in_next_header and not self.closed_rows:
            # The last answer of a row has no next turn; the others may teach the end.
            if not self.opened_next and not self.not_trained:
                audit.report_count(NO_NEXT, self.open_rows.total(), self._first.get("open"))
            return
        cut = self._cut()
        audit.report_count(TRUNCATED, cut, self._first.get("longest"))
        if MISSING not in audit:
            audit.report_count(MISSING, self.open_rows.total() - cut, self._first.get("open"))

    def _cut(self) -> int:
        """Return how many open rows were cut at a maximum length: those of the greatest length, if it is a limit."""
        at_most = self.open_rows.get(self.longest, 0)
        shorter = sum(count for length, count in self.lengths.items() if length < self.longest)
        ended = shorter - (self.open_rows.total() - at_most)
        is_limit = self.longest == self.max_length or self.longest % 64 == 0 or at_most > 1
        return at_most if is_limit and 2 * ended >= shorter else 0

    def facts(self) -> dict[str, int]:
        """Return the counts."""
        return {
            "turns": self.turns,
            "end_trained": self.trained - self.dropped,
            "end_not_trained": self.not_trained + self.dropped,
            "end_missing": self.missing,
        }


def _shown_length(example: Example, audit: Audit) -> int:
    """Return the length of an example without the padding after it."""
    shown = example.visible.copy()
    vocabulary = audit.vocabulary
    if vocabulary is not None and vocabulary.pads_apart:
        shown &= example.ids != vocabulary.pad
    places = np.flatnonzero(shown)
    return int(places[-1]) + 1 if places.size else 0
