"""The Parquet files that stages exchange: their schemas, and how they are written, found and read.

Every per-token column is a list as long as `input_ids`. Measured values (loss, attention, rel, score) are null where
there is none: outside the response, and if the method needs no such signal.

Functions that read a shard raise `SstokenError` if it is damaged.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sstoken.errors import SstokenError, reason
from sstoken.signals import get_signal, is_signal
from sstoken.stages import folders, plain_json, storage
from sstoken.stages.storage import atomic_file

IDS = pa.list_(pa.int32())
MASK = pa.list_(pa.bool_())
VALUES = pa.list_(pa.float32())

TOKENS = pa.schema([("example_id", pa.string()), ("input_ids", IDS), ("response_mask", MASK)])
SIGNAL_COLUMNS = {"float32": VALUES, "int32": IDS}
"""Column types by a signal's dtype. A scores folder has `example_id` and a column for each signal."""
MASKED_LEAN = pa.schema(
    [("example_id", pa.string()), ("input_ids", IDS), ("labels", IDS), ("keep_mask", MASK)]
)
MASKED = pa.schema(
    [*MASKED_LEAN, ("response_mask", MASK), ("rel", VALUES), ("attention", VALUES), ("score", VALUES)]
)
WEIGHT = pa.field("weight", VALUES)
"""Factor of a token's loss: null outside the response, 0 if the token is not learned, negative to unlearn it."""


def masked_schema(weighted: bool, lean: bool) -> pa.Schema:
    """Return the columns of a masked dataset; `weight` is among them if the method gives weights."""
    schema = MASKED_LEAN if lean else MASKED
    return schema.append(WEIGHT) if weighted else schema


METADATA_KEY = b"sstoken"
_LEVEL = 3
"""zstd level of the shards that stages exchange."""
_DIGEST = "digest"
"""Key of the metadata's own digest: metadata are read without the rest of the file, whose digest the manifest has."""


def part_name(index: int) -> str:
    """Return the file name of shard `index`."""
    return f"part-{index:05d}.parquet"


def parts(folder: Path) -> list[Path]:
    """Return a folder's shards in order: those that its manifest lists, or all files of a partial folder."""
    listed = folders.listed_in(folder)
    if listed is None:
        found = list(folder.glob("part-*.parquet"))
    else:
        found = [path for path in listed if path.parent == folder and path.match("part-*.parquet")]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def write_part(
    path: Path, table: pa.Table, metadata: Mapping[str, Any] | None, *, compression_level: int = _LEVEL
) -> None:
    """Write one shard atomically, with `metadata` as JSON under our own key and no other library's metadata."""
    write_row_groups(path, [table], table.schema, metadata, compression_level=compression_level)


def write_row_groups(
    path: Path,
    groups: Iterable[pa.Table],
    schema: pa.Schema,
    metadata: Mapping[str, Any] | None,
    *,
    compression_level: int = _LEVEL,
) -> None:
    """Like `write_part`, one row group for each table; only one is in memory at a time."""
    ours = None
    if metadata is not None:
        ours = {METADATA_KEY: json.dumps({**metadata, _DIGEST: _digest(metadata)}, sort_keys=True)}
    with atomic_file(path) as file:
        _write(file, groups, schema.with_metadata(ours), compression_level)
    pa.default_memory_pool().release_unused()  # what encoding took, before the next shard asks for more


def _write(file: Any, groups: Iterable[pa.Table], schema: pa.Schema, compression_level: int) -> None:
    lists = [f for f in schema if pa.types.is_list(f.type)]
    floats = [f"{f.name}.list.element" for f in lists if pa.types.is_floating(f.type.value_type)]
    ids = [f"{f.name}.list.element" for f in lists if f.name in ("input_ids", "labels")]
    with pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=compression_level,
        use_dictionary=ids,
        use_byte_stream_split=floats,
        write_page_checksum=True,
    ) as writer:
        for table in groups:
            writer.write_table(table.cast(schema).combine_chunks())  # pages end where chunks do
    pa.default_memory_pool().release_unused()  # else memory grows with every shard


def read_metadata(path: Path, *, with_digest: bool = False) -> dict[str, Any]:
    """Return the metadata that `write_part` put into a shard.

    Args:
        path: the shard.
        with_digest: refuse metadata without a digest, which older versions wrote.

    Raises:
        SstokenError: the file was not written by `write_part`, or is damaged.
    """
    content, sealed = _metadata_of(path, _stamp(path))
    if with_digest and not sealed:
        raise SstokenError(
            f"{path}: not a readable Parquet file (its metadata were changed); make its folder again"
        )
    return plain_json.parse_object(content)


def _stamp(path: Path) -> tuple[object, ...]:
    """Return what changes when a local file does; something new each time for a remote one, to read it again."""
    if "://" in str(path):
        return (object(),)
    with _readable(path):
        return storage.stamp(path)


@lru_cache(maxsize=256)
def _metadata_of(path: Path, stamp: tuple[object, ...]) -> tuple[str, bool]:
    """Return the JSON without its digest, which is checked, and whether there was one. Stages ask again and again."""
    with _readable(path):
        raw = (_schema(path).metadata or {}).get(METADATA_KEY)
        if raw is None:
            raise SstokenError(f"{path}: not written by sstoken (no {METADATA_KEY.decode()!r} metadata)")
        metadata = plain_json.parse_object(raw)
        digest = metadata.pop(_DIGEST, None)
        if digest is not None and digest != _digest(metadata):
            raise ValueError("its metadata were changed")
    return json.dumps(metadata), digest is not None


