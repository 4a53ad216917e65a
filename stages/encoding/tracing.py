"""Where each piece of a conversation stands in its rendering, and which pieces a chat template leaves out.

A chat template is a program: it may strip, cut, reorder or drop what it is given. So it is run twice, on the
conversation and on a copy whose letters and digits are replaced by others of the same kind. Characters that differ
between the two renderings come from the conversation, the others from the template. Each message uses a replacement of
its own, so a character also tells which message it comes from.

The copy keeps every length, all whitespace and punctuation, and the text that the template itself looks for (such as
`</think>`), so the template treats both alike. Where it does not, the renderings do not match and nothing is claimed.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.encoding.messages import BadRow, Conversation, Message

TEMPLATE = -1
"""Owner of a character that the template printed on its own account."""
TOOLS = 0
"""Owner of a character of the tool definitions. Message `i` owns its characters as `i + 1`."""
SPLIT = "split by the template"
"""Why a row is bad whose turn has another one printed inside it."""
_LETTER, _DIGIT, _OTHER = range(3)
"""Kinds of characters; each is replaced within its kind."""
_RANGES = ((_LETTER, ord("a"), 26), (_LETTER, ord("A"), 26), (_DIGIT, ord("0"), 10))
_NUM_SHIFTS = (25, 9, 7)
"""How many replacements there are of each kind."""
_THOUGHT = re.compile(r"<think(?:ing)?>(.*?)(?:</think(?:ing)?>|\Z)", re.DOTALL)

Render = Callable[[Conversation], str]


@dataclass(frozen=True)
class Piece:
    """A piece of text that a conversation holds."""

    owner: int
    """`TOOLS`, or the message's index plus 1."""
    kind: str
    """`content`, `system`, `reasoning`, `tool_calls` or `tools`."""
    text: str
    verbatim: bool = True
    """The template has to print it as it stands, but for whitespace at its ends; False: it may be escaped."""
    altered: bool = True
    """The altered copy replaces its letters. Keys and numbers keep them: templates sort by them, and look them up."""
    is_name: bool = False
    """The name of a tool, which some templates look up: it may have to keep its letters."""


@dataclass(frozen=True)
class Trace:
    """A rendering, and who owns each of its characters."""

    text: str
    owners: NDArray[np.int16]
    """[len(text)]: `TEMPLATE`, `TOOLS`, or a message's index plus 1."""
    names: str | None
    """The letters of tools' names outside the calls, such as in definitions; None: names kept their letters."""

    def letters(self, owner: int) -> str:
        """The characters of one owner, in the order in which they are printed."""
        return _decoded(_codes(self.text)[self.owners == owner])

    def region(self, owner: int) -> tuple[int, int] | None:
        """Start and end of the stretch that the owner's characters span; None where it has none.

        Raises:
            BadRow: characters of another owner stand in between.
        """
        own = np.flatnonzero(self.owners == owner)
        if not own.size:
            return None
        start, stop = int(own[0]), int(own[-1]) + 1
        inside = self.owners[start:stop]
        if ((inside != owner) & (inside != TEMPLATE)).any():
            raise BadRow(SPLIT, f"it prints turn {owner} in several places")
        return start, stop

    def around(self, owner: int) -> str:
        """The text between what stands before and after an owner's characters; all of it where it has none."""
        own = np.flatnonzero(self.owners == owner)
        return self.text[self.before(int(own[0])) : self.after(int(own[-1]) + 1)] if own.size else self.text

    def before(self, position: int) -> int:
        """The end of the last owned character before `position`, 0 where there is none."""
        owned = np.flatnonzero(self.owners[:position] != TEMPLATE)
        return int(owned[-1]) + 1 if owned.size else 0

    def after(self, position: int) -> int:
        """The first owned character from `position` on, the end of the text where there is none."""
        owned = np.flatnonzero(self.owners[position:] != TEMPLATE)
        return position + int(owned[0]) if owned.size else len(self.text)


