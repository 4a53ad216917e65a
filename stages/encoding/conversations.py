"""Parse a raw row, in any dataset layout, into a conversation."""

from collections.abc import Mapping
from typing import Any

from sstoken.stages.encoding.content_parts import read_content
from sstoken.stages.encoding.json_values import json_or_text, says_something, turns_or_text
from sstoken.stages.encoding.layouts import REQUIRED, Beside, Layout
from sstoken.stages.encoding.marks import PROMPTS_TOO, list_marks, refuse_unknown_marks, row_mark
from sstoken.stages.encoding.messages import MAX_CHARS, BadRow, Conversation, check_messages, check_text
from sstoken.stages.encoding.preference import wanted
from sstoken.stages.encoding.tool_calls import read_tools
from sstoken.stages.encoding.turns import Turns, read_turns
from sstoken.stages.encoding.unused_text import check_unused

UNTRAINED = "answers left out of the response by a mark"
PROMPT_MARKED = "prompt turns marked to be trained on (answers alone are)"
_SWITCHES = ("on", "off", "true", "false", "yes", "no")
EARLIER = "answers before the wanted one, not trained on"
IN_PROMPT = "answers in the prompt column, not trained on"
WANTED = "wanted answers of preference rows"


def to_conversation(row: Any, layout: Layout, max_chars: int = MAX_CHARS) -> Conversation:
    """Parse a row into a conversation of at most `max_chars` characters in all its messages together.

    Raises:
        BadRow: the row has no well-formed conversation with a turn to train on, or holds something that a
            conversation cannot: media, a preference, text in an unused column.
    """
    original = row
    row, judged = wanted(row, layout.ignored, take=layout.preference == "take")
    beside = layout.beside(row)
    _check_media(row, beside)
    for role in REQUIRED[layout.format]:
        if layout.get(row, role) is None:
            raise BadRow(
                "no answer" if role in ("answer", "output", "completion") else "missing column",
                f"column {layout.columns[role]!r} is missing or null",
            )
    turns = _PARSERS[layout.format](row, layout)
    left = [(name, name, row[name]) for name in beside.others]
    left += [(f"messages[].{key}", key.rpartition(".")[2], values) for key, values in turns.others.items()]
    others = [each for each in left if each[1] not in layout.ignored]
    refuse_unknown_marks(others, (len(turns.answers), sum(turns.answers)))
    tools = read_tools(layout.get(row, "tools"))
    notes = [PROMPT_MARKED] * turns.marked_prompts
    untrained = _untrained(row, turns, beside, notes)
    if judged:
        untrained |= _before_the_last_prompt(turns, untrained, notes)
    untrained |= _in_prompt(turns, untrained, notes)
    messages = _with_system(row, layout, turns)
    untrained = {index + len(messages) - len(turns.messages) for index in untrained}
    unused = check_unused(left, messages, layout) if left else []
    if _is_switch(layout.get(row, "reasoning")):
        unused.append(layout.columns["reasoning"])
    unused += sorted(name for name in layout.ignored if says_something(original.get(name)))
    check_messages(messages, max_chars)
    if tools:
        check_text(tools)
    if untrained and len(untrained) == sum(m["role"] == "assistant" for m in messages):
        raise BadRow("not to be trained on", "every answer is marked so")
    return Conversation(messages, tools, frozenset(untrained), tuple(unused), tuple(notes))


def _from_turns(row: Mapping[str, Any], layout: Layout) -> Turns:
    (role,) = REQUIRED[layout.format]
    return read_turns(layout.get(row, role), layout.ignored)


def _from_prompt(row: Mapping[str, Any], layout: Layout) -> Turns:
    asked, said = (
        value if isinstance(value, list) else [{"role": role, "content": value}]
        for role, value in (
            ("user", turns_or_text(layout.get(row, "prompt"))),
            ("assistant", turns_or_text(layout.get(row, "completion"))),
        )
    )
    turns = _read(row, layout, _with_context(row, layout, [*asked, *said]))
    stop = len(turns.speakers) - len(said)
    turns.in_prompt = range(stop - len(asked), stop)
    return turns


def _from_alpaca(row: Mapping[str, Any], layout: Layout) -> Turns:
    instruction, *extras, output = (
        _text(layout.get(row, role), role) for role in ("instruction", "input", "context", "output")
    )
    question = "\n".join([instruction, *filter(str.strip, extras)])
    return _read(row, layout, _pair(question, output))


def _from_qa(row: Mapping[str, Any], layout: Layout) -> Turns:
    question, answer = (_text(layout.get(row, role), role) for role in ("question", "answer"))
    return _read(row, layout, _with_context(row, layout, _pair(question, answer)))


_PARSERS = {
    "messages": _from_turns,
    "sharegpt": _from_turns,
    "prompt-completion": _from_prompt,
    "alpaca": _from_alpaca,
    "qa": _from_qa,
}


