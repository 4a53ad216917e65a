"""Check that a tokenised row is well formed: valid ids, labels and masks that fit together."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.labels import IGNORED_LABEL
from sstoken.selection import BoolArray, IntArray
from sstoken.stages.auditing.checks import packs
from sstoken.stages.auditing.columns import Columns
from sstoken.stages.auditing.examples import Example, find_padding
from sstoken.stages.auditing.findings import Audit
from sstoken.stages.auditing.kinds import Family, Kind
from sstoken.stages.auditing.opened import Row
from sstoken.stages.auditing.values import BadValue, is_nested, numbers

FAMILY = Family("rows")
UNREADABLE = FAMILY.error(
    "unreadable-row",
    "rows that cannot be read",
    "write the dataset again; token ids and labels are lists of integers, masks lists of numbers",
)
NULL = FAMILY.error(
    "null-row", "rows without token ids or labels (null)", "drop them, or tokenize them again"
)
NULL_TOKEN = FAMILY.error(
    "null-token", "rows with null or NaN among their ids, labels or masks", "tokenize them again"
)
EMPTY = FAMILY.error("empty-row", "rows without a token", "drop them")
NESTED = FAMILY.error(
    "nested-row",
    "rows whose lists lie within another list, as tokenizer(..., return_tensors=...) leaves them",
    "tokenize without return_tensors, or take [0] of each",
)
LENGTHS = FAMILY.error(
    "lengths-differ",
    "rows whose token ids and labels or masks are of different lengths",
    "make them from one list of tokens; a mask that covers the answer alone needs zeros for the prompt",
)
OUTSIDE = FAMILY.error(
    "id-out-of-vocabulary",
    "rows with a token id that the tokenizer does not have",
    "name the tokenizer that made the rows (--model, --tokenizer), or tokenize with the model's own",
)
BAD_LABEL = FAMILY.error(
    "bad-label",
    "rows with a label that is neither -100 nor a token id",
    "mark tokens that are not trained with -100: another number ends training with an error, or is learned",
)
OTHER_LABELS = FAMILY.error(
    "labels-not-inputs",
    "rows with labels that are not the token ids at their place",
    "make the labels from a copy of the token ids",
)
SHIFTED = FAMILY.error(
    "labels-shifted",
    "rows whose labels are moved by one or two tokens",
    "leave labels where the tokens are: the model shifts them itself. For a trainer that does not (NeMo, Megatron), "
    "pass --shifted-labels",
)
NOT_SHIFTED = FAMILY.error(
    "labels-not-shifted",
    "rows whose labels are not moved, though their trainer expects them moved by one (--shifted-labels)",
    "move them one to the left: label i is what position i predicts",
)
BAD_MASK = FAMILY.error(
    "bad-mask-value",
    "rows with a mask or weight that is negative, infinite or not a number",
    "masks are 0 and 1 (or true and false), weights 0 or more",
)
DISAGREE = FAMILY.error(
    "masks-disagree",
    "rows whose labels and masks say different things about what is trained",
    "keep one of the columns, or make them agree: trainers differ in which they read",
)
NO_LABELS = FAMILY.error(
    "no-labels",
    "rows without labels or a mask: trainers learn every token, the prompt too",
    "add labels (-100 for what is not trained), unless the model should learn to write prompts",
)
_ENOUGH = 0.98
"""Share of labels that must match the ids one or two places on for the labels to count as shifted."""


class _Stop(Exception):  # noqa: N818 (ends the reading of one row)
    pass


def examples(row: Row, columns: Columns, audit: Audit) -> Iterator[Example]:
    """Yield an example for each document packed into a row; report what is wrong with the row."""
    try:
        yield from _documents(row, columns, audit)
    except _Stop:
        return


def _documents(row: Row, columns: Columns, audit: Audit) -> Iterator[Example]:
    if row.problem is not None:
        audit.report_row(UNREADABLE, row.where, row.index, row.problem)
        raise _Stop
    values = columns.of(row.values)
    ids = _integers(row, "token ids", values.get(columns.ids), audit)
    nothing = np.zeros(len(ids), bool)
    example = Example(row.where, row.index, ids, nothing, _name(row), selected=columns.selected)
    if not len(ids):
        audit.report(EMPTY, example)
        raise _Stop
    _check_ids(example, audit)
    trained = _from_labels(example, row, columns, values, audit)
    masks = _masks(example, row, columns, values, audit)
    example.trained = _agreed(example, trained, masks, columns, audit)
    if columns.response and values.get(columns.response) is not None:
        example.response = _mask(example, row, columns.response, values, audit) > 0
        example.selected = True
    shown = np.ones(len(ids), bool)
    if values.get("attention_mask") is not None:
        shown = _mask(example, row, "attention_mask", values, audit) > 0
    if audit.vocabulary is not None:
        inner = find_padding(ids[shown], example.trained[shown], audit.vocabulary, audit.shape)
        if inner is not None:
            shown[np.flatnonzero(shown)[inner]] = False
    example.padding = None if shown.all() else ~shown
    positions = lengths = None
    if values.get("position_ids") is not None and not is_nested(values["position_ids"]):
        positions = _integers(row, "position_ids", values["position_ids"], audit)
        _same_length(example, "position_ids", positions, row, audit)
    for name in ("seq_lengths", "seq_lens"):
        if values.get(name) is not None:
            lengths = _integers(row, name, values[name], audit)
    yield from packs.documents(example, positions, lengths, audit)


def _name(row: Row) -> str | None:
    name = row.values.get("example_id", row.values.get("id"))
    return str(name) if isinstance(name, (str, int)) else None


def _stop(kind: Kind, row: Row, detail: str, audit: Audit) -> _Stop:
    audit.report_row(kind, row.where, row.index, detail)
    return _Stop()


def _array(row: Row, what: str, value: Any, audit: Audit) -> NDArray[Any]:
    try:
        return numbers(value)
    except BadValue as error:
        kinds = {"null": NULL, "null token": NULL_TOKEN, "nested": NESTED}
        raise _stop(kinds.get(error.kind, UNREADABLE), row, f"{what}: {error}", audit) from error


def _integers(row: Row, what: str, value: Any, audit: Audit) -> IntArray:
    array = _array(row, what, value, audit)
    if array.dtype.kind == "f" and not (array == np.floor(array)).all():
        raise _stop(OUTSIDE, row, f"{what} has {array[array != np.floor(array)][0]:g}", audit)
    return array.astype(np.int64)


def _check_ids(example: Example, audit: Audit) -> None:
    ids, vocabulary = example.ids, audit.vocabulary
    outside = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary.size)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        last = "" if vocabulary is None else f"; the last there is {vocabulary.size - 1}"
        audit.report(OUTSIDE, example, (at, at + 1), f"id {ids[at]}{last}")


def _same_length(example: Example, what: str, array: NDArray[Any], row: Row, audit: Audit) -> None:
    if len(array) != len(example.ids):
        said = f"{len(example.ids)} token ids, {len(array)} {what}"
        audit.report(LENGTHS, example, (min(len(array), len(example.ids)),) * 2, said)
        raise _Stop


def _from_labels(
    example: Example, row: Row, columns: Columns, values: Mapping[str, Any], audit: Audit
) -> BoolArray | None:
    """Return which tokens the labels train, undoing a shift, [T]; None if there are no labels."""
    if columns.labels is None:
        return None
    labels = _integers(row, columns.labels, values.get(columns.labels), audit)
    _same_length(example, columns.labels, labels, row, audit)
    ids = example.ids
    trained = labels != IGNORED_LABEL
    size = audit.vocabulary.size if audit.vocabulary else None
    bad = trained & ((labels < 0) | (labels >= size if size else False))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        example.trained = trained & ~bad
        audit.report(BAD_LABEL, example, (at, at + 1), f"label {labels[at]}")
        trained = trained & ~bad
    shift = _shift(ids, labels, trained)
    moved = np.zeros(len(ids), bool)
    places = np.flatnonzero(trained) + (shift or 0)
    moved[places[(places >= 0) & (places < len(ids))]] = True
    example.trained = moved
    expected = 1 if columns.shifted else 0
    if shift is None:
        at = int(np.flatnonzero(trained & (labels != ids))[0])
        audit.report(OTHER_LABELS, example, (at, at + 1), f"token {ids[at]} has label {labels[at]}")
    elif shift != expected and trained.any():
        at = int(np.flatnonzero(trained)[0])
        if expected and not shift:
            audit.report(NOT_SHIFTED, example, (at, at + 1))
        else:
            way = "left" if shift > 0 else "right"
            audit.report(SHIFTED, example, (at, at + 1), f"by {abs(shift)} to the {way}")
    return moved


def _shift(ids: IntArray, labels: IntArray, trained: BoolArray) -> int | None:
    """Return by how many places labels are shifted to the left; None if they match the ids at no shift up to 2."""
    places = np.flatnonzero(trained)
    if (labels[places] == ids[places]).all():
        return 0
    best, share = None, 0.0
    for shift in (1, -1, 2, -2):
        near = places[(places + shift >= 0) & (places + shift < len(ids))]
        # Labels whose token would lie outside the row cannot be compared.
        if len(near) and len(near) >= len(places) - abs(shift):
            same = float((labels[near] == ids[near + shift]).mean())
            if same > share:
                best, share = shift, same
    return best if share >= _ENOUGH else None


def _masks(
    example: Example, row: Row, columns: Columns, values: Mapping[str, Any], audit: Audit
) -> dict[str, BoolArray]:
    found = {}
    for name in (*columns.masks, *columns.inverted):
        if isinstance(values.get(name), (bool, int, float)):
            continue  # one weight for the whole row
        if values.get(name) is None and (columns.labels or len(columns.masks) > 1):
            continue
        found[name] = _mask(example, row, name, values, audit) > 0
        if name in columns.inverted:
            found[name] = ~found[name]
    return found


def _mask(
    example: Example, row: Row, name: str, values: Mapping[str, Any], audit: Audit
) -> NDArray[np.float64]:
    array = _array(row, name, values.get(name), audit).astype(np.float64)
    _same_length(example, name, array, row, audit)
    wrong = ~np.isfinite(array) | (array < 0)
    if wrong.any() and name != "weight":  # our weights may be negative: tokens to unlearn
        at = int(np.flatnonzero(wrong)[0])
        audit.report(BAD_MASK, example, (at, at + 1), f"{name} has {array[at]:g}")
    return np.where(np.isfinite(array), array, 0)


def _agreed(
    example: Example,
    labels: BoolArray | None,
    masks: dict[str, BoolArray],
    columns: Columns,
    audit: Audit,
) -> BoolArray:
    if labels is None and not masks:
        audit.report_row(NO_LABELS, example.where, example.row, f"it has {', '.join(columns.all)}")
        return np.ones(len(example.ids), bool)
    # TRL trains what both completion_mask and assistant_masks allow.
    narrow = {name: mask for name, mask in masks.items() if name not in columns.outer}
    outer = np.ones(len(example.ids), bool)
    for name in columns.outer:
        outer &= masks.get(name, outer)
    says = {columns.labels or "": labels} if labels is not None else {}
    says |= {name: mask & outer for name, mask in narrow.items()}
    if not says:
        return outer
    first, *others = says.items()
    trained = first[1]
    if (trained & ~outer)[1:].any():
        others.append((columns.outer[0], trained & outer))
    example.trained = trained
    for name, mask in others:
        different = np.flatnonzero((mask != trained)[1:]) + 1  # nothing predicts the first token
        if different.size:
            at = int(different[0])
            audit.report(DISAGREE, example, (at, at + 1), f"{first[0]} and {name} differ")
    return trained
