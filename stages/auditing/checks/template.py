"""Encode raw conversations as `encode` would, and report what the chat template refuses, drops or changes."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from sstoken.errors import SstokenError
from sstoken.stages.auditing.data_files import Row
from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.findings import Audit, Family, Kind
from sstoken.stages.encoding import chat, rendering
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import Layout, NoLayout, Preference
from sstoken.stages.encoding.limits import time_limited
from sstoken.stages.encoding.messages import LOST, UNCERTAIN, BadRow, Conversation, NeedsDecision, PassedOver
from sstoken.stages.encoding.tracing import OTHER_HEADER, SPLIT

FAMILY = Family("conversations and the chat template", "raw")
_TURNS = "use --turns each, or a --chat-template that prints all of it"


def _lost(what: str, about: str) -> Kind:
    return FAMILY.error(f"{what}-dropped", f"rows whose {about} the chat template leaves out", _TURNS)


DROPPED = {
    "reasoning": _lost("reasoning", "reasoning"),
    "system": _lost("system", "system prompt"),
    "tools": _lost("tools", "tool definitions"),
    "tool_calls": _lost("tool-calls", "tool calls"),
    "content": _lost("content", "text"),
}
UNSURE = FAMILY.error(
    "uncertain-mask",
    "rows in which it is not certain where an answer begins or ends",
    "use a chat template that marks answers with {% generation %}, such as --chat-template trl:NAME",
)
REFUSED = FAMILY.error(
    "template-refuses", "rows that the chat template refuses", "fix the rows, or use another --chat-template"
)
SPECIAL = FAMILY.error(
    "special-token-in-text",
    "rows whose text holds a special token: a chat template was applied already, or the text was not cleaned",
    "remove it, or keep the rows with --keep-special-tokens",
)
TOKENIZER = FAMILY.error(
    "changed-by-tokenizer",
    "rows whose answers do not survive tokenization as they are written",
    "use another tokenizer, or clean the text",
)
DECISION = FAMILY.error(
    "needs-decision",
    "rows that can be read in several ways",
    "choose one with the option that the example names",
)
BAD = FAMILY.error("bad-row", "rows that are not a conversation to train on", "fix or drop them")
NO_TEMPLATE = FAMILY.warning(
    "no-chat-template",
    "rows encoded without a chat template: a plain one is used (User: ... Assistant: ...)",
    "name the template that the model will be used with (--chat-template)",
)
NAMES = FAMILY.warning(
    "names-dropped",
    "rows whose speakers have names, which the chat template leaves out",
    "write the names into the contents, if they matter",
)
NORMALIZED = FAMILY.warning(
    "text-normalized",
    "rows whose text the tokenizer changes (blanks, or other forms of letters)",
    "check that code and quotations are still right",
)
NOT_MARKED = FAMILY.warning(
    "turn-not-marked",
    "rows with an answer, or a part of one, that the chat template does not mark with {% generation %}",
    "mark it in the template, if it should be trained",
)
_NOTES = {
    rendering.SPEAKERS_LOST: NAMES,
    chat.NORMALIZED: NORMALIZED,
    chat.BLANKS_CHANGED: NORMALIZED,
    chat.PROMPT_CHANGED: NORMALIZED,
    rendering.UNMARKED: NOT_MARKED,
}
_REASONS = {
    UNCERTAIN: UNSURE,
    SPLIT: UNSURE,
    OTHER_HEADER: UNSURE,
    "template refuses": REFUSED,
    "special token in the text": SPECIAL,
    "changed by the tokenizer": TOKENIZER,
}
_TURN = re.compile(r"\bturn (\d+)\b")
_QUOTED = re.compile(r"holds '([^']+)'")
_EXCERPT = 120
"""Characters of a refused row to show."""
_KINDS = re.compile(r"\b(reasoning|system|tools|tool_calls|content)\b")


class Conversations:
    """Encodes raw rows, counts what happens to them, and reports those that cannot be encoded.

    `detect` finds the layout from the columns of a row; what `preference` data does is as in `Encode`.
    """

    def __init__(
        self,
        encoder: chat.ChatEncoder,
        detect: Callable[[Any, Preference], Layout],
        preference: Preference,
        audit: Audit,
    ) -> None:
        self._encoder, self._detect, self._preference, self._audit = encoder, detect, preference, audit
        names = ("refused", "passed_over", "notes", "unused_columns", "proof")
        self._counts = {name: Counter[str]() for name in names}

    def examples(self, rows: Iterator[Row]) -> Iterator[Example]:
        """Yield the examples of rows.

        Raises:
            SstokenError: the columns match no layout, or the chat template is not valid Jinja or does not terminate.
        """
        layout: Layout | None = None
        with time_limited("the chat template") as start:
            for row in rows:
                conversation: Conversation | None = None
                try:
                    if row.problem is not None:
                        raise BadRow("broken row", row.problem)
                    if layout is None:
                        layout = self._detect(row.values, self._preference)
                    conversation = to_conversation(row.values, layout)
                    start(row.where)
                    examples = self._encoder.encode(conversation)
                except NoLayout as error:
                    raise SstokenError(f"{row.where}: {error}") from error
                except BadRow as error:
                    self._refuse(row, error, conversation)
                    if layout is None and isinstance(error, NeedsDecision):
                        with suppress(SstokenError):
                            layout = replace(self._detect(row.values, "take"), preference="stop")
                    continue
                self._counts["unused_columns"].update(conversation.unused)
                name = row.values.get("example_id")
                name = None if name is None else str(name)
                for each in examples:
                    ids, trained = np.array(each.input_ids, np.int64), np.array(each.response_mask, bool)
                    example = Example(row.where, row.index, ids, trained, name)
                    self._counts["proof"][each.proof] += 1
                    for note in (*conversation.notes, *each.notes):
                        self._counts["notes"][note] += 1
                        if note in _NOTES:
                            self._audit.report(_NOTES[note], example, (0, 0), note)
                    yield example

    def _refuse(self, row: Row, error: BadRow, conversation: Conversation | None) -> None:
        """Report a row that cannot be encoded; `conversation` is its content, if that could be read."""
        if isinstance(error, PassedOver):
            self._counts["passed_over"][error.reason] += 1
            return
        self._counts["refused"][error.reason] += 1
        detail, _, way_out = error.detail.partition("; ")
        remedy = way_out if way_out.startswith("take ") else ""
        said = f"{error.reason}: {error.detail}" if error.detail else error.reason
        text = _excerpt(error.detail, row, conversation)
        if error.reason == LOST:
            for name in dict.fromkeys(_KINDS.findall(detail)) or ("content",):
                self._audit.report_row(DROPPED[name], row.where, row.index, detail, remedy, text)
            return
        kind = _REASONS.get(error.reason, DECISION if isinstance(error, NeedsDecision) else BAD)
        self._audit.report_row(kind, row.where, row.index, said, remedy, text)

    def facts(self) -> dict[str, Any]:
        """Return the counts."""
        return {name: dict(counts) for name, counts in self._counts.items()}


def _excerpt(detail: str, row: Row, conversation: Conversation | None) -> str:
    """Return the start of the turn that an error names, or of the row; from the special token it quotes, if any."""
    turn = _TURN.search(detail)
    if conversation is None or turn is None or int(turn[1]) > len(conversation.messages):
        values = dict(row.values) if conversation is None else conversation.messages
        return json.dumps(values, ensure_ascii=False, default=str)[:_EXCERPT] if values else ""
    message = conversation.messages[int(turn[1]) - 1]
    key = "reasoning_content" if detail.startswith("reasoning") else "content"
    text = str(message.get(key) or json.dumps(message, ensure_ascii=False, default=str))
    quoted = _QUOTED.search(detail)
    start = max(0, text.find(quoted[1]) - 16) if quoted and quoted[1] in text else 0
    return text[start : start + _EXCERPT]
