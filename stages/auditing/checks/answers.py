"""Compare answers with each other and with their prompts. Findings are notes: repetition may be intended.

Near duplicates are found by MinHash (Broder, 1997): two answers are alike if 26 of their 32 signature values agree,
which estimates the Jaccard similarity of their token trigrams. To bound memory, only the first `MOST_ANSWERS` answers
are compared.
"""

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import IntArray
from sstoken.stages.auditing.examples import Example, Turn
from sstoken.stages.auditing.findings import Audit, Family
from sstoken.stages.auditing.vocabulary import CONTROL, shown

FAMILY = Family("answers")
ROWS = FAMILY.note(
    "duplicate-rows", "rows that are copies of an earlier row", "drop the copies, unless they are intended"
)
SAME = FAMILY.note(
    "duplicate-answers",
    "rows with an answer that an earlier row has word for word",
    "check that they are intended",
)
NEAR = FAMILY.note(
    "near-duplicate-answers",
    "rows with an answer that is nearly that of an earlier row",
    "check that they are intended",
)
ONE_TOKEN = FAMILY.note(
    "one-token-answers",
    "rows with an answer of one token, besides the token that ends it",
    "check that they are intended",
    "tokenizer",
)
SCRIPT = FAMILY.note(
    "answers-in-another-script",
    "rows with an answer in another script than its prompt",
    "check that they are intended",
    "template",
)
MOST_ANSWERS = 500_000
LONG_ENOUGH = 12
"""Fewest tokens of an answer that is compared: short answers are naturally alike."""
_HASHES, _BANDS = 32, 8
_ALIKE = 26
"""Fewest signature values, of `_HASHES`, that agree in near duplicates: four fifths."""
_HEAD = 24
"""Leading tokens of an answer to keep for display."""
_BUFFER = 1 << 18
_LETTERS = 8
"""Fewest letters for which a text's script is determined."""


@dataclass
class Answers:
    """Counts over the dataset."""

    compared: int = 0
    left_out: int = 0
    _rows: set[bytes] = field(default_factory=set)
    _seen: set[bytes] = field(default_factory=set)
    _buffer: list[IntArray] = field(default_factory=list)
    _buffered: int = 0
    _signatures: list[NDArray[np.uint32]] = field(default_factory=list)
    _heads: list[NDArray[np.int32]] = field(default_factory=list)
    _numbers: list[int] = field(default_factory=list)

    def add_row(self, ids: IntArray, example: Example, audit: Audit) -> None:
        """Count a row; `ids` are all of it."""
        if len(self._rows) >= MOST_ANSWERS:
            return
        digest = _digest(ids)
        if digest in self._rows:
            audit.report(ROWS, example)
        self._rows.add(digest)

    def check(self, example: Example, audit: Audit) -> None:
        """Check each answer."""
        for turn in example.answers:
            said = self._said(example, turn, audit)
            if not said.size or _calls_a_tool(example, turn, audit):
                continue  # calls are naturally alike
            if audit.vocabulary is not None and said.size == 1:
                audit.report(ONE_TOKEN, example, turn.start)
            if example.turns and audit.vocabulary is not None:
                _check_script(example, turn, audit)
            if said.size >= LONG_ENOUGH:
                self._compare(said, example, turn, audit)

    @staticmethod
    def _said(example: Example, turn: Turn, audit: Audit) -> IntArray:
        """Return an answer's tokens without special tokens and whitespace."""
        ids = example.ids[turn.start : turn.stop][example.learned[turn.start : turn.stop]]
        vocabulary = audit.vocabulary
        if vocabulary is None or not ids.size:
            return ids
        return ids[~(vocabulary.is_control(ids) | vocabulary.is_blank(ids))]

    def _compare(self, said: IntArray, example: Example, turn: Turn, audit: Audit) -> None:
        if self.compared >= MOST_ANSWERS:
            self.left_out += 1
            return
        self.compared += 1
        digest = _digest(said)
        if digest in self._seen:
            if not audit.has(ROWS, example.row):
                audit.report(SAME, example, (turn.start, turn.stop))
            return
        self._seen.add(digest)
        self._numbers.append(example.row)
        self._heads.append(example.ids[turn.start : turn.stop][:_HEAD].astype(np.int32))
        self._buffer.append(said)
        self._buffered += said.size
        if self._buffered >= _BUFFER:
            self._sign()

    def _sign(self) -> None:
        if self._buffer:
            self._signatures.append(signatures(self._buffer))
        self._buffer, self._buffered = [], 0

    def finish(self, audit: Audit) -> None:
        """Report near duplicates."""
        self._sign()
        if not self._signatures:
            return
        like = near_duplicates(np.concatenate(self._signatures))
        copies = np.flatnonzero(like >= 0)
        rows = np.array(self._numbers)
        copies = copies[rows[copies] != rows[like[copies]]]
        if not copies.size:
            return
        first = int(copies[0])
        row = int(rows[first])
        example = audit.excerpt(f"row {row}", row, self._heads[first].tolist(), trained=True)
        detail = f"its answer is nearly that of row {int(rows[like[first]])}"
        audit.report_count(NEAR, int(np.unique(rows[copies]).size), example, detail)

    def facts(self) -> dict[str, Any]:
        """Return how many answers were compared."""
        return {"answers_compared": self.compared, "answers_not_compared": self.left_out}


