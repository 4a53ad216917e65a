"""Chat messages, and what makes a list of them a conversation worth learning from."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from sstoken.errors import SstokenError

Message = dict[str, Any]
"""`role` (system, user, assistant, tool), `content`, and for some `tool_calls`, reasoning and ids."""


TrainedTurns = Literal["all", "last", "each"]
"""Which assistant turns are responses: all in one example, the last, or each in an example of its own."""
Losable = Literal["reasoning", "system", "tools", "tool_calls", "content"]
"""What a chat template may leave out of a conversation if the user allows it."""


@dataclass(frozen=True)
class Conversation:
    """What a row says, in one form whatever its layout: what `sstoken.stages.encoding.chat` renders."""

    messages: list[Message]
    """Contents are strings. `tool_calls` are `{"type": "function", "function": {"name", "arguments"}}`, with the
    arguments as an object; reasoning stands under `reasoning_content`."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the model is offered."""
    untrained: frozenset[int] = frozenset()
    """Indices of the assistant messages that the row marks as not to be trained on."""
    unused: tuple[str, ...] = ()
    """Columns and keys of messages that say something and are no part of it: `source`, `messages[].timestamp`."""
    notes: tuple[str, ...] = ()
    """What was done that the row alone does not show, once for each time; short and stable, for counting."""


MAX_CHARS = 5_000_000
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which an assistant turn may carry its thinking."""
_MAY_FOLLOW: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system", "user", "assistant", "tool"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


UNCERTAIN = "uncertain mask"
"""Why a row is bad of which it cannot be told for certain what the responses are."""
LOST = "lost by the template"
"""Why a row is bad of which the chat template leaves out a text."""


class BadRow(SstokenError):  # noqa: N818 (a row is bad; the error is what is raised about it)
    """A row that cannot be used. `reason` is short and stable, for counting; `detail` speaks of this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class NeedsDecision(BadRow):
    """A row that the user may want read in more than one way; the detail names the options."""


class PassedOver(BadRow):
    """A row that the user asked not to train on: counted, and no reason to stop."""


def has_more_than_content(message: Message) -> bool:
    """Whether an assistant turn says anything outside `content`: tool calls, reasoning."""
    return any(message.get(key) for key in ("tool_calls", *REASONING))


def check_messages(messages: list[Message], max_chars: int = MAX_CHARS) -> None:
    """Refuse what is no well-formed conversation.

    A system message stands first; the first other one is the user's; an assistant follows a user or a tool; a
    tool follows an assistant or a tool. There is at least one assistant turn and none is empty.

    Raises:
        BadRow: a role out of order, no answer, a lone surrogate, or more than `max_chars` characters.
    """
    _check_length(messages, max_chars)
    check_text(messages)
    _check_order(messages)
    _check_answers(messages)


def _check_length(messages: list[Message], max_chars: int) -> None:
    length = sum(
        len(value) if isinstance(value, str) else len(str(value)) for m in messages for value in m.values()
    )
    if length > max_chars:
        raise BadRow("too long", f"{length:,} characters, more than --max-chars {max_chars:,}")


def check_text(value: Any) -> None:
    """Refuse text that no tokenizer takes: UTF-8 has no code for half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "lone surrogate", f"character U+{ord(error.object[error.start]):04X} stands alone"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("bad message", f"not plain JSON values ({type(error).__name__})") from error


def _check_order(messages: list[Message]) -> None:
    previous = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if previous not in _MAY_FOLLOW[role]:
            where = f"after {previous}" if previous else "at the start"
            raise BadRow("role order", f"message {number} is {role} {where}")
        previous = role


def _check_answers(messages: list[Message]) -> None:
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer", "no assistant message")
    if not all(m.get("content", "").strip() or m.get("tool_calls") for m in answers):
        raise BadRow("no answer", "an assistant message is empty")
