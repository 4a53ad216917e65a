"""Parse the turns of a conversation, in the styles of various APIs and trainers, into messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sstoken.stages.encoding.content_parts import read_content
from sstoken.stages.encoding.json_values import json_or_text
from sstoken.stages.encoding.marks import TURN_MARKS, count_marked, turn_marks
from sstoken.stages.encoding.messages import REASONING, BadRow, Message
from sstoken.stages.encoding.tool_calls import Unused, read_calls

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
    "function_call": "call",
    "function-call": "call",
    "tool_call": "call",
}
"""Lower-case speaker names and their roles; `call`: an assistant whose content is a tool call."""
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_SAID = ("content", "value", "text")
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_READ = {"role", "from", *_SAID, "tool_calls", "function_call", "name", "tool_call_id",
         "train_detail", *REASONING, *TURN_MARKS}  # fmt: skip
_PLAIN = {"role", "from", "content", "value"}


@dataclass
class Turns:
    """Messages, and what the row says about each."""

    messages: list[Message] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    """For each message, the index of its turn in the row's list."""
    trained: list[bool] = field(default_factory=list)
    """For each message, whether its own marks allow training on it."""
    speakers: list[str] = field(default_factory=list)
    """For each turn of the row's list, its speaker as written there."""
    in_prompt: range = range(0)
    """The turns of the row's list that a prompt column holds."""
    marked_prompts: int = 0
    """The number of turns that are not answers but are marked as trained on."""
    others: dict[str, list[Any]] = field(default_factory=dict)
    """Keys of turns that end up in no message, and their values."""

    def add(self, message: Message, turn: int, trained: bool) -> None:
        """Append one message."""
        self.messages.append(message)
        self.turn.append(turn)
        self.trained.append(trained)

    def leave(self, key: str, value: Any) -> None:
        """Remember a value that ends up in no message, unless it is empty."""
        if value not in _EMPTY:
            self.others.setdefault(key, []).append(value)

    @property
    def answers(self) -> list[bool]:
        """For each turn of the row's list, whether it is the assistant's."""
        found = [False] * len(self.speakers)
        for message, turn in zip(self.messages, self.turn, strict=True):
            found[turn] |= message["role"] == "assistant"
        return found


def read_turns(value: Any, ignored: frozenset[str] = frozenset()) -> Turns:
    """Parse a list of turns, or its JSON text, into messages.

    Consecutive calls, which some layouts store as separate turns, become one message; so do an answer and the calls
    that directly follow it. Keys in `ignored` are disregarded.

    Raises:
        BadRow: not a list, an unknown kind of turn, or an unsupported mark.
    """
    raw = json_or_text(value)
    if not isinstance(raw, list) or not raw:
        found = "an empty list" if raw == [] else f"of type {type(raw).__name__}"
        hint = "; write it with json.dumps" if isinstance(raw, str) and raw[:1] == "[" else ""
        raise BadRow("no messages", f"the conversation is {found}, and has to be a list of messages{hint}")
    if isinstance(raw[0], str):  # each turn as JSON text
        raw = [json_or_text(turn, "{") for turn in raw]
    turns = Turns()
    if ignored:
        raw = [_without(turn, ignored, turns) for turn in raw]
    roles = [_role(turn, number) for number, turn in enumerate(raw, 1)]
    plain = all(turn.keys() <= _PLAIN for turn in raw) and "call" not in roles  # by far the most common
    trained = [True] * len(raw)
    if not plain:
        answers = [role in ("assistant", "call") for role in roles]
        trained = turn_marks(raw, answers)
        turns.marked_prompts = count_marked(raw, answers)
    for index, (turn, role) in enumerate(zip(raw, roles, strict=True)):
        turns.speakers.append(str(turn.get("role") or turn.get("from")))
        said = turn.get("content")
        if plain and isinstance(said, str) and "value" not in turn:
            turns.add({"role": role, "content": said}, index, True)
            continue
        _add(turns, turn, role, index, trained[index])
        for key, other in turn.items():
            if key not in _READ:
                turns.leave(str(key), other)
    return turns


def _without(turn: Any, ignored: frozenset[str], turns: Turns) -> Any:
    if not isinstance(turn, Mapping) or ignored.isdisjoint(turn):
        return turn
    for key in ignored.intersection(turn):
        turns.leave(key, turn[key])
    return {key: value for key, value in turn.items() if key not in ignored}


def _role(turn: Any, number: int) -> str:
    if not isinstance(turn, Mapping):
        raise BadRow("bad message", f"message {number} is a {type(turn).__name__}, not an object")
    name = turn.get("from") if turn.get("role") is None else turn["role"]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow("unknown role", f"message {number} is from {name!r}; known: {', '.join(ROLES)}")
    return role


def _add(turns: Turns, turn: Mapping[str, Any], role: str, index: int, trained: bool) -> None:
    where = f"message {index + 1}"
    for key in () if turn.keys() <= _PLAIN else _MEDIA:
        if turn.get(key):
            raise BadRow("media", f"{where} has {key}; only text can be encoded")
    saying = [key for key in _SAID if turn.get(key) is not None]
    said = turn[saying[0]] if saying else None
    for key in saying[1:]:
        if turn[key] != said:
            turns.leave(key, turn[key])
    if role == "call":
        calls = _calls(turns, "", said, where)
        if turns.messages and turns.messages[-1]["role"] == "assistant":
            _join_calls(turns, calls, trained, where)
        else:
            turns.add({"role": "assistant", "content": "", "tool_calls": calls}, index, trained)
        return
    content = read_content(said, where)
    for key, value in content.unused:
        turns.leave(f"content[].{key}", value)
    for result in content.results:
        turns.add(result, index, True)
    if content.results and not (content.text.strip() or content.calls or content.reasoning):
        return
    message: Message = {"role": role, "content": content.text}
    calls = content.calls + _calls(turns, "tool_calls[].", turn.get("tool_calls") or [], where)
    older = _calls(turns, "function_call.", turn.get("function_call") or [], where)
    calls += [call for call in older if call["function"] not in [c["function"] for c in calls]]
    reasoning = _reasoning(turn, content.reasoning, where)
    if (calls or reasoning) and role != "assistant":
        raise BadRow("bad message", f"{where} is from {role} and holds tool calls or reasoning")
    if calls:
        message["tool_calls"] = calls
    if reasoning:
        message["reasoning_content"] = reasoning
    message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    turns.add(message, index, trained)


def _calls(turns: Turns, place: str, value: Any, where: str) -> list[dict[str, Any]]:
    """Parse calls that stand at a place such as `tool_calls[].`; remember what of them ends up in no message."""
    unused: list[Unused] = []
    calls = read_calls(value, where, unused)
    for key, left in unused:
        turns.leave(place + key, left)
    return calls


def _reasoning(turn: Mapping[str, Any], of_parts: str, where: str) -> str:
    contents = [read_content(turn[key], where) for key in REASONING if turn.get(key)]
    if any(content.calls or content.results for content in contents):
        raise BadRow("not text", f"{where}: a reasoning that holds more than text")
    given = {of_parts, *(content.reasoning + content.text for content in contents)} - {""}
    if len(given) > 1:
        raise BadRow("bad message", f"{where} holds two different reasonings")
    return given.pop() if given else ""


def _join_calls(turns: Turns, calls: list[dict[str, Any]], trained: bool, where: str) -> None:
    if turns.trained[-1] != trained:
        raise BadRow("unclear mark", f"{where}: a call is marked differently from the answer it belongs to")
    turns.messages[-1].setdefault("tool_calls", []).extend(calls)
