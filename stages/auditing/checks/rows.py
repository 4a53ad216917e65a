"""Check that a tokenised row is well formed: valid ids, labels and masks that fit together."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.labels import IGNORED_LABEL
from sstoken.selection import BoolArray, IntArray
from sstoken.stages.auditing.checks import packs
from sstoken.stages.auditing.columns import BadValue, Columns, is_nested, numbers
from sstoken.stages.auditing.data_files import Row
from sstoken.stages.auditing.examples import Example, find_padding
from sstoken.stages.auditing.findings import Audit, Family, Kind

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
    if row.problem is not None:
        audit.report_row(UNREADABLE, row.where, row.index, row.problem)
        return
    with suppress(_Stop):
        yield from _Reader(row, columns, audit).documents()


class _Reader:
    """Reads one row, of T tokens."""

    def __init__(self, row: Row, columns: Columns, audit: Audit) -> None:
        self._row, self._columns, self._audit = row, columns, audit
        self._values = columns.of(row.values)
        ids = self._integers(columns.ids, "token ids")
        name = row.values.get("example_id", row.values.get("id"))
        name = str(name) if isinstance(name, (str, int)) else None
        nothing = np.zeros(len(ids), bool)
        self._example = Example(row.where, row.index, ids, nothing, name, selected=columns.selected)

    def documents(self) -> Iterator[Example]:
        example, vocabulary = self._example, self._audit.vocabulary
        ids = example.ids
        if not len(ids):
            self._audit.report(EMPTY, example)
            return
        outside = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary.size)
        if outside.any():
            at = int(outside.argmax())
            last = "" if vocabulary is None else f"; the last there is {vocabulary.size - 1}"
            self._report(OUTSIDE, at, f"id {ids[at]}{last}")
        labels = self._from_labels()
        example.trained = self._agreed(labels, self._masks())
        response = self._columns.response
        if response is not None and self._has(response):
            example.response = self._mask(response) > 0
            example.selected = True
        shown = self._mask("attention_mask") > 0 if self._has("attention_mask") else np.ones(len(ids), bool)
        if vocabulary is not None:
            inner = find_padding(ids[shown], example.trained[shown], vocabulary, self._audit.shape)
            if inner is not None:
                shown[np.flatnonzero(shown)[inner]] = False
        example.padding = None if shown.all() else ~shown
        positions = lengths = None
        if self._has("position_ids") and not is_nested(self._values["position_ids"]):
            positions = self._per_token("position_ids")
        for name in ("seq_lengths", "seq_lens"):
            if self._has(name):
                lengths = self._integers(name)
        yield from packs.documents(example, positions, lengths, self._audit)

    def _has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _report(self, kind: Kind, at: int, detail: str = "") -> None:
        self._audit.report(kind, self._example, at, detail)

    def _array(self, name: str, what: str | None = None) -> NDArray[Any]:
        """Return a column's numbers; `what` is its name in messages."""
        try:
            return numbers(self._values.get(name))
        except BadValue as error:
            kind = {"null": NULL, "null token": NULL_TOKEN, "nested": NESTED}.get(error.kind, UNREADABLE)
            raise self._stop(kind, f"{what or name}: {error}") from error

    def _stop(self, kind: Kind, detail: str) -> _Stop:
        self._audit.report_row(kind, self._row.where, self._row.index, detail)
        return _Stop()

    def _integers(self, name: str, what: str | None = None) -> IntArray:
        array = self._array(name, what)
        if array.dtype.kind == "f" and not (array == np.floor(array)).all():
            odd = array[array != np.floor(array)][0]
            raise self._stop(OUTSIDE, f"{what or name} has {odd:g}")
        return array.astype(np.int64)

    def _check_length(self, name: str, array: NDArray[Any]) -> None:
        size = len(self._example.ids)
        if len(array) != size:
            focus = (min(len(array), size),) * 2
            self._audit.report(LENGTHS, self._example, focus, f"{size} token ids, {len(array)} {name}")
            raise _Stop

    def _per_token(self, name: str) -> IntArray:
        array = self._integers(name)
        self._check_length(name, array)
        return array

    def _from_labels(self) -> BoolArray | None:
        """Return which tokens the labels train, undoing a shift, [T]; None if there are no labels."""
        if self._columns.labels is None:
            return None
        ids, labels = self._example.ids, self._per_token(self._columns.labels)
        trained = labels != IGNORED_LABEL
        vocabulary = self._audit.vocabulary
        bad = trained & ((labels < 0) | (False if vocabulary is None else labels >= vocabulary.size))
        trained &= ~bad
        if bad.any():
            at = int(bad.argmax())
            self._example.trained = trained
            self._report(BAD_LABEL, at, f"label {labels[at]}")
        shift = _shift(ids, labels, trained)
        moved = np.zeros(len(ids), bool)
        places = np.flatnonzero(trained) + (shift or 0)
        moved[places[(places >= 0) & (places < len(ids))]] = True
        self._example.trained = moved
        expected = int(self._columns.shifted)
        if shift is None:
            at = int((trained & (labels != ids)).argmax())
            self._report(OTHER_LABELS, at, f"token {ids[at]} has label {labels[at]}")
        elif shift != expected and trained.any():
            at = int(trained.argmax())
            if expected and not shift:
                self._report(NOT_SHIFTED, at)
            else:
                self._report(SHIFTED, at, f"by {abs(shift)} to the {'left' if shift > 0 else 'right'}")
        return moved

    def _masks(self) -> dict[str, BoolArray]:
        found = {}
        columns, values = self._columns, self._values
        for name in (*columns.masks, *columns.inverted):
            if isinstance(values.get(name), (bool, int, float)):
                continue  # one weight for the whole row
            if not self._has(name) and (columns.labels or len(columns.masks) > 1):
                continue
            mask = self._mask(name) > 0
            found[name] = ~mask if name in columns.inverted else mask
        return found

    def _mask(self, name: str) -> NDArray[np.float64]:
        array = self._array(name).astype(np.float64)
        self._check_length(name, array)
        wrong = ~np.isfinite(array) | (array < 0)
        if wrong.any() and name != "weight":  # our weights may be negative: tokens to unlearn
            at = int(wrong.argmax())
            self._report(BAD_MASK, at, f"{name} has {array[at]:g}")
        return np.where(np.isfinite(array), array, 0)

    def _agreed(self, labels: BoolArray | None, masks: dict[str, BoolArray]) -> BoolArray:
        """Return which tokens labels and masks train, [T]; report where they differ."""
        example, columns = self._example, self._columns
        outer = np.ones(len(example.ids), bool)
        if labels is None and not masks:
            said = f"it has {', '.join(columns.all)}"
            self._audit.report_row(NO_LABELS, example.where, example.row, said)
            return outer
        # TRL trains what both completion_mask and assistant_masks allow.
        for name in columns.outer:
            outer &= masks.get(name, outer)
        says = {columns.labels or "": labels} if labels is not None else {}
        says |= {name: mask & outer for name, mask in masks.items() if name not in columns.outer}
        if not says:
            return outer
        (first, trained), *others = says.items()
        if (trained & ~outer)[1:].any():
            others.append((columns.outer[0], trained & outer))
        example.trained = trained
        for name, mask in others:
            different = (mask != trained)[1:]  # nothing predicts the first token
            if different.any():
                self._report(DISAGREE, int(different.argmax()) + 1, f"{first} and {name} differ")
        return trained


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
