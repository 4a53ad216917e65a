"""Find the padding of a row without an attention mask."""

import numpy as np

from sstoken.selection import BoolArray, IntArray
from sstoken.stages.auditing.shape import Shape
from sstoken.stages.auditing.vocabulary import Vocabulary

_RUN = 3
"""Fewest copies of an end token that count as padding, not as a doubled end."""


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
    inside = ids[(ids >= 0) & (ids < vocabulary.size)][-4:]
    words = inside[~vocabulary.is_blank[inside]]
    return shape.known and bool(words.size) and int(words[-1]) in (shape.last_closers or shape.closers)


def _run(ids: IntArray, token: int) -> int:
    """Return the number of copies of a token at the start."""
    others = np.flatnonzero(ids != token)
    return int(others[0]) if others.size else len(ids)
