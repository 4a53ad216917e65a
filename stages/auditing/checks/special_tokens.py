"""Check BOS, padding and other special tokens."""

import numpy as np

from sstoken.stages.auditing.examples import Example, stretches
from sstoken.stages.auditing.findings import Audit, Family

FAMILY = Family("special tokens", "tokenizer")
BOS_MISSING = FAMILY.error(
    "bos-missing",
    "rows that do not begin with BOS, though the tokenizer or its chat template puts it there",
    "tokenize with the chat template as it is, or with add_special_tokens=True where there is none",
)
BOS_DOUBLED = FAMILY.error(
    "bos-doubled",
    "rows that begin with BOS twice",
    "tokenize templated text with add_special_tokens=False: the template prints BOS already",
)
BOS_INSIDE = FAMILY.error(
    "bos-inside",
    "rows with BOS in the middle of a document",
    "tokenize prompt and answer as one text, or the answer with add_special_tokens=False",
)
PADDING = FAMILY.error(
    "padding-trained",
    "rows that train padding",
    "set the labels of padding to -100; where the pad token is EOS, do it by position, not by id",
    "ids",
)
SPECIAL = FAMILY.warning(
    "special-token-trained",
    "rows that train a special token that the chat template does not print",
    "remove it from the text, or set its label to -100",
    "template",
)
UNKNOWN = FAMILY.warning(
    "unknown-token-trained",
    "rows that train the unknown token: the tokenizer has no token for a piece of the answer",
    "clean the text, or take a tokenizer that covers it",
)


def check(example: Example, audit: Audit) -> None:
    """Check the special tokens of an example."""
    ids, vocabulary = example.ids, audit.vocabulary
    hidden = ~example.visible & example.trained
    if vocabulary is not None and vocabulary.pads_apart:
        hidden |= (ids == vocabulary.pad) & example.trained
    for run in stretches(hidden)[:1]:
        audit.report(PADDING, example, run)
    if vocabulary is None:
        return
    _check_bos(example, audit)
    if vocabulary.unknown is not None and vocabulary.unknown != vocabulary.pad:
        unknown = np.flatnonzero((ids == vocabulary.unknown) & example.trained)
        if unknown.size:
            audit.report(UNKNOWN, example, int(unknown[0]))
    expected = {*audit.shape.printed, *vocabulary.stops, vocabulary.bos, vocabulary.pad, vocabulary.unknown}
    for turn in example.answers if example.turns else ():
        span = slice(turn.start, turn.stop)
        special = np.flatnonzero(vocabulary.is_control(ids[span]) & example.trained[span]) + turn.start
        odd = [int(i) for i in special if int(ids[i]) not in expected]
        if odd:
            audit.report(SPECIAL, example, odd[0])


def _check_bos(example: Example, audit: Audit) -> None:
    ids, vocabulary = example.ids, audit.vocabulary
    assert vocabulary is not None
    bos = vocabulary.bos
    shown = np.flatnonzero(example.visible)
    if bos is None or not shown.size:
        return
    first = int(shown[0])
    if ids[first] == bos and first + 1 < ids.size and ids[first + 1] == bos:
        audit.report(BOS_DOUBLED, example, (first, first + 2))
    wanted = audit.shape.begins_with_bos if example.turns else vocabulary.adds_bos and not audit.shape.known
    if wanted and ids[first] != bos and not example.offset:
        audit.report(BOS_MISSING, example, first)
    if bos in vocabulary.stops or bos == vocabulary.pad or audit.shape.bos_opens_turns:
        return
    ends = vocabulary.stops | audit.shape.closers | {vocabulary.pad, bos}
    for position in np.flatnonzero(ids == bos):
        if position <= first:
            continue
        before = position - 1
        while before > first and vocabulary.is_blank(ids[before]):
            before -= 1
        # After an end, another document may begin; but some tokens that stop generation (Phi-3's) open answers.
        opened = any(t.role == "assistant" and t.header <= before < t.start for t in example.turns)
        if opened or int(ids[before]) not in ends:
            audit.report(BOS_INSIDE, example, int(position))
