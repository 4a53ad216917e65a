"""The text of response tokens: its words and sentences, and the tokens that `protect` keeps."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import UsageError
from sstoken.selection import BoolArray, IntArray
from sstoken.stages import folders, storage
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.token_text import Decoder, special_ids, token_texts

END_OF_TURN = "end_of_turn"
_PATTERNS = {
    "tool_calls": (
        r"<tool_call>.*?(?:</tool_call>|\Z)",
        r"<function_call>.*?(?:</function_call>|\Z)",
        r"<function=.*?(?:</function>|\Z)",
        r"\[TOOL_CALLS\].*",
        r"<\|python_tag\|>.*",
        r"<\|action_start\|>.*?(?:<\|action_end\|>|\Z)",
        r"<\|tool_calls_section_begin\|>.*?(?:<\|tool_calls_section_end\|>|\Z)",
        r"<｜tool▁calls▁begin｜>.*?(?:<｜tool▁calls▁end｜>|\Z)",
        r"\A\s*\{\s*\"(?:name|function)\"\s*:.*\"(?:arguments|parameters)\"\s*:.*\}",
    ),
    "code": (r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)",),
}
"""Patterns, in the text of a turn, of what `protect` knows by name."""
_REGEX = "regex:"
_UNKNOWN = "\ufffd"


def check_protect(names: Sequence[str]) -> None:
    """Refuse values that `protect` does not know.

    Raises:
        UsageError: lists the legal values, or says what is wrong with a regular expression.
    """
    for name in names:
        if name.startswith(_REGEX):
            try:
                re.compile(name.removeprefix(_REGEX))
            except re.error as error:
                raise UsageError(
                    f"protect is {name!r}, not a regular expression in Python's syntax ({error})"
                ) from None
        elif name not in (END_OF_TURN, *_PATTERNS):
            raise UsageError(
                f"protect is {name!r}; legal is {END_OF_TURN}, {', '.join(_PATTERNS)} or {_REGEX}PATTERN"
            )


@dataclass(frozen=True)
class ResponseText:
    """The response tokens of some turns, one after the other."""

    ids: NDArray[np.int32]
    """[N]"""
    turns: IntArray
    """[U + 1], where each turn starts."""
    tokenizer: Path
    cut: BoolArray | None = None
    """[U]: whether a turn ends where its example was truncated; None: none does."""

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each token; joined, the text of the turns."""
        loaded = _loaded(self.tokenizer)
        found = [loaded.text(int(i)) for i in self.ids]
        for a, b in zip(self.turns[:-1], self.turns[1:], strict=True):
            if any(_UNKNOWN in piece for piece in found[a:b]):  # a character spans several tokens
                found[a:b] = token_texts(loaded.tokenizer, self.ids[a:b].tolist())
        return found

    @property
    def quick(self) -> bool:
        """Whether the tokenizer can be read without transformers, in well under a second."""
        return (self.tokenizer / "tokenizer.json").is_file()

    def where(self, test: Callable[[str], bool]) -> BoolArray:
        """Return whether each token's own text passes a test, [N]; the test is called once per id."""
        if not len(self.ids):
            return np.zeros(0, dtype=bool)
        loaded = _loaded(self.tokenizer)
        passed = np.zeros(int(self.ids.max()) + 1, dtype=bool)
        found = np.flatnonzero(np.bincount(self.ids))
        passed[found] = [test(loaded.text(int(i))) for i in found]
        return passed[self.ids]

    def spans(self, pool: str) -> IntArray:
        """Return where each word or sentence starts, [S + 1]; none crosses a turn.

        Words are separated by whitespace. A sentence ends with `.`, `!` or `?` before whitespace, with one of their
        full-width forms, or at the end of a line.
        """
        begins = np.zeros(len(self.ids), dtype=bool)
        begins[self.turns[:-1][np.diff(self.turns) > 0]] = True
        last = ""
        for i, piece in enumerate(self.pieces):
            if begins[i]:
                last = ""
            if piece and last:
                begins[i] |= _new_word(last, piece) if pool == "word" else _new_sentence(last, piece)
            if pool == "sentence" and not piece.strip() and not begins[i]:
                last += piece  # whitespace does not hide the end of a sentence before it
            else:
                last = piece or last
        return np.append(np.flatnonzero(begins), len(self.ids)).astype(np.int64)

    def protected(self, names: Sequence[str]) -> dict[str, BoolArray]:
        """Return which tokens each name protects, [N]."""
        return {
            name: self._ends() if name == END_OF_TURN else self._matching(name)
            for name in dict.fromkeys(names)
        }

    def _ends(self) -> BoolArray:
        """Return each turn's last token, and the special tokens and whitespace at its end.

        A truncated turn may have no end: its last token counts only if special.
        """
        special = _loaded(self.tokenizer).special
        ends = np.zeros(len(self.ids), dtype=bool)
        cut = np.zeros(len(self.turns) - 1, bool) if self.cut is None else self.cut
        for a, b, truncated in zip(self.turns[:-1], self.turns[1:], cut, strict=True):
            at, found = b - 1, b if truncated else b - 1
            while at >= a and (int(self.ids[at]) in special or not self.pieces[at].strip()):
                if int(self.ids[at]) in special:
                    found = at
                at -= 1
            ends[max(a, found) : b] = True
        return ends

    def _matching(self, name: str) -> BoolArray:
        given = (name.removeprefix(_REGEX),) if name.startswith(_REGEX) else _PATTERNS[name]
        flags = re.MULTILINE if name.startswith(_REGEX) else re.MULTILINE | re.DOTALL
        patterns = [re.compile(pattern, flags) for pattern in given]
        kept = np.zeros(len(self.ids), dtype=bool)
        for a, b in zip(self.turns[:-1], self.turns[1:], strict=True):
            starts = np.cumsum([0, *(len(piece) for piece in self.pieces[a:b])])
            for start, stop in _matches(patterns, "".join(self.pieces[a:b])):
                first = int(np.searchsorted(starts[1:], start, side="right"))
                end = int(np.searchsorted(starts[:-1], stop, side="left"))
                kept[a + first : a + end] = True
        return kept


