"""Recognise the columns of a tokenised dataset by the names that trainers use, and read their cells."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

IDS = ("input_ids", "token_ids", "tokens")
LABELS = ("labels", "label_ids", "target_ids")
OUTER = ("completion_mask",)
"""Masks that limit others: TRL trains what both this and the assistant's mask allow."""
MASKS = (
    "loss_mask",
    "assistant_masks",
    "assistant_mask",
    "assistant_tokens_mask",
    "label_mask",
    "train_mask",
    "keep_mask",
    "loss_weights",
    "loss_scale",
    "weights",
    "weight",
    *OUTER,
)
"""1, true or a weight above 0 where a token is trained."""
BESIDE = ("attention_mask", "position_ids", "seq_lengths", "seq_lens", "example_id", "id")
_RESPONSE = "response_mask"
_NOT_TRAINED = "mask"
"""torchtune's mask, beside `tokens`: true where a token is *not* trained."""


@dataclass(frozen=True)
class Columns:
    """The columns of a tokenised dataset."""

    ids: str
    labels: str | None = None
    masks: tuple[str, ...] = ()
    inverted: tuple[str, ...] = ()
    """Masks that are true where a token is not trained."""
    response: str | None = None
    """Mask of the assistant's tokens, if the other columns select some of them."""
    all: tuple[str, ...] = ()
    """Every column of the dataset."""
    shifted: bool = False
    """Label i is the token after token i, as the trainer expects."""
    selected: bool = False
    """The trained tokens are a selection of the response."""
    nested: bool = False
    """As in ms-swift, a message holds the ids and the loss scale."""

    @property
    def outer(self) -> tuple[str, ...]:
        """The masks that only limit others."""
        return tuple(name for name in self.masks if name in OUTER)

    @property
    def wanted(self) -> list[str]:
        """The columns to read."""
        known = {self.ids, self.labels, *self.masks, *self.inverted, self.response, *BESIDE}
        known |= {"messages"} if self.nested else set()
        return [name for name in self.all if name in known]

    def of(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns of a row."""
        if not self.nested:
            return values
        found = _within_message(values.get("messages"))
        return {} if found is None else found


def find(names: Iterable[str], first: Mapping[str, Any] | None = None) -> Columns | None:
    """Find the columns of a tokenised dataset by all its names; None: it has no token ids.

    In the `first` row, a message may hold the ids.
    """
    names = tuple(names)
    ids = next((name for name in IDS if name in names), None)
    if ids is None:
        inside = _within_message((first or {}).get("messages"))
        if inside is None:
            return None
        found = find(inside)
        return None if found is None else replace(found, all=names, nested=True)
    labels = next((name for name in LABELS if name in names), None)
    masks = tuple(name for name in MASKS if name in names)
    response: str | None = _RESPONSE if _RESPONSE in names else None
    if response and labels is None and not masks:
        masks, response = (response,), None
    inverted = (
        (_NOT_TRAINED,) if ids == "tokens" and not masks and labels is None and _NOT_TRAINED in names else ()
    )
    return Columns(ids, labels, masks, inverted, response, names, selected=response is not None)


def _within_message(messages: Any) -> Mapping[str, Any] | None:
    if not isinstance(messages, (list, tuple)) or len(messages) != 1:
        return None
    content = messages[0].get("content") if isinstance(messages[0], Mapping) else None
    return content if isinstance(content, Mapping) and "token_ids" in content else None


class BadValue(ValueError):  # noqa: N818 (the value is bad; the error is what is raised about it)
    """A cell that is not a list of numbers. `kind` is `null`, `null token`, `nested` or `other`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def numbers(value: Any) -> NDArray[Any]:
    """Return a cell as numbers, [T], from an Arrow list of any width, a list, a numpy array or a tensor.

    Raises:
        BadValue: the cell is null, a list of lists or not numeric, or contains null or NaN.
    """
    if value is None:
        raise BadValue("null", "null")
    array = _array(value)
    if array.ndim == 0:
        raise BadValue("other", f"{str(value)[:40]!r} is not a list")
    if array.ndim > 1:
        raise BadValue("nested", f"a list of {len(array)} lists")
    if not array.size:
        return np.zeros(0, np.int64)
    if array.dtype == object:
        return _from_objects(array)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise BadValue("null token", f"NaN at {int(np.flatnonzero(np.isnan(array))[0])}")
    if array.dtype.kind not in "biuf":
        raise BadValue("other", f"{array.dtype.name} instead of numbers")
    return array


def is_nested(value: Any) -> bool:
    """Return whether a cell is a list of lists, as the positions of multimodal models are."""
    try:
        numbers(value)
    except BadValue as error:
        return error.kind == "nested"
    return False


def _array(value: Any) -> NDArray[Any]:
    import pyarrow as pa

    if isinstance(value, pa.Array):
        if pa.types.is_nested(value.type):
            raise BadValue("nested", f"a list of {len(value)} lists")
        if value.null_count:
            at = next(i for i, null in enumerate(value.is_null().to_pylist()) if null)
            raise BadValue("null token", f"null at {at}")
        if pa.types.is_decimal(value.type):
            value = value.cast(pa.float64())
        return np.asarray(value.to_numpy(zero_copy_only=False))
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple, np.ndarray)):
            raise BadValue("nested", f"a list of {len(value)} lists")
        try:
            return np.asarray(value)
        except (ValueError, OverflowError) as error:
            raise BadValue("other", str(error).splitlines()[0]) from error
    if hasattr(value, "numpy"):  # a tensor
        return np.asarray(value.numpy())
    return np.asarray(value)


def _from_objects(array: NDArray[Any]) -> NDArray[Any]:
    values = array.tolist()
    for at, value in enumerate(values):
        if value is None:
            raise BadValue("null token", f"null at {at}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadValue("other", f"{str(value)[:40]!r} at {at} is no number")
    raise BadValue("other", "numbers beyond 64 bits")