def pieces(conversation: Conversation) -> list[Piece]:
    """Every piece of text of a conversation that its rendering has to hold."""
    found = list(_tool_pieces(conversation.tools))
    for index, message in enumerate(conversation.messages):
        owner = index + 1
        if message.get("reasoning_content"):
            found.append(Piece(owner, "reasoning", message["reasoning_content"]))
        if message.get("content"):
            found.append(
                Piece(owner, "system" if message["role"] == "system" else "content", message["content"],
                      verbatim=message["role"] != "tool")
            )  # fmt: skip
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            found.append(
                Piece(owner, "tool_calls", str(function.get("name", "")), verbatim=False, is_name=True)
            )
            found += [
                Piece(owner, "tool_calls", text, verbatim=False, altered=altered)
                for text, altered in _leaves(function.get("arguments"))
            ]
    return found


def trace(
    conversation: Conversation, render: Render, protected: re.Pattern[str] | None, text: str | None = None
) -> Trace:
    """Render a conversation and find out who owns each character.

    Args:
        conversation: what is rendered.
        render: the chat template.
        protected: text that the template looks for, which keeps its letters.
        text: the rendering, if it is there already.

    Raises:
        BadRow: the template refuses the conversation, or treats every altered copy in another way.
    """
    text = render(conversation) if text is None else text
    codes = _codes(text)
    for variant in range(4):
        with_names = variant % 2 == 0
        try:
            altered = render(_altered(conversation, protected, variant, with_names))
        except BadRow:
            continue
        if len(altered) != len(text):
            continue
        owners = _owners(codes, _codes(altered), len(conversation.messages) + 2, variant)
        if owners is not None:
            names = _share_names(owners, text, conversation) if with_names else None
            return Trace(text, owners, names)
    raise BadRow(
        "uncertain mask",
        "the chat template prints this conversation in another way when its words change; pass a --chat-template with "
        "{% generation %} markers",
    )


def missing(found: Trace, conversation: Conversation, protected: re.Pattern[str] | None) -> list[Piece]:
    """The pieces, or parts of pieces, that a rendering does not hold as they stand."""
    lost: list[Piece] = []
    printed: dict[int, str] = {}
    for piece in pieces(conversation):
        if piece.is_name and piece.owner == TOOLS and found.names is not None:
            if visible(piece.text, protected) not in found.names:
                lost.append(piece)
            continue
        if not piece.altered or (piece.is_name and found.names is None):
            if not _shown(piece.text, found.around(piece.owner)):
                lost.append(piece)
            continue
        if piece.owner not in printed:
            printed[piece.owner] = found.letters(piece.owner)
        letters = visible(piece.text, protected)
        there = bool(letters) and letters in printed[piece.owner]
        if not there or (piece.verbatim and piece.text.strip() not in found.text):
            lost += _lost_parts(piece, found.around(piece.owner), printed[piece.owner], protected)
    return lost


def _lost_parts(piece: Piece, text: str, printed: str, protected: re.Pattern[str] | None) -> Iterator[Piece]:
    thoughts = [m.span(1) for m in _THOUGHT.finditer(piece.text)] if piece.kind == "content" else []
    for start, stop in _segments(piece.text, protected):
        part = piece.text[start:stop].strip()
        letters = visible(part, None)
        if not part or (_shown(part, text) if not letters else letters in printed and not piece.verbatim):
            continue
        kind = "reasoning" if any(a <= start and stop <= b for a, b in thoughts) else piece.kind
        if not letters or letters not in printed:
            yield Piece(piece.owner, kind, part, piece.verbatim)
        elif part not in text:
            yield Piece(piece.owner, f"{kind} (changed)", part, piece.verbatim)


