"""Cut a dataset into ranges of rows, one or more per shard, which worker processes read themselves.

The main process only finds where rows start: a range of a JSONL file is a range of bytes, one of a Parquet file a range
of rows in whole row groups, and other tables are sent as Arrow. CSV, JSON lists and compressed files can only be read
from their start, so the main process reads their rows and sends them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from sstoken.errors import SstokenError
from sstoken.stages.encoding import row_files
from sstoken.stages.encoding.archives import COMPRESSED, is_zip
from sstoken.stages.encoding.arrow_rows import rows_of
from sstoken.stages.encoding.sources import (
    Files,
    Hub,
    Row,
    Saved,
    dataset_tables,
    file_labels,
    file_rows,
    is_local,
    locate,
    naming_dataset,
    pairs,
    remote,
    shown,
)

_READ_TWICE = 4
"""Longest row group, in shards, that workers read: each shard reads it from its start. Longer ones are read here."""


class RowRange(Protocol):
    """Consecutive rows of one file."""

    @property
    def count(self) -> int:
        """Number of rows."""

    def rows(self) -> Iterator[Row]:
        """Read the rows."""


class _Source(Protocol):
    """A file or table that marks point into."""

    def range(self, first: "_Mark", count: int) -> RowRange:
        """Return `count` rows from a mark on."""


class _Mark(NamedTuple):
    """Where a row starts."""

    source: _Source
    row: int
    """Its position in the file, from 0."""
    offset: int = 0
    """In bytes of the file, or in rows of the table in memory."""
    number: int = 0
    """Its line in the file, from 1."""


@dataclass(frozen=True)
class _Opened:
    """A file that every process can open."""

    filesystem: Any
    path: str
    name: str
    """As shown to the user."""
    label: str

    @cached_property
    def stamp(self) -> tuple[int, int] | None:
        """Size and time of a local file."""
        if not is_local(self.filesystem):
            return None
        stat = os.stat(self.path)
        return stat.st_size, stat.st_mtime_ns

    def open(self) -> Any:
        return remote(lambda path: self.filesystem.open(path, "rb"), self.path, self.name)


@dataclass(frozen=True)
class _Lines(_Opened):
    """An uncompressed JSONL file."""

    def range(self, first: _Mark, count: int) -> RowRange:
        return _LineRange(self, self.stamp, first.row, first.offset, first.number, count)


@dataclass(frozen=True)
class _Groups(_Opened):
    """A Parquet file with small row groups."""

    def range(self, first: _Mark, count: int) -> RowRange:
        return _GroupRange(self, self.stamp, first.row, count)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A table in memory."""

    batch: Any
    name: str
    label: str
    first: int
    """Position of its first row in the file or dataset."""
    of: Saved | Hub | None
    """The dataset it comes from; None for a Parquet file."""

    def range(self, first: _Mark, count: int) -> RowRange:
        return _Table(self, first.offset, count)


@dataclass(frozen=True)
class _LineRange:
    file: _Opened
    stamp: tuple[int, int] | None
    index: int
    offset: int
    number: int
    count: int

    def rows(self) -> Iterator[Row]:
        with _unchanged(self.file, self.stamp) as raw:
            raw.seek(self.offset)
            found = islice(row_files.lines(raw, self.offset, self.number), self.count)
            for index, (_, number, line) in enumerate(found, self.index):
                parsed = row_files.line_of_json(number, line, parse=True)
                yield Row(
                    self.file.label, index, f"{self.file.name} {parsed.where}", parsed.value, parsed.problem
                )


@dataclass(frozen=True)
class _GroupRange:
    file: _Opened
    stamp: tuple[int, int] | None
    index: int
    count: int

    def rows(self) -> Iterator[Row]:
        import pyarrow as pa

        with _unchanged(self.file, self.stamp) as raw:
            try:
                opened = row_files.parquet_file(raw)
                groups, skipped = _groups(opened.metadata, self.index, self.count)
                batches = opened.iter_batches(row_files.BATCH_ROWS, row_groups=groups, use_threads=False)
                parsed = chain.from_iterable(map(rows_of, batches))
                wanted = islice(parsed, skipped, skipped + self.count)
                read = 0
                for index, (value, problem, notes) in enumerate(wanted, self.index):
                    yield Row(self.file.label, index, f"{self.file.name} row {index}", value, problem, notes)
                    read += 1
                row_files.check_all_read(self.count, read)
            except (pa.ArrowException, ValueError) as error:
                raise row_files.not_parquet(self.file.name, error) from error
            except row_files.DAMAGE as error:
                raise row_files.damaged(self.file.name, error) from error


