"""A row in the form that all checks use: ids, which tokens are trained, and whose turn each is in."""

import re
from collections.abc import Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import BoolArray, IntArray
from sstoken.stages.auditing.shape import Shape, pattern
from sstoken.stages.auditing.vocabulary import Vocabulary

_RUN = 3
"""Fewest copies of an end token that count as padding, not as a doubled end."""


@dataclass(frozen=True)
class Turn:
    """A turn in a row. Positions count tokens; `stop` is exclusive."""

    role: str
    """`system` (everything before the first mark), `user`, `assistant` or `tool`."""
    header: int
    """Where the text that opens the turn starts."""
    start: int
    stop: int
    shares_blank: bool = False
    """Whether the last token before `start` holds the end of the header and the blanks that the text begins with."""


@dataclass
class Example:
    """One document: a row, or part of a packed row."""

    where: str
    """As shown to the user: `data.jsonl line 12`."""
    row: int
    """Number of the row, from 0."""
    ids: IntArray
    """[T]"""
    trained: BoolArray
    """[T]"""
    name: str | None = None
    """Its `example_id`, if it has one."""
    response: BoolArray | None = None
    """[T]: the assistant's tokens, if `trained` is a selection of them; None if not known, or the same."""
    padding: BoolArray | None = None
    """[T]: tokens that the attention mask hides, or that look like padding without one; None if there are none."""
    whole: bool = True
    """Whether it is a whole row, not one document of a packed row."""
    offset: int = 0
    """Where it starts in its row."""
    selected: bool = False
    """Whether its trained tokens are a selection, whose gaps are intended."""
    turns: list[Turn] = field(default_factory=list)
    """Empty if not known."""
    text: bytes = b""
    """From `Vocabulary.bytes_of`; empty without a tokenizer."""
    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[T + 1]: where each token starts in `text`."""

    @property
    def learned(self) -> BoolArray:
        """[T]: the assistant's tokens: the trained ones, or those that a selection was taken from."""
        return self.trained if self.response is None else self.response

    @property
    def visible(self) -> BoolArray:
        """[T]: what is not padding."""
        return np.ones(len(self.ids), bool) if self.padding is None else ~self.padding

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Start and stop of each stretch of `learned`."""
        return stretches(self.learned)

    def end(self, turn: Turn, closers: Set[int], vocabulary: Vocabulary) -> int:
        """Return where a turn stops, including an end token that is the header of the next turn (as in GLM-4).

        Trained copies of that token belong to the turn too.
        """
        ids = self.ids
        if turn.role != "assistant" or turn.stop >= len(ids):
            return turn.stop
        following = int(ids[turn.stop])
        if not vocabulary.is_control(ids[turn.stop]):
            return turn.stop
        if following in closers:
            others = np.flatnonzero((ids[turn.stop + 1 :] != following) | ~self.learned[turn.stop + 1 :])
            return turn.stop + 1 + (int(others[0]) if others.size else len(ids) - turn.stop - 1)
        own = np.flatnonzero(self.learned[turn.start : turn.stop]) + turn.start
        closed = any(int(i) in closers for i in ids[own[-2:]])
        alone = self.learned[turn.stop] and not self.learned[turn.stop + 1 : turn.stop + 2].any()
        return turn.stop + 1 if own.size and own[-1] == turn.stop - 1 and alone and not closed else turn.stop

    @cached_property
    def answers(self) -> list[Turn]:
        """The assistant's turns with trained tokens; if turns are not known, each stretch of trained tokens."""
        if not self.turns:
            starts = [start for start, _ in self.runs]
            ends = [*starts[1:], len(self.ids)]
            return [Turn("assistant", a, a, b) for a, b in zip(starts, ends, strict=False)]
        return [t for t in self.turns if t.role == "assistant" and self.learned[t.header : t.stop].any()]


def stretches(mask: BoolArray) -> list[tuple[int, int]]:
    """Return start and stop of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


class Cutter:
    """Cuts rows into turns by the marks of a chat template."""

    def __init__(self, vocabulary: Vocabulary, shape: Shape) -> None:
        self._vocabulary, self._shape = vocabulary, shape
        self._pattern: re.Pattern[bytes] | None = pattern(shape, vocabulary) if shape.known else None

    def __call__(self, example: Example) -> None:
        """Fill in the text and the turns of an example."""
        example.text, example.starts = self._vocabulary.bytes_of(example.ids)
        if self._pattern is None:
            return
        found = [(match.lastgroup or "", *match.span()) for match in self._pattern.finditer(example.text)]
        if not any(role == "assistant" for role, _, _ in found):
            return
        turns: list[Turn] = []
        if found[0][1] > 0 and example.text[: found[0][1]].strip():
            turns.append(Turn("system", 0, 0, self._first_from(example, found[0][1])))
        for (role, begin, end), (_, after, _) in pairwise([*found, ("", len(example.text), 0)]):
            header, stop = self._first_from(example, begin), self._first_from(example, after)
            body, shares_blank = self._body(example, end)
            start = min(body, stop)
            if role == "assistant" and turns and turns[-1].role == role:  # one turn in several messages
                turns[-1] = replace(turns[-1], stop=stop)
            else:
                turns.append(Turn(role, header, start, stop, shares_blank))
        example.turns = turns

    def _first_from(self, example: Example, position: int) -> int:
        return int(np.searchsorted(example.starts[:-1], position))

    def _body(self, example: Example, end: int) -> tuple[int, bool]:
        """Return the first token after a header, and whether the one before it goes on with blanks of the text.

        A token across the end of the header belongs to the text unless that part of it is blank.
        """
        first = self._first_from(example, end)
        across = first > 0 and int(example.starts[first]) > end
        if across and example.text[end : example.starts[first]].strip():
            return first - 1, False
        return first, across


def find_padding(ids: IntArray, trained: BoolArray, vocabulary: Vocabulary, shape: Shape) -> BoolArray | None:
    """Return which tokens at the ends of a row are padding, [T]; None if there are none.

    A separate pad token is padding wherever the row begins or ends with it. If the tokenizer pads with a token that
    also ends turns, the first of a run at the end is the end of the turn, unless another token ended it already
    (Phi-3's template prints both).
    """
    if not ids.size:
        return None
    candidates = (vocabulary.stops | {vocabulary.pad}) - {None, vocabulary.bos}
    first, last = int(ids[0]), int(ids[-1])
    if first not in candidates and last not in candidates:
        return None
    found = np.zeros(len(ids), bool)
    if first in candidates:
        length = _run(ids, first)
        if length > 1 or (vocabulary.pads_apart and first == vocabulary.pad):
            found[:length] = True
    if last in candidates and not found.all():
        length = _run(ids[::-1], last)
        start = len(ids) - length
        told = last in shape.tail and trained[start:].any()
        if last == vocabulary.pad and (
            vocabulary.pads_apart or (not told and _is_ended(ids[:start], vocabulary, shape))
        ):
            found[start:] = True
        elif length >= _RUN or not trained[start + 1 :].any():
            found[start + 1 :] = True
    return found if found.any() else None


def _is_ended(ids: IntArray, vocabulary: Vocabulary, shape: Shape) -> bool:
    """Return whether the tokens end with an answer's end token; False without a chat template."""
    words = ids[-4:][~vocabulary.is_blank(ids[-4:])]
    return shape.known and bool(words.size) and int(words[-1]) in (shape.last_closers or shape.closers)


def _run(ids: IntArray, token: int) -> int:
    """Return the number of copies of a token at the start."""
    others = np.flatnonzero(ids != token)
    return int(others[0]) if others.size else len(ids)
