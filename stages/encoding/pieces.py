"""The pieces of text in a conversation: contents, reasoning, tool calls, tool definitions."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sstoken.stages.encoding.altering import TOOLS
from sstoken.stages.encoding.messages import Conversation

_KEYWORDS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
"""Keywords of JSON schemas that hold one schema."""
_FORMS = ("type", "required", "$ref", "$schema", "$id")
"""Keys of tool definitions whose values templates write in their own way."""


@dataclass(frozen=True)
class Piece:
    """A piece of text in a conversation."""

    owner: int
    """`TOOLS`, or the message's index plus 1."""
    kind: str
    """`content`, `system`, `reasoning`, `tool_calls` or `tools`."""
    text: str
    verbatim: bool = True
    """The template must print it verbatim except for whitespace at its ends; False: it may be escaped."""
    altered: bool = True
    """The altered copy replaces its letters. Keys and numbers keep theirs: templates sort by them and look
    them up."""
    is_name: bool = False
    """The name of a tool. Some templates look it up, so it may have to keep its letters."""
    changed: bool = False
    """For a missing piece: the rendering has its letters, in another form."""
    where: str = ""
    """For a tool definition: the tool and parameter, such as `search.filters.lang`."""

    @property
    def place(self) -> str:
        """Describe what it is and where: `reasoning of turn 2`."""
        what = f"{self.kind} (changed)" if self.changed else self.kind
        return f"{what} ({self.where})" if self.owner == TOOLS else f"{what} of turn {self.owner}"


def pieces(conversation: Conversation) -> list[Piece]:
    """Yield every piece of text that a rendering of the conversation must contain."""
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
                for text, altered in leaves(function.get("arguments"))
            ]
    return found


def _tool_pieces(tools: list[dict[str, Any]] | None) -> Iterator[Piece]:
    for tool in tools or ():
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            continue
        where = str(function.get("name", ""))
        if where.strip():
            yield Piece(TOOLS, "tools", where, verbatim=False, is_name=True, where=where)
        yield from _description(function, where)
        for key, value in function.items():
            if isinstance(value, Mapping):  # parameters, and the result where it is described
                yield from (_schema_pieces if key == "parameters" else _described)(value, where)
            elif isinstance(value, list | tuple):  # parameters, in older APIs
                for inner in value:
                    if isinstance(inner, Mapping) and isinstance(name := inner.get("name"), str):
                        yield _name_of_parameter(name, f"{where}.{name}")
                    yield from _described(inner, where)


def _schema_pieces(schema: Any, where: str) -> Iterator[Piece]:
    """Yield the names, descriptions and allowed values of parameters, including nested ones."""
    for key, value in schema.items() if isinstance(schema, Mapping) else ():
        if key == "properties" and isinstance(value, Mapping):
            for name, described in value.items():
                place = f"{where}.{name}"
                yield _name_of_parameter(str(name), place)
                yield from _described(described, place)
        elif key == "enum" and isinstance(value, list | tuple):
            for permitted in value:
                if isinstance(permitted, str) and permitted.strip():
                    yield Piece(TOOLS, "tools", permitted, verbatim=False, altered=False, where=where)
        elif isinstance(value, Mapping):
            if "type" in value and key not in _KEYWORDS:  # a parameter without `properties` around it
                yield _name_of_parameter(str(key), f"{where}.{key}")
            yield from _described(value, where)
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from _described(inner, where)


def _name_of_parameter(name: str, place: str) -> Piece:
    return Piece(TOOLS, "tools", name, verbatim=False, altered=False, where=place)


def _described(schema: Any, where: str) -> Iterator[Piece]:
    if isinstance(schema, Mapping):
        yield from _description(schema, where)
        yield from _schema_pieces(schema, where)


def _description(described: Mapping[str, Any], where: str) -> Iterator[Piece]:
    text = described.get("description")
    if isinstance(text, str) and text.strip():
        yield Piece(TOOLS, "tools", text, verbatim=False, where=where)


def details(tools: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the texts and numbers of tool definitions that templates may leave out, such as defaults and limits."""
    for key, value in chain.from_iterable(map(_scalars, tools)):
        if isinstance(value, str) and key not in _FORMS and value.strip():
            yield value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield json.dumps(value)


def _scalars(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each scalar inside a JSON value, with the key that it, or the list around it, stands under."""
    if isinstance(value, Mapping):
        yield from chain.from_iterable(_scalars(inner, str(name)) for name, inner in value.items())
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(_scalars(inner, key) for inner in value)
    else:
        yield key, value


def leaves(value: Any) -> Iterator[tuple[str, bool]]:
    """Yield the keys, strings and numbers of a JSON value. True, false and null count through their keys."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), False
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        if value.strip():
            yield value, True
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value), False