@dataclass(frozen=True)
class _Table:
    table: _Batch
    offset: int
    count: int

    def rows(self) -> Iterator[Row]:
        name, label, first = self.table.name, self.table.label, self.table.first + self.offset
        part = self.table.batch.slice(self.offset, self.count)
        try:
            for index, (value, problem, notes) in enumerate(rows_of(part), first):
                yield Row(label, index, f"{name} row {index}", value, problem, notes)
        except ValueError as error:
            if self.table.of is None:
                raise row_files.not_parquet(name, error) from error
            with naming_dataset(self.table.of):
                raise


@dataclass(frozen=True)
class _Read:
    """Rows that the main process has read."""

    read: list[Row]

    @property
    def count(self) -> int:
        return len(self.read)

    def rows(self) -> Iterator[Row]:
        return (row.parsed() for row in self.read)


def cut(data: str, split: str | None, size: int, limit: int | None = None) -> Iterator[list[RowRange]]:
    """Yield the ranges of each shard of `size` rows, in order; the last shard may be shorter.

    Args:
        data: see `sources`.
        split: split of a dataset.
        size: rows in a shard.
        limit: most rows in total.

    Raises:
        SstokenError: as `sources.open_rows`.
    """
    source = locate(data, split)
    found = _marks_of_files(source, size) if isinstance(source, Files) else _marks_of_dataset(source, split)
    marks: Iterator[_Mark | Row] = islice(found, limit)
    empty = True
    while shard := list(islice(marks, size)):
        empty = False
        yield _ranges(shard)
    if empty:
        raise SstokenError(f"{shown(data)}: no rows in it; name data that has some")


def _ranges(marks: list[_Mark | Row]) -> list[RowRange]:
    ranges: list[RowRange] = []
    for source, group in groupby(marks, key=lambda mark: mark.source if isinstance(mark, _Mark) else None):
        found: list[Any] = list(group)
        found_range: RowRange = _Read(found) if source is None else source.range(found[0], len(found))
        ranges.append(found_range)
    return ranges


def _marks_of_files(files: Files, size: int) -> Iterator[_Mark | Row]:
    for (path, name), label in zip(pairs(files), file_labels(list(files.shown)), strict=True):
        kind = row_files.kind(name)
        plain = not is_zip(name) and PurePosixPath(name).suffix.lower() not in COMPRESSED
        if plain and kind == "jsonl" and is_local(files.filesystem):
            yield from _marks_of_lines(_Lines(files.filesystem, path, name, label))
        elif plain and kind == "parquet":
            yield from _marks_of_parquet(files.filesystem, path, name, label, size)
        else:
            one = Files(files.filesystem, (path,), (name,))
            yield from file_rows(one, [label], parse=False)


def _marks_of_lines(file: _Lines) -> Iterator[_Mark]:
    with file.open() as raw:
        row_files.refuse_mistaken(raw.peek(1)[:4096], file.name)
        for index, (offset, number, _) in enumerate(row_files.lines(raw)):
            yield _Mark(file, index, offset, number)


def _marks_of_parquet(filesystem: Any, path: str, name: str, label: str, size: int) -> Iterator[_Mark]:
    import pyarrow as pa

    file = _Groups(filesystem, path, name, label)
    with file.open() as raw:
        row_files.refuse_mistaken(raw.read(4096), name)
        raw.seek(0)
        try:
            opened = row_files.parquet_file(raw)
            about = opened.metadata
            longest = max((about.row_group(i).num_rows for i in range(about.num_row_groups)), default=0)
            if longest <= _READ_TWICE * size and _is_shared(filesystem):
                yield from (_Mark(file, index) for index in range(about.num_rows))
                return
            first = 0
            for batch in opened.iter_batches(row_files.BATCH_ROWS, use_threads=False):
                yield from _marks_of_batch(_Batch(batch, name, label, first, None))
                first += batch.num_rows
        except (pa.ArrowException, ValueError) as error:
            raise row_files.not_parquet(name, error) from error
        except row_files.DAMAGE as error:
            raise row_files.damaged(name, error) from error


def _marks_of_dataset(source: Saved | Hub, split: str | None) -> Iterator[_Mark]:
    first = 0
    with naming_dataset(source) as (name, label):
        for table in dataset_tables(source, split):
            yield from _marks_of_batch(_Batch(table, name, label, first, source))
            first += table.num_rows


def _marks_of_batch(batch: _Batch) -> Iterator[_Mark]:
    return (_Mark(batch, batch.first + offset, offset) for offset in range(batch.batch.num_rows))


def _is_shared(filesystem: Any) -> bool:
    """Return whether other processes see the same files."""
    return "memory" not in filesystem.protocol


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


def _unchanged(file: _Opened, stamp: tuple[int, int] | None) -> Any:
    """Open a file, and refuse it if it changed since its rows were located."""
    if stamp is not None:
        stat = remote(os.stat, file.path, file.name)
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            raise SstokenError(f"{file.name}: changed while it was read; run again when it is complete")
    return file.open()
