"""Compressed files give the rows of the plain ones; an archive is read whole or refused in one line."""

import bz2
import gzip
import json
import lzma
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.encoding import archives
from sstoken.stages.encoding.sources import locate, open_rows

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def csv():
    return ("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in ROWS)).encode()


PLAIN = {
    "jsonl": LINES,
    "ndjson": LINES,
    "json": json.dumps(ROWS).encode(),
    "parquet": parquet(),
    "csv": csv(),
}
CODECS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def values(path):
    rows = list(open_rows(str(path)))
    assert [row.index for row in rows] == list(range(len(rows)))
    assert all(row.problem is None for row in rows)
    return [row.value for row in rows]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", PLAIN)
def test_every_extension_with_every_codec(kind, codec, tmp_path) -> None:
    path = tmp_path / f"d.{kind}.{codec}"
    path.write_bytes(CODECS[codec](PLAIN[kind]))
    assert values(path) == ROWS
    assert next(open_rows(str(path))).file == "d"


@pytest.mark.parametrize("codec", CODECS)
def test_several_streams_in_one_file(codec, tmp_path) -> None:
    path = tmp_path / f"d.jsonl.{codec}"
    path.write_bytes(CODECS[codec](LINES) + CODECS[codec](LINES))
    assert values(path) == ROWS + ROWS


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"nothing of the kind " * 9])
def test_damage_is_one_line(codec, damage, tmp_path) -> None:
    path = tmp_path / f"d.jsonl.{codec}"
    path.write_bytes(damage(CODECS[codec](LINES)))
    with pytest.raises(SstokenError, match=r"damaged or cut short") as error:
        list(open_rows(str(path)))
    assert "\n" not in str(error.value)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_zip_is_read_member_by_member(tmp_path) -> None:
    members = {
        "rows/": b"",
        "rows/b.jsonl": LINES,
        "rows/deep/a.csv": PLAIN["csv"],
        "c.jsonl.gz": gzip.compress(LINES),
        "d.jsonl.zst": zstd(LINES),
        "e.parquet": PLAIN["parquet"],
        "__MACOSX/rows/._b.jsonl": b"\0\1",
        "rows/.DS_Store": b"\0",
    }
    for name in ("d.zip", "d.jsonl.zip"):
        path = write_zip(tmp_path / name, members)
        assert values(path) == ROWS * 5
        rows = list(open_rows(str(path)))
        assert {row.file for row in rows} == {"d"}
        assert rows[0].where == f"{path}: rows/b.jsonl line 1"


def test_the_name_of_an_archive_may_say_what_its_one_member_is(tmp_path) -> None:
    assert values(write_zip(tmp_path / "d.jsonl.zip", {"data": LINES})) == ROWS


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jsonl": LINES, "readme.txt": b"read"}, r"holds readme.txt, which is not one of .*extract"),
        ({"a.jsonl": LINES, "more.zip": b"PK"}, "holds more.zip"),
        ({"a.jsonl.zip": b"PK"}, "holds a.jsonl.zip"),
        ({"folder/": b""}, "no rows in it"),
        ({"a.jsonl": LINES, "b.jsonl": b""}, r"b\.jsonl: the file is empty"),
    ],
)
def test_zips_that_are_refused(members, message, tmp_path) -> None:
    path = write_zip(tmp_path / "d.zip", members)
    with pytest.raises(SstokenError, match=message) as error:
        list(open_rows(str(path)))
    assert "\n" not in str(error.value)


def test_a_damaged_zip_is_one_line(tmp_path) -> None:
    path = write_zip(tmp_path / "d.zip", {"a.jsonl": LINES * 999})
    data = bytearray(path.read_bytes())
    data[100:120] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(SstokenError, match=r"damaged or cut short"):
        list(open_rows(str(path)))
    path.write_bytes(b"no zip at all")
    with pytest.raises(SstokenError, match=r"damaged or cut short"):
        list(open_rows(str(path)))


def test_an_encrypted_zip_is_one_line(tmp_path) -> None:
    path = write_zip(tmp_path / "d.zip", {"a.jsonl": LINES})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag, in the member's header and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(SstokenError, match=r"a\.jsonl cannot be read .*encrypted.*extract"):
        list(open_rows(str(path)))


@pytest.mark.parametrize("name", ["d.tar", "d.tar.gz", "d.tgz", "d.jsonl.tar.xz", "d.tar.zst", "d.TBZ2"])
def test_tar_archives_are_named_as_such(name, tmp_path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="a tar archive; extract it"):
        locate(str(tmp_path / name))


def test_a_missing_codec_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "d.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setattr(pa, "Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(SstokenError, match=r"without zstd; decompress the file with zstd -d"):
        list(open_rows(str(tmp_path / "d.jsonl.zst")))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(LINES))
    monkeypatch.setitem(archives._MODULES, ".xz", "no_such_module")
    with pytest.raises(SstokenError, match="built without no_such_module; decompress"):
        list(open_rows(str(tmp_path / "d.jsonl.xz")))
