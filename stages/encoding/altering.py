"""Copies of conversations with substituted letters, which reveal the owner of each character of a rendering.

Each owner (the tool definitions, a message, the names of tools) substitutes every kind of character in its own way,
so a substituted character identifies its owner.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.stages.encoding.messages import Conversation, Message

TEMPLATE = -1
"""Owner of a character that the template itself printed."""
TOOLS = 0
"""Owner of the characters of tool definitions. Message `i` owns its characters as `i + 1`."""
_LETTER, _DIGIT, _OTHER = range(3)
"""Kinds of characters; a character is replaced by another of its kind."""
_RANGES = ((_LETTER, ord("a"), 26), (_LETTER, ord("A"), 26), (_DIGIT, ord("0"), 10))
_SHORT = 300
"""Texts up to this many characters are cached."""
_NUM_SHIFTS = (25, 9, 7)
"""The number of distinct replacements of each kind."""


def altered_copy(
    conversation: Conversation, protected: re.Pattern[str] | None, variant: int, with_names: bool
) -> Conversation:
    """Return a copy with other letters and digits, where every text keeps its length.

    Text that matches `protected` keeps its letters. Each `variant` is another set of replacements. `with_names`
    replaces the names of tools, too, although some templates look them up.
    """
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
    """Yield start, stop and kind of each stretch, in order: True outside protected text, False inside."""
    at = 0
    for match in protected.finditer(text) if protected else ():
        yield at, match.start(), True
        yield match.start(), match.end(), False
        at = match.end()
    yield at, len(text), True


def unprotected(text: str, protected: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each stretch outside protected text."""
    return ((start, stop) for start, stop, outside in _stretches(text, protected) if outside)


def visible(text: str, protected: re.Pattern[str] | None) -> str:
    """Return the characters of a text that an altered copy replaces."""
    return _visible_short(text, protected) if len(text) <= _SHORT else _visible(text, protected)


def _visible(text: str, protected: re.Pattern[str] | None) -> str:
    return "".join(text[start:stop].translate(_REPLACED) for start, stop in unprotected(text, protected))


_visible_short = lru_cache(maxsize=1 << 14)(_visible)
"""Cached, since all rows share tool descriptions, keys and names."""


def _shifts(owner: int, variant: int) -> tuple[int, ...]:
    """Return the shift of an owner's letters, of its digits and of its other characters."""
    return tuple(1 + (owner + 5 * variant) % count for count in _NUM_SHIFTS)


class _Replacements(dict[int, int]):
    """A lazily filled table for `str.translate`."""

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
        # Beyond ASCII: a neighbour in the same block of eight, if all eight are of one kind.
        return code ^ self._shifts[_OTHER] if _uniform(code >> 3) else code


@lru_cache(maxsize=1 << 14)
def _uniform(block: int) -> bool:
    """Return whether the eight characters of a block are all letters or all symbols, and stable when normalized."""
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


class _Replaced(dict[int, int | None]):
    """A lazily filled table for `str.translate` that deletes the characters an altered copy keeps."""

    def __missing__(self, code: int) -> int | None:
        self[code] = kept = code if _replacements(0, 0)[code] != code else None
        return kept


_REPLACED = _Replaced()


@lru_cache(maxsize=256)
def _replacements(owner: int, variant: int) -> _Replacements:
    return _Replacements(_shifts(owner, variant))


def codes(text: str) -> NDArray[np.uint32]:
    """Return the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def decoded(points: NDArray[np.uint32]) -> str:
    """Return the text of code points."""
    return points.tobytes().decode("utf-32-le")


def owners_of(
    text: str, altered_text: str, num_owners: int, variant: int, texts: Mapping[int, str]
) -> NDArray[np.int16] | None:
    """Return the owner of each character, inferred from its replacement; None if one matches no owner.

    `texts` holds what each owner has to print. Where several owners replace a character alike, prefer those that
    still have this character to print.
    """
    original, altered = codes(text), codes(altered_text)
    if original.size != altered.size:
        return None
    left = {owner: Counter(text) for owner, text in texts.items()} if num_owners > min(_NUM_SHIFTS) else {}
    owners = np.full(original.size, TEMPLATE, np.int16)
    places = np.flatnonzero(original != altered)
    before, after = original[places].astype(np.int64), altered[places].astype(np.int64)
    # The kind of each replacement (letter, digit, other) and its shift or XOR mask.
    kinds, amounts = np.full(places.size, _OTHER), before ^ after
    for kind, first, count in _RANGES:
        both = (before >= first) & (before < first + count) & (after >= first) & (after < first + count)
        kinds[both] = kind
        amounts[both] = (after[both] - before[both]) % count
    keys = kinds * 4096 + np.minimum(amounts, 4095)
    apart = np.diff(keys) != 0
    if left:  # two owners with the same replacement may be adjacent
        apart |= np.diff(places) > 1
    borders = np.flatnonzero(apart) + 1
    owner = TOOLS
    for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), places.size], strict=True):
        if start == stop:
            break
        candidates = _candidates(int(kinds[start]), int(amounts[start]), num_owners, variant)
        if not candidates:
            return None
        if left and len(candidates) > 1:
            character = chr(int(before[start]))
            candidates = tuple(c for c in candidates if c in left and left[c][character] > 0) or candidates
        if owner not in candidates:  # most templates print messages in order
            owner = next((c for c in candidates if c > owner), candidates[0])
        owners[places[start:stop]] = owner
        if owner in left:
            left[owner].subtract(decoded(original[places[start:stop]]))
    return owners


@lru_cache(maxsize=4096)
def _candidates(kind: int, amount: int, num_owners: int, variant: int) -> tuple[int, ...]:
    """Return the owners that replace characters of this kind by this amount."""
    return tuple(o for o in range(num_owners) if _shifts(o, variant)[kind] == amount)
