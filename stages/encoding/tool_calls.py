"""Tool calls and tool definitions: the forms that APIs and trainers use, parsed into one form."""

from collections.abc import Mapping
from typing import Any

from sstoken.stages.encoding.json_values import json_or_text, parse_json
from sstoken.stages.encoding.messages import BadRow

_ARGUMENTS = ("arguments", "parameters", "input", "args")
"""Where a call keeps its arguments: OpenAI and most others, Llama 3, Anthropic, LangChain."""
_IDS = ("id", "tool_call_id", "call_id")
Unused = tuple[str, Any]
"""A key that ends up in no message, and its value."""


def read_calls(value: Any, where: str, unused: list[Unused]) -> list[dict[str, Any]]:
    """Parse calls into `{"type": "function", "function": {"name", "arguments"}}`, with `id` if present.

    The value is a call or a list of them, possibly as JSON text. A call may be a bare name and arguments. What else it
    has is appended to `unused`.

    Raises:
        BadRow: a call has no name, or its arguments are not a JSON object.
    """
    parsed = _parsed(value, where)
    calls = parsed if isinstance(parsed, list) else [parsed]
    return [_call(_parsed(call, where), where, unused) for call in calls]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Parse tool definitions into `{"type": "function", "function": {...}}`; None if there are none.

    The value is one definition or a list of them, possibly as JSON text. A definition may lack the wrapper.

    Raises:
        BadRow: it is something else.
    """
    tools = json_or_text(value, "[{")
    if isinstance(tools, str):
        tools = tools.strip()
    if not tools:
        return None
    tools = [json_or_text(tool, "{") for tool in (tools if isinstance(tools, list) else [tools])]
    return [_tool(tool) for tool in tools]


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad tool call", f"{where}: not JSON ({str(error)[:80]})") from error


def _call(call: Any, where: str, unused: list[Unused]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, str):  # {"function": "name", "arguments": {...}}
        function = {**call, "name": function}
    function = call if function is None else function
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRow("bad tool call", f"{where}: a call without a name")
    key = next((key for key in _ARGUMENTS if function.get(key) is not None), None)
    given = None if key is None else function[key]
    arguments = {} if given is None or given == "" else _parsed(given, where)
    if not isinstance(arguments, Mapping):
        raise BadRow("bad tool call", f"{where}: the arguments of {name} are not a JSON object")
    read = ("type", "function", "name", key, *_IDS)
    unused += [(str(name), value) for name, value in {**call, **function}.items() if name not in read]
    identity = next((call[key] for key in _IDS if call.get(key) is not None), None)
    known = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return known if identity is None else known | {"id": identity}


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise BadRow(
            "bad tools", "the tools are not a list of JSON schemas; leave them out with --ignore-column"
        )
    if isinstance(tool.get("function"), Mapping):
        return {"type": "function"} | dict(tool) | {"function": _with_schema(tool["function"])}
    if not isinstance(tool.get("name"), str):
        raise BadRow("bad tools", "a tool has no name")
    function = _with_schema({key: value for key, value in tool.items() if key != "type"})
    if "input_schema" in function and "parameters" not in function:  # Anthropic
        function = {("parameters" if k == "input_schema" else k): v for k, v in function.items()}
    return {"type": "function", "function": function}


def _with_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a schema given as JSON text."""
    return {
        k: json_or_text(v, "{") if k in ("parameters", "input_schema") else v for k, v in function.items()
    }
