"""Preference rows (DPO, KTO): recognised, and the wanted answer taken as a demonstration where asked for."""

from collections.abc import Mapping
from typing import Any

from stages.encoding.json_values import json_or_text
from stages.encoding.leftovers import says_something
from stages.encoding.messages import BadRow, NeedsDecision, PassedOver

PREFERENCE = "preference row"
"""The reason of a row that holds a wanted and an unwanted answer, or a verdict on its answer."""
_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_response", "rejected_response"),
    ("chosen_conversations", "rejected_conversations"),
    ("preferred_output", "non_preferred_output"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("completion", "rejected"),
    ("response", "rejected_response"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
)
"""The wanted and the unwanted answer: TRL and LLaMA-Factory, its second version, ..., OpenAI, ..., ms-swift."""
_VERDICTS = ("kto_tag", "kto_label", "label", "desirable", "is_desirable")
"""Columns that say, true or false, whether the row's answer is wanted: LLaMA-Factory, ..., TRL."""
_WORDS = {"true": True, "false": False}
_TURNS = ("messages", "conversations", "conversation")
_ANSWERS = {"prompt": "completion", "instruction": "output", "question": "answer", "query": "answer"}
"""Columns of a plain prompt, and the role of the answer to it."""


def wanted(
    row: Any, ignored: frozenset[str] = frozenset(), *, take: bool = False
) -> tuple[Mapping[str, Any], bool]:
    """The row as a demonstration, and whether it is of preference data.

    Args:
        row: of any layout.
        ignored: columns to leave out of account.
        take: whether the user asked for the wanted answers.

    Raises:
        NeedsDecision: a preference row, and `take` is false.
        BadRow: no row of named columns; a preference row in which the wanted answer cannot be told.
        PassedOver: its only answer is unwanted.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", f"a {type(row).__name__} instead of named columns")
    if not ignored.isdisjoint(row):
        row = {name: value for name, value in row.items() if name not in ignored}
    pair = next((p for p in _PAIRS if p[1] in row and p[0] in row and says_something(row[p[1]])), None)
    if pair is not None:
        if not take:
            raise _refused(f"{pair[0]} holds a wanted answer and {pair[1]} an unwanted one", pair[1])
        return _with_answer(row, *pair), True
    verdict = next((name for name in _VERDICTS if _verdict(row.get(name)) is not None), None)
    if verdict is None:
        return row, False
    if not take:
        raise _refused(f"{verdict} says whether the answer is wanted (true) or not", verdict)
    if not _verdict(row[verdict]):
        raise PassedOver("unwanted answer", f"{verdict} is false")
    return {name: value for name, value in row.items() if name != verdict}, True


def _verdict(value: Any) -> bool | None:
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _refused(what: str, column: str) -> NeedsDecision:
    return NeedsDecision(
        PREFERENCE,
        f"{what}; take the wanted answers as demonstrations with --preference take, or read the rows without that "
        f"column with --ignore-column {column}",
    )


def _with_answer(row: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name not in (chosen, rejected)}
    if chosen in ("messages", "completion", "response"):  # the row is a demonstration already
        return rest | {chosen: row[chosen]}
    answer = json_or_text(row[chosen], "[{")
    if isinstance(answer, Mapping):
        answer = answer.get("messages", [answer])
    is_turns = isinstance(answer, list) and all(isinstance(turn, Mapping) for turn in answer)
    if not is_turns and not isinstance(answer, str):
        raise BadRow(PREFERENCE, f"column {chosen} is neither text nor messages")
    if is_turns and any(str(t.get("role", t.get("from"))).lower() in ("user", "human") for t in answer):
        return {name: value for name, value in rest.items() if name not in _TURNS} | {"messages": answer}
    for name in _TURNS:
        turns = json_or_text(rest.get(name), "[")
        if isinstance(turns, list) and turns:
            return rest | {name: [*turns, *(answer if is_turns else [_turn(answer)])]}
    given = rest.get("input")
    if isinstance(given, Mapping) and "messages" in given:  # OpenAI
        tools = {"tools": given["tools"]} if given.get("tools") else {}
        turns = [*given["messages"], *(answer if is_turns else [_turn(answer)])]
        return {k: v for k, v in rest.items() if k != "input"} | tools | {"messages": turns}
    for prompt, role in _ANSWERS.items():
        if rest.get(prompt) is not None:
            if is_turns and role != "completion":
                answer = _only_text(answer, chosen)
            return rest | {role: answer}
    raise BadRow(PREFERENCE, f"there is no prompt beside {chosen}; columns are {', '.join(map(str, row))}")


def _turn(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


def _only_text(turns: list[Mapping[str, Any]], column: str) -> Any:
    if len(turns) != 1:
        raise BadRow(PREFERENCE, f"column {column} holds several messages beside a plain prompt")
    return next((turns[0][key] for key in ("content", "value") if turns[0].get(key) is not None), None)
