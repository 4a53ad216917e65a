"""An opened dataset, and rows from Arrow tables."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstoken.stages.auditing.checks.rows import Row
from sstoken.stages.auditing.columns import IDS, Columns
from sstoken.stages.encoding.arrow_rows import rows_of

BATCH = 500
"""Rows held in memory at a time."""


@dataclass
class OpenedDataset:
    """A dataset that is ready to be read."""

    shown: str
    form: str
    """`conversations`, `tokenised`, or the stage that wrote the folder."""
    rows: Iterator[Row]
    columns: Columns | None
    """None: raw conversations."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that made it, found beside it."""
    scores: Path | None = None
    """The scores folder to audit; `rows` are then those of its tokens."""
    tokens: Path | None = None
    """The folder of tokens that `scores` belong to."""
    max_length: int | None = None
    """Length in tokens at which the rows were cut; None if the folder does not say."""


def arrow_rows(batches: Iterable[Any], where: str, first: int = 0) -> Iterator[Row]:
    """Yield the rows of Arrow tables or batches.

    Cells of list columns of a tokenised dataset stay Arrow arrays; all others become Python values.

    Args:
        batches: tables or record batches of any size.
        where: prefix of a row's number in messages.
        first: number of the first row among all that are read.
    """
    index = first
    for batch in batches:
        tokenised = any(name in IDS for name in batch.schema.names)
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            for values, problem in _cells(part) if tokenised else _values(part):
                yield Row(f"{where} {index - first}", index, values, problem)
                index += 1


def _values(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    for value, problem, _ in rows_of(batch):
        yield value or {}, None if problem is None else ": ".join(problem)


def _cells(batch: Any) -> Iterator[tuple[dict[str, Any], None]]:
    names = batch.schema.names
    for row in zip(*(_column(batch.column(i)) for i in range(len(names))), strict=True):
        yield dict(zip(names, row, strict=True)), None


def _column(column: Any) -> list[Any]:
    import pyarrow as pa

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists and not pa.types.is_nested(kind.value_type):
        return [cell.values for cell in column]
    return list(column.to_pylist())
