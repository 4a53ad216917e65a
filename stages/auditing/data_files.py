"""Rows of data files: Parquet and Arrow in batches of the columns that are needed, others as `encode` reads them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError, first_line
from sstoken.stages import folders
from sstoken.stages.auditing import columns
from sstoken.stages.auditing.columns import IDS
from sstoken.stages.encoding import row_files, sources
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


_ARROW = (".parquet", ".arrow", ".feather")
_IN_FOLDERS = ("parquet", "arrow", "jsonl", "json")
"""Extensions to look for in a folder."""
_NO_DATA = (
    "dataset_info.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


def read_files(path: Path, name: str, split: str | None) -> tuple[Iterator[Row], list[str] | None]:
    """Return the rows, and their column names if the files have a schema.

    `name` is a path, a pattern, a URL or a Hub id, and `path` the same as a path.

    Raises:
        UsageError: there is no such file, or the folder holds no data files.
        SstokenError: a file is damaged.
    """
    files = _files(path, name)
    for file in [path] if files is None and path.is_file() else files or ():
        folders.check_file(file)
    if files is None:
        return _as_encode_reads(sources.open_rows(name, split)), None
    if split is not None:
        raise UsageError(
            f"split {split!r}: plain files have no splits; name the split's file, or leave split out"
        )
    if files[0].suffix.lower() not in _ARROW:
        return _as_encode_reads(chain.from_iterable(sources.open_rows(str(file)) for file in files)), None
    return file_rows(files, _batches), _names(files[0])


def file_rows(files: Iterable[Path], batches: Callable[[Path], Iterable[Any]]) -> Iterator[Row]:
    """Yield the rows of files, numbered throughout; `batches` reads a file's Arrow tables or record batches.

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

    Cells of list columns of a tokenised dataset stay Arrow arrays; all others become Python values. Messages name a row
    by `where` and its number; `first` is the number of rows that were read before.
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


def _as_encode_reads(rows: Iterator[sources.Row]) -> Iterator[Row]:
    for index, row in enumerate(rows):
        value, problem = row.value, row.problem
        if problem is not None:
            yield Row(row.where, index, {}, ": ".join(problem))
        elif isinstance(value, Mapping):
            yield Row(row.where, index, value)
        else:
            yield Row(row.where, index, {}, f"a {type(value).__name__} instead of named columns")


def _files(path: Path, name: str) -> list[Path] | None:
    """Return the local files to read here; None if `sources` has to open it."""
    if path.is_file():
        return [path] if path.suffix.lower() in _ARROW else None
    if path.is_dir() and not any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _in_folder(path)
    if not path.is_dir() and "://" not in name and any(c in name for c in "*?[") and name.endswith(_ARROW):
        return sorted(map(Path, row_files.matches(name))) or None
    return None


def _in_folder(folder: Path) -> list[Path]:
    finished = sorted(p.parent.relative_to(folder).as_posix() for p in folder.glob("*/manifest.json"))
    for place in () if finished else ("", "data/", "*/"):
        kinds = {kind: files for kind in _IN_FOLDERS if (files := _data_files(folder, f"{place}*.{kind}"))}
        if len(kinds) > 1:
            kinds.pop("json", None)  # beside other data, .json files mostly describe it
        if len(kinds) > 1:
            raise UsageError(
                f"{folder}: holds {' and '.join(f'.{kind}' for kind in kinds)} files; name those to be audited with a "
                f"pattern, such as '{folder}/{place}*.{next(iter(kinds))}'"
            )
        for files in kinds.values():
            return files
    what = f"name one of the folders in it: {', '.join(finished)}" if finished else "no data files in it"
    raise UsageError(f"{folder}: {what}")


def _data_files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    return [p for p in found if p.name not in _NO_DATA and row_files.is_visible(p.name)]


def _names(file: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".parquet":
            return list(pq.read_schema(file).names)
        return list(_arrow_file(file).schema.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SstokenError(f"{file}: not a readable {file.suffix[1:]} file ({first_line(error)})") from error


def _arrow_file(file: Path) -> Any:
    """Open an Arrow file, or an Arrow stream, which `datasets` writes."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(file)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(file)))


def _batches(file: Path) -> Iterator[Any]:
    """Yield the batches of a file; from a tokenised Parquet file, only the columns to check."""
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        found = columns.find(_names(file))
        with pq.ParquetFile(file, pre_buffer=False) as opened:
            wanted = None if found is None else found.wanted
            yield from opened.iter_batches(BATCH, columns=wanted, use_threads=False)
        return
    opened = _arrow_file(file)
    if hasattr(opened, "num_record_batches"):
        yield from (opened.get_batch(i) for i in range(opened.num_record_batches))
    else:
        yield from opened
