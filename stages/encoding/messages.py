"""Chat messages, and the checks that a list of them is a conversation to train on."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from sstoken.errors import SstokenError

Message = dict[str, Any]
"""`role` (system, user, assistant, tool), `content`, and optionally `tool_calls`, reasoning and ids."""

TrainedTurns = Literal["all", "last", "each"]
"""Which assistant turns are responses: all in one example, the last, or each in its own example."""
Losable = Literal["reasoning", "system", "tools", "tool_calls", "content"]
"""Kinds of text that a chat template may drop if the user allows it."""


@dataclass(frozen=True)
class Conversation:
    """A parsed row, independent of its layout: the input of `sstoken.stages.encoding.chat`."""

    messages: list[Message]
    """Contents are strings. `tool_calls` are `{"type": "function", "function": {"name", "arguments"}}`, with the
    arguments as an object; reasoning is under `reasoning_content`."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools offered to the model."""
    untrained: frozenset[int] = frozenset()
    """Indices of assistant messages that the row marks as not trained on."""
    unused: tuple[str, ...] = ()
    """Non-empty columns and message keys that are not part of it: `source`, `messages[].timestamp`."""
    notes: tuple[str, ...] = ()
    """Changes that are not visible in the row, one entry per change; short and stable, for counting."""


MAX_CHARS = 5_000_000
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which an assistant turn may hold its reasoning."""
_MAY_FOLLOW: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system", "user", "assistant", "tool"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}

UNCERTAIN = "uncertain mask"
"""Why a row is bad: its response spans are not certain."""
LOST = "lost by the template"
"""Why a row is bad: the chat template drops text of it."""


class BadRow(SstokenError):  # noqa: N818 (a row is bad; the error is what is raised about it)
    """A row that cannot be used. `reason` is short and stable, for counting; `detail` describes this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class NeedsDecision(BadRow):
    """A row that can be read in several ways; the detail names the options."""


class PassedOver(BadRow):
    """A row that the user chose not to train on: counted, and not an error."""


def check_messages(messages: list[Message], max_chars: int = MAX_CHARS) -> None:
    """Check that messages form a conversation.

    A system message comes first; the first other message is the user's; an assistant follows a user or a tool; a tool
    follows an assistant or a tool. There is at least one assistant turn, and none is empty.

    Raises:
        BadRow: a role is out of order, there is no answer, a text has a lone surrogate, or there are more than
            `max_chars` characters.
    """
    length = sum(len(str(value)) for message in messages for value in message.values())
    if length > max_chars:
        raise BadRow("too long", f"{length:,} characters, more than --max-chars {max_chars:,}")
    check_text(messages)
    previous = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if previous not in _MAY_FOLLOW[role]:
            where = f"after {previous}" if previous else "at the start"
            raise BadRow("role order", f"message {number} is {role} {where}")
        previous = role
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer", "no assistant message")
    if not all(m.get("content", "").strip() or m.get("tool_calls") for m in answers):
        raise BadRow("no answer", "an assistant message is empty")


def check_text(value: Any) -> None:
    """Refuse text that cannot be tokenized: UTF-8 cannot encode a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "lone surrogate", f"character U+{ord(error.object[error.start]):04X} is a lone surrogate"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        what = f"not plain JSON values ({type(error).__name__})"
        if "Decimal" in str(error):
            what = "a number of more digits than a float keeps; write it as text, or leave it out"
        raise BadRow("bad message", what) from error
