"""Locate the assistant's turns in a rendered conversation, from the generation prompt to its end token.

A turn starts where generation starts at inference: after everything that `add_generation_prompt` prints, as far as
the conversation prints the same. It ends with the tokens that close it, up to the one that stops generation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

from sstoken.stages.encoding.altering import visible
from sstoken.stages.encoding.messages import LOST, UNCERTAIN, BadRow, Conversation
from sstoken.stages.encoding.pieces import pieces
from sstoken.stages.encoding.templates import ChatTemplate, Span, any_of
from sstoken.stages.encoding.tracing import OTHER_HEADER, SPLIT, Trace, trace

ATOM = re.compile(r"<[^<>\s]{0,60}>|\[[^\[\]\s]{0,40}\]|\w+|\s+|.", re.DOTALL)
"""Text that no boundary between turns splits: a tag, a word, a run of whitespace."""
_PROBE = ("Wqxask", "Wqxreply", "Wqxaskmore", "Wqxreplymore")


@dataclass(frozen=True)
class Turn:
    """An assistant turn in a rendered conversation."""

    message: int
    """The index of its message."""
    first: int
    """Its first character that comes from the conversation."""
    last: int
    """One past its last such character."""
    start: int
    """Where generation starts."""
    stop: int
    """One past the end-of-turn token."""
    closed: bool
    """It ends with a token that stops generation."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer's tokens that decide how conversations are rendered and where turns end."""

    named: Mapping[str, Any]
    """Special tokens by their names in templates: `bos_token`, ..."""
    control: frozenset[str]
    """Special tokens, which are not text; only these can end a turn."""
    special: frozenset[str]
    """Special and added tokens; any of them may close a turn."""
    stops: frozenset[str]
    """Tokens that stop generation."""


