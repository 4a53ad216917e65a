"""Where the assistant's words stand in a rendered conversation, proven for any chat template.

Two proofs, tried in this order:

1. *Substitution.* Every assistant content is replaced by a sentinel; the rendered text, split at the
   sentinels, gives the constant pieces S0 .. Sk. If S0 + c1 + S1 + ... + ck + Sk is exactly the text rendered
   from the real contents c1 .. ck, the contents stand where the sentinels stood.
2. *Prefix.* A turn is what the text grows by from the generation prompt before it (messages[:i]) to the
   conversation with it (messages[:i+1]), provided both are prefixes of the whole text. This covers turns that
   say more than their content (tool calls, reasoning).

Both demand that the turn is closed by the template's end-of-turn token, which belongs to the response.
"""

import re
from collections.abc import Callable, Iterable
from itertools import count

from stages.encoding.messages import BadRow, Message, has_more_than_content

Span = tuple[int, int]
"""Start and end of a response in characters; the end is excluded."""
Fill = Callable[..., str]
"""`fill(messages, prompt=False)`: the template's text, with the generation prompt after it if asked."""

_VARIANTS: tuple[Callable[[str], str], ...] = (
    lambda content: content,
    str.strip,  # Llama 3, Gemma
    lambda content: content.lstrip("\n"),  # Qwen 3
    str.lstrip,
    str.rstrip,
    lambda content: content.strip("\n"),
)
"""What templates do to a content before they print it."""


def end_of_turn(fill: Callable[[list[Message]], str], tokens: Iterable[str]) -> str | None:
    """The token that closes an assistant turn: the first of `tokens` after its content.

    Args:
        fill: renders messages.
        tokens: the tokenizer's special and added tokens.

    Returns:
        The token, or None where the content is followed by anything else.
    """
    user, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": _sentinel(0, 0)}
    for messages in ([user, answer], [{"role": "system", "content": "hello"}, user, answer]):
        try:
            text = fill(messages)
        except BadRow:
            continue
        after = text.partition(_sentinel(0, 0))[2].lstrip()
        # The longest first: one token may be the beginning of another.
        for token in sorted(filter(str.strip, tokens), key=lambda t: (-len(t), t)):
            if after.startswith(token):
                return token
    return None


def close_spans(text: str, spans: list[Span], end: str | None) -> list[Span]:
    """Marked spans, each extended over the end-of-turn token `end` where that follows; empty ones left out."""
    closed = []
    for start, stop in spans:
        if start >= stop:
            continue
        if end is not None and not text[start:stop].rstrip().endswith(end):
            stop = _skip(text, stop, end) or stop
        closed.append((start, stop))
    return closed


def find_spans(messages: list[Message], fill: Fill, end: str) -> tuple[str, list[Span]]:
    """The rendered conversation and its responses, for a template that does not mark them.

    Args:
        messages: the conversation.
        fill: renders messages with the template.
        end: the template's end-of-turn token.

    Raises:
        BadRow: neither proof succeeds, so nobody can say for sure which tokens are the model's own.
    """
    text = fill(messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = None
    if not any(has_more_than_content(messages[i]) for i in answers):
        spans = _by_substitution(text, messages, answers, fill, end)
    if spans is None:
        spans = _by_prefix(text, messages, answers, fill, end)
    if spans is None:
        raise BadRow(
            "uncertain mask",
            "the chat template rewrites an assistant turn, or does not close it; pass a --chat-template with "
            "{% generation %} markers",
        )
    return text, spans


def _by_substitution(
    text: str, messages: list[Message], answers: list[int], fill: Fill, end: str
) -> list[Span] | None:
    """Proof 1, None where it fails."""
    salt = next(n for n in count() if _sentinel_head(n) not in text)
    sentinels = [_sentinel(salt, k) for k in range(len(answers))]
    swapped = list(messages)
    for index, sentinel in zip(answers, sentinels, strict=True):
        swapped[index] = messages[index] | {"content": sentinel}
    try:
        constant = fill(swapped)
    except BadRow:
        return None
    pattern = "|".join(sentinels)
    if re.findall(pattern, constant) != sentinels:
        return None
    pieces = re.split(pattern, constant)
    contents = [str(messages[i]["content"]) for i in answers]
    for variant in _VARIANTS:
        spans, at = [], len(pieces[0])
        shown = [variant(content) for content in contents]
        joined = pieces[0] + "".join(c + piece for c, piece in zip(shown, pieces[1:], strict=True))
        if joined != text:
            continue
        for content, piece in zip(shown, pieces[1:], strict=True):
            stop = _skip(text, at + len(content), end)
            if stop is None or stop > at + len(content) + len(piece):
                return None
            spans.append((at, stop))
            at += len(content) + len(piece)
        return spans
    return None


def _by_prefix(
    text: str, messages: list[Message], answers: list[int], fill: Fill, end: str
) -> list[Span] | None:
    """Proof 2, None where it fails."""
    spans: list[Span] = []
    for i in answers:
        try:
            before, prompt, after = (
                fill(messages[:i]),
                fill(messages[:i], prompt=True),
                fill(messages[: i + 1]),
            )
        except BadRow:
            return None
        after = after.rstrip()
        # A template without a generation prompt would have the turn's header taken for a response.
        if prompt == before or not after.startswith(prompt) or not text.startswith(after):
            return None
        if not after.endswith(end) or len(after) <= len(prompt):
            return None
        spans.append((len(prompt), len(after)))
    return spans


def _skip(text: str, at: int, end: str) -> int | None:
    """Where `end` stops if it stands at `at`, whitespace before it allowed."""
    start = at
    while start < len(text) and text[start].isspace():
        start += 1
    return start + len(end) if text.startswith(end, start) else None


def _sentinel_head(salt: int) -> str:
    return f"ANSWERx{salt}x"


def _sentinel(salt: int, number: int) -> str:
    """Letters and digits only: nothing that a template would strip, split at or escape."""
    return f"{_sentinel_head(salt)}{number}xEND"
