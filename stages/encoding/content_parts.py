"""Message contents given as typed parts, sorted into text, reasoning, tool calls and tool results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sstoken.stages.encoding.messages import BadRow, Message
from sstoken.stages.encoding.tool_calls import Unused, read_calls

_TEXT = ("text", "input_text", "output_text", "refusal")
_REASONING = ("reasoning", "thinking", "reasoning_text", "think")
_CALL = ("tool_call", "tool_use", "function_call", "toolCall")
_RESULT = ("tool_result", "tool_response", "function_call_output")
_MEDIA = ("image", "video", "audio", "image_url", "video_url", "audio_url", "input_image", "input_audio",
          "input_video", "input_file", "file", "document")  # fmt: skip
_VALUE = ("text", "value", "content", "thinking", "reasoning", "refusal", "output")
"""The keys under which a part holds its text."""
_RESULT_IDS = ("tool_use_id", "tool_call_id", "call_id")


@dataclass
class Content:
    """A parsed content."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    """Messages with role `tool`."""
    unused: list[Unused] = field(default_factory=list)
    """Keys of parts and calls, and their values, that are in none of the fields above."""


def read_content(content: Any, where: str) -> Content:
    """Parse a content: a string, or typed parts.

    A message holds reasoning, text and calls in that order, so parts in any other order are refused.

    Raises:
        BadRow: media, an unknown type, or an order of parts that a message cannot represent.
    """
    if isinstance(content, str):
        return Content(content)
    if content is None:
        return Content()
    if isinstance(content, Mapping) and "type" in content:
        content = [content]
    if not isinstance(content, list):
        raise BadRow(
            "not text",
            f"{where}: a content is of type {type(content).__name__}; it has to be a string or typed parts",
        )
    if len(content) > 1 and all(isinstance(part, str) for part in content):
        raise BadRow(
            "not text",
            f"{where}: a list of {len(content)} strings; make it one string, or a list of typed parts",
        )
    found = Content()
    for part in content:
        _add(found, {"type": "text", "text": part} if isinstance(part, str) else part, where)
    return found


def _add(found: Content, part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in _MEDIA:
        raise BadRow("media", f"{where}: a part of type {kind}; only text can be encoded")
    key: str | None = None
    if kind in _TEXT:
        key, text = _text_of(part, where)
        if text.strip() and found.calls:
            raise BadRow("part order", f"{where}: text after a tool call; put it into a message of its own")
        found.text += text
    elif kind in _REASONING:
        if found.text.strip() or found.calls:
            raise BadRow("part order", f"{where}: reasoning after text or a tool call; split the message")
        key, text = _text_of(part, where)
        found.reasoning += text
    elif kind in _CALL:
        key = next((k for k in ("value", kind, "content") if part.get(k) is not None), None)
        if key is None or isinstance(part.get("name"), str) or isinstance(part.get("function"), Mapping):
            found.calls += read_calls(part, where, found.unused)
            return
        found.calls += read_calls(part[key], where, found.unused)
    elif kind in _RESULT:
        if found.text.strip():
            raise BadRow("part order", f"{where}: a tool result after text; put it first")
        key, result = _result(part, where, found.unused)
        found.results.append(result)
    else:
        raise BadRow("not text", f"{where}: a content part of type {kind!r}")
    read = ("type", "id", key, *(_RESULT_IDS if kind in _RESULT else ()))
    found.unused += [(str(name), value) for name, value in part.items() if name not in read]


def _text_of(part: Mapping[str, Any], where: str) -> tuple[str | None, str]:
    """Return the key that holds a part's text, and the text."""
    key = next((key for key in _VALUE if part.get(key) is not None), None)
    value = None if key is None else part[key]
    if isinstance(value, Mapping):  # {"text": {"value": ...}}
        value = value.get("value")
    if not isinstance(value, str):
        raise BadRow("not text", f"{where}: a part of type {part['type']!r} without a string")
    return key, value


def _result(part: Mapping[str, Any], where: str, unused: list[Unused]) -> tuple[str | None, Message]:
    """Return the key that holds a tool's result, and the message."""
    key = next((key for key in ("content", "output", "value", "text") if part.get(key) is not None), None)
    inner = read_content(None if key is None else part[key], where)
    if inner.calls or inner.results or inner.reasoning:
        raise BadRow("not text", f"{where}: a tool result that holds more than text")
    unused += inner.unused
    message: Message = {"role": "tool", "content": inner.text}
    identity = next((part[k] for k in _RESULT_IDS if part.get(k)), None)
    return key, message if identity is None else message | {"tool_call_id": identity}
