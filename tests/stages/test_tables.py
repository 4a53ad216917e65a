"""Shards: what is written is read, and damage is one line."""

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sstoken.errors import SstokenError
from sstoken.stages import tables
from sstoken.stages.manifest import Manifest, list_files, write_manifest
from sstoken.stages.storage import address
from tests.support import PATIENCE, ROOT

ROWS = [
    {"example_id": "a", "input_ids": [1, 2, 3], "response_mask": [False, True, True]},
    {"example_id": "b", "input_ids": [], "response_mask": []},
    {"example_id": "c", "input_ids": [4], "response_mask": [False]},
]
TABLE = pa.Table.from_pylist(ROWS, schema=tables.TOKENS)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / tables.part_name(0)
    tables.write_part(path, TABLE, {"kind": "tokens", "size": 3})
    return path


def test_names_sort_in_the_order_of_the_shards(tmp_path):
    assert tables.part_name(7) == "part-00007.parquet"
    names = [tables.part_name(i) for i in (100_000, 3, 99_999)]
    for name in [*names, "other.parquet", "part-1.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in tables.parts(tmp_path)] == [names[1], names[2], names[0]]


def test_a_finished_folders_shards_are_those_that_its_manifest_lists(tmp_path):
    names = [tables.part_name(i) for i in (100_000, 99_999)]
    for name in [*names, "other.parquet"]:
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / names[0]).touch()
    facts = {"settings": {}, "seed": 0, "inputs": {}, "sources": {}, "seconds": 0, "metrics": {}}
    manifest = Manifest(stage="encode", fingerprint="f", version="1", files=list_files(tmp_path), **facts)
    write_manifest(tmp_path, manifest)
    (tmp_path / tables.part_name(1)).touch()  # a stray one
    assert tables.parts(tmp_path) == [tmp_path / name for name in reversed(names)]


def test_what_is_written_is_read(shard):
    assert tables.read_table(shard).equals(TABLE)
    assert tables.read_table(shard, ["example_id"]).column_names == ["example_id"]
    assert tables.read_metadata(shard) == {"kind": "tokens", "size": 3}
    assert tables.read_metadata(shard, with_digest=True) == {"kind": "tokens", "size": 3}
    assert tables.num_rows(shard) == 3
    assert tables.columns(shard) == TABLE.column_names
    assert tables.is_sound(shard)
    batches = list(tables.read_batches(shard, 2, ["example_id"]))
    assert [batch.to_pydict() for batch in batches] == [{"example_id": ["a", "b"]}, {"example_id": ["c"]}]


def test_a_shard_in_an_object_store():
    path = address(f"memory://{uuid4()}/part-00000.parquet")
    tables.write_part(path, TABLE, {"kind": "tokens"})
    assert tables.num_rows(path) == 3
    assert tables.columns(path) == TABLE.column_names
    assert tables.read_metadata(path) == {"kind": "tokens"}
    assert tables.read_table(path).equals(TABLE)
    tables.write_part(path, TABLE.slice(1), {"kind": "others"})
    assert tables.read_metadata(path) == {"kind": "others"}
    assert tables.is_sound(path)


def test_tokens_are_counted_unless_the_shard_says(shard):
    twice = pa.concat_tables([TABLE, TABLE])
    for metadata in ({}, {"stats": {"rows": 6}}):
        tables.write_part(shard, twice, metadata)
        assert tables.num_tokens(shard) == 8
    tables.write_part(shard, TABLE, {"stats": {"tokens": 17}})
    assert tables.num_tokens(shard) == 17


