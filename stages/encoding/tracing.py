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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.encoding.altering import (
    TEMPLATE,
    TOOLS,
    altered_copy,
    codes,
    decoded,
    owners_of,
    segments,
    visible,
)
from stages.encoding.messages import BadRow, Conversation

OTHER_HEADER = "not as at inference"
"""Why a row is bad whose turn opens in another way than the generation prompt."""
SPLIT = "split by the template"
"""Why a row is bad whose turn has another one printed inside it."""
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
    where: str = ""
    """Of a tool definition: the tool and parameter, `search.filters.lang`."""


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
        return decoded(codes(self.text)[self.owners == owner])

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
    original = codes(text)
    for variant in range(4):
        with_names = variant % 2 == 0
        try:
            altered = render(altered_copy(conversation, protected, variant, with_names))
        except BadRow:
            continue
        if len(altered) != len(text):
            continue
        owners = owners_of(original, codes(altered), len(conversation.messages) + 2, variant)
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
    for start, stop in segments(piece.text, protected):
        part = piece.text[start:stop].strip()
        letters = visible(part, None)
        if not part or (_shown(part, text) if not letters else letters in printed and not piece.verbatim):
            continue
        kind = "reasoning" if any(a <= start and stop <= b for a, b in thoughts) else piece.kind
        if not letters or letters not in printed:
            yield replace(piece, kind=kind, text=part)
        elif part not in text:
            yield replace(piece, kind=f"{kind} (changed)", text=part)


def _shown(part: str, text: str) -> bool:
    """Whether the text holds it as it stands, or as JSON writes it."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _tool_pieces(tools: list[dict[str, Any]] | None) -> Iterator[Piece]:
    for tool in tools or ():
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            continue
        where = str(function.get("name", ""))
        if where.strip():
            yield Piece(TOOLS, "tools", where, verbatim=False, is_name=True, where=where)
        yield from _description(function, where)
        yield from _schema_pieces(function.get("parameters"), where)


def _schema_pieces(schema: Any, where: str) -> Iterator[Piece]:
    """The names and descriptions of parameters, nested ones too."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    for name, value in properties.items() if isinstance(properties, Mapping) else ():
        place = f"{where}.{name}"
        yield Piece(TOOLS, "tools", str(name), verbatim=False, altered=False, where=place)
        if isinstance(value, Mapping):
            yield from _description(value, place)
            yield from _schema_pieces(value, place)


def _description(described: Mapping[str, Any], where: str) -> Iterator[Piece]:
    text = described.get("description")
    if isinstance(text, str) and text.strip():
        yield Piece(TOOLS, "tools", text, verbatim=False, where=where)


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
    letters = decoded(codes(text)[left])
    owners[left] = TEMPLATE
    return letters
