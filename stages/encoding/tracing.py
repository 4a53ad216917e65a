"""Find where each piece of a conversation is in its rendering, and which pieces a chat template drops.

A chat template is a program: it may strip, cut, reorder or drop its input. So it is run twice: on the conversation,
and on a copy whose letters and digits are replaced by others of the same kind. Characters that differ between the two
renderings come from the conversation, the others from the template. Each message uses its own replacement, so a
character also reveals its message.

The copy keeps every length, all whitespace and punctuation, and any text that the template itself looks for (such as
`</think>`), so that the template treats both alike. If it does not, the renderings do not match and the row is
refused.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.stages.encoding.altering import (
    TEMPLATE,
    TOOLS,
    altered_copy,
    codes,
    decoded,
    owners_of,
    unprotected,
    visible,
)
from sstoken.stages.encoding.messages import UNCERTAIN, BadRow, Conversation
from sstoken.stages.encoding.pieces import Piece, leaves, pieces

OTHER_HEADER = "not as at inference"
"""Why a row is bad: a turn opens differently from the generation prompt."""
SPLIT = "split by the template"
"""Why a row is bad: another turn is printed inside one."""
_THOUGHT = re.compile(r"<think(?:ing)?>(.*?)(?:</think(?:ing)?>|\Z)", re.DOTALL)

_VARIANTS = 4
"""Altered copies to try, in case a template treats one differently."""
Render = Callable[[Conversation], str]


@dataclass(frozen=True)
class Trace:
    """A rendering, and the owner of each of its characters."""

    text: str
    owners: NDArray[np.int16]
    """[len(text)]: `TEMPLATE`, `TOOLS`, or a message's index plus 1."""
    names: str | None
    """The letters of tool names outside the calls, such as in definitions; None: names kept their letters."""

    def letters(self, owner: int) -> str:
        """Return the characters of one owner, in printed order."""
        return decoded(codes(self.text)[self.owners == owner])

    def region(self, owner: int) -> tuple[int, int] | None:
        """Return start and stop of the owner's characters; None if it has none.

        Raises:
            BadRow: another owner's characters are in between.
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
        """Return the text between the neighbouring owners' characters; all of the text if the owner has none."""
        own = np.flatnonzero(self.owners == owner)
        return self.text[self.before(int(own[0])) : self.after(int(own[-1]) + 1)] if own.size else self.text

    def before(self, position: int) -> int:
        """Return the end of the last owned character before `position`, or 0."""
        owned = np.flatnonzero(self.owners[:position] != TEMPLATE)
        return int(owned[-1]) + 1 if owned.size else 0

    def after(self, position: int) -> int:
        """Return the first owned character from `position` on, or the end of the text."""
        owned = np.flatnonzero(self.owners[position:] != TEMPLATE)
        return position + int(owned[0]) if owned.size else len(self.text)


def _texts_of(conversation: Conversation) -> dict[int, str]:
    """Return what each owner has to print; tool names have their own owner, after the last message."""
    texts: dict[int, str] = {}
    for piece in pieces(conversation):
        owner = len(conversation.messages) + 1 if piece.is_name else piece.owner
        texts[owner] = texts.get(owner, "") + piece.text
    return texts


def trace(
    conversation: Conversation, render: Render, protected: re.Pattern[str] | None, text: str | None = None
) -> Trace:
    """Render a conversation (`text`, if already known) and find the owner of each character.

    Text that matches `protected`, since the template looks for it, keeps its letters.

    Raises:
        BadRow: the template refuses the conversation, or treats every altered copy differently.
    """
    text = render(conversation) if text is None else text

    def names_in(index: int) -> int | None:
        """Return how many letters of names message `index` prints if nothing follows it; None if unknown."""
        cut = replace(conversation, messages=conversation.messages[: index + 1])
        try:
            shown = render(cut)
            altered = render(altered_copy(cut, protected, variant, with_names=True))
        except BadRow:
            return None
        found = owners_of(shown, altered, index + 3, variant, _texts_of(cut))
        if found is None:
            return None
        earlier = np.flatnonzero((found >= TOOLS) & (found <= index))
        return int((found[int(earlier[-1]) + 1 if earlier.size else 0 :] == index + 2).sum())

    for variant in range(_VARIANTS):
        with_names = variant % 2 == 0
        try:
            altered = render(altered_copy(conversation, protected, variant, with_names))
        except BadRow:
            continue
        num_owners = len(conversation.messages) + 2
        owners = owners_of(text, altered, num_owners, variant, _texts_of(conversation))
        if owners is not None:
            names = _share_names(owners, text, conversation, names_in) if with_names else None
            return Trace(text, owners, names)
    raise BadRow(
        UNCERTAIN,
        "the chat template prints this conversation in another way when its words change; pass a --chat-template with "
        "{% generation %} markers",
    )


