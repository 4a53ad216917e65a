"""Every kind of source gives the same rows; every kind of wrong one gives one line."""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.encoding import row_files
from sstoken.stages.encoding.sources import data_identity, file_labels, locate, open_rows, shown

ROWS = [{"question": f"q{i} \u00e9\u2028\n", "answer": f"a{i}"} for i in range(5)]


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path, rows=ROWS) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def values(data, split=None):
    return [row.value for row in open_rows(data, split)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.jsonl.gz", "d.json", "d.parquet", "d.csv"])
def test_files(name, tmp_path) -> None:
    rows = list(open_rows(write(tmp_path / name)))
    assert [row.value for row in rows] == ROWS
    assert [row.index for row in rows] == [0, 1, 2, 3, 4]
    assert {row.file for row in rows} == {"d"}
    assert all(row.problem is None for row in rows)


def test_json_may_hold_lines(tmp_path) -> None:
    (tmp_path / "d.json").write_text("\n" + "\n".join(map(json.dumps, ROWS)))
    assert values(str(tmp_path / "d.json")) == ROWS


def test_byte_order_marks_and_floats(tmp_path) -> None:
    (tmp_path / "d.json").write_bytes(b'\xef\xbb\xbf [{"a": 1.5}]')
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1.5}\r\n')
    assert values(str(tmp_path / "d.json")) == values(str(tmp_path / "d.jsonl")) == [{"a": 1.5}]
    assert type(values(str(tmp_path / "d.json"))[0]["a"]) is float


def test_patterns_read_files_in_order(tmp_path) -> None:
    for i in (1, 0):
        write(tmp_path / f"d{i}.jsonl", ROWS[i : i + 1])
    write(tmp_path / "_d.jsonl", ROWS[:1])
    write(tmp_path / ".hidden.jsonl")
    (tmp_path / "_SUCCESS").touch()
    rows = list(open_rows(str(tmp_path / "*")))
    assert [(row.file, row.index, row.value) for row in rows] == [
        ("_d", 0, ROWS[0]),
        ("d0", 0, ROWS[0]),
        ("d1", 0, ROWS[1]),
    ]


def test_files_of_one_name_get_labels_of_their_own() -> None:
    assert file_labels(["/x/a/t.jsonl", "/x/b/t.jsonl", "/x/b/u.json.gz"]) == ["a/t.jsonl", "b/t.jsonl", "u"]
    assert file_labels(["/x/t.jsonl", "/x/t.parquet"]) == ["t.jsonl", "t.parquet"]
    assert file_labels(["t.jsonl"]) == ["t"]


def test_broken_lines_are_rows_with_a_problem(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n{"a": "\\ud800"}\n\xff\n{"a": 2}')
    rows = list(open_rows(str(path)))
    assert [row.index for row in rows] == [0, 1, 2, 3, 4]
    assert [row.problem and row.problem[0] for row in rows] == [
        None,
        "broken JSON",
        None,
        "not UTF-8",
        None,
    ]
    assert rows[1].where == f"{path} line 3"
    assert rows[2].value == {"a": "\ud800"}  # told apart later, as a lone surrogate


def test_a_line_beyond_measure_is_passed_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 16)
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n"' + "x" * 50 + '"\n{"a": 2}\n')
    rows = list(open_rows(str(tmp_path / "d.jsonl")))
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert rows[1].problem is not None
    assert rows[1].problem[0] == "too long"


def test_uneven_csv_rows_are_bad(tmp_path) -> None:
    (tmp_path / "d.csv").write_text("a,b\n1,2\n1\n1,2,3\n")
    assert [row.problem and row.problem[0] for row in open_rows(str(tmp_path / "d.csv"))] == [
        None,
        "broken CSV",
        "broken CSV",
    ]


def test_saved_datasets(tmp_path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "both")
    assert values(str(tmp_path / "one")) == ROWS
    assert values(str(tmp_path / "both"), "test") == ROWS[:1]
    with pytest.raises(UsageError, match="test"):
        locate(str(tmp_path / "both"), "dev")
    with pytest.raises(UsageError, match="leave split out"):
        locate(str(tmp_path / "one"), "train")
    identity = data_identity(str(tmp_path / "one"), None, digest)
    assert "state.json" in identity["files"]
    (tmp_path / "one").rename(tmp_path / "two")  # the examples' ids change with the name
    assert data_identity(str(tmp_path / "two"), None, digest) != identity
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ')
    with pytest.raises(SstokenError, match=r"dataset_dict\.json: damaged"):
        locate(str(tmp_path / "both"), "test")


