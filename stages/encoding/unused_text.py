"""Columns and keys that play no role in a row's conversation: metadata, or text that would be lost."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sstoken.stages.encoding.column_names import kind_of_name, likely_roles
from sstoken.stages.encoding.json_values import json_or_text, says_something
from sstoken.stages.encoding.layouts import OPTIONAL, Layout
from sstoken.stages.encoding.messages import Message, NeedsDecision

UNUSED_TEXT = "unused text"
"""Why a row is bad: it has text that is in no message."""
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
"""TRL's column of extra template arguments, such as instructions. It is not passed on."""
_RENDERED = (
    "text",
    "formatted",
    "formatted_text",
    "formatted_prompt",
    "rendered",
    "full_text",
    "prompt",
    "chat",
)
"""Columns that may repeat the complete conversation as one text."""
_ENOUGH_WORDS = 5
_ENOUGH_SIGNS = 12
_CHINESE_OR_JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")


def check_unused(
    values: Iterable[tuple[str, str, Any]], messages: list[Message], layout: Layout
) -> list[str]:
    """Return the names of unused columns and keys; refuse those that hold text of a conversation.

    Text that also appears in the messages is not lost, nor is a column that repeats the complete conversation as one
    text. `values` hold the name as shown to the user (`messages[].name`), the bare name and the value.

    Raises:
        NeedsDecision: with reason `unused text`; lists all such columns and the options that use or ignore them.
    """
    unused, lost = [], []
    for shown, name, value in values:
        if not says_something(value):
            continue
        unused.append(shown)
        if name not in layout.ignored and _is_lost(name, value, messages):
            lost.append((shown, name))
    if lost:
        take = next((_take(n, layout) for shown, n in lost if shown == n != TEMPLATE_ARGUMENTS), "")
        leave = " ".join(f"--ignore-column {name}" for _, name in lost)
        raise NeedsDecision(
            UNUSED_TEXT,
            f"{', '.join(shown for shown, _ in lost)} would be lost, being part of no message; {take}leave it out "
            f"with {leave}",
        )
    return unused


def _take(name: str, layout: Layout) -> str:
    role = next(role for role in (*likely_roles(name), *OPTIONAL[layout.format]) if role in layout.columns)
    return f"take it with --column {role}={name}, or "


def _is_lost(name: str, value: Any, messages: list[Message]) -> bool:
    if name == TEMPLATE_ARGUMENTS:
        return True
    kind = kind_of_name(name)
    if kind == "metadata":
        return False
    value = json_or_text(value, "[{")
    is_conversation = kind == "conversation" or _holds_turns_or_tools(value)
    texts = [t for t in _texts(value) if says_something(t) and (is_conversation or _is_natural(t))]
    if not texts:
        return False
    contents = [str(m.get(key, "")).strip() for m in messages for key in ("content", "reasoning_content")]
    everything = "\n".join(contents)
    if all(text.strip() in everything for text in texts):
        return False
    if name not in _RENDERED or not isinstance(value, str):
        return True
    # Compare line by line: a rendering may put more than a line break between an instruction and its input.
    lines = (line.strip() for part in contents for line in part.splitlines())
    return not all(line in value for line in lines)


def _holds_turns_or_tools(value: Any) -> bool:
    entries = value if isinstance(value, list) else [value]
    return any(
        (entry.keys() & {"role", "from"} and entry.keys() & {"content", "value"})
        or ("name" in entry and entry.keys() & {"parameters", "input_schema"})
        or isinstance(entry.get("function"), Mapping)
        for entry in entries
        if isinstance(entry, Mapping)
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield the strings in a value; for turns, only their contents."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        contents = [value[key] for key in ("content", "value") if value.get(key) is not None]
        for inner in contents if contents and ("role" in value or "from" in value) else value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _is_natural(text: str) -> bool:
    """Return whether a text is a sentence, not a name, an address or a code."""
    words = [word for word in text.split() if any(map(str.isalpha, word))]
    return len(words) >= _ENOUGH_WORDS or len(_CHINESE_OR_JAPANESE.findall(text[:1000])) >= _ENOUGH_SIGNS