def footer(path: Path) -> pq.FileMetaData:
    """Return a shard's footer, unchecked; nothing else of a remote file is downloaded."""
    with storage.of(path).open(path) as file:
        return pq.read_metadata(file)


def _schema(path: Path) -> pa.Schema:
    # Not from `footer`: pyarrow leaks memory for each schema made from file metadata.
    with storage.of(path).open(path) as file:
        return pq.read_schema(file)


def _digest(metadata: Mapping[str, Any]) -> str:
    return plain_json.digest(dict(metadata))[:16]


def columns(path: Path) -> list[str]:
    """Return the names of a shard's columns."""
    with _readable(path):
        return list(_schema(path).names)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a shard, or some of its columns."""
    with _opened(path) as file:
        return file.read(columns, use_threads=False)


def read_row_group(path: Path, group: int, columns: Iterable[str]) -> pa.Table:
    """Read one row group; columns that the shard does not have are left out."""
    with _opened(path) as file:
        names = [name for name in columns if name in file.schema_arrow.names]
        return file.read_row_group(group, names, use_threads=False)


def read_batches(path: Path, num_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield columns of a shard in batches of at most `num_rows` rows."""
    with _opened(path) as file:
        yield from file.iter_batches(num_rows, columns=columns, use_threads=False)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard, checking its digest against the manifest and the checksum of each page."""
    with _readable(path):
        content = pa.BufferReader(folders.read_file(path))
        # No threads, here or in the readers above: each holds memory, so the peak would differ from run to run; and one
        # that frees the bytes read, Python's own, while the interpreter ends aborts the process.
        with pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True) as file:
            yield file


def is_sound(path: Path) -> bool:
    """Return whether a shard that no manifest lists yet is what was written, byte for byte.

    Checksums do not cover a Parquet file's footer and page headers, so write its content again and compare the files. A
    shard that another version of Arrow wrote does not pass.
    """
    try:
        read_metadata(path, with_digest=True)
        with _opened(path) as file:
            fields = [_known(field) for field in file.schema_arrow]
            groups = [file.read_row_group(i, use_threads=False) for i in range(file.num_row_groups)]
            raw = file.schema_arrow.metadata[METADATA_KEY]
        again = pa.BufferOutputStream()
        _write(again, groups, pa.schema(fields, {METADATA_KEY: raw}), _LEVEL)
        return bool(folders.read_file(path) == again.getvalue().to_pybytes())
    except (SstokenError, pa.ArrowException, OSError, ValueError):
        return False


def _known(field: pa.Field) -> pa.Field:
    """Return our schemas' field for a file's, whose names within lists differ; ValueError if there is none."""
    ours = [*TOKENS, *MASKED, WEIGHT]
    if is_signal(field.name):
        ours.append(pa.field(field.name, SIGNAL_COLUMNS[get_signal(field.name).dtype]))
    for known in ours:
        if known.equals(field.remove_metadata()):
            return known
    raise ValueError(f"no column of ours: {field}")


def num_rows(path: Path) -> int:
    """Return the number of rows in a shard, from its footer."""
    with _readable(path):
        return int(footer(path).num_rows)


def num_tokens(path: Path) -> int:
    """Return the number of tokens in a shard of tokens, prompts included.

    Not from the footer's column statistics: pyarrow aborts the process if they are damaged.
    """
    counted = read_metadata(path).get("stats", {}).get("tokens")
    if counted is not None:
        return int(counted)
    return flatten(read_table(path, ["input_ids"])["input_ids"])[0].size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SstokenError(
            f"{path}: not a readable Parquet file ({reason(error)}); make its folder again"
        ) from error


def flatten(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return a list column's flat values [M], null as NaN, and its rows' offsets [E + 1]."""
    array = column.combine_chunks()
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()


def rows(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """Return a list column as one numpy array per row."""
    values, offsets = flatten(column)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def lists(values: NDArray[Any], offsets: NDArray[np.integer[Any]], kind: pa.ListType) -> pa.ListArray:
    """Return a list column of type `kind` from flat values [M] and offsets [E + 1]; NaN becomes null."""
    flat = pa.array(values, kind.value_type, from_pandas=True)
    return pa.ListArray.from_arrays(offsets, flat)


def scattered(
    values: NDArray[Any], measured: NDArray[np.bool_], offsets: NDArray[np.integer[Any]], kind: pa.ListType
) -> pa.ListArray:
    """Return a list column that is null where nothing was measured.

    Args:
        values: [N], one for each True in `measured`; NaN becomes null.
        measured: [M].
        offsets: [E + 1], where each row starts.
        kind: the column's type.
    """
    full, missing = np.zeros(measured.size, values.dtype), ~measured
    full[measured] = values
    missing[measured] = np.isnan(values)  # given a mask, Arrow makes no NaN null
    flat = pa.array(full, kind.value_type, mask=missing)
    return pa.ListArray.from_arrays(offsets, flat)
