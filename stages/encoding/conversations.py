"""A raw row, in any of the layouts that datasets come in, as a list of chat messages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sstoken.errors import SstokenError, UsageError
from stages.encoding.messages import (
    MAX_CHARS,
    REASONING,
    BadRow,
    Conversation,
    Message,
    check_messages,
    check_text,
)

Format = Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "qa"]

_REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "qa": ("question", "answer"),
}
"""The columns that make a row of each format, in the order in which formats are tried."""
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt-completion": ("tools",),
    "qa": ("system",),
}
_OTHER_NAMES = {"output": ("response",)}
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}
_PASSED_ON = ("name", "tool_call_id", *REASONING)


@dataclass(frozen=True)
class Layout:
    """How rows hold conversations."""

    format: str
    """One of `Format`, `auto` excepted."""
    columns: tuple[tuple[str, str], ...]
    """Each role of the format and the column that plays it, present or not."""

    def get(self, row: Mapping[str, Any], role: str) -> Any:
        """The row's value for `role`, None where it has none."""
        return row.get(dict(self.columns).get(role, role))


def check_columns(format: str, columns: Mapping[str, str]) -> None:
    """Refuse roles that the format does not have.

    Raises:
        UsageError: with the roles it has.
    """
    names = list(_REQUIRED) if format == "auto" else [format]
    legal = sorted({role for n in names for role in _REQUIRED[n] + _OPTIONAL[n]})
    for role in columns:
        if role not in legal:
            raise UsageError(f"column {role!r}: format {format} has the columns {', '.join(legal)}")


def detect_layout(
    row: Mapping[str, Any], format: str = "auto", columns: Mapping[str, str] | None = None
) -> Layout:
    """The layout of a dataset, from its first row.

    Args:
        row: its columns are what is looked at.
        format: a known format, or `auto` to take the first whose required columns are all there.
        columns: overrides, a format's role -> the column that plays it.

    Raises:
        SstokenError: no known layout has these columns, or `format` needs one that is missing.
    """
    given = columns or {}
    for name in _REQUIRED if format == "auto" else (format,):
        resolved = tuple((role, _column(row, role, given)) for role in _REQUIRED[name] + _OPTIONAL[name])
        if all(column in row for role, column in resolved if role in _REQUIRED[name]):
            return Layout(name, resolved)
    known = "; ".join(f"{n} ({', '.join(c)})" for n, c in _REQUIRED.items() if format in ("auto", n))
    raise SstokenError(
        f"the columns {', '.join(map(str, row)) or '(none)'} make no known layout: {known}; say which column is "
        f"which with --format and --column, e.g. --format qa --column question={next(iter(row), 'text')}"
    )


def to_conversation(row: Any, layout: Layout, max_chars: int = MAX_CHARS) -> Conversation:
    """What a row says.

    Raises:
        BadRow: as `to_messages` and `to_tools`.
    """
    return Conversation(to_messages(row, layout, max_chars), to_tools(row, layout))


def to_messages(row: Any, layout: Layout, max_chars: int = MAX_CHARS) -> list[Message]:
    """The conversation of a row: dicts with `role` (system, user, assistant, tool) and `content`.

    Args:
        row: the parsed row.
        layout: of the dataset it stands in.
        max_chars: the longest conversation taken, in characters of all messages together.

    Raises:
        BadRow: it holds no well-formed conversation that ends up teaching something.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", f"a {type(row).__name__} instead of named columns")
    for role in _REQUIRED[layout.format]:
        if layout.get(row, role) is None:
            raise BadRow(
                "no answer" if role in ("answer", "output", "completion") else "missing column",
                f"column {dict(layout.columns)[role]!r} is missing or null",
            )
    messages = _PARSERS[layout.format](row, layout)
    check_messages(messages, max_chars)
    return messages


def to_tools(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]] | None:
    """The tool schemas that a row offers the model, None where it has none.

    Raises:
        BadRow: the column holds something else.
    """
    tools = _maybe_json(layout.get(row, "tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("bad tools", "the tools column is not a list of JSON schemas")
    tools = _without_nulls(tools)
    check_text(tools)
    return tools


def _column(row: Mapping[str, Any], role: str, given: Mapping[str, str]) -> str:
    names = [given[role]] if role in given else [role, *_OTHER_NAMES.get(role, ())]
    return next((name for name in names if name in row), names[0])


def _from_turns(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    column = "messages" if layout.format == "messages" else "conversations"
    return _system(row, layout) + _turns(layout.get(row, column))


def _from_prompt(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    sides = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = layout.get(row, column)
        turns = _maybe_json(value)
        # A plain prompt may itself be a JSON list, of numbers say; a list of objects is a conversation.
        is_text = isinstance(value, str) and not (
            isinstance(turns, list) and turns and all(isinstance(turn, Mapping) for turn in turns)
        )
        sides += [{"role": role, "content": value}] if is_text else _turns(turns)
    return sides


def _from_alpaca(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    instruction, extra, output = (layout.get(row, c) for c in ("instruction", "input", "output"))
    question = _text(instruction) + ("\n" + _text(extra) if extra and _text(extra).strip() else "")
    return _system(row, layout) + _pair(question, _text(output))


def _from_qa(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    pair = _pair(_text(layout.get(row, "question")), _text(layout.get(row, "answer")))
    return _system(row, layout) + pair


_PARSERS = {
    "messages": _from_turns,
    "sharegpt": _from_turns,
    "prompt-completion": _from_prompt,
    "alpaca": _from_alpaca,
    "qa": _from_qa,
}


def _system(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    text = layout.get(row, "system") if "system" in _OPTIONAL[layout.format] else None
    return [{"role": "system", "content": _text(text)}] if text else []


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _turns(value: Any) -> list[Message]:
    turns = _maybe_json(value)
    if not isinstance(turns, list) or not turns:
        raise BadRow("no messages", "the conversation is not a non-empty list")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow("bad message", f"message {number} is a {type(turn).__name__}, not an object")
    sharegpt = "from" in turn and "role" not in turn
    roles = _SHAREGPT_ROLES if sharegpt else _ROLES
    name = turn.get("from" if sharegpt else "role")
    if not isinstance(name, str) or name not in roles:
        raise BadRow("unknown role", f"message {number} is from {name!r}; known: {', '.join(roles)}")
    message: Message = {"role": roles[name]}
    content = turn.get("value" if sharegpt else "content")
    calls = _maybe_json(turn.get("tool_calls"))
    if content is not None or not calls:
        message["content"] = _text(content)
    if calls:
        message["tool_calls"] = _without_nulls(calls)
    return message | {key: turn[key] for key in _PASSED_ON if turn.get(key) is not None}


def _text(content: Any) -> str:
    """A string, or the text parts of a list of parts; nothing else is text."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [
            p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if text is not None)
    raise BadRow(
        "not text", f"a content is a {type(content).__name__}, neither a string nor a list of text parts"
    )


def _maybe_json(value: Any) -> Any:
    """Lists are often stored as JSON in a string column."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct the keys of all others, null where absent."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


assert set(_REQUIRED) == set(get_args(Format)) - {"auto"}
