"""The Parquet files that stages exchange: their schemas, and how they are written and found.

Every per-token column is a list as long as `input_ids`. Measured values (loss, attention, rel, score) are
null where there is none: off the response, and where the method needed no such signal.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sstoken.errors import SstokenError
from sstoken.signals import get_signal, is_signal
from sstoken.stages import folders, plain_json, storage
from sstoken.stages.storage import atomic_file

IDS = pa.list_(pa.int32())
MASK = pa.list_(pa.bool_())
VALUES = pa.list_(pa.float32())

TOKENS = pa.schema([("example_id", pa.string()), ("input_ids", IDS), ("response_mask", MASK)])
SIGNAL_COLUMNS = {"float32": VALUES, "int32": IDS}
"""A scores folder has `example_id` and a column for each signal, by the signal's dtype."""
MASKED_LEAN = pa.schema(
    [("example_id", pa.string()), ("input_ids", IDS), ("labels", IDS), ("keep_mask", MASK)]
)
MASKED = pa.schema(
    [
        *MASKED_LEAN,
        ("response_mask", MASK),
        ("rel", VALUES),
        ("attention", VALUES),
        ("score", VALUES),
    ]
)
WEIGHT = pa.field("weight", VALUES)
"""What a token's loss is multiplied by: null off the response, 0 where it is not learned, below 0 to be unlearned."""


def masked_schema(weighted: bool, lean: bool) -> pa.Schema:
    """The columns of a masked dataset; `weight` only where the method gives weights."""
    schema = MASKED_LEAN if lean else MASKED
    return schema.append(WEIGHT) if weighted else schema


METADATA_KEY = b"sstoken"
_LEVEL = 3
"""Of the shards that stages exchange."""
_DIGEST = "digest"
"""Key in the metadata, of their own digest: they are read alone, without the file whose digest the manifest has."""


def part_name(index: int) -> str:
    """File name of shard `index`; names sort in the order of the shards."""
    return f"part-{index:05d}.parquet"


def parts(folder: Path) -> list[Path]:
    """The shards of a folder, in order: those that its manifest lists, or those there are of unfinished work.

    Raises:
        SstokenError: the manifest is damaged.
    """
    listed = folders.listed_in(folder)
    if listed is None:
        found = list(folder.glob("part-*.parquet"))
    else:
        found = [path for path in listed if path.parent == folder and path.match("part-*.parquet")]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def write_part(
    path: Path, table: pa.Table, metadata: Mapping[str, Any] | None, *, compression_level: int = _LEVEL
) -> None:
    """Write one shard atomically; `metadata` goes into the file as JSON.

    Only our own key is written, and without `metadata` none: no library's feature metadata, so that every reader
    takes the file.
    """
    write_row_groups(path, [table], table.schema, metadata, compression_level=compression_level)


def write_row_groups(
    path: Path,
    groups: Iterable[pa.Table],
    schema: pa.Schema,
    metadata: Mapping[str, Any] | None,
    *,
    compression_level: int = _LEVEL,
) -> None:
    """As `write_part`, from tables of one schema that become a row group each and are never held together."""
    ours = None
    if metadata is not None:
        ours = {METADATA_KEY: json.dumps({**metadata, _DIGEST: _digest(metadata)}, sort_keys=True)}
    with atomic_file(path) as file:
        _write(file, groups, schema.with_metadata(ours), compression_level)
    pa.default_memory_pool().release_unused()  # what encoding took, before the next shard asks for more


def _write(file: Any, groups: Iterable[pa.Table], schema: pa.Schema, compression_level: int) -> None:
    floats = [f"{name}.list.element" for name in _float_columns(schema)]
    ids = [f"{f.name}.list.element" for f in schema if f.name in ("input_ids", "labels")]
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


def _float_columns(schema: pa.Schema) -> list[str]:
    return [f.name for f in schema if pa.types.is_list(f.type) and pa.types.is_floating(f.type.value_type)]


