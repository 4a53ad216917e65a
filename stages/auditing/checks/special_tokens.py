"""Check BOS, padding and other special tokens."""

import numpy as np

from sstoken.stages.auditing.context import Context
from sstoken.stages.auditing.examples import Example, stretches
from sstoken.stages.auditing.kinds import Family

FAMILY = Family("special tokens")
BOS_MISSING = FAMILY.kind(
    "bos-missing",
    "error",
    "rows that do not begin with BOS, though the tokenizer or its chat template puts it there",
    "tokenize with the chat template as it is, or with add_special_tokens=True where there is none",
    "tokenizer",
)
BOS_DOUBLED = FAMILY.kind(
    "bos-doubled",
    "error",
    "rows that begin with BOS twice",
    "tokenize templated text with add_special_tokens=False: the template prints BOS already",
    "tokenizer",
)
BOS_INSIDE = FAMILY.kind(
    "bos-inside",
    "error",
    "rows with BOS in the middle of a document",
    "tokenize prompt and answer as one text, or the answer with add_special_tokens=False",
    "tokenizer",
)
PADDING = FAMILY.kind(
    "padding-trained",
    "error",
    "rows that train padding",
    "set the labels of padding to -100; where the pad token is EOS, do it by position, not by id",
)
SPECIAL = FAMILY.kind(
    "special-token-trained",
    "warning",
    "rows that train a special token that the chat template does not print",
    "remove it from the text, or set its label to -100",
    "template",
)
UNKNOWN = FAMILY.kind(
    "unknown-token-trained",
    "warning",
    "rows that train the unknown token: the tokenizer has no token for a piece of the answer",
    "clean the text, or take a tokenizer that covers it",
    "tokenizer",
)


def check(example: Example, context: Context) -> None:
    """Check the special tokens of an example."""
    ids, found, vocabulary = example.ids, context.found, context.vocabulary
    hidden = ~example.visible & example.trained
    if vocabulary is not None and vocabulary.pads_apart:
        hidden |= (ids == vocabulary.pad) & example.trained
    for run in stretches(hidden)[:1]:
        found.add(PADDING, example, run)
    if vocabulary is None:
        return
    _check_bos(example, context)
    if vocabulary.unknown is not None and vocabulary.unknown != vocabulary.pad:
        unknown = np.flatnonzero((ids == vocabulary.unknown) & example.trained)
        if unknown.size:
            found.add(UNKNOWN, example, (int(unknown[0]), int(unknown[0]) + 1))
    expected = {*context.shape.printed, *vocabulary.stops, vocabulary.bos, vocabulary.pad, vocabulary.unknown}
    known = vocabulary.known(ids)
    for turn in example.answers if example.turns else ():
        span = slice(turn.start, turn.stop)
        special = np.flatnonzero(vocabulary.is_control[known[span]] & example.trained[span]) + turn.start
        odd = [int(i) for i in special if int(ids[i]) not in expected]
        if odd:
            found.add(SPECIAL, example, (odd[0], odd[0] + 1))


def _check_bos(example: Example, context: Context) -> None:
    ids, vocabulary = example.ids, context.vocabulary
    assert vocabulary is not None
    bos = vocabulary.bos
    if bos is None or not ids.size:
        return
    shown = np.flatnonzero(example.visible)
    if not shown.size:
        return
    first = int(shown[0])
    if ids[first] == bos and first + 1 < ids.size and ids[first + 1] == bos:
        context.found.add(BOS_DOUBLED, example, (first, first + 2))
    wanted = (
        context.shape.begins_with_bos if example.turns else vocabulary.adds_bos and not context.shape.known
    )
    if wanted and ids[first] != bos and not example.offset:
        context.found.add(BOS_MISSING, example, (first, first + 1))
    if bos in vocabulary.stops or bos == vocabulary.pad or context.shape.bos_opens_turns:
        return
    ends = vocabulary.stops | context.shape.closers | {vocabulary.pad, bos}
    for position in np.flatnonzero(ids == bos):
        if position <= first:
            continue
        before = position - 1
        while before > first and vocabulary.is_blank[min(max(int(ids[before]), 0), vocabulary.size - 1)]:
            before -= 1
        # After an end, another document may begin; but some tokens that stop generation (Phi-3's) open answers.
        opened = any(t.role == "assistant" and t.header <= before < t.start for t in example.turns)
        if opened or int(ids[before]) not in ends:
            context.found.add(BOS_INSIDE, example, (int(position), int(position) + 1))
