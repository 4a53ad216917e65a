"""Check which tokens are trained: none, all, prompts, generation prompts, answers without their start."""

import re

import numpy as np

from sstoken.selection import BoolArray
from sstoken.stages.auditing.examples import Example, Turn, stretches
from sstoken.stages.auditing.findings import Audit, Family

FAMILY = Family("what is trained")
NOTHING = FAMILY.error(
    "nothing-trained",
    "rows in which no token is trained",
    "drop these rows, or fix what makes the labels: often the text by which it finds answers is missing, or the answer "
    "was cut off",
)
NOTHING_KEPT = FAMILY.warning(
    "nothing-kept",
    "rows of which the selection keeps no token",
    "such rows cost training time and teach nothing: select a larger share, or let `export` drop them",
)
EVERYTHING = FAMILY.error(
    "everything-trained",
    "rows in which every token is trained, the prompt too",
    "set the labels of the prompt to -100 (in TRL `assistant_only_loss` or `completion_only_loss`), unless the model "
    "should learn to write prompts",
)
PROMPT = FAMILY.error(
    "prompt-trained",
    "rows that train tokens of a user, system or tool turn",
    "set their labels to -100",
    "template",
)
HEADER = FAMILY.error(
    "generation-prompt-trained",
    "rows that train the generation prompt, which the model is given at inference",
    "begin the trained span after the generation prompt",
    "template",
)
SHIFTED_MASK = FAMILY.error(
    "mask-shifted",
    "rows whose mask stands one token too early: it trains the token before each answer and not the one that ends it",
    "move the mask one token to the right: it marks the tokens that are learned, not the positions that predict them",
    "template",
)
LATE_START = FAMILY.warning(
    "answer-start-not-trained",
    "rows that train an answer without its first tokens",
    "begin the trained span right after the generation prompt; a single missing token often means a mask that is off "
    "by one, or a prompt that was tokenized separately",
    "template",
)
UNKNOWN_TURNS = FAMILY.warning(
    "turns-not-found",
    "rows in which no turn of the tokenizer's chat template was found, so their prompts and turn ends were not checked",
    "name the tokenizer and template that made them (--model, --tokenizer, --chat-template)",
    "tokenizer",
)
ACROSS = FAMILY.warning(
    "packed-start-trained",
    "rows that train the first token of a document packed after another: it would be predicted from that other one",
    "set the label of each document's first token to -100",
)


def check(example: Example, audit: Audit) -> None:
    """Check which tokens of an example are trained."""
    trained = example.trained
    visible = np.flatnonzero(example.visible)
    if not trained.any():
        return  # `check_row` reports it
    if visible.size > 1 and trained[visible[1:]].all():  # nothing predicts the first token
        audit.report(EVERYTHING, example, int(visible[0]))
        return
    if not example.whole and example.offset and trained[0]:
        audit.report(ACROSS, example, 0)
    if not example.turns:
        if audit.shape.known and not example.offset:
            audit.report(UNKNOWN_TURNS, example)
        return
    if _shifted(example, audit):
        first = example.answers[0]
        audit.report(SHIFTED_MASK, example, first.start - 1)
        return
    _check_turns(example, audit)


def check_row(first: Example, trained: BoolArray, audit: Audit) -> None:
    """Check that a row trains anything: `first` is the row or its first document, `trained` covers all of it, [T]."""
    if not trained.any():
        audit.report(NOTHING_KEPT if first.selected else NOTHING, first)


def _check_turns(example: Example, audit: Audit) -> None:
    vocabulary = audit.vocabulary
    assert vocabulary is not None
    trained, visible = example.trained & example.visible, np.flatnonzero(example.visible)
    before = int(visible[0]) + 1 if visible.size else 0  # nothing predicts the first token
    prompt_trained = False
    for turn in example.turns:
        if turn.role != "assistant":
            start = max(turn.header, before)
            run = next(iter(stretches(trained[start : turn.stop])), None)
            prompt_trained = run is not None
            if run is not None:
                focus = (start + run[0], start + run[1])
                audit.report(PROMPT, example, focus, f"in a turn of the {turn.role}")
        else:
            run = next(iter(stretches(trained[turn.header : turn.start - turn.shares_blank])), None)
            if run is not None and _only_opens_reasoning(example, turn, run):
                run = None
            if run is not None and not prompt_trained:
                audit.report(HEADER, example, (turn.header + run[0], turn.header + run[1]))
            if not example.selected and run is None:
                _check_start(example, turn, audit)
        before = max(before, example.end(turn, audit.shape.closers, vocabulary))


def _only_opens_reasoning(example: Example, turn: Turn, run: tuple[int, int]) -> bool:
    """Return whether the trained part of a header opens reasoning or is empty reasoning: the row may hold it."""
    begin, end = (int(example.starts[turn.header + at]) for at in run)
    said = example.text[begin:end]
    return re.match(rb"\xfe?</?think", said) is not None and not re.sub(
        rb"</?think(ing)?>|\xfe|\s", b"", said
    )


def _check_start(example: Example, turn: Turn, audit: Audit) -> None:
    trained = np.flatnonzero(example.trained[turn.start : turn.stop])
    if not trained.size or not trained[0] or trained[-1] - trained[0] + 1 != trained.size:
        return  # further gaps: the tokens are left out on purpose
    skipped = example.ids[turn.start : turn.start + trained[0]]
    vocabulary, shape = audit.vocabulary, audit.shape
    assert vocabulary is not None
    if (skipped == vocabulary.bos).any() or vocabulary.is_blank(skipped).all():
        return  # BOS has a check of its own; a blank may belong to what the template prints
    begin, end = example.starts[turn.start], example.starts[turn.start + trained[0]]
    if any(mark.strip().encode() in example.text[begin:end] for mark in shape.thoughts):
        return  # reasoning has a check of its own
    audit.report(LATE_START, example, (turn.start, turn.start + int(trained[0])))


def _shifted(example: Example, audit: Audit) -> bool:
    """Return whether the trained span of every answer starts and ends one token too early."""
    closers = audit.shape.closers
    answers = example.answers
    if example.selected or not answers or not closers:
        return False
    for turn in answers:
        first = max(0, turn.header - 1)
        trained = np.flatnonzero(example.trained[first : turn.stop]) + first
        behind = int(trained[-1]) + 1 if trained.size else 0
        if (
            not trained.size
            or trained[0] != turn.start - 1
            or behind >= len(example.ids)
            or int(example.ids[behind]) not in closers
            or int(example.ids[behind - 1]) in closers
            or example.trained[behind]
            or not example.visible[behind]
        ):
            return False
    return True