def _calls_a_tool(example: Example, turn: Turn, audit: Audit) -> bool:
    if audit.vocabulary is None or not audit.shape.calls:
        return False
    said = example.text[int(example.starts[turn.start]) : int(example.starts[turn.stop])]
    return any(audit.vocabulary.marked(mark) in said for mark in audit.shape.calls)


def signatures(answers: list[IntArray]) -> NDArray[np.uint32]:
    """Return MinHash signatures of A answers, [A, 32], by their token trigrams; each has at least three tokens."""
    lengths = np.array([len(a) for a in answers])
    ids = np.concatenate(answers).astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mix(ids)
        triples = _mix(mixed[:-2] + np.uint64(3) * _mix(mixed[1:-1]) + np.uint64(7) * mixed[2:])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # The last two trigrams of an answer would reach into the next one: repeat its last own trigram instead.
    place = np.arange(len(triples))
    end = np.repeat(starts + lengths - 3, lengths)[: len(triples)]
    triples = triples[np.minimum(place, end)]
    found = np.empty((len(answers), _HASHES), np.uint32)
    with np.errstate(over="ignore"):
        for column, (a, b) in enumerate(zip(_FACTORS[0], _FACTORS[1], strict=True)):
            found[:, column] = np.minimum.reduceat((triples * a + b) >> np.uint64(32), starts).astype(
                np.uint32
            )
    return found


def near_duplicates(signed: NDArray[np.uint32]) -> IntArray:
    """Return for each of A signatures the index of an earlier one that is alike, or -1."""
    like = np.full(len(signed), -1, np.int64)
    width = _HASHES // _BANDS
    for band in range(_BANDS):
        part = signed[:, band * width : (band + 1) * width].astype(np.uint64)
        key = np.zeros(len(signed), np.uint64)
        with np.errstate(over="ignore"):
            for column in part.T:
                key = _mix(key * np.uint64(31) + column)
        order = np.argsort(key, kind="stable")
        new = np.concatenate([[True], key[order][1:] != key[order][:-1]])
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        alike = (signed[order] == signed[first]).sum(axis=1) >= _ALIKE
        found = alike & (first < order) & (like[order] < 0)
        like[order[found]] = first[found]
    return like


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_FACTORS = np.random.default_rng(0).integers(1, 2**63, (2, _HASHES), dtype=np.uint64) | np.uint64(1)


def _digest(ids: IntArray) -> bytes:
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=8).digest()


def _check_script(example: Example, turn: Turn, audit: Audit) -> None:
    before = next((t for t in reversed(example.turns) if t.stop <= turn.header and t.role == "user"), None)
    if before is None:
        return
    asked, said = (
        example.text[int(example.starts[t.start]) : int(example.starts[t.stop])] for t in (before, turn)
    )
    if (asked + said).replace(CONTROL, b"").isascii():
        return
    scripts = script(shown(asked)), script(shown(said))
    if None not in scripts and scripts[0] != scripts[1]:
        detail = f"the prompt is in {scripts[0]}, the answer in {scripts[1]}"
        audit.report(SCRIPT, example, (turn.start, turn.start + 8), detail)


def script(text: str) -> str | None:
    """Return the script that most letters of a text belong to, by their Unicode names; None for too few letters."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        name = _script_of(character)
        if name:
            counts[name] += count
    if sum(counts.values()) < _LETTERS:
        return None
    return counts.most_common(1)[0][0]


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").split()
    if not name:
        return ""
    return {"CJK": "Han", "HIRAGANA": "Han", "KATAKANA": "Han", "FULLWIDTH": "Latin"}.get(
        name[0], name[0].capitalize()
    )
