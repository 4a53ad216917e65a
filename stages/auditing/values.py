"""Turn a cell into an array of numbers, whatever type its file gave it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


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