def read_metadata(path: Path, *, with_digest: bool = False) -> dict[str, Any]:
    """The JSON that `write_part` put into the file.

    Args:
        path: of the shard.
        with_digest: refuse metadata without a digest, as older versions wrote them.

    Raises:
        SstokenError: the file is not one of ours, or is damaged.
    """
    with _readable(path):
        raw = (_schema(path).metadata or {}).get(METADATA_KEY)
        if raw is None:
            raise SstokenError(f"{path}: not written by sstoken (no {METADATA_KEY.decode()!r} metadata)")
        metadata = plain_json.parse_object(raw)
        digest = metadata.pop(_DIGEST, None)
        if digest != _digest(metadata) and (digest is not None or with_digest):
            raise ValueError("its metadata were changed")
    return metadata


def footer(path: Path) -> pq.FileMetaData:
    """What stands at the end of a shard, unchecked; of a remote one, nothing else is fetched."""
    with storage.of(path).open(path) as file:
        return pq.read_metadata(file)


def _schema(path: Path) -> pa.Schema:
    # Not of the `footer`: a schema made from that leaves memory that grows with the number of shards.
    with storage.of(path).open(path) as file:
        return pq.read_schema(file)


def _digest(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()[:16]


def columns(path: Path) -> list[str]:
    """The names of a shard's columns.

    Raises:
        SstokenError: it is damaged.
    """
    with _readable(path):
        return list(_schema(path).names)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard, or some of its columns.

    Raises:
        SstokenError: it is damaged.
    """
    with _opened(path) as file:
        return file.read(columns, use_threads=False)


def read_row_group(path: Path, group: int, columns: Iterable[str]) -> pa.Table:
    """Those of the columns that there are, of one row group.

    Raises:
        SstokenError: see `read_table`.
    """
    with _opened(path) as file:
        return file.read_row_group(group, [name for name in columns if name in file.schema_arrow.names])


def read_batches(path: Path, num_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a shard in pieces of at most `num_rows` rows.

    Raises:
        SstokenError: see `read_table`.
    """
    with _opened(path) as file:
        yield from file.iter_batches(num_rows, columns=columns)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A shard whose content is checked against its folder's manifest, and page by page."""
    with _readable(path):
        content = pa.BufferReader(folders.read_file(path))
        # Each thread that reads ahead keeps memory of its own: their peak would differ from run to run.
        with pq.ParquetFile(content, pre_buffer=False, page_checksum_verification=True) as file:
            yield file


def is_sound(path: Path) -> bool:
    """Whether a shard that no manifest lists yet is what was written, byte for byte.

    Checksums do not cover a Parquet file's footer and the headers of its pages: writing what it holds has to give the
    same file. One that another version of Arrow wrote is not taken, either.
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
    """The field of one of our schemas that a field is; a file's own has other names within lists.

    Raises:
        ValueError: there is none.
    """
    ours = [*TOKENS, *MASKED, WEIGHT]
    if is_signal(field.name):
        ours.append(pa.field(field.name, SIGNAL_COLUMNS[get_signal(field.name).dtype]))
    for known in ours:
        if known.equals(field.remove_metadata()):
            return known
    raise ValueError(f"no column of ours: {field}")


def num_rows(path: Path) -> int:
    """Count the rows of a shard without reading them.

    Raises:
        SstokenError: it is damaged.
    """
    with _readable(path):
        return int(footer(path).num_rows)


def num_tokens(path: Path) -> int:
    """Return the number of tokens in a shard of tokens, prompts included.

    Not from the footer's column statistics: where those are damaged, pyarrow ends the process.

    Raises:
        SstokenError: it is damaged.
    """
    counted = read_metadata(path).get("stats", {}).get("tokens")
    return (
        int(counted) if counted is not None else flatten(read_table(path, ["input_ids"])["input_ids"])[0].size
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SstokenError(
            f"{path}: not a readable Parquet file ({reason}); make its folder again"
        ) from error


def flatten(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """A list column as flat values [M] (null as NaN) and the rows' offsets [E + 1], without Python objects."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.array([], column.type)
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()


def rows(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """The lists of a column, one numpy array a row."""
    values, offsets = flatten(column)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def lists(values: NDArray[Any], offsets: NDArray[np.integer[Any]], kind: pa.ListType) -> pa.ListArray:
    """A list column of type `kind` from flat values [M] and offsets [E + 1]; NaN becomes null."""
    flat = pa.array(values, kind.value_type, from_pandas=True)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)
