"""Cut a dataset into ranges of rows, one or more per shard, which worker processes read themselves.

The main process only finds where rows start: a range of a JSONL file is a range of bytes, one of a Parquet file a range
of rows in whole row groups, and other tables are sent as Arrow. CSV, JSON lists and compressed files can only be read
from their start, so the main process reads their rows and sends them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from sstoken.errors import SstokenError
from sstoken.stages.encoding import row_files
from sstoken.stages.encoding.archives import COMPRESSED
from sstoken.stages.encoding.arrow_rows import rows_of
from sstoken.stages.encoding.sources import (
    File,
    Hub,
    Row,
    Saved,
    dataset_tables,
    file_rows,
    is_local,
    locate,
    naming_dataset,
    numbered,
    remote,
    some,
)

_READ_TWICE = 4
"""Longest row group, in shards, that workers read: each shard reads it from its start. Longer ones are read here."""


class RowRange(Protocol):
    """Consecutive rows of one file."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    def rows(self) -> Iterator[Row]:
        """Read the rows."""


@dataclass(frozen=True)
class _Stamped(File):
    """A file whose rows were located, and which must not change before they are read."""

    stamp: tuple[int, int] | None
    """Size and time of a local file."""

    def open(self) -> Any:
        """Open the file; refuse it if it has changed."""
        if self.stamp != _stamp(self):
            raise SstokenError(f"{self.name}: changed while it was read; run again when it is complete")
        return super().open()


@dataclass(frozen=True)
class _Table:
    """A table in memory."""

    table: Any
    name: str
    label: str
    first: int
    """Position of its first row in the file or dataset."""
    dataset: Saved | Hub | None
    """The dataset it comes from; None for a Parquet file."""


class _Lines(NamedTuple):
    """Rows of an uncompressed JSONL file."""

    source: _Stamped
    first: int
    offset: int
    """Where the first row starts, in bytes."""
    number: int
    """The first row's line, from 1."""
    num_rows: int = 1

    def rows(self) -> Iterator[Row]:
        name, label = self.source.name, self.source.label
        with self.source.open() as raw:
            raw.seek(self.offset)
            found = islice(row_files.lines(raw, self.offset, self.number), self.num_rows)
            for index, (_, number, line) in enumerate(found, self.first):
                parsed = row_files.line_of_json(number, line, parse=True)
                yield Row(label, index, f"{name} {parsed.where}", parsed.value, parsed.problem)


class _InGroups(NamedTuple):
    """Rows of a Parquet file with small row groups."""

    source: _Stamped
    first: int
    num_rows: int = 1

    def rows(self) -> Iterator[Row]:
        name = self.source.name
        with self.source.open() as raw, row_files.reading(name), row_files.reading_parquet(name):
            file = row_files.parquet_file(raw)
            groups, skipped = _groups(file.metadata, self.first, self.num_rows)
            batches = file.iter_batches(row_files.BATCH_ROWS, row_groups=groups, use_threads=False)
            wanted = islice(chain.from_iterable(map(rows_of, batches)), skipped, skipped + self.num_rows)
            read = 0
            for row in numbered(wanted, name, self.source.label, self.first):
                yield row
                read += 1
            row_files.check_all_read(self.num_rows, read)


class _InTable(NamedTuple):
    """Rows of a table in memory."""

    source: _Table
    offset: int
    """The first row's position in the table."""
    num_rows: int = 1

    def rows(self) -> Iterator[Row]:
        name, label, dataset = self.source.name, self.source.label, self.source.dataset
        with row_files.reading_parquet(name) if dataset is None else naming_dataset(dataset):
            part = self.source.table.slice(self.offset, self.num_rows)
            yield from numbered(rows_of(part), name, label, self.source.first + self.offset)


class _Read(NamedTuple):
    """Rows that the main process has read."""

    read: list[Row]

    @property
    def num_rows(self) -> int:
        return len(self.read)

    def rows(self) -> Iterator[Row]:
        return (row.parsed() for row in self.read)


_OneRow = _Lines | _InGroups | _InTable | Row


