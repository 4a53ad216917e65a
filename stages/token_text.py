"""The text of single tokens, which of them are special, and escaping of untrusted text for display."""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|&~$])")
_JOINERS = "\u200c\u200d"  # these shape letters and emoji, and cannot reorder or hide text


def visible(text: str, newline: str = "⏎\n") -> str:
    """Escape characters that a terminal would interpret or not draw.

    A newline becomes `newline`; any other control, format, private or unassigned character its Python escape.
    """
    named = {"\n": newline, "\t": "⇥   "}

    def shown(c: str) -> str:
        if c in named:
            return named[c]
        unseen = unicodedata.category(c) in _UNSEEN and c not in _JOINERS
        return c.encode("unicode_escape").decode() if unseen else c

    return "".join(map(shown, text))


def markdown(value: object) -> str:
    """Escape text for a line or table cell of Markdown: no markup, HTML or formula remains."""
    return _MARKDOWN.sub(r"\\\1", visible(str(value), newline=" "))


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of special tokens, including added ones."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


class Decoder:
    """Decodes tokens as they read after others: some tokenizers drop the first space of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._skipped = len(_decode(tokenizer, self._before))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of consecutive tokens."""
        return _decode(self._tokenizer, [*self._before, *ids])[self._skipped :]


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; joined, they give the decoded text.

    A character spread over several tokens appears at the token that completes it, and the earlier ones add nothing.
    Bytes that never form a character become U+FFFD at the token after them.
    """
    texts: list[str] = []
    start, done = 0, 0  # ids[start:done] are decoded and serve as left context for the next
    for i in range(len(ids)):
        before, now = _decode(tokenizer, ids[start:done]), _decode(tokenizer, ids[start : i + 1])
        unfinished = now.endswith("\ufffd") and i + 1 < len(ids)
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            start, done = done, i + 1
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
