"""The text of single tokens, and how text from a dataset is made safe to look at."""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|&~$])")
_JOINERS = "\u200c\u200d"  # shape letters and emoji, and cannot reorder or hide text


def visible(text: str, newline: str = "⏎\n") -> str:
    """`text` with what a terminal would obey, or not draw, spelled out.

    A newline becomes `newline`; every other control, format, private or unassigned character its Python escape.
    """
    named = {"\n": newline, "\t": "⇥   "}

    def shown(c: str) -> str:
        if c in named:
            return named[c]
        unseen = unicodedata.category(c) in _UNSEEN and c not in _JOINERS
        return c.encode("unicode_escape").decode() if unseen else c

    return "".join(map(shown, text))


def markdown(value: object) -> str:
    """Text for a line or a table cell of Markdown, where nothing of it is markup, HTML or a formula."""
    return _MARKDOWN.sub(r"\\\1", visible(str(value), newline=" "))


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, the text of the whole.

    A character spread over several tokens stands at the token that completes it, and the earlier ones add
    nothing. Bytes that never make a character become U+FFFD, at the token after them.
    """

    def decode(some: Sequence[int]) -> str:
        text = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    texts: list[str] = []
    start, done = 0, 0  # ids[start:done] are decoded, and give the next ones their left context
    for i in range(len(ids)):
        before, now = decode(ids[start:done]), decode(ids[start : i + 1])
        unfinished = now.endswith("\ufffd") and i + 1 < len(ids)
        texts.append("" if unfinished else now[len(before) :])
        if not unfinished:
            start, done = done, i + 1
    return texts
