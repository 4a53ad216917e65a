"""Ordinary conversations, one of each kind, in the form that `to_conversation` gives."""

from typing import Any

from sstoken.stages.encoding.messages import Conversation, Message


def _tool(name: str, description: str, **parameters: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)[:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _says(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def _result(content: str, name: str = "get_weather", id: str = "call12345") -> Message:
    return {"role": "tool", "name": name, "tool_call_id": id, "content": content}


def _calls(name: str, arguments: dict[str, Any], id: str = "call12345") -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


_SYSTEM: Message = {"role": "system", "content": "Speak briefly."}
_FRUIT = _user("Name a red fruit.")
_YELLOW = _user("And a yellow one?")
_WEATHER = _tool("get_weather", "Weather of a place.", city={"type": "string", "description": "A city."})
_SEARCH = _tool("search_web", "Looks things up.", query={"type": "string", "description": "Words."})
_ADD = _tool("add", "Adds numbers.", a={"type": "number"}, b={"type": "number"})
_PING = _tool("ping", "Tells whether it is up.")

SHOWN = {
    "one turn": Conversation([_FRUIT, _says("A cherry is red.")]),
    "system": Conversation([_SYSTEM, _FRUIT, _says("A cherry is red.")]),
    "turns": Conversation([_FRUIT, _says("A cherry is red."), _YELLOW, _says("A lemon, say I.")]),
    "reasoning": Conversation([_FRUIT, _says("A cherry is red.", reasoning_content="Think of orchards.")]),
    "reasoning in turns": Conversation(
        [
            _FRUIT,
            _says("A cherry is red.", reasoning_content="Think of orchards."),
            _YELLOW,
            _says("A lemon, say I.", reasoning_content="Citrus comes to mind."),
        ]
    ),
    "tool call": Conversation(
        [
            _user("Weather in Oslo?"),
            _says("", tool_calls=[_calls("get_weather", {"city": "Oslo"})]),
            _result("7 degrees"),
            _says("It has seven."),
        ],
        [_WEATHER],
    ),
    "tool calls with text": Conversation(
        [
            _user("Weather in Oslo, then Rome?"),
            _says("Let me look.", tool_calls=[_calls("get_weather", {"city": "Oslo"})]),
            _result("7 degrees"),
            _says("", tool_calls=[_calls("get_weather", {"city": "Rome"})]),
            _result("21 degrees"),
            _says("Oslo seven, Rome more."),
        ],
        [_WEATHER],
    ),
}
"""What the table of the documentation has a column for."""

MORE = {
    "three turns": Conversation(
        [_SYSTEM, _FRUIT, _says("Cherry."), _YELLOW, _says("Lemon."), _user("A third?"), _says("Plum.")]
    ),
    "blanks": Conversation([_user("  Name a fruit.\n\n"), _says("\n\n  A cherry.\n  Indented.\n")]),
    "code": Conversation(
        [_user("A loop in C?"), _says('```c\nfor (;;) {\n    f("%d\\n", i);\n}\n```\nAnd <b>{{ x }}</b> & {% y %}.')]
    ),
    "marks alone": Conversation([_user("?!"), _says("What is meant?"), _user("..."), _says("Unsure.")]),
    "answers of marks": Conversation([_user("An empty dict?"), _says("{}"), _user("A list?"), _says("[]")]),
    "numbers": Conversation([_user("7*8?"), _says("56"), _user("0*9?"), _says("0")]),
    "same text": Conversation([_user("Say yes."), _says("Yes."), _user("Yes."), _says("Yes.")]),
    "scripts": Conversation([_user("Назови фрукт. 果物は？"), _says("Вишня 🍒 — さくらんぼ, ‘one’ “two” ﬁ é é.")]),
    "thought in content": Conversation([_FRUIT, _says("<think>\nOrchards.\n</think>\n\nA cherry.")]),
    "thoughts in content": Conversation(
        [
            _FRUIT,
            _says("<think>\nOrchards.\n</think>\n\nA cherry."),
            _YELLOW,
            _says("<think>\nCitrus.\n</think>\n\nA lemon."),
        ]
    ),
    "reasoning and call": Conversation(
        [
            _user("Weather in Oslo?"),
            _says(
                "", reasoning_content="Look it up.", tool_calls=[_calls("get_weather", {"city": "Oslo"})]
            ),
            _result("7 degrees"),
            _says("It has seven.", reasoning_content="The tool said so."),
        ],
        [_WEATHER],
    ),
    "calls at once": Conversation(
        [
            _SYSTEM,
            _user("Weather in Oslo, and news?"),
            _says(
                "",
                tool_calls=[
                    _calls("get_weather", {"city": "Oslo"}, "call11111"),
                    _calls("search_web", {"query": "news of today"}, "call22222"),
                ],
            ),
            _result("7 degrees", id="call11111"),
            _result("Nothing", "search_web", "call22222"),
            _says("Seven, no news."),
        ],
        [_WEATHER, _SEARCH],
    ),
    "escapes": Conversation(
        [
            _user("Search it"),
            _says(
                "",
                tool_calls=[
                    _calls(
                        "search_web",
                        {"query": 'say "hi"\nto <Bob> & {co} \\ ünï', "n": 3, "ok": True, "to": ["x1", None]},
                    )
                ],
            ),
            _result('{"hits": [1, 2]}', "search_web"),
            _says("Found two."),
        ],
        [_SEARCH],
    ),
    "call of numbers": Conversation(
        [_user("2+3?"), _says("", tool_calls=[_calls("add", {"a": 2, "b": 3})]), _result("5", "add"), _says("Five.")],
        [_ADD],
    ),
    "call without arguments": Conversation(
        [_user("Up?"), _says("", tool_calls=[_calls("ping", {})]), _result("pong", "ping"), _says("It is up.")],
        [_PING],
    ),
    "call at the end": Conversation(
        [_user("Weather?"), _says("I look.", tool_calls=[_calls("get_weather", {"city": "Oslo"})])], [_WEATHER]
    ),
    "tools left alone": Conversation([_user("Hello there"), _says("How can I help?")], [_WEATHER]),
}  # fmt: skip
"""What else is tried with every template."""
