"""Rows of Arrow tables (Parquet, saved datasets, the Hub) converted to the JSON values they stand for.

An Arrow struct has the keys of all rows and holds null where a row lacks one, so nulls in structs are dropped. Nulls
in maps and in JSON columns are values and are kept.
"""

from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np

from sstoken.stages.encoding.json_values import parse_json

NULLS_LEFT_OUT = "nulls in tool calls or tools left out (an Arrow struct does not tell a null from nothing)"
_CALLS = frozenset(("arguments", "parameters", "input", "args", "tools", "functions"))
"""Fields below which a null may be a real value of the row."""
Convert = Callable[[Any], Any]
Converted = tuple[Any, tuple[str, str] | None, tuple[str, ...]]
"""A row's value, or a (reason, detail) problem, and notes on what reading it changed."""


class _Nulls:
    """Counts the dropped nulls of a row that may have been real values."""

    found = 0


def rows_of(table: Any) -> Iterator[Converted]:
    """Yield the rows of a table or record batch; refuse two columns of one name with a ValueError."""
    names = table.schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"two columns are named {next(n for n in names if names.count(n) > 1)!r}")
    nulls = _Nulls()
    converts = {
        field.name: convert
        for field in table.schema
        if (convert := _converter(field.type, field.name in _CALLS, nulls)) is not None
    }
    table = _without_times(table)
    try:
        rows: Iterator[Any] = iter(table.to_pylist())
    except UnicodeDecodeError:  # one of the rows is not UTF-8
        rows = (_one(table, i) for i in range(table.num_rows))
    for row in rows:
        nulls.found = 0
        try:
            if isinstance(row, Exception):
                raise row
            for name, convert in converts.items():
                if row[name] is not None:
                    row[name] = convert(row[name])
        except UnicodeDecodeError as error:
            yield None, ("not UTF-8", f"byte 0x{error.object[error.start]:02X} at {error.start}"), ()
        except (ValueError, RecursionError) as error:
            yield None, ("broken JSON", str(error)[:200]), ()
        else:
            yield row, None, (NULLS_LEFT_OUT,) if nulls.found else ()


def _one(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def _without_times(table: Any) -> Any:
    """Convert date and time columns to text: Python has no type for nanoseconds."""
    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if pa.types.is_date(field.type) or pa.types.is_timestamp(field.type) or pa.types.is_time(field.type):
            text = table.column(index).cast(pa.string())
            table = table.set_column(index, field.name, text)
    return table


def _converter(kind: Any, in_call: bool, nulls: _Nulls) -> Convert | None:
    """Return the function that converts Python values of an Arrow type to JSON values; None if none is needed."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _converter(kind.value_type, in_call, nulls)
    if isinstance(kind, pa.BaseExtensionType):
        if getattr(kind, "extension_name", "") == "arrow.json":
            return parse_json
        return _converter(kind.storage_type, in_call, nulls)
    if types.is_struct(kind):
        inner = {f.name: _converter(f.type, in_call or f.name in _CALLS, nulls) for f in kind}
        return partial(_struct, inner=inner, nulls=nulls if in_call else None)
    if types.is_map(kind):
        return partial(_map, inner=_converter(kind.item_type, in_call, nulls))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _converter(kind.value_type, in_call, nulls)
        return item and partial(_list, inner=item)
    if in_call and (types.is_float16(kind) or types.is_float32(kind)):
        return _single
    return _decimal if types.is_decimal(kind) else None


def _struct(value: dict[str, Any], inner: dict[str, Convert | None], nulls: _Nulls | None) -> dict[str, Any]:
    found = {}
    for key, item in value.items():
        if item is None:
            if nulls is not None:
                nulls.found += 1
            continue
        convert = inner[key]
        found[key] = item if convert is None else convert(item)
    return found


def _map(value: list[tuple[Any, Any]], inner: Convert | None) -> dict[str, Any]:
    found = {str(k): v if v is None or inner is None else inner(v) for k, v in value}
    if len(found) != len(value):
        raise ValueError("a map has a key twice")
    return found


def _list(value: list[Any], inner: Convert) -> list[Any]:
    return [item if item is None else inner(item) for item in value]


def _single(value: float) -> float:
    """Return the float that prints as the single-precision number does: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))


def _decimal(value: Decimal) -> Any:
    """Convert an integer to int, and another number to the float that prints the same, if one does."""
    if value == value.to_integral_value() and value.as_tuple().exponent == 0:
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else value