def read_all(shard):
    """With every reader."""
    columns = ["example_id", "input_ids", "response_mask"]
    yield tables.read_table(shard)
    yield tables.read_row_group(shard, 0, columns)
    yield pa.Table.from_batches(tables.read_batches(shard, 2, columns))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_no_reader_starts_a_thread(shard):
    """At the interpreter's end, a thread of Arrow's that frees Python's bytes aborts the process."""
    assert all(table.equals(TABLE) for table in read_all(shard))
    assert tables.is_sound(shard)
    code = f"""
import os
from pathlib import Path
from uuid import uuid4
from sstoken.stages import tables
from tests.stages.test_tables import read_all
shard, before = Path({str(shard)!r}), len(os.listdir("/proc/self/task"))
list(read_all(shard))
assert tables.is_sound(shard)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "0\n", done.stderr


def test_no_byte_of_a_shard_of_unfinished_work_can_change(shard):
    """Neither its pages nor its footer, which no checksum covers."""
    content = shard.read_bytes()
    for place in range(0, len(content), 2):
        shard.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        assert not tables.is_sound(shard), place
    shard.write_bytes(content)
    assert tables.is_sound(shard)


@pytest.mark.parametrize("rows", [0, 1, 3, 3000])
def test_a_shard_is_sound_however_it_was_cut_when_it_was_written(rows, tmp_path):
    table = pa.Table.from_pylist((ROWS * 1000)[:rows], schema=tables.TOKENS)
    pieces = pa.concat_tables([table.slice(0, rows // 3), table.slice(rows // 3)])
    for name, groups in {
        "one": [table],
        "pieces": [pieces],
        "groups": [table.slice(rows // 2), pieces],
    }.items():
        path = tmp_path / name
        tables.write_row_groups(path, groups, table.schema, {"kind": "tokens"})
        assert tables.is_sound(path), name


def test_a_file_has_our_metadata_alone(shard, tmp_path):
    assert set(pq.read_schema(shard).metadata) == {tables.METADATA_KEY}
    plain = tmp_path / "plain.parquet"
    tables.write_part(plain, TABLE, None)
    assert not pq.read_schema(plain).metadata
    with pytest.raises(
        SstokenError, match=r"plain.parquet: not written by sstoken \(no 'sstoken' metadata\)"
    ):
        tables.read_metadata(plain)
    assert not tables.is_sound(plain)


def test_metadata_are_the_same_bytes_in_any_order(tmp_path):
    for name, metadata in {"a": {"x": 1, "y": 2}, "b": {"y": 2, "x": 1}}.items():
        tables.write_part(tmp_path / name, TABLE, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_higher_level_compresses_more(tmp_path):
    ids = [list(range(i, i + 40)) for i in range(300)]
    table = pa.table({"example_id": ["a"] * 300, "labels": pa.array(ids, tables.IDS)})
    for level in (1, 19):
        tables.write_part(tmp_path / str(level), table, {}, compression_level=level)
    assert (tmp_path / "19").stat().st_size < (tmp_path / "1").stat().st_size
    group = pq.read_metadata(tmp_path / "1").row_group(0)
    assert "RLE_DICTIONARY" in group.column(1).encodings


def test_how_columns_are_stored(tmp_path):
    path = tmp_path / "part.parquet"
    schema = tables.TOKENS.append(pa.field("loss", tables.VALUES))
    rows = [row | {"loss": [None] * len(row["input_ids"])} for row in ROWS]
    tables.write_part(path, pa.Table.from_pylist(rows, schema=schema), {})
    group = pq.read_metadata(path).row_group(0)
    stored = {group.column(i).path_in_schema.split(".")[0]: group.column(i) for i in range(4)}
    assert {column.compression for column in stored.values()} == {"ZSTD"}
    assert "RLE_DICTIONARY" in stored["input_ids"].encodings
    assert "RLE_DICTIONARY" not in stored["example_id"].encodings
    assert "RLE_DICTIONARY" not in stored["response_mask"].encodings
    assert "BYTE_STREAM_SPLIT" in stored["loss"].encodings


def test_row_groups(tmp_path):
    path = tmp_path / "part.parquet"
    tables.write_row_groups(path, [TABLE, TABLE.slice(1)], tables.TOKENS, {"a": 1})
    assert pq.read_metadata(path).num_row_groups == 2
    assert tables.read_metadata(path) == {"a": 1}
    second = tables.read_row_group(path, 1, ["input_ids", "no such column"])
    assert second.to_pylist() == [{"input_ids": []}, {"input_ids": [4]}]


def test_changed_metadata_are_damage(shard, tmp_path):
    path = tmp_path / "changed.parquet"

    def rewrite(text):
        schema = TABLE.schema.with_metadata({tables.METADATA_KEY: text})
        pq.write_table(TABLE.cast(schema), path)

    text = pq.read_schema(shard).metadata[tables.METADATA_KEY]
    rewrite(text.replace(b"tokens", b"tokons"))
    with pytest.raises(SstokenError, match="its metadata were changed"):
        tables.read_metadata(path)
    rewrite(b'{"kind": "tokens"}')  # as older versions wrote them
    assert tables.read_metadata(path) == {"kind": "tokens"}
    with pytest.raises(SstokenError, match="its metadata were changed"):
        tables.read_metadata(path, with_digest=True)
    assert not tables.is_sound(path)


def test_unfinished_work_without_a_digest_of_its_metadata_is_not_sound(tmp_path):
    path = tmp_path / "part.parquet"
    with path.open("wb") as file:
        tables._write(file, [TABLE], TABLE.schema.with_metadata({tables.METADATA_KEY: b"{}"}), 3)
    assert tables.read_metadata(path) == {}
    assert not tables.is_sound(path)


def test_metadata_are_parsed_again_only_where_the_file_may_have_changed(shard):
    def parsed(path):
        before = tables._metadata_of.cache_info().misses
        assert tables.read_metadata(path) == {"kind": "tokens", "size": 3}
        return tables._metadata_of.cache_info().misses - before

    tables._metadata_of.cache_clear()
    assert [parsed(shard), parsed(shard)] == [1, 0]
    remote = address(f"memory://{uuid4()}/part-00000.parquet")
    tables.write_part(remote, TABLE, {"kind": "tokens", "size": 3})
    assert [parsed(remote), parsed(remote)] == [1, 1]


def test_a_missing_shard_is_named(tmp_path):
    for read in (tables.read_table, tables.read_metadata, tables.num_rows, tables.columns):
        with pytest.raises(SstokenError, match=f"^{tmp_path}/gone.parquet: not a readable Parquet file"):
            read(tmp_path / "gone.parquet")


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_cut_shard_is_one_line(shard, size):
    shard.write_bytes(shard.read_bytes()[:size])
    for read in (
        tables.read_table,
        tables.read_metadata,
        tables.num_rows,
        tables.columns,
        lambda path: list(tables.read_batches(path, 1, ["example_id"])),
        lambda path: tables.read_row_group(path, 0, ["example_id"]),
    ):
        with pytest.raises(
            SstokenError, match=r"not a readable Parquet file .*; make its folder again"
        ) as raised:
            read(shard)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith(str(shard))
    assert not tables.is_sound(shard)


def test_a_flipped_byte_in_a_page_is_damage(shard):
    content = bytearray(shard.read_bytes())
    content[60] ^= 255
    shard.write_bytes(content)
    assert not tables.is_sound(shard)


@pytest.mark.parametrize(
    ("field", "sound"),
    [
        (pa.field("loss", tables.VALUES), True),
        (pa.field("attention@12", tables.VALUES), True),
        (pa.field("rank", tables.IDS), True),
        (pa.field("loss", tables.IDS), False),
        (pa.field("score", tables.VALUES), True),
        (pa.field("weight", tables.VALUES), True),
        (pa.field("strange", tables.VALUES), False),
    ],
)
def test_columns_that_are_known(tmp_path, field, sound):
    path = tmp_path / "part.parquet"
    table = TABLE.append_column(field, pa.array([[None] * 3, [], [None]], field.type))
    tables.write_part(path, table, {})
    assert tables.is_sound(path) is sound


def test_masked_columns():
    assert tables.masked_schema(False, False) == tables.MASKED
    assert tables.masked_schema(False, True) == tables.MASKED_LEAN
    assert tables.masked_schema(True, True).names == [*tables.MASKED_LEAN.names, "weight"]
    assert tables.masked_schema(True, False).names == [*tables.MASKED.names, "weight"]


def test_lists_and_back():
    values = np.array([1.0, np.nan, 3.0], np.float32)
    offsets = np.array([0, 2, 2, 3])
    made = tables.lists(values, offsets, tables.VALUES)
    assert made.type == tables.VALUES
    assert made.to_pylist() == [[1.0, None], [], [3.0]]
    flat, bounds = tables.flatten(pa.chunked_array([made]))
    np.testing.assert_array_equal(flat, values)
    assert bounds.tolist() == offsets.tolist()
    assert [row.tolist() for row in tables.rows(pa.chunked_array([made.slice(1)]))] == [[], [3.0]]
    empty, bounds = tables.flatten(pa.chunked_array([], tables.IDS))
    assert empty.size == 0
    assert bounds.tolist() == [0]
    ids = tables.lists(np.array([1, 2]), np.array([0, 2]), tables.IDS)  # of int64
    assert ids.type == tables.IDS
    assert ids.to_pylist() == [[1, 2]]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (tables.VALUES, np.array([1.5, np.nan, 3.0]), [[None, 1.5], [], [None, None, 3.0]]),
        (tables.IDS, np.array([7, 0, 9]), [[None, 7], [], [0, None, 9]]),
    ],
)
def test_measured_values_are_scattered_over_their_rows(kind, values, expected):
    measured = np.array([value is not None for row in expected for value in row])
    if kind == tables.VALUES:
        measured[2] = True  # where NaN was measured
    made = tables.scattered(values, measured, np.array([0, 2, 2, 5]), kind)
    assert made.type == kind
    assert made.to_pylist() == expected
