"""Texts and classes of tokens by id, for statistics over millions of tokens."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import BoolArray, IntArray
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.token_text import Decoder, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASSES = ("special", "white space", "number", "word", "punctuation")
"""Token classes by the token's text: a number has a digit, a word has a letter and no digit."""
ALL_CLASSES = ("word", "number", "punctuation", "code", "white space", "end of turn", "special")
"""`CLASSES` and those that depend on the token's place: inside a code fence, at the end of a turn."""
_FENCES = ("```", "~~~")
_FENCE_LENGTH = 3


def class_of(text: str) -> str:
    """Return the class of a token that is not special, by its text."""
    if not text.strip():
        return "white space"
    if any(c.isdigit() for c in text):
        return "number"
    return "word" if any(c.isalpha() for c in text) else "punctuation"


@dataclass(frozen=True)
class TokenClasses:
    """The text and class of each token of a tokenizer, in arrays indexed by id."""

    folder: Path
    """The tokenizer's folder."""

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The loaded tokenizer."""
        return load_tokenizer(str(self.folder))

    @cached_property
    def decoder(self) -> Decoder:
        """Its decoder."""
        return Decoder(self.tokenizer)

    @cached_property
    def texts(self) -> list[str]:
        """[V]: the text of each token after others; "" for an id without a token."""
        ids = sorted(set(self.tokenizer.get_vocab().values()))
        texts = [""] * (ids[-1] + 1 if ids else 0)
        for i in ids:
            texts[i] = self.decoder.text([i])
        return texts

    @cached_property
    def special(self) -> BoolArray:
        """[V]: whether a token is special."""
        found = np.zeros(len(self.texts), dtype=bool)
        found[[i for i in special_ids(self.tokenizer) if i < found.size]] = True
        return found

    @cached_property
    def classes(self) -> NDArray[np.int8]:
        """[V]: index into `ALL_CLASSES`, by the token's text."""
        names = [class_of(text) for text in self.texts]
        found = np.array([ALL_CLASSES.index(name) for name in names], dtype=np.int8)
        found[self.special] = ALL_CLASSES.index("special")
        return found

    @cached_property
    def _is_fence(self) -> BoolArray:
        return np.array([text.strip().startswith(_FENCES) for text in self.texts], dtype=bool)

    @cached_property
    def _ticks(self) -> NDArray[np.int8]:
        """[V]: how many backticks or tildes a token is, 0 where it is more or a fence by itself."""
        found = [len(text.strip()) if text.strip() in ("`", "``", "~", "~~") else 0 for text in self.texts]
        return np.array(found, dtype=np.int8)

    def _fences(self, known: IntArray) -> tuple[BoolArray, BoolArray]:
        """Return which of N tokens begin a code fence, and which belong to one: some tokenizers split it up."""
        begins = self._is_fence[known]
        ticks = self._ticks[known]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ticks > 0, [0]]).astype(np.int8)))
        starts, stops = edges[::2], edges[1::2]
        total = np.concatenate([[0], np.cumsum(ticks, dtype=np.int64)])
        split = total[stops] - total[starts] >= _FENCE_LENGTH
        steps = np.zeros(len(known) + 1, dtype=np.int8)
        steps[starts[split]], steps[stops[split]] = 1, -1
        inside = np.cumsum(steps[:-1]) > 0
        belongs = begins | inside
        begins[starts[split]] = True
        return begins, belongs

    def is_special(self, ids: NDArray[np.int32]) -> BoolArray:
        """Return whether each token is special, [N]."""
        return self.special[np.minimum(ids, self.special.size - 1)]

    def classify(self, ids: NDArray[np.int32], turns: IntArray) -> NDArray[np.int8]:
        """Return the classes of N response tokens by text and place, as indices into `ALL_CLASSES`, [N].

        `turns` tells where each turn starts, [U + 1].
        """
        known = np.minimum(ids, len(self.texts) - 1)
        found = self.classes[known].copy()
        if not ids.size:
            return found
        lengths = np.diff(turns)
        turn_of = np.repeat(np.arange(lengths.size), lengths)
        begins, fences = self._fences(known)
        opened = np.cumsum(begins)
        before = np.concatenate([[0], opened])[turns[:-1]]
        inside = (opened - before[turn_of]) % 2 == 1
        special = self.is_special(ids)
        found[(inside | fences) & ~special] = ALL_CLASSES.index("code")
        found[_ends(special, turns)] = ALL_CLASSES.index("end of turn")
        return found


def _ends(special: BoolArray, turns: IntArray) -> BoolArray:
    """Return which tokens end a turn, [N]: its last token, or the one before, if special."""
    ends = np.zeros(special.size, dtype=bool)
    starts, lasts = turns[:-1][np.diff(turns) > 0], turns[1:][np.diff(turns) > 0] - 1
    ends[lasts[special[lasts]]] = True
    earlier = lasts - 1
    with_newline = ~special[lasts] & (earlier >= starts)
    earlier = earlier[with_newline]
    ends[earlier[special[earlier]]] = True
    return ends
