"""A tokenizer's ids: their text, and which of them are special, blank or stop generation."""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import BoolArray, IntArray
from sstoken.stages.encoding.chat import control_tokens
from sstoken.stages.token_text import byte_of_character

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL = b"\xfe"
"""Precedes a special token in the bytes of a row, to tell it from text that looks like one. Never occurs in UTF-8."""


class Vocabulary:
    """The ids of one tokenizer.

    `stops` are tokens that stop generation, besides EOS; `size` is that of the model's embedding, if it is known.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str] = (), size: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = sorted(filter(str.strip, control_tokens(tokenizer)), key=lambda t: (-len(t), t))
        vocabulary = tokenizer.get_vocab()
        self.size = max(len(tokenizer), max(vocabulary.values(), default=0) + 1, size or 0)
        self.ids = {token: vocabulary[token] for token in self.control_tokens if token in vocabulary}
        self.stops = {i for t in (str(tokenizer.eos_token), *stops) if (i := vocabulary.get(t)) is not None}
        self.bos: int | None = tokenizer.bos_token_id
        self.pad: int | None = tokenizer.pad_token_id
        self.unknown: int | None = tokenizer.unk_token_id

    @property
    def pads_apart(self) -> bool:
        """Whether padding has a token of its own, which neither ends turns nor begins documents."""
        return self.pad is not None and self.pad not in {*self.stops, self.bos, self.unknown}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with BOS."""
        return self.bos is not None and self.tokenizer("a", verbose=False)["input_ids"][:1] == [self.bos]

    def is_control(self, ids: IntArray) -> BoolArray:
        """Return which ids are special tokens."""
        return self._control.take(np.add(ids, 1), mode="clip")

    def is_stop(self, ids: IntArray) -> BoolArray:
        """Return which ids stop generation."""
        return self._stop.take(np.add(ids, 1), mode="clip")

    def is_blank(self, ids: IntArray) -> BoolArray:
        """Return which ids are whitespace."""
        return self._blank.take(np.add(ids, 1), mode="clip")

    def bytes_of(self, ids: IntArray) -> tuple[bytes, NDArray[np.int64]]:
        """Return the text of T tokens as UTF-8 with `CONTROL` marks, and where each token starts in it, [T + 1]."""
        places = np.where((ids >= 0) & (ids < self.size), ids, self.size)
        starts = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(self._lengths[places], out=starts[1:])
        return b"".join([self._pieces[i] for i in places.tolist()]), starts

    def marked(self, text: str) -> bytes:
        """Return text in the form of `bytes_of`."""
        parts = self.split(text)
        return b"".join(CONTROL * (part in self.ids) + part.encode() for part in parts)

    def split(self, text: str) -> list[str]:
        """Split text at special tokens, each of which becomes a part of its own."""
        if not self.control_tokens:
            return [text] if text else []
        parts = re.split(f"({'|'.join(map(re.escape, self.control_tokens))})", text)
        return [part for part in parts if part]

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each id, [size + 1]; the last entry is for ids outside the vocabulary."""
        tokens: list[str] = ["?"] * self.size
        for token, i in self.tokenizer.get_vocab().items():
            tokens[i] = token
        added = {i: str(token).encode() for i, token in self.tokenizer.added_tokens_decoder.items()}
        control = set(self.ids.values())
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = str(getattr(backend, "decoder", None))
        plain = _byte_level() if "ByteLevel" in decoder else _sentencepiece if "▁" in decoder else _word
        pieces = []
        for i, token in enumerate(tokens):
            pieces.append(CONTROL + token.encode() if i in control else added.get(i) or plain(token))
        return [*pieces, b"?"]

    # Whether an id is special, stops or is blank, for -1 to `size`: ids outside are clipped to its ends, and are none.

    @cached_property
    def _control(self) -> BoolArray:
        return np.isin(np.arange(-1, self.size + 1), list(self.ids.values()))

    @cached_property
    def _stop(self) -> BoolArray:
        return np.isin(np.arange(-1, self.size + 1), list(self.stops))

    @cached_property
    def _blank(self) -> BoolArray:
        return np.array([False, *(not piece.strip() for piece in self._pieces)], bool)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.array([len(piece) for piece in self._pieces], np.int64)


def shown(text: bytes) -> str:
    """Return bytes of `Vocabulary.bytes_of` as text."""
    return text.replace(CONTROL, b"").decode(errors="replace")


def _byte_level() -> Callable[[str], bytes]:
    byte_of = byte_of_character()
    return lambda token: bytes(byte_of.get(c, 0x3F) for c in token)


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode(errors="replace")


def _word(token: str) -> bytes:
    """Decode a WordPiece token: a word with a space before it, or the continuation of one."""
    return token.removeprefix("##").encode() if token.startswith("##") else b" " + token.encode()


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