def _shown(part: str, text: str) -> bool:
    """Whether the text holds it as it stands, or as JSON writes it."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _tool_pieces(tools: list[dict[str, Any]] | None) -> Iterator[Piece]:
    for tool in tools or ():
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            continue
        for key in ("name", "description"):
            if isinstance(function.get(key), str) and function[key].strip():
                yield Piece(TOOLS, "tools", function[key], verbatim=False, is_name=key == "name")
        yield from _schema_pieces(function.get("parameters"))


def _schema_pieces(schema: Any) -> Iterator[Piece]:
    """The names and descriptions of parameters, nested ones too."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    for name, value in properties.items() if isinstance(properties, Mapping) else ():
        yield Piece(TOOLS, "tools", str(name), verbatim=False, altered=False)
        if isinstance(value, Mapping):
            if isinstance(value.get("description"), str) and value["description"].strip():
                yield Piece(TOOLS, "tools", value["description"], verbatim=False)
            yield from _schema_pieces(value)


def _leaves(value: Any) -> Iterator[tuple[str, bool]]:
    """Keys, strings and numbers of a JSON value. True, false and null go by their keys."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), False
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        if value.strip():
            yield value, True
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value), False


def _altered(
    conversation: Conversation, protected: re.Pattern[str] | None, variant: int, with_names: bool
) -> Conversation:
    """The copy with other letters. Names of tools may be left as they are: some templates look them up."""

    names = len(conversation.messages) + 1

    def alter(text: str, owner: int) -> str:
        table = _replacements(owner, variant)
        return "".join(
            text[start:stop].translate(table) if inside else text[start:stop]
            for start, stop, inside in _stretches(text, protected)
        )

    def value(given: Any, owner: int) -> Any:
        if isinstance(given, str):
            return alter(given, owner)
        if isinstance(given, Mapping):
            return {key: value(inner, owner) for key, inner in given.items()}
        return [value(inner, owner) for inner in given] if isinstance(given, list | tuple) else given

    def call(given: Mapping[str, Any], owner: int) -> dict[str, Any]:
        function = dict(given.get("function", given))
        if "arguments" in function:
            function["arguments"] = value(function["arguments"], owner)
        if with_names and "name" in function:
            function["name"] = alter(str(function["name"]), names)
        return {**given, "function": function} if "function" in given else function

    def described(given: Any) -> Any:
        if isinstance(given, Mapping):
            return {
                key: alter(inner, TOOLS if key == "description" else names)
                if isinstance(inner, str) and (key == "description" or (key == "name" and with_names))
                else described(inner)
                for key, inner in given.items()
            }
        return [described(inner) for inner in given] if isinstance(given, list) else given

    messages: list[Message] = []
    for index, message in enumerate(conversation.messages):
        copy = dict(message)
        for key in ("content", "reasoning_content"):
            if isinstance(copy.get(key), str):
                copy[key] = alter(copy[key], index + 1)
        if with_names and isinstance(copy.get("name"), str):
            copy["name"] = alter(copy["name"], names)
        if copy.get("tool_calls"):
            copy["tool_calls"] = [call(each, index + 1) for each in copy["tool_calls"]]
        messages.append(copy)
    return replace(conversation, messages=messages, tools=described(conversation.tools))


def _stretches(text: str, protected: re.Pattern[str] | None) -> Iterator[tuple[int, int, bool]]:
    """The whole text in order: stretches outside (True) and inside (False) of what is protected."""
    at = 0
    for match in protected.finditer(text) if protected else ():
        yield at, match.start(), True
        yield match.start(), match.end(), False
        at = match.end()
    yield at, len(text), True


def _segments(text: str, protected: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    return ((start, stop) for start, stop, outside in _stretches(text, protected) if outside)


def visible(text: str, protected: re.Pattern[str] | None) -> str:
    """The characters of a text that an altered copy replaces."""
    table = _replacements(0, 0)
    return "".join(
        c for start, stop in _segments(text, protected) for c in text[start:stop] if table[ord(c)] != ord(c)
    )


def _shifts(owner: int, variant: int) -> tuple[int, ...]:
    """How an owner's letters, digits and other characters are replaced."""
    number = owner + 5 * variant
    return tuple(1 + number % count for count in _NUM_SHIFTS)