def test_remote_addresses(tmp_path) -> None:
    import fsspec

    with fsspec.filesystem("memory").open("/bucket/d.jsonl", "wb") as file:
        file.write(b'{"a": 1}\n')
    (row,) = open_rows("memory://bucket/d.jsonl")
    assert row.value == {"a": 1}
    assert row.where == "memory:///bucket/d.jsonl line 1"
    assert values("memory://bucket/*.jsonl") == [{"a": 1}]
    assert set(data_identity("memory://bucket/d.jsonl", None, digest)["files"]) == {"d"}
    with pytest.raises(UsageError, match="no such file"):
        locate("memory://bucket/e.jsonl")
    with pytest.raises(UsageError, match="cannot be opened"):
        locate("nothing://bucket/e.jsonl")


def test_secrets_of_an_address_are_not_shown() -> None:
    assert shown("https://me:key@host/d.jsonl?X-Amz-Signature=1") == "https://host/d.jsonl"
    assert shown("s3://bucket/a?b.jsonl") == "s3://bucket/a?b.jsonl"
    assert shown("a?b.jsonl") == "a?b.jsonl"


def test_identity_is_the_content(tmp_path) -> None:
    data = write(tmp_path / "d.jsonl")
    assert data_identity(data, None, digest) == {"files": {"d": digest(tmp_path / "d.jsonl")}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("data/missing.jsonl", "no such file"),
        ("./missing", "no such file"),
        ("note.txt.jsonl", r"no such file.*; did you mean 'notes\.txt'\?"),
        ("folder", r"name a file in it or a pattern such as 'folder/\*.jsonl'"),
        ("folder/*.jsonl", "no file matches"),
        ("notes.txt", r"extension .txt is not one of .jsonl, .ndjson, .json, .parquet, .csv"),
        ("bare", "extension none"),
    ],
)
def test_refusals_before_any_work(data, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bare").write_text("x")
    with pytest.raises(UsageError, match=message) as error:
        locate(data)
    assert "\n" not in str(error.value)


def test_files_have_no_splits(tmp_path) -> None:
    with pytest.raises(UsageError, match="leave split out"):
        locate(write(tmp_path / "d.jsonl"), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "the file is empty"),
        ("d.jsonl", b"\n \n", "no rows"),
        ("d.json", b"[]", "no rows"),
        ("d.csv", b"a,b\n", "no rows"),
        ("d.json", b'[{"a": 1}, {"a"', "broken JSON after row 0"),
        ("d.json", b'{\n  "data": []\n}', "neither a JSON list"),
        ("d.parquet", b"PAR1 not really", "not a readable Parquet"),
        ("d.csv", b"a,b\n1,\xe9\n", "not UTF-8.*iconv"),
        ("d.json", b'["\xe9"]', "not UTF-8.*iconv"),
        ("d.json", b'[{"a": 1,}]', "broken JSON in its first row"),
        ("d.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16 text.*iconv -f UTF-16"),
        ("d.csv", bz2.compress(b"a,b\n"), "add .bz2"),
        ("d.jsonl", lzma.compress(b"{}\n"), "add .xz"),
        ("d.jsonl", pa.compress(b"{}\n", "zstd", asbytes=True), "add .zst"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9999)[:-20], "damaged or cut short"),
        ("d.jsonl.gz", b"not gzip", "cannot be decompressed|damaged"),
    ],
)
def test_damaged_files(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SstokenError, match=message) as error:
        list(open_rows(str(tmp_path / name)))
    assert error.value.exit_code == 1
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise ConnectionError("offline\nsecond line")

    def said(message: str) -> None:
        with pytest.raises(SstokenError, match=message) as error:
            list(open_rows("user/name@main"))
        assert "\n" not in str(error.value)

    monkeypatch.setattr(huggingface_hub, "dataset_info", refuse)
    said(r"'user/name': no such file, and the Hub does not answer.*offline.*check the id")
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="a"))
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said(r"user/name: no such file.*offline")


def test_hub_datasets_stream(monkeypatch) -> None:
    asked = {}

    def load(name, config, **options):
        asked.update(options, name=name, config=config)
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="a"))
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(open_rows("user/name:main@v1", "test"))
    assert [row.value for row in rows] == ROWS
    assert rows[0].file == "name"
    assert asked == {
        "name": "user/name",
        "config": "main",
        "split": "test",
        "revision": "v1",
        "streaming": True,
    }
