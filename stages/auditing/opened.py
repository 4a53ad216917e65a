"""An opened dataset, and rows from Arrow tables."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, first_line
from sstoken.stages.auditing.columns import IDS, Columns
from sstoken.stages.encoding.arrow_rows import rows_of

BATCH = 500
"""Rows held in memory at a time."""


@dataclass
class Row:
    """A row as read from the dataset."""

    where: str
    """As shown to the user: `data.jsonl line 12`."""
    index: int
    """From 0, among all that are read."""
    values: Mapping[str, Any]
    problem: str | None = None
    """Why it cannot be read."""


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


def file_rows(files: Iterable[Path], batches: Callable[[Path], Iterable[Any]]) -> Iterator[Row]:
    """Yield the rows of files, numbered throughout.

    Args:
        files: the files.
        batches: reads a file's Arrow tables or record batches.

    Raises:
        SstokenError: a file is damaged.
    """
    import pyarrow as pa

    row = 0
    for file in files:
        try:
            for each in arrow_rows(batches(file), f"{file.name} row", row):
                yield each
                row = each.index + 1
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SstokenError(f"{file}: damaged or cut short ({first_line(error)})") from error


def arrow_rows(batches: Iterable[Any], where: str = "row", first: int = 0) -> Iterator[Row]:
    """Yield the rows of Arrow tables or record batches of any size.

    Cells of list columns of a tokenised dataset stay Arrow arrays; all others become Python values.

    Args:
        batches: the tables or batches.
        where: prefix of a row's number in messages.
        first: number of the first row among all that are read.
    """
    index = first
    for batch in batches:
        read = _cells if any(name in IDS for name in batch.schema.names) else _values
        for start in range(0, batch.num_rows, BATCH):
            for values, problem in read(batch.slice(start, BATCH)):
                yield Row(f"{where} {index - first}", index, values, problem)
                index += 1


def _values(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    for value, problem, _ in rows_of(batch):
        yield value or {}, None if problem is None else ": ".join(problem)


def _cells(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    names = batch.schema.names
    for row in zip(*map(_column, batch.columns), strict=True):
        yield dict(zip(names, row, strict=True)), None


def _column(column: Any) -> list[Any]:
    import pyarrow as pa

    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists and not pa.types.is_nested(kind.value_type):
        return [cell.values for cell in column]
    return list(column.to_pylist())
