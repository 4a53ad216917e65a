"""Stream the values of one open file: JSON lines, a JSON array, Parquet or CSV of any size."""

import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from zipfile import BadZipFile

from sstoken.errors import SstokenError, first_line
from sstoken.stages.encoding.arrow_rows import rows_of
from sstoken.stages.encoding.json_values import DuplicateKeyError, elements, parse_json

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
MAX_LINE_BYTES = 256 << 20
"""A longer line of JSON is a bad row rather than out of memory."""
BATCH_ROWS = 64
"""Rows of a table in memory at a time."""
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, BadZipFile)
"""What decompressors raise on a truncated file, or one that is not compressed."""

Problem = tuple[str, str]
"""A short stable reason, and the detail."""


class Parsed(NamedTuple):
    """One row of a file."""

    where: str
    """Its position in the file, as shown to the user."""
    value: Any
    problem: Problem | None = None
    """The problem with the row, instead of a value."""
    notes: tuple[str, ...] = ()
    """Notes on what reading it changed."""


def kind(path: str) -> str | None:
    """Return the format by the extension, ignoring a compression suffix; None: not a known format."""
    match = re.search(r"\.(jsonl|ndjson|json|parquet|csv)(\.(gz|bz2|xz|zst|zip))?$", path.lower())
    if match is None:
        return None
    return "jsonl" if match[1] == "ndjson" else match[1]


def matches(pattern: str) -> list[str]:
    """Return the absolute local paths that a path's pattern matches.

    fsspec would read a `[` in the current folder's name as part of the pattern.
    """
    return [os.path.abspath(path) for path in glob(os.path.expanduser(pattern), recursive=True)]


def is_visible(path: str) -> bool:
    """Whether a pattern should match it: hidden files and markers such as `_SUCCESS` are skipped."""
    name = PurePosixPath(path).name
    return not name.startswith(".") and (not name.startswith("_") or kind(name) is not None)


def read(stream: Any, name: str, *, parse: bool = True) -> Iterator[Parsed]:
    """Yield the rows of an open `io.BufferedReader`; the extension in its name decides the format.

    Without `parse`, lines of JSON stay bytes.

    Raises:
        SstokenError: the file is empty or damaged.
    """
    format = kind(name)
    assert format is not None, name
    with reading(name):
        refuse_mistaken(stream.peek(1)[:4096], name)
        if format == "jsonl":
            yield from (line_of_json(number, line, parse) for _, number, line in lines(stream))
        else:
            yield from {"json": _json, "parquet": _parquet, "csv": _csv}[format](stream, name)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what decompressors raise on a damaged file into a one-line error."""
    try:
        yield
    except _DAMAGE as error:
        raise SstokenError(f"{name}: damaged or cut short ({first_line(error)}); fetch it again") from error


def refuse_mistaken(start: bytes, name: str) -> None:
    """Refuse an empty file, or one whose first bytes show that it is of another kind than its name says."""
    if not start:
        raise SstokenError(f"{name}: the file is empty; name one that has rows")
    text, format = start.removeprefix(b"\xef\xbb\xbf").lstrip(), kind(name)
    for mark, told in _OTHERS.items():
        if text.lower().startswith(mark) and (mark, format) != (b"par1", "parquet"):
            raise SstokenError(f"{name}: {told}")


_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch the file itself: git lfs pull",
    b"<!doctype": "a web page and not the data; download the file itself (on the Hub, resolve in place of blob)",
    b"<html": "a web page and not the data; download the file itself (on the Hub, resolve in place of blob)",
    b"pk\x03\x04": "a zip archive or a spreadsheet; name an archive .zip, and save a sheet as .csv",
    b"par1": "a Parquet file; name it .parquet",
    b"\x1f\x8b": "compressed with gzip; add .gz to its name",
    b"bzh91ay&sy": "compressed with bzip2; add .bz2 to its name",
    b"\xfd7zxz": "compressed with xz; add .xz to its name",
    b"(\xb5/\xfd": "compressed with zstd; add .zst to its name",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8",
}
"""What a file is, by its first bytes in lower case."""


def lines(stream: Any, offset: int = 0, number: int = 1) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield offset, number and bytes of the lines that are not blank; None instead of bytes if one is too long.

    `offset` is the position of `stream` in its file, at the start of line `number`, which counts from 1.
    """
    while line := stream.readline(MAX_LINE_BYTES):
        start, offset = offset, offset + len(line)
        too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
        while too_long and line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
            offset += len(line)
        line = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if too_long or line:
            yield start, number, None if too_long else line
        number += 1


def line_of_json(number: int, line: bytes | None, parse: bool) -> Parsed:
    """Return a line of JSON as a row; without `parse`, its value stays bytes."""
    if line is None:
        return Parsed(f"line {number}", None, ("too long", f"the line is over {MAX_LINE_BYTES >> 20} MiB"))
    return Parsed(f"line {number}", *(json_value(line) if parse else (line, None)))


