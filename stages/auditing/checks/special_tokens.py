"""BOS, padding and other special tokens."""

import numpy as np

from sstoken.stages.auditing.context import Context
from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.kinds import kind

FAMILY = "special tokens"
BOS_MISSING = kind(
    "bos-missing",
    FAMILY,
    "error",
    "rows that do not begin with BOS, though the tokenizer or its chat template puts it there",
    "tokenize with the chat template as it is, or with add_special_tokens=True where there is none",
    "tokenizer",
)
BOS_DOUBLED = kind(
    "bos-doubled",
    FAMILY,
    "error",
    "rows that begin with BOS twice",
    "tokenize templated text with add_special_tokens=False: the template prints BOS already",
    "tokenizer",
)
BOS_INSIDE = kind(
    "bos-inside",
    FAMILY,
    "error",
    "rows with BOS in the middle of a document",
    "tokenize prompt and answer as one text, or the answer with add_special_tokens=False",
    "tokenizer",
)
PADDING = kind(
    "padding-trained",
    FAMILY,
    "error",
    "rows that train padding",
    "set the labels of padding to -100; where the pad token is EOS, do it by position, not by id",
)
SPECIAL = kind(
    "special-token-trained",
    FAMILY,
    "warning",
    "rows that train a special token that the chat template does not print",
    "remove it from the text, or set its label to -100",
    "template",
)
UNKNOWN = kind(
    "unknown-token-trained",
    FAMILY,
    "warning",
    "rows that train the unknown token: the tokenizer has no token for a piece of the answer",
    "clean the text, or take a tokenizer that covers it",
    "tokenizer",
)


def check(example: Example, context: Context) -> None:
    """Look at special tokens."""
    ids, found, vocabulary = example.ids, context.found, context.vocabulary
    if example.padding is not None and (hidden := np.flatnonzero(example.padding & example.trained)).size:
        found.add(PADDING, example, (int(hidden[0]), int(hidden[0]) + 1), "the attention mask hides it")
    if vocabulary is None:
        return
    _check_bos(example, context)
    run = _padding(example, context)
    if run is not None:
        found.add(PADDING, example, run)
    if vocabulary.unknown is not None and vocabulary.unknown != vocabulary.pad:
        unknown = np.flatnonzero((ids == vocabulary.unknown) & example.trained)
        if unknown.size:
            found.add(UNKNOWN, example, (int(unknown[0]), int(unknown[0]) + 1))
    expected = {*context.shape.printed, *vocabulary.stops, vocabulary.bos, vocabulary.pad, vocabulary.unknown}
    inside = np.where((ids >= 0) & (ids < vocabulary.size), ids, 0)
    for turn in example.answers if example.turns else ():
        span = slice(turn.start, turn.stop)
        special = np.flatnonzero(vocabulary.is_control[inside[span]] & example.trained[span]) + turn.start
        odd = [int(i) for i in special if int(ids[i]) not in expected]
        if odd:
            found.add(SPECIAL, example, (odd[0], odd[0] + 1))


def _check_bos(example: Example, context: Context) -> None:
    ids, vocabulary = example.ids, context.vocabulary
    assert vocabulary is not None
    bos = vocabulary.bos
    if bos is None or not ids.size:
        return
    shown = (
        np.flatnonzero(ids != vocabulary.pad) if vocabulary.pad not in (None, bos) else np.arange(ids.size)
    )
    if example.padding is not None:
        shown = np.flatnonzero(~example.padding)
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
        if int(ids[before]) not in ends:  # else another document may begin here
            context.found.add(BOS_INSIDE, example, (int(position), int(position) + 1))


def _padding(example: Example, context: Context) -> tuple[int, int] | None:
    """A run of trained padding: pad tokens, or one special token three times or more where pad is EOS."""
    ids, vocabulary = example.ids, context.vocabulary
    assert vocabulary is not None
    pad = vocabulary.pad
    if pad is not None and pad not in vocabulary.stops and pad not in (vocabulary.bos, vocabulary.unknown):
        trained = np.flatnonzero((ids == pad) & example.trained)
        return (int(trained[0]), int(trained[-1]) + 1) if trained.size else None
    if not ids.size or int(ids[-1]) not in vocabulary.stops | {pad}:
        return None
    others = np.flatnonzero(ids != ids[-1])
    start = int(others[-1]) + 1 if others.size else 0
    if len(ids) - start >= 3 and example.trained[start + 1 :].any():
        return start + 1, len(ids)
    return None
