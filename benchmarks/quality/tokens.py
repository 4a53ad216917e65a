"""Examples as tokens, each response token with the noise that it belongs to and the class that it is of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.planting import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "content"
END = "end"
"""The token that ends the turn."""
CLASSES = ("result", "number", "word", "other", END)
"""Classes of clean tokens: digits of the final result, other digits, words, punctuation and spaces, the end."""


@dataclass(frozen=True)
class Encoded:
    """One example."""

    ids: NDArray[np.int64]
    """[T], prompt and response."""
    start: int
    """The first response token."""
    kinds: NDArray[np.str_]
    """[n], of each response token: a kind of noise, `content`, or `end`."""
    classes: NDArray[np.str_]
    """[n], of each response token: one of `CLASSES`."""

    @property
    def num_response(self) -> int:
        """n."""
        return len(self.kinds)


def encode(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Example], max_length: int
) -> list[Encoded]:
    """Tokens of each example; those longer than `max_length` are cut at its end."""
    return [_encode(tokenizer, example, max_length) for example in examples]


def encode_plain(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int
) -> list[Encoded]:
    """Texts without a prompt: all tokens but the first are counted, as class `word`."""
    found = []
    for text in texts:
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"][:max_length], dtype=np.int64)
        num = len(ids) - 1
        found.append(Encoded(ids, 1, np.full(num, CONTENT, dtype="U16"), np.full(num, "word", dtype="U8")))
    return found


def prompt_text(tokenizer: "PreTrainedTokenizerBase", question: str) -> str:
    """The chat template's text up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def end_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The token that the chat template ends a turn with."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ANSWER"}], tokenize=False
    )
    return re.match(r"\s*(<[^>]+>)", text.split("ANSWER", 1)[1]).group(1)  # type: ignore[union-attr]


def _encode(tokenizer: "PreTrainedTokenizerBase", example: Example, max_length: int) -> Encoded:
    prompt = prompt_text(tokenizer, example.row.question)
    answer = example.answer
    given = tokenizer(
        prompt + answer + end_token(tokenizer), add_special_tokens=False, return_offsets_mapping=True
    )
    offsets = [(a - len(prompt), b - len(prompt)) for a, b in given["offset_mapping"]]
    start = next(i for i, (a, _) in enumerate(offsets) if a >= 0)
    noise = np.full(len(answer) + 1, CONTENT, dtype="U16")
    for span in example.spans:
        noise[span.start : span.end] = span.kind
    result_at = answer.rfind(example.row.result) if example.row.result else -1
    result = range(result_at, result_at + len(example.row.result)) if result_at >= 0 else range(0)
    kinds, classes = [], []
    for a, b in offsets[start:max_length]:
        text = answer[a:b]
        if a >= len(answer):
            kinds.append(END)
            classes.append(END)
            continue
        at = a + (len(text) - len(text.lstrip()) if text.strip() else 0)
        kinds.append(str(noise[at]))
        digit, word = any(c.isdigit() for c in text), any(c.isalpha() for c in text)
        plain = "number" if digit else "word" if word else "other"
        classes.append("result" if at in result and (digit or word) else plain)
    ids = np.array(given["input_ids"][:max_length], dtype=np.int64)
    return Encoded(ids, start, np.array(kinds, dtype="U16"), np.array(classes, dtype="U8"))