def json_value(text: bytes) -> tuple[Any, Problem | None]:
    """Return the value of a line of JSON, or its problem."""
    try:
        return parse_json(text.decode("utf-8", "surrogatepass")), None
    except UnicodeDecodeError as wrong:
        return None, ("not UTF-8", _not_utf8(wrong))
    except DuplicateKeyError as error:
        return None, ("duplicate key", str(error))
    except json.JSONDecodeError as error:
        return None, ("broken JSON", f"{_explained(error)} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deep
        return None, ("broken JSON", str(error)[:100])


def _not_utf8(wrong: UnicodeDecodeError) -> str:
    where = f"byte 0x{wrong.object[wrong.start]:02X} at {wrong.start}"
    return f"{where}; convert the file, for example with iconv"


def _explained(error: json.JSONDecodeError) -> str:
    """Return what is wrong with a JSON text, in plainer words than Python's parser."""
    if error.doc.strip() in ("{", "["):
        return "the row spans several lines; write one object per line, or name a list .json; broken"
    found, before = error.doc[error.pos : error.pos + 1], error.doc[: error.pos].rstrip()[-1:]
    if error.msg == "Extra data":
        return "more than one value on the line"
    if found and found in "]}" and before == ",":
        return f"a comma before {found}"
    return "names and texts need double quotes" if found == "'" else error.msg


def _json(stream: Any, name: str) -> Iterator[Parsed]:
    start = stream.peek(1)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        yield from _json_array(stream, name)
        return
    # Many .json files hold JSON lines; others hold one pretty-printed object.
    for _, number, line in lines(stream):
        row = line_of_json(number, line, parse=True)
        if number == 1 and row.problem is not None and row.problem[0] == "broken JSON":
            raise SstokenError(
                f"{name}: neither a JSON list of rows nor one JSON object a line ({row.problem[1]}); make it "
                "[{...}, {...}] or JSON lines"
            )
        yield row


def _json_array(stream: Any, name: str) -> Iterator[Parsed]:
    index = 0
    try:
        for value, problem in elements(stream):
            yield Parsed(f"row {index}", value, problem)
            index += 1
    except UnicodeDecodeError as error:
        raise SstokenError(f"{name}: not UTF-8, in or soon after row {index}: {_not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        where = f"after row {index - 1}" if index else "in its first row"
        raise SstokenError(f"{name}: broken JSON {where} ({first_line(error)})") from error


def _parquet(stream: Any, name: str) -> Iterator[Parsed]:
    if not stream.seekable():  # Parquet needs a seekable file
        import shutil
        import tempfile

        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            yield from _parquet(copy, name)
        return
    index = 0
    with reading_parquet(name):
        file = parquet_file(stream)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            for value, problem, notes in rows_of(batch):
                yield Parsed(f"row {index}", value, problem, notes)
                index += 1
        check_all_read(file.metadata.num_rows, index)


def parquet_file(stream: Any) -> Any:
    """Open a seekable Parquet file for reading in little memory.

    Raises:
        ValueError: its footer claims more rows than its columns hold; pyarrow would read them forever.
    """
    import pyarrow.parquet as pq

    size = stream.seek(0, 2)
    stream.seek(0)
    # Read-ahead and threads each need memory in proportion to the row group, which may span the file.
    file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    about = file.metadata
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    held = sum(group.num_rows for group in groups)
    if about.num_rows != held or any(group.num_rows < 0 for group in groups):
        raise ValueError(f"its footer claims {about.num_rows:,} rows, its row groups hold {held:,}")
    for index, group in enumerate(groups):
        if group.num_rows <= size:
            continue  # `check_all_read` comes in time
        # `column` of a damaged group ends the process, so read a row of it first.
        next(file.iter_batches(1, row_groups=[index], use_threads=False))
        if any(group.column(i).num_values < group.num_rows for i in range(group.num_columns)):
            raise ValueError(f"its footer claims {group.num_rows:,} rows, more than its columns hold")
    return file


def check_all_read(claimed: int, read: int) -> None:
    """Refuse a Parquet file that held fewer rows than its footer claims, with a ValueError."""
    if read < claimed:
        raise ValueError(f"its footer claims {claimed:,} rows there, its columns hold {read:,}")


@contextmanager
def reading_parquet(name: str) -> Iterator[None]:
    """Turn what readers raise on a damaged Parquet file into a one-line error."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError) as error:
        raise SstokenError(
            f"{name}: not a readable Parquet file ({first_line(error)}); fetch it again"
        ) from error


def _csv(stream: Any, name: str) -> Iterator[Parsed]:
    import csv
    import io

    csv.field_size_limit(MAX_LINE_BYTES)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(lines, strict=True)
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            twice = next(n for n in names if list(names).count(n) > 1)
            raise SstokenError(f"{name}: two columns are named {twice!r}; rename one")
        for value in reader:
            # DictReader puts surplus fields under None, and fills missing ones with None.
            uneven = None in value or None in value.values()
            problem = ("broken CSV", f"{len(reader.fieldnames or ())} columns expected") if uneven else None
            yield Parsed(f"line {reader.line_num}", None if uneven else value, problem)
    except UnicodeDecodeError as error:
        raise SstokenError(
            f"{name}: not UTF-8, soon after line {reader.line_num}: {_not_utf8(error)}"
        ) from error
    except csv.Error as error:
        raise SstokenError(f"{name}: broken CSV near line {reader.line_num} ({first_line(error)})") from error