def missing(found: Trace, conversation: Conversation, protected: re.Pattern[str] | None) -> list[Piece]:
    """Return the pieces, or parts of pieces, that a rendering does not contain verbatim."""
    lost: list[Piece] = []
    printed: dict[int, str] = {}
    everything = pieces(conversation)
    wanted = _times_wanted(everything, found, protected)
    for piece in everything:
        if piece.is_name and piece.owner == TOOLS and found.names is not None:
            if visible(piece.text, protected) not in found.names:
                lost.append(piece)
            continue
        if _keeps_letters(piece, found):
            if not shown(piece.text, found.around(piece.owner)):
                lost.append(piece)
            continue
        if piece.owner not in printed:
            printed[piece.owner] = found.letters(piece.owner)
        letters = visible(piece.text, protected)
        times = printed[piece.owner].count(letters) if letters else 0
        if not times or (piece.verbatim and piece.text.strip() not in found.text):
            lost += _lost_parts(piece, found.around(piece.owner), printed[piece.owner], protected)
        elif times < wanted[piece.owner, letters]:  # for example, only one of two equal calls is printed
            lost.append(piece)
            wanted[piece.owner, letters] -= 1
    return lost


def _keeps_letters(piece: Piece, found: Trace) -> bool:
    return not piece.altered or (piece.is_name and found.names is None)


def _times_wanted(
    everything: Iterable[Piece], found: Trace, protected: re.Pattern[str] | None
) -> dict[tuple[int, str], int]:
    """Count how often the letters of each piece occur in all pieces of its owner together."""
    letters: dict[int, list[str]] = {}
    for piece in everything:
        if not _keeps_letters(piece, found) and not (piece.is_name and piece.owner == TOOLS):
            letters.setdefault(piece.owner, []).append(visible(piece.text, protected))
    wanted: dict[tuple[int, str], int] = {}
    for owner, texts in letters.items():
        together = "\0".join(texts)
        wanted |= {(owner, own): together.count(own) for own in texts if own}
    return wanted


def _lost_parts(piece: Piece, text: str, printed: str, protected: re.Pattern[str] | None) -> Iterator[Piece]:
    thoughts = [m.span(1) for m in _THOUGHT.finditer(piece.text)] if piece.kind == "content" else []
    parts = [
        (start, stop, piece.text[start:stop].strip()) for start, stop in unprotected(piece.text, protected)
    ]
    together = "\0".join(visible(part, None) for _, _, part in parts)
    given_up: Counter[str] = Counter()
    for start, stop, part in parts:
        if not part:
            continue
        letters = visible(part, None)
        times = together.count(letters) - given_up[letters]
        there = printed.count(letters) >= times if letters else shown(part, text)
        if there and not (letters and piece.verbatim):
            continue
        kind = "reasoning" if any(a <= start and stop <= b for a, b in thoughts) else piece.kind
        if not there:
            given_up[letters] += 1
            yield replace(piece, kind=kind, text=part)
        elif part not in text:
            yield replace(piece, kind=kind, text=part, changed=True)


def shown(part: str, text: str) -> bool:
    """Whether the text contains the part verbatim or JSON-escaped."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _share_names(
    owners: NDArray[np.int16], text: str, conversation: Conversation, names_in: Callable[[int], int | None]
) -> str:
    """Assign the tool names that calls print to their turns, in place; return the remaining, unowned letters.

    Templates also print the name of a call in the header of its result. A turn's own names are the first ones between
    its neighbouring turns, and come before its last argument; `names_in` decides for trailing calls without arguments.
    """
    named = len(conversation.messages) + 1
    for index, message in enumerate(conversation.messages):
        calls = [c.get("function", c) for c in message.get("tool_calls") or ()]
        names = [visible(str(call.get("name", "")), None) for call in calls]
        called = "".join(names)
        if not called:
            continue
        start = _behind_earlier(owners, index, named)
        later = np.flatnonzero((owners > index + 1) & (owners < named))
        later = later[later >= start]
        stop = int(later[0]) if later.size else owners.size
        places = start + np.flatnonzero(owners[start:stop] == named)[: len(called)]
        if index + 1 < len(conversation.messages):
            own = np.flatnonzero(owners[start:stop] == index + 1)
            before = int((places < start + int(own[-1])).sum()) if own.size else 0
            last = max((i for i, call in enumerate(calls) if _has_letters(call.get("arguments"))), default=-1)
            if before < len("".join(names[: last + 1])):
                places = places[:before]
            elif before < len(called):
                there = names_in(index)
                places = places if there is None else places[: max(before, there)]
        if called.startswith("".join(text[place] for place in places.tolist())):
            owners[places] = index + 1
    left = owners == named
    letters = decoded(codes(text)[left])
    owners[left] = TEMPLATE
    return letters


def _behind_earlier(owners: NDArray[np.int16], index: int, named: int) -> int:
    """Return the first place after the earlier turns, and after tool definitions between them and this turn.

    Some templates (Mistral's) print the definitions before the last question, so after earlier calls.
    """
    earlier = np.flatnonzero((owners > TOOLS) & (owners <= index))
    start = int(earlier[-1]) + 1 if earlier.size else 0
    following = np.flatnonzero((owners[start:] > index) & (owners[start:] < named))
    stop = start + int(following[0]) if following.size else owners.size
    tools = np.flatnonzero(owners[start:stop] == TOOLS)
    return start + int(tools[-1]) + 1 if tools.size else start


def _has_letters(arguments: Any) -> bool:
    return any(altered and visible(text, None) for text, altered in leaves(arguments))
