"""Encode raw conversations for the checks, as `encode` would but without a limit on their length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sstoken.errors import SstokenError
from sstoken.stages.auditing.checks.template import Conversations
from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.findings import Audit
from sstoken.stages.auditing.opened import Row
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import Layout, NoLayout, Preference, detect_layout
from sstoken.stages.encoding.limits import time_limited
from sstoken.stages.encoding.messages import BadRow, Conversation, NeedsDecision
from sstoken.stages.encoding.preference import wanted

if TYPE_CHECKING:
    from sstoken.stages.encoding.chat import ChatEncoder


@dataclass(frozen=True)
class Reading:
    """How rows are read; see the fields of `Encode`."""

    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    ignore_columns: tuple[str, ...] = ()
    preference: Preference = "stop"


def encoded(
    rows: Iterator[Row], encoder: "ChatEncoder", reading: Reading, counts: Conversations, audit: Audit
) -> Iterator[Example]:
    """Yield the examples of rows; count and report those that cannot be encoded.

    Raises:
        SstokenError: the columns match no layout, or the chat template is not valid Jinja or does not terminate.
    """
    layout: Layout | None = None
    ignored = frozenset(reading.ignore_columns)
    with time_limited("the chat template") as start:
        for row in rows:
            conversation: Conversation | None = None
            try:
                if row.problem is not None:
                    raise BadRow("broken row", row.problem)
                if layout is None:
                    seen, _ = wanted(row.values, ignored, take=reading.preference == "take")
                    layout = detect_layout(
                        seen, reading.format, dict(reading.columns), ignored, reading.preference
                    )
                conversation = to_conversation(row.values, layout)
                start(row.where)
                examples = encoder.encode(conversation)
            except NoLayout as error:
                raise SstokenError(f"{row.where}: {error}") from error
            except BadRow as error:
                counts.refuse(row, error, audit, conversation)
                if layout is None and isinstance(error, NeedsDecision):
                    layout = _layout_anyway(row, reading)
                continue
            counts.unused.update(conversation.unused)
            for each in examples:
                example = Example(
                    row.where,
                    row.index,
                    np.array(each.input_ids, np.int64),
                    np.array(each.response_mask, bool),
                    _name(row),
                )
                counts.proofs[each.proof] += 1
                counts.note((*conversation.notes, *each.notes), example, audit)
                yield example


def _layout_anyway(row: Row, reading: Reading) -> Layout | None:
    try:
        seen, _ = wanted(row.values, frozenset(reading.ignore_columns), take=True)
        return detect_layout(seen, reading.format, dict(reading.columns), frozenset(reading.ignore_columns))
    except SstokenError:
        return None


def _name(row: Row) -> str | None:
    name = row.values.get("example_id")
    return None if name is None else str(name)
