"""Ranges of a dataset hold, one after the other, the rows that reading it from its start gives."""

import pickle
from itertools import chain

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstoken.errors import SstokenError
from sstoken.stages.encoding import row_files
from sstoken.stages.encoding.ranges import cut
from sstoken.stages.encoding.sources import open_rows
from tests.stages.encoding.test_sources import ROWS, write

NAMES = ["d.jsonl", "d.ndjson", "d.jsonl.gz", "d.json", "d.parquet", "d.csv"]


def check(data, size, limit=None, split=None):
    """Cut, move each shard to another process and read it; compare with reading all."""
    shards = [pickle.loads(pickle.dumps(shard)) for shard in cut(data, split, size, limit)]
    counts = [sum(rows.num_rows for rows in shard) for shard in shards]
    assert all(count == size for count in counts[:-1])
    found = [list(chain.from_iterable(rows.rows() for rows in shard)) for shard in shards]
    assert [len(rows) for rows in found] == counts
    assert list(chain(*found)) == list(open_rows(data, split))[:limit]
    return shards


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_every_format(name, size, tmp_path) -> None:
    check(write(tmp_path / name), size)
    check(write(tmp_path / name), size, limit=4)


def test_shards_go_over_the_borders_of_files(tmp_path) -> None:
    for i, name in enumerate(NAMES):
        write(tmp_path / f"{i}{name}")
    assert len(check(str(tmp_path / "*.*"), 4)) == 8


def test_saved_datasets(tmp_path) -> None:
    one = datasets.Dataset.from_list(ROWS * 30)
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "both")
    check(str(tmp_path / "both"), 70, split="train")


@pytest.mark.parametrize("group", [2, 1000])
def test_tables_of_small_and_of_large_row_groups(group, tmp_path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS * 60), tmp_path / "d.parquet", row_group_size=group)
    check(str(tmp_path / "d.parquet"), 7)
    check(str(tmp_path / "d.parquet"), 130)


@given(
    st.lists(st.sampled_from([b'{"a": 1}', b"", b" ", b"{", b"\xff", b'"' + b"x" * 40 + b'"', b"[1]\r"])),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
)
def test_any_lines(tmp_path_factory, lines, mark, ended, size) -> None:
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    content = (
        (b"\xef\xbb\xbf" if mark else b"") + b"\n".join([*lines, b'{"a": 2}']) + (b"\n" if ended else b"")
    )
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "MAX_LINE_BYTES", 16)
        check(str(path), size)


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_a_range_does_not_carry_its_rows(name, tmp_path) -> None:
    rows = [{"question": f"word{i} " * 500, "answer": "b"} for i in range(100)]
    (shard,) = cut(write(tmp_path / name, rows), None, 100)
    assert len(pickle.dumps(shard)) < 2000


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_a_file_that_changes_meanwhile_is_refused(name, tmp_path) -> None:
    (shard,) = cut(write(tmp_path / name), None, 100)
    write(tmp_path / name, ROWS[:4])
    with pytest.raises(SstokenError, match="changed while it was read"):
        list(shard[0].rows())


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("d.jsonl", b"", "the file is empty"),
        ("d.parquet", b"", "the file is empty"),
        ("d.jsonl", b"\n \n", "no rows in it"),
        ("d.parquet", b"PAR1 not a table PAR1", "not a readable Parquet file"),
    ],
)
def test_what_holds_no_rows_is_refused(name, content, error, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (lambda data: list(cut(data, None, 3)), lambda data: list(open_rows(data))):
        with pytest.raises(SstokenError, match=error):
            read(str(tmp_path / name))
