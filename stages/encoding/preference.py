"""Preference rows (DPO, KTO): detect them and, on request, take the wanted answer as a demonstration."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sstoken.stages.encoding.column_names import kind_of_name
from sstoken.stages.encoding.json_values import json_or_text, says_something, turns_or_text
from sstoken.stages.encoding.messages import BadRow, NeedsDecision, PassedOver

PREFERENCE = "preference row"
"""Why a row is bad: it has a wanted and an unwanted answer, or a verdict on its answer."""
_UNWANTED = re.compile(r"rejected|non_preferred|dispreferred|unwanted")
_WANTED = ("chosen", "preferred", "accepted", "wanted")
"""For each name of the unwanted answer, the name of the wanted one: LLaMA-Factory and TRL, OpenAI, others."""
_VERDICTS = ("kto_tag", "kto_label", "desirable", "is_desirable", "label")
"""Boolean columns that say whether the row's answer is wanted: LLaMA-Factory, ..., TRL."""
_WORDS = {"true": True, "false": False, "1": 1, "0": 0}
_TURNS = ("messages", "conversations", "conversation")
_ANSWERS = {"prompt": "completion", "instruction": "output", "question": "answer", "query": "answer"}
"""Columns of a plain prompt, and the role of its answer."""


def wanted(
    row: Any, ignored: frozenset[str] = frozenset(), *, take: bool = False
) -> tuple[Mapping[str, Any], bool]:
    """Return the row as a demonstration, and whether it is preference data, without the `ignored` columns.

    Raises:
        NeedsDecision: a preference row, and the user did not ask to `take` the wanted answers.
        BadRow: the row has no named columns, or its wanted answer is ambiguous.
        PassedOver: its only answer is unwanted.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object", f"a {type(row).__name__} instead of named columns")
    if not ignored.isdisjoint(row):
        row = {name: value for name, value in row.items() if name not in ignored}
    answers, verdicts = _candidates(tuple(row))
    rejected = [name for name in answers if _is_answer(row[name])]
    if rejected:
        if not take:
            raise _refused(f"{', '.join(rejected)} holds an unwanted answer", rejected)
        return _with_answer(row, rejected), True
    of_completion = "completion" in row
    verdict = next((name for name in verdicts if _verdict(row[name], name, of_completion) is not None), None)
    if verdict is None:
        return row, False
    if not take:
        raise _refused(f"{verdict} says whether the answer is wanted (true) or not", [verdict])
    if not _verdict(row[verdict], verdict, of_completion):
        raise PassedOver("unwanted answer", f"{verdict} is false")
    return {name: value for name, value in row.items() if name != verdict}, True


@lru_cache(maxsize=1024)
def _candidates(columns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the columns that may hold an unwanted answer, and those that may hold a verdict."""
    unwanted = [c for c in columns if _UNWANTED.search(c.lower()) and kind_of_name(c) != "metadata"]
    return unwanted, [name for name in _VERDICTS if name in columns]


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | list | Mapping) and says_something(value)


def _verdict(value: Any, name: str, of_completion: bool) -> bool | None:
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower())
    if value in (0, 1) and (name != "label" or of_completion):  # other numeric labels are classes
        return bool(value)
    return value if isinstance(value, bool) else None


def _refused(what: str, columns: list[str]) -> NeedsDecision:
    return NeedsDecision(
        PREFERENCE,
        f"{what}; take the wanted answers as demonstrations with --preference take, or read the rows without with "
        + " ".join(f"--ignore-column {column}" for column in columns),
    )


def _with_answer(row: Mapping[str, Any], rejected: list[str]) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name not in rejected}
    names = [_UNWANTED.sub(wanted, name.lower(), count=1) for name in rejected for wanted in _WANTED]
    chosen = next(
        (name for name in rest if name.lower() in (*names, "chosen") and _is_answer(rest[name])), None
    )
    if chosen is None:  # the row is already a demonstration, plus an unwanted answer
        return rest
    answer = turns_or_text(rest.pop(chosen))
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
