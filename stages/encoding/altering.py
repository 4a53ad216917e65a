"""Copies of conversations with other letters, from which it shows who owns each character of a rendering.

Every owner (the tool definitions, each message, the names of tools) has a replacement of its own within each kind of
character, so that a replaced character tells whose it is.
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
"""Owner of a character that the template printed on its own account."""
TOOLS = 0
"""Owner of a character of the tool definitions. Message `i` owns its characters as `i + 1`."""
_LETTER, _DIGIT, _OTHER = range(3)
"""Kinds of characters; each is replaced within its kind."""
_RANGES = ((_LETTER, ord("a"), 26), (_LETTER, ord("A"), 26), (_DIGIT, ord("0"), 10))
_SHORT = 300
"""Characters up to which texts are remembered."""
_NUM_SHIFTS = (25, 9, 7)
"""How many replacements there are of each kind."""


def altered_copy(
    conversation: Conversation, protected: re.Pattern[str] | None, variant: int, with_names: bool
) -> Conversation:
    """A copy with other letters and digits, of the same length everywhere.

    Args:
        conversation: is left as it is.
        protected: text that the template looks for, which keeps its letters.
        variant: another number gives other replacements.
        with_names: replace the names of tools too; some templates look them up.
    """
    names = len(conversation.messages) + 1

    def alter(text: str, owner: int) -> str:
        table = _replacements(owner, variant)
        return "".join(
            text[start:stop].translate(table) if inside else text[start:stop]
            for start, stop, inside in stretches(text, protected)
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


def stretches(text: str, protected: re.Pattern[str] | None) -> Iterator[tuple[int, int, bool]]:
    """The whole text in order: stretches outside (True) and inside (False) of what is protected."""
    at = 0
    for match in protected.finditer(text) if protected else ():
        yield at, match.start(), True
        yield match.start(), match.end(), False
        at = match.end()
    yield at, len(text), True


def segments(text: str, protected: re.Pattern[str] | None) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch outside of what is protected."""
    return ((start, stop) for start, stop, outside in stretches(text, protected) if outside)


def visible(text: str, protected: re.Pattern[str] | None) -> str:
    """The characters of a text that an altered copy replaces."""
    return _visible_short(text, protected) if len(text) <= _SHORT else _visible(text, protected)


def _visible(text: str, protected: re.Pattern[str] | None) -> str:
    return "".join(text[start:stop].translate(_REPLACED) for start, stop in segments(text, protected))


_visible_short = lru_cache(maxsize=1 << 14)(_visible)
"""Descriptions of tools, keys and names, which all rows share."""


def _shifts(owner: int, variant: int) -> tuple[int, ...]:
    """How an owner's letters, digits and other characters are replaced."""
    return tuple(1 + (owner + 5 * variant) % count for count in _NUM_SHIFTS)


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


class _Replaced(dict[int, int | None]):
    """A table for `str.translate` that deletes what an altered copy keeps, filled as it is used."""

    def __missing__(self, code: int) -> int | None:
        self[code] = kept = code if _replacements(0, 0)[code] != code else None
        return kept


_REPLACED = _Replaced()


@lru_cache(maxsize=256)
def _replacements(owner: int, variant: int) -> _Replacements:
    return _Replacements(_shifts(owner, variant))


def codes(text: str) -> NDArray[np.uint32]:
    """A text as its code points."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def decoded(points: NDArray[np.uint32]) -> str:
    """Code points as text."""
    return points.tobytes().decode("utf-32-le")


def owners_of(
    original: NDArray[np.uint32],
    altered: NDArray[np.uint32],
    num_owners: int,
    variant: int,
    texts: Mapping[int, str],
) -> NDArray[np.int16] | None:
    """Who owns each character, from how it was replaced; None where some replacement is nobody's.

    `texts` are what each owner has to print. Of owners that replace alike, those come first that have some of the
    character left.
    """
    left = {owner: Counter(text) for owner, text in texts.items()} if num_owners > min(_NUM_SHIFTS) else {}
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
    apart = np.diff(keys) != 0
    if left:  # two owners that replace alike may follow each other
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
        if owner not in candidates:  # messages are printed in their order, most of them
            owner = next((c for c in candidates if c > owner), candidates[0])
        owners[places[start:stop]] = owner
        if owner in left:
            left[owner].subtract(decoded(original[places[start:stop]]))
    return owners


@lru_cache(maxsize=4096)
def _candidates(kind: int, amount: int, num_owners: int, variant: int) -> tuple[int, ...]:
    """The owners whose characters of a kind are replaced by that amount."""
    return tuple(o for o in range(num_owners) if _shifts(o, variant)[kind] == amount)