class TurnFinder:
    """Finds the assistant's turns in the renderings of one template."""

    def __init__(self, template: ChatTemplate, tokens: SpecialTokens) -> None:
        self.template = template
        self._control = tuple(filter(str.strip, tokens.control))
        self._special = sorted(filter(str.strip, tokens.special), key=lambda t: (-len(t), t))
        self._stops = frozenset(filter(str.strip, tokens.stops))
        self._headers: dict[tuple[object, ...], int] = {}

    def trace(self, conversation: Conversation, text: str | None = None) -> Trace:
        """Find the owner of each character of a rendered conversation (`text`, if already known); see `trace`."""
        return trace(conversation, self.template.render, self.template.protected, text)

    def turn(self, found: Trace, conversation: Conversation, index: int) -> Turn:
        """Return the turn of message `index`.

        Raises:
            BadRow: the template prints the turn in several places, or the end of its header is not certain.
        """
        first, last = self._region(found, conversation, index)
        before, after = found.before(first), found.after(last)
        start = before + self._header_length(found.text[before:first], conversation, index)
        length, closed = self._closing(found.text[last:after], conversation, index)
        return Turn(index, first, last, start, last + length, closed)

    def prompt(self, conversation: Conversation, index: int) -> Trace:
        """Render the prompt that the model gets at inference before message `index`, with the generation prompt."""
        before = _until(conversation, index)
        return trace(before, lambda c: self.template.render(c, prompt=True), self.template.protected)

    def _region(self, found: Trace, conversation: Conversation, index: int) -> Span:
        region = found.region(index + 1)
        if region is not None:
            own = [p for p in pieces(conversation) if p.owner == index + 1 and p.altered]
            altered = [p for p in own if not (p.is_name and found.names is None)]
            expected = sum(len(visible(piece.text, self.template.protected)) for piece in altered)
            if len(found.letters(index + 1)) > expected:
                raise BadRow(SPLIT, f"it prints turn {index + 1} more than once")
            return region
        return self._region_by_substitution(found, conversation, index)

    def _region_by_substitution(self, found: Trace, conversation: Conversation, index: int) -> Span:
        """Find a turn without letters and digits, such as `{}`, by rendering a word in its place."""
        message = conversation.messages[index]
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise BadRow(UNCERTAIN, f"turn {index + 1} cannot be told from what the chat template prints")
        word = next(w for w in (f"{_PROBE[1]}{n}" for n in count()) if w not in found.text)
        messages = list(conversation.messages)
        messages[index] = message | {"content": word}
        rendered = self.template.render(replace(conversation, messages=messages))
        before, printed, after = rendered.partition(word)
        stop = len(found.text) - len(after)
        shown = found.text[len(before) : stop]
        if not printed or not found.text.startswith(before) or not found.text.endswith(after):
            raise BadRow(UNCERTAIN, f"the chat template prints turn {index + 1} in another way than a word")
        if shown.strip() != message["content"].strip():
            raise BadRow(LOST, f"content of turn {index + 1}")
        return len(before), stop

    def _header_length(self, gap: str, conversation: Conversation, index: int) -> int:
        """Return how much of the text before a turn is given to the model at inference.

        `gap` is the text from the last character of an earlier message to the turn's first.
        """
        roles = tuple(m["role"] for m in conversation.messages[max(0, index - 2) : index])
        reasons = any(m.get("reasoning_content") for m in conversation.messages)
        key = (gap, roles, bool(conversation.tools), reasons)
        if key not in self._headers:
            self._headers[key] = self._compare_header(gap, conversation, index)
        return self._headers[key]

    def _compare_header(self, gap: str, conversation: Conversation, index: int) -> int:
        found = self.prompt(conversation, index)
        header = found.text[found.before(len(found.text)) :]
        bare = self.template.render(_until(conversation, index))
        added = len(found.text) - len(bare) if found.text.startswith(bare) else len(header)
        if not added:
            # No generation prompt: the header is the text before a plain answer, less a blank.
            plain = self._plain_header(conversation, index)
            header, added = header if plain.rstrip(" ") == header else plain, 0
        shared = _shared(gap, header)
        if shared == len(gap) or (shared and shared > len(header) - added) or shared == len(header):
            return shared
        raise BadRow(
            OTHER_HEADER,
            f"the chat template opens turn {index + 1} with {gap[-60:]!r}, its generation prompt is {header[-60:]!r}",
        )

    def _plain_header(self, conversation: Conversation, index: int) -> str:
        before = _until(conversation, index)
        answer = {"role": "assistant", "content": _PROBE[1]}
        found = self.trace(replace(before, messages=[*before.messages, answer]))
        region = found.region(index + 1)
        if region is None:
            raise BadRow(UNCERTAIN, "the chat template prints no generation prompt and no plain answer")
        return found.text[found.before(region[0]) : region[0]]

    def _closing(self, after: str, conversation: Conversation, index: int) -> tuple[int, bool]:
        """Return how much of the text after a turn's last character closes it, and whether a token does."""
        match = self._closers.search(after) if self._closers else None
        if match is None:
            last = after
            if index + 1 < len(conversation.messages):
                try:
                    alone = self.trace(_until(conversation, index + 1))
                except BadRow as error:
                    raise BadRow(UNCERTAIN, f"nothing shows where turn {index + 1} ends ({error})") from error
                last = alone.text[alone.before(len(alone.text)) :]
            closing = after[: _shared(after, last)].rstrip()
            return len(closing), closing.endswith(self._control)
        stop, stopped = match.end(), match[0] in self._stops
        assert self._closers is not None
        while True:
            # A second token directly after also closes the turn; one after whitespace only if it stops generation.
            following = self._closers.match(after, stop)
            if following is None and not stopped:
                spaced = self._closers.match(after, stop + len(after[stop:]) - len(after[stop:].lstrip()))
                following = spaced if spaced and spaced[0] in self._stops else None
            if following is None:
                return stop, True
            stop, stopped = following.end(), stopped or following[0] in self._stops

    @cached_property
    def _closers(self) -> re.Pattern[str] | None:
        """The tokens that may close a turn: those that stop generation, and those after a probe's answers."""
        tokens = {*self._stops, *self._after_probe()}
        return re.compile(any_of(tokens)) if tokens else None

    def _after_probe(self) -> set[str]:
        asked, replied, asked_more, replied_more = _PROBE
        found: set[str] = set()
        dialogue = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": replied},
            {"role": "user", "content": asked_more},
            {"role": "assistant", "content": replied_more},
        ]
        system = {"role": "system", "content": "Wqxsystem"}
        for messages in (dialogue, [system, *dialogue], dialogue[:2], [system, *dialogue[:2]]):
            try:
                text = self.template.render(Conversation(messages))
            except BadRow:
                continue
            last = replied_more if len(messages) > 3 else replied
            found |= self._first_token(text.partition(last)[2])
            if last == replied_more:
                # A token that closes an earlier turn also closes a user's; any other opens the next turn.
                between = text.partition(replied)[2].partition(asked_more)[0]
                after_user = text.partition(asked)[2].partition(replied)[0]
                found |= self._first_token(between[: _shared(between, after_user)])
            break
        return found

    def _first_token(self, text: str) -> set[str]:
        text = text.lstrip()
        return {next((t for t in self._special if text.startswith(t)), "")} - {""}


def _until(conversation: Conversation, index: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[:index])


def _shared(left: str, right: str) -> int:
    """Return the length of the common prefix of two texts, without splitting a tag or a word of either."""
    if left.startswith(right):
        return len(right)
    if right.startswith(left):
        return len(left)
    shared = 0
    for a, b in zip(ATOM.finditer(left), ATOM.finditer(right), strict=False):
        if a[0] != b[0]:
            break
        shared = a.end()
    return shared