def _matches(patterns: Sequence[re.Pattern[str]], text: str) -> Iterator[tuple[int, int]]:
    for pattern in patterns:
        yield from (match.span() for match in pattern.finditer(text) if match.end() > match.start())


def _new_word(last: str, piece: str) -> bool:
    if piece[0].isspace():
        return not last[-1].isspace()
    return last[-1].isspace() and bool(last.strip())


def _new_sentence(last: str, piece: str) -> bool:
    ended = last.rstrip()
    if ended.endswith(("。", "！", "？")):
        return True
    if "\n" in last:
        return bool(piece.strip())
    ended = ended.rstrip("\"')]}*_”’")
    return ended.endswith((".", "!", "?")) and (piece[0].isspace() or last[-1].isspace())


class _Core:
    """A tokenizer of the `tokenizers` library, since importing transformers takes longer than `select` itself."""

    all_special_ids: tuple[int, ...] = ()
    """The library only knows special tokens that were added."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._core = Tokenizer.from_file(str(file))
        self.added_tokens_decoder = self._core.get_added_tokens_decoder()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, **_: Any) -> str:
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special_tokens))


class _Loaded:
    """The tokenizer that made the tokens, checked against its folder's manifest."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if file.is_file():
            folders.check_file(file)
        self.tokenizer: Any = _Core(file) if file.is_file() else load_tokenizer(str(folder))
        self.special = frozenset(special_ids(self.tokenizer))
        self._decoder = Decoder(self.tokenizer)
        self._texts: dict[int, str] = {}

    def text(self, index: int) -> str:
        """Return the text of an id's token after others."""
        if index not in self._texts:
            self._texts[index] = self._decoder.text([index])
        return self._texts[index]


def _loaded(folder: Path) -> _Loaded:
    local = storage.local(folder)
    files = sorted(path for path in local.iterdir() if path.is_file())
    return _load(local, tuple((file.name, *storage.stamp(file)) for file in files))


@lru_cache(maxsize=2)
def _load(folder: Path, stamps: tuple[tuple[object, ...], ...]) -> _Loaded:
    """Load a tokenizer once a process; other `stamps` mean that its files have changed."""
    return _Loaded(folder)