def _read(row: Mapping[str, Any], layout: Layout, turns: list[Any]) -> Turns:
    return read_turns(_history(row, layout) + _reasoned(row, layout, turns), layout.ignored)


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(content: Any, role: str) -> str:
    found = read_content(content, f"column {role}")
    if found.calls or found.results or found.reasoning:
        raise BadRow("not text", f"column {role} holds more than text; give the row as messages")
    return found.text


def _reasoned(row: Mapping[str, Any], layout: Layout, turns: list[Any]) -> list[Any]:
    """Put the reasoning column into the answer it led to."""
    reasoning = layout.get(row, "reasoning")
    if not says_something(reasoning) or _is_switch(reasoning):
        return turns
    if not isinstance(turns[-1], Mapping):
        raise BadRow("bad message", "there is no answer to attach the reasoning to")
    return [*turns[:-1], {**turns[-1], "reasoning_content": reasoning}]


def _is_switch(value: Any) -> bool:
    """Return whether a reasoning column only switches reasoning on or off."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


def _history(row: Mapping[str, Any], layout: Layout) -> list[Any]:
    """Parse earlier turns: pairs of question and answer, or messages."""
    value = json_or_text(layout.get(row, "history"))
    if not value or (isinstance(value, str) and not says_something(value)):
        return []
    turns: list[Any] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, Mapping):
            turns.append(entry)
        elif isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(e, str) for e in entry):
            turns += _pair(*entry)
        else:
            raise BadRow("bad history", "the history is not a list of [question, answer] pairs or messages")
    return turns


def _with_context(row: Mapping[str, Any], layout: Layout, turns: list[Any]) -> list[Any]:
    """Put the context and a blank line before the last question."""
    context = _text(layout.get(row, "context"), "context")
    if not says_something(context):
        return turns
    last = max(
        (i for i, t in enumerate(turns) if isinstance(t, Mapping) and t.get("role") == "user"), default=None
    )
    if last is None or not isinstance(turns[last].get("content"), str):
        raise BadRow("bad message", "there is no plain question to put the context before")
    asked = turns[last] | {"content": f"{context}\n\n{turns[last]['content']}"}
    return [*turns[:last], asked, *turns[last + 1 :]]


def _with_system(row: Mapping[str, Any], layout: Layout, turns: Turns) -> list[dict[str, Any]]:
    text = _text(layout.get(row, "system"), "system")
    if not text.strip():
        return turns.messages
    if turns.messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *turns.messages]
    if text.strip() not in turns.messages[0]["content"]:
        column = layout.columns["system"]
        raise BadRow(
            "two system prompts",
            f"column {column} and the first message differ; take the message with --ignore-column {column}",
        )
    return turns.messages


def _untrained(row: Mapping[str, Any], turns: Turns, beside: Beside, notes: list[str]) -> set[int]:
    """Return the answers that marks on turns or columns of marks exclude from training."""
    trained = list(turns.trained)
    for name in beside.marks:
        value = json_or_text(row[name])
        if value is None:
            continue
        if isinstance(value, list):
            marks = list_marks(value, name, turns.answers)
        elif name == "mask" and isinstance(value, str) and value in turns.speakers:  # NeMo
            marks = [speaker != value for speaker in turns.speakers]
        elif row_mark(value, name):
            continue
        else:
            raise BadRow("not to be trained on", f"column {name} is {value}")
        trained = [t and marks[turn] for t, turn in zip(trained, turns.turn, strict=True)]
    notes += [PROMPT_MARKED for name in PROMPTS_TOO if row.get(name) in (True, "true", "True", 1)]
    found = {i for i, m in enumerate(turns.messages) if m["role"] == "assistant" and not trained[i]}
    notes += [UNTRAINED] * len(found)
    return found


def _before_the_last_prompt(turns: Turns, untrained: set[int], notes: list[str]) -> set[int]:
    """Return the earlier answers of a preference row: only the judged answer is a demonstration."""
    roles = [message["role"] for message in turns.messages]
    last = max((i for i, role in enumerate(roles) if role == "user"), default=0)
    earlier = {i for i in range(last) if roles[i] == "assistant"} - untrained
    notes += [WANTED, *[EARLIER] * len(earlier)]
    return earlier


def _in_prompt(turns: Turns, untrained: set[int], notes: list[str]) -> set[int]:
    """Return the answers in the prompt column: as in TRL, only the completion is trained on."""
    roles = enumerate(message["role"] for message in turns.messages)
    given = {i for i, role in roles if role == "assistant" and turns.turn[i] in turns.in_prompt} - untrained
    notes += [IN_PROMPT] * len(given)
    return given


def _check_media(row: Mapping[str, Any], beside: Beside) -> None:
    for name in beside.media:
        if says_something(row[name]) and not isinstance(row[name], int | float):
            raise BadRow(
                "media",
                f"column {name} belongs to the row and only text can be encoded; train on the text alone with "
                f"--ignore-column {name}",
            )