class _Replacements(dict[int, int]):
    """A table for `str.translate`, filled as it is used."""

    def __init__(self, shifts: tuple[int, ...]) -> None:
        super().__init__()
        self._shifts = shifts

    def __missing__(self, code: int) -> int:
        self[code] = replaced = self._replace(code)
        return replaced

    def _replace(self, code: int) -> int:
        for kind, first, count in _RANGES:
            if first <= code < first + count:
                return first + (code - first + self._shifts[kind]) % count
        # Beyond ASCII: a neighbour in the same block of eight, where all eight are of one kind.
        return code ^ self._shifts[_OTHER] if _uniform(code >> 3) else code


@lru_cache(maxsize=1 << 14)
def _uniform(block: int) -> bool:
    """Whether the eight characters of a block are letters, or pictures, of one kind that no normal form changes."""
    if block < 0x10:
        return False
    characters = [chr(code) for code in range(block << 3, (block << 3) + 8)]
    kinds = {unicodedata.category(c) for c in characters}
    return (
        len(kinds) == 1
        and kinds <= {"Lo", "Ll", "Lu", "So"}
        and all(
            unicodedata.is_normalized("NFKC", c) and len(c.upper()) == len(c.lower()) == 1 for c in characters
        )
    )


@lru_cache(maxsize=256)
def _replacements(owner: int, variant: int) -> _Replacements:
    return _Replacements(_shifts(owner, variant))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _decoded(codes: NDArray[np.uint32]) -> str:
    return codes.tobytes().decode("utf-32-le")


def _owners(
    original: NDArray[np.uint32], altered: NDArray[np.uint32], num_owners: int, variant: int
) -> NDArray[np.int16] | None:
    """Who owns each character, from how it was replaced; None where some replacement is nobody's."""
    owners = np.full(original.size, TEMPLATE, np.int16)
    places = np.flatnonzero(original != altered)
    before, after = original[places].astype(np.int64), altered[places].astype(np.int64)
    # What each replacement amounts to: its kind (letters, digits, others) and its shift or mask.
    kinds, amounts = np.full(places.size, _OTHER), before ^ after
    for kind, first, count in _RANGES:
        both = (before >= first) & (before < first + count) & (after >= first) & (after < first + count)
        kinds[both] = kind
        amounts[both] = (after[both] - before[both]) % count
    keys = kinds * 4096 + np.minimum(amounts, 4095)
    borders = np.flatnonzero(np.diff(keys)) + 1
    owner = TOOLS
    for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), places.size], strict=True):
        if start == stop:
            break
        candidates = _candidates(int(kinds[start]), int(amounts[start]), num_owners, variant)
        if not candidates:
            return None
        if owner not in candidates:  # messages are printed in their order, most of them
            owner = next((c for c in candidates if c > owner), candidates[0])
        owners[places[start:stop]] = owner
    return owners


def _share_names(owners: NDArray[np.int16], text: str, conversation: Conversation) -> str:
    """Give the names that calls print to their turns, in place; return the letters of the others, which nobody owns.

    Templates print the name of a call in the header of its result too. A turn's own are the first ones between the
    turns around it.
    """
    named = len(conversation.messages) + 1
    for index, message in enumerate(conversation.messages):
        called = "".join(
            visible(str(c.get("function", c).get("name", "")), None) for c in message.get("tool_calls") or ()
        )
        if not called:
            continue
        earlier = np.flatnonzero((owners >= TOOLS) & (owners <= index))
        later = np.flatnonzero((owners > index + 1) & (owners < named))
        start = int(earlier[-1]) + 1 if earlier.size else 0
        later = later[later >= start]
        stop = int(later[0]) if later.size else owners.size
        places = start + np.flatnonzero(owners[start:stop] == named)[: len(called)]
        if "".join(text[place] for place in places.tolist()) == called:
            owners[places] = index + 1
    left = owners == named
    letters = _decoded(_codes(text)[left])
    owners[left] = TEMPLATE
    return letters


@lru_cache(maxsize=4096)
def _candidates(kind: int, amount: int, num_owners: int, variant: int) -> tuple[int, ...]:
    """The owners whose characters of a kind are replaced by that amount."""
    return tuple(o for o in range(num_owners) if _shifts(o, variant)[kind] == amount)