def cut(data: str, split: str | None, size: int, limit: int | None = None) -> Iterator[list[RowRange]]:
    """Yield the ranges of each shard of `size` rows, in order; the last shard may be shorter.

    `data` and `split` are as for `open_rows`; `limit` is the most rows in total.

    Raises:
        SstokenError: as `sources.open_rows`.
    """
    source = locate(data, split)
    found: Iterator[_OneRow]
    if isinstance(source, list):
        found = chain.from_iterable(_rows_of_file(file, size) for file in source)
    else:
        found = _rows_of_dataset(source, split)
    rows = islice(found, limit)
    shards = iter(lambda: list(islice(rows, size)), [])
    return some(map(_joined, shards), data)


def _joined(rows: list[_OneRow]) -> list[RowRange]:
    """Join the rows that have the same source."""
    ranges: list[RowRange] = []
    for _, group in groupby(rows, key=lambda row: None if isinstance(row, Row) else id(row.source)):
        found: list[Any] = list(group)
        is_read = isinstance(found[0], Row)
        ranges.append(_Read(found) if is_read else found[0]._replace(num_rows=len(found)))
    return ranges


def _rows_of_file(file: File, size: int) -> Iterator[_OneRow]:
    kind = row_files.kind(file.name)
    if PurePosixPath(file.name).suffix.lower() in COMPRESSED:
        return file_rows(file, parse=False)
    if kind == "parquet":
        return _rows_of_parquet(_Stamped(**vars(file), stamp=_stamp(file)), size)
    if kind == "jsonl" and is_local(file.filesystem):
        return _rows_of_lines(_Stamped(**vars(file), stamp=_stamp(file)))
    return file_rows(file, parse=False)


def _rows_of_lines(file: _Stamped) -> Iterator[_Lines]:
    with file.open() as raw:
        row_files.refuse_mistaken(raw.peek(1)[:4096], file.name)
        for index, (offset, number, _) in enumerate(row_files.lines(raw)):
            yield _Lines(file, index, offset, number)


def _rows_of_parquet(file: _Stamped, size: int) -> Iterator[_InGroups | _InTable]:
    with file.open() as raw, row_files.reading(file.name), row_files.reading_parquet(file.name):
        row_files.refuse_mistaken(raw.read(4096), file.name)
        opened = row_files.parquet_file(raw)
        about = opened.metadata
        longest = max((about.row_group(i).num_rows for i in range(about.num_row_groups)), default=0)
        shared = "memory" not in file.filesystem.protocol  # other processes see the same files
        if longest <= _READ_TWICE * size and shared:
            yield from (_InGroups(file, index) for index in range(about.num_rows))
            return
        batches = opened.iter_batches(row_files.BATCH_ROWS, use_threads=False)
        yield from _rows_of_tables(batches, file.name, file.label, None)


def _rows_of_dataset(source: Saved | Hub, split: str | None) -> Iterator[_InTable]:
    with naming_dataset(source) as (name, label):
        yield from _rows_of_tables(dataset_tables(source, split), name, label, source)


def _rows_of_tables(
    tables: Iterator[Any], name: str, label: str, dataset: Saved | Hub | None
) -> Iterator[_InTable]:
    first = 0
    for table in tables:
        source = _Table(table, name, label, first, dataset)
        yield from (_InTable(source, offset) for offset in range(table.num_rows))
        first += table.num_rows


def _groups(about: Any, first: int, count: int) -> tuple[list[int], int]:
    """Return the row groups that contain a range of rows, and the number of rows in them before the range."""
    groups: list[int] = []
    start = skipped = 0
    for group in range(about.num_row_groups):
        end = start + about.row_group(group).num_rows
        if end > first and start < first + count:
            skipped = skipped if groups else first - start
            groups.append(group)
        start = end
    return groups, skipped


def _stamp(file: File) -> tuple[int, int] | None:
    """Return the size and time of a local file."""
    if not is_local(file.filesystem):
        return None
    stat = remote(os.stat, file.path, file.name)
    return stat.st_size, stat.st_mtime_ns
