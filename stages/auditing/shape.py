"""Learn the marks that a chat template puts around turns, by rendering a dialogue of made-up words.

Rows of token ids are cut into turns at these marks. A row without any was made with another template; its turns are
not checked.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from sstoken.errors import SstokenError
from sstoken.stages.auditing.vocabulary import CONTROL, Vocabulary
from sstoken.stages.encoding.messages import Conversation, Message
from sstoken.stages.encoding.spans import ATOM
from sstoken.stages.encoding.templates import ChatTemplate

_ASKED, _SAID, _ASKED_MORE, _SAID_MORE = "Wqxask", "Wqxreply", "Wqxaskmore", "Wqxreplymore"
_THOUGHT, _TOOL, _KEY, _VALUE, _RESULT = "Wqxthought", "Wqxtool", "Wqxkey", "Wqxvalue", "Wqxresult"
_TAG = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\]")


@dataclass
class Shape:
    """The marks of one template, in the bytes of `Vocabulary.bytes_of`."""

    openers: dict[str, list[str]] = field(default_factory=dict)
    """The texts that open a turn, by role: user, assistant, tool, system."""
    closers: set[int] = field(default_factory=set)
    """Tokens that end an assistant turn: those that stop generation, and those that the template prints after one."""
    last_closers: set[int] = field(default_factory=set)
    """The token that the template prints after the last answer."""
    tail: frozenset[int] = frozenset()
    """All special tokens that it prints there."""
    in_next_header: bool = False
    """Whether the token that ends an answer opens the next turn; the last answer then has no end token."""
    begins_with_bos: bool = False
    bos_opens_turns: bool = False
    """Whether BOS opens turns, and so also occurs within a row."""
    thoughts: tuple[str, str] = ("<think>", "</think>")
    """Marks around reasoning."""
    calls: tuple[str, ...] = ()
    """Marks that open a tool call."""
    printed: frozenset[int] = frozenset()
    """Special tokens that the template itself prints."""

    @property
    def known(self) -> bool:
        """Whether turns can be told apart."""
        return bool(self.openers.get("user") and self.openers.get("assistant"))


def learn(template: ChatTemplate, vocabulary: Vocabulary) -> Shape:
    """Find the marks of a template; a template that refuses even a plain dialogue has none."""
    shape = Shape(closers=set(vocabulary.stops))
    probe = _Probe(template)
    dialogue = [_user(_ASKED), _says(_SAID), _user(_ASKED_MORE), _says(_SAID_MORE)]
    text = probe.text(dialogue) or probe.text([{"role": "system", "content": "Wqxsystem"}, *dialogue])
    words = (_ASKED, _SAID, _ASKED_MORE, _SAID_MORE)
    if text is None or any(word not in text for word in words):
        return shape
    before, to_answer, to_user, to_last, tail = _gaps(text, words)
    asked = _after(probe.text(dialogue[:1], prompt=True), _ASKED)
    bare = _after(probe.text(dialogue[:1]), _ASKED)
    closing_user = _prefix(asked, bare) if asked != bare else ""
    prompt = asked[len(closing_user) :]
    gaps = [to_answer, to_last, *(gap for gap in (probe.before_reasoning(), probe.before_call()) if gap)]
    shape.openers["assistant"] = list(dict.fromkeys(_answer_openers(prompt, closing_user, gaps)))
    shape.openers["user"] = _user_openers(before, to_user, tail, closing_user)
    shape.last_closers, shape.tail = _first(tail, vocabulary), frozenset(_ids_in(tail, vocabulary))
    following = _first(to_user, vocabulary)
    shape.closers |= shape.last_closers | following | _first(_prefix(to_user, tail), vocabulary)
    shape.in_next_header = bool(following) and not shape.last_closers
    if vocabulary.bos is not None:
        bos = str(vocabulary.tokenizer.bos_token)
        shape.begins_with_bos = text.startswith(bos)
        shape.bos_opens_turns = text.count(bos) > 1
    _learn_reasoning(shape, probe)
    _learn_tools(shape, probe, vocabulary)
    _learn_between(shape, probe, {"role": "system", "content": _RESULT}, _user(_ASKED_MORE))
    printed = {i for token, i in vocabulary.ids.items() if token in template.source}
    shape.printed = frozenset(printed | set(shape.closers) | _ids_in(text, vocabulary))
    if not _found_again(shape, text, vocabulary):
        shape.openers = {}
    return shape


def _found_again(shape: Shape, text: str, vocabulary: Vocabulary) -> bool:
    """Return whether the marks survive tokenization of the dialogue; some tokenizers change them."""
    if not shape.known:
        return False
    ids = vocabulary.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    said, _ = vocabulary.bytes_of(np.array(ids, np.int64))
    found = [match.lastgroup for match in pattern(shape, vocabulary).finditer(said)]
    return found.count("user") >= 2 and found.count("assistant") >= 2


def pattern(shape: Shape, vocabulary: Vocabulary) -> re.Pattern[bytes]:
    """Return a pattern that matches the openers of all roles, in a group named after the role."""
    alternatives = []
    for role, texts in shape.openers.items():
        forms = sorted({text for text in texts if text.strip()}, key=len, reverse=True)
        if forms:
            alternatives.append(
                (max(map(len, forms)), role, b"|".join(_lenient(text, vocabulary) for text in forms))
            )
    # Longest first: `user<tool_response>` opens a tool's turn, not a user's.
    alternatives.sort(reverse=True)
    return re.compile(b"|".join(b"(?P<%s>%s)" % (role.encode(), forms) for _, role, forms in alternatives))


def _lenient(text: str, vocabulary: Vocabulary) -> bytes:
    """Return a pattern for a mark that allows for whitespace which tokenizers add after special tokens or remove."""
    pieces = vocabulary.split(text.strip())
    parts = []
    for number, piece in enumerate(pieces, 1):
        if piece in vocabulary.ids:
            blank = b" ?" if number < len(pieces) else b""  # behind the mark it may be the turn's own
            parts.append(re.escape(CONTROL + piece.encode()) + blank)
        else:
            words = re.findall(r"\s+|\S+", piece)
            parts += [rb"\s*" if word.isspace() else re.escape(word.encode()) for word in words]
    trailing = text[len(text.rstrip()) :].encode()
    return b"".join(parts) + (b"(?:%s)?" % re.escape(trailing) if trailing else b"")


class _Probe:
    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def text(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False
    ) -> str | None:
        try:
            return self._template.render(Conversation(messages, tools), prompt=prompt)
        except SstokenError:
            return None

    def before_reasoning(self) -> str:
        """Return the text between a question and the reasoning of its answer."""
        text = self.text(_reasoned()) or ""
        return text.rpartition(_ASKED)[2].partition(_THOUGHT)[0] if _THOUGHT in text else ""

    def before_call(self) -> str:
        """Return the text between a question and a tool call."""
        text = self.text(_called()[:2], [_DEFINITION]) or ""
        return text.rpartition(_ASKED)[2].partition(_TOOL)[0] if _VALUE in text else ""


def _reasoned() -> list[Message]:
    return [_user(_ASKED), _says(_SAID, reasoning_content=_THOUGHT)]


def _answer_openers(prompt: str, closing_user: str, gaps: Iterable[str]) -> Iterator[str]:
    if not prompt.strip():  # no generation prompt: an answer follows what closes the user's turn
        yield from (gap.rstrip(" ") for gap in gaps)
        return
    yield prompt
    for gap in gaps:
        rest = gap.removeprefix(closing_user)
        shared = _prefix(rest, prompt)
        if shared.strip():
            yield shared


def _user_openers(before: str, to_user: str, tail: str, closing_user: str) -> list[str]:
    opener = _suffix(before, to_user)
    closing = _prefix(to_user, tail)
    if len(opener) > len(to_user) - len(closing) and to_user[len(closing) :].strip():
        opener = to_user[len(closing) :]  # else one token closes the answer and opens the turn
    for closed in (closing_user, closing_user.strip()):
        if closed and opener.startswith(closed) and opener.removeprefix(closed).strip():
            opener = opener.removeprefix(closed)
            break
    return [opener.lstrip()] if opener.strip() else []


def _first(text: str, vocabulary: Vocabulary) -> set[int]:
    """Return the special token that a text begins with, if any, as a set."""
    parts = vocabulary.split(text.lstrip())
    return {vocabulary.ids[parts[0]]} if parts and parts[0] in vocabulary.ids else set()


def _ids_in(text: str, vocabulary: Vocabulary) -> set[int]:
    return {vocabulary.ids[part] for part in vocabulary.split(text) if part in vocabulary.ids}


def _learn_reasoning(shape: Shape, probe: _Probe) -> None:
    text = probe.text(_reasoned())
    if text is None or _THOUGHT not in text or text.find(_THOUGHT) > text.rfind(_SAID):
        return
    before, _, rest = text.partition(_THOUGHT)
    opened = _after_header(before, shape).strip()
    closes = _TAG.findall(rest.partition(_SAID)[0])
    if _TAG.match(opened) and closes:
        shape.thoughts = (opened, closes[0])


def _learn_tools(shape: Shape, probe: _Probe, vocabulary: Vocabulary) -> None:
    text = probe.text([*_called(), _says(_SAID)], [_DEFINITION])
    if text is None or not text.find(_ASKED) < text.find(_VALUE) < text.find(_RESULT):
        _learn_between(shape, probe, _result())  # the template may print results, but no calls
        return
    before = _after_header(text.rpartition(_ASKED)[2].partition(_VALUE)[0].partition(_TOOL)[0], shape)
    tags = [tag for tag in _TAG.findall(before) if tag not in shape.thoughts]
    shape.calls = (tags[0],) if tags else (before.strip(),) if before.strip() else ()
    gap = text.rpartition(_VALUE)[2].partition(_RESULT)[0]
    closing = _prefix(gap, _after(probe.text(_called()[:2], [_DEFINITION]), _VALUE))
    ends = [part for part in vocabulary.split(closing) if part in vocabulary.ids]
    shape.closers |= {vocabulary.ids[end] for end in ends[-1:]}  # some calls end with a token of their own
    plain = re.match(r"(?:<[^<>\s]{1,60}>|[^\"'{])*", gap[len(closing) :].lstrip().partition("Wqx")[0])
    opener = plain[0] if plain else ""
    if opener.strip() and not _TAG.search(opener):  # cannot be told from ordinary text
        opener = f"{ends[-1]}{opener}" if ends and closing.endswith(ends[-1]) else ""
    if opener.strip() and opener not in shape.openers["user"]:
        shape.openers["tool"] = [opener]
    answered = text.partition(_RESULT)[2].partition(_SAID)[0]
    if not any(known.strip() in answered for known in shape.openers["assistant"]):
        shape.openers["assistant"] += _TAG.findall(answered)[-1:]


def _learn_between(shape: Shape, probe: _Probe, message: Message, *following: Message) -> None:
    """Find what opens the turn of a message after an answer, which says `_RESULT`, and may have others behind it."""
    text = probe.text([_user(_ASKED), _says(_SAID), message, *following, _says(_SAID_MORE)])
    if text is None or not text.find(_SAID) < text.find(_RESULT) < text.find(_SAID_MORE):
        return
    gap = text.rpartition(_SAID_MORE)[0].rpartition(_RESULT)[0].rpartition(_SAID)[2]
    opener = gap[len(_prefix(gap, _after(probe.text([_user(_ASKED), _says(_SAID)]), _SAID))) :].lstrip()
    if _TAG.search(opener) and not any(opener.startswith(known.strip()) for known in shape.openers["user"]):
        shape.openers[message["role"]] = [opener]


def _after_header(text: str, shape: Shape) -> str:
    """Return the text after the last opener of an answer in it."""
    ends = [text.rfind(opener) + len(opener) for opener in shape.openers["assistant"] if opener in text]
    return text[max(ends) :] if ends else text


_DEFINITION = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "Wqxdoes",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "Wqxwhat"}}},
    },
}


def _called() -> list[Message]:
    call = {"type": "function", "id": "call12345", "function": {"name": _TOOL, "arguments": {_KEY: _VALUE}}}
    return [_user(_ASKED), _says("", tool_calls=[call]), _result()]


def _result() -> Message:
    return {"role": "tool", "name": _TOOL, "tool_call_id": "call12345", "content": _RESULT}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _says(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def _gaps(text: str, words: Sequence[str]) -> list[str]:
    """Return the texts before, between and after consecutive words."""
    found = []
    for word in words:
        gap, _, text = text.partition(word)
        found.append(gap)
    return [*found, text]


def _after(text: str | None, word: str) -> str:
    return "" if text is None else text.rpartition(word)[2]


def _prefix(left: str, right: str) -> str:
    """Return the common prefix of two texts, without splitting a tag or a word."""
    return "".join(_shared(ATOM.findall(left), ATOM.findall(right)))


def _suffix(left: str, right: str) -> str:
    """Return the common suffix of two texts, without splitting a tag or a word."""
    return "".join(_shared(ATOM.findall(left)[::-1], ATOM.findall(right)[::-1])[::-1])


def _shared(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Return the leading items that two lists share."""
    pairs = zip(left, right, strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
