"""Scaffolds: what a template prints around the texts of a conversation, learned once per conversation shape.

Most conversations of a dataset have one shape. Once one of them is traced, the next of that shape needs no
trace: if its rendering equals the known scaffold with its own texts in the gaps, character by character, each text is
where its gap is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sstoken.stages.encoding.messages import Conversation
from sstoken.stages.encoding.spans import Turn
from sstoken.stages.encoding.tracing import Trace

_VARIANTS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,  # Llama 3, Gemma
    lambda text: text.lstrip("\n"),  # Qwen 3
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
)
"""Ways in which templates strip a text before they print it."""
_MAX_SHAPES = 4096


@dataclass(frozen=True)
class _Place:
    """A turn's borders, relative to the gaps around its texts."""

    message: int
    gap_before: int
    start: int
    """Characters from the start of that gap."""
    gap_after: int
    stop: int
    """Characters from the start of that gap."""
    closed: bool


@dataclass(frozen=True)
class _Scaffold:
    gaps: list[str]
    """What the template prints before the first text, between texts and after the last."""
    texts: list[tuple[int, str]]
    """Message and key of each text, in printed order."""
    places: list[_Place]


class Scaffolds:
    """The scaffolds of one template, by the shape of the conversation."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Scaffold] = {}

    def recognise(self, text: str, conversation: Conversation) -> list[Turn] | None:
        """Return the turns of a rendered conversation, or None if its scaffold is unknown."""
        shape = _shape(conversation)
        scaffold = self._known.get(shape) if shape else None
        if scaffold is None or not text.startswith(scaffold.gaps[0]):
            return None
        gap_starts, gap_stops, at = [0], [], len(scaffold.gaps[0])
        for (index, key), following in zip(scaffold.texts, scaffold.gaps[1:], strict=True):
            raw = conversation.messages[index][key]
            for variant in _VARIANTS:
                shown = variant(raw)
                if text.startswith(shown, at) and text.startswith(following, at + len(shown)):
                    break
            else:
                return None
            gap_stops.append(at)
            at += len(shown)
            gap_starts.append(at)
            at += len(following)
        if at != len(text):
            return None
        return [
            Turn(
                place.message,
                first=gap_stops[place.gap_before],
                last=gap_starts[place.gap_after],
                start=gap_starts[place.gap_before] + place.start,
                stop=gap_starts[place.gap_after] + place.stop,
                closed=place.closed,
            )
            for place in scaffold.places
        ]

    def learn(self, found: Trace, conversation: Conversation, turns: Sequence[Turn]) -> None:
        """Remember the scaffold of a traced conversation, if each of its texts appears once."""
        shape = _shape(conversation)
        if shape is None or shape in self._known or len(self._known) >= _MAX_SHAPES:
            return
        placed = []
        for index, message in enumerate(conversation.messages):
            region = found.region(index + 1)
            for key in ("reasoning_content", "content"):
                value = message.get(key)
                if not value:
                    continue
                if region is None or value != value.strip():
                    return
                start = found.before(region[0])
                around = found.text[start : found.after(region[1])]
                if around.count(value) != 1:
                    return
                at = start + around.index(value)
                placed.append((at, at + len(value), index, key))
        placed.sort()
        ends = [0, *(end for _, end, _, _ in placed)]
        begins = [*(begin for begin, _, _, _ in placed), len(found.text)]
        if any(begin < end for begin, end in zip(begins, ends, strict=True)):
            return
        places = []
        for turn in turns:
            own = [k for k, (_, _, index, _) in enumerate(placed) if index == turn.message]
            before, after = own[0], own[-1] + 1
            starts_in_gap = ends[before] <= turn.start <= begins[before]
            if not (starts_in_gap and ends[after] <= turn.stop <= begins[after]):
                return
            start, stop = turn.start - ends[before], turn.stop - ends[after]
            places.append(_Place(turn.message, before, start, after, stop, turn.closed))
        self._known[shape] = _Scaffold(
            [found.text[end:begin] for begin, end in zip(begins, ends, strict=True)],
            [(index, key) for _, _, index, key in placed],
            places,
        )


def _shape(conversation: Conversation) -> tuple[object, ...] | None:
    """Return the conversation's shape (its roles, and which texts it has); None if it holds more than texts."""
    if conversation.tools or any(m.get("tool_calls") for m in conversation.messages):
        return None
    return tuple(
        (m["role"], bool(m.get("content")), bool(m.get("reasoning_content")), m.get("name"))
        for m in conversation.messages
    )
