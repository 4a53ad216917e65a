"""A published dataset back into a folder: the same rows, usable as before, and refused where anything was changed."""

import hashlib
import json
import re
import shutil

import pyarrow as pa
import pytest

from sstoken.stages import tables
from tests import factories
from tests.pipeline.hub.rows import identical, masked_table
from tests.pipeline.hub.test_publish import SPLIT

SHARD = "data/part-00001.parquet"


@pytest.fixture(scope="module")
def prepared(client, masked, tmp_path_factory):
    """What is published of the masked folder, all columns, a file for each shard."""
    folder = tmp_path_factory.mktemp("prepared") / "files"
    client.works("publish", masked, "--repo", "me/whole", "--include-scores", *SPLIT, "--out", folder)
    return folder


@pytest.fixture
def repo(hub, prepared, request):
    """A repository of its own with these files, to tamper with."""
    name = "me/" + re.sub(r"\W+", "-", request.node.name)[:60].strip("-")
    hub.create(name)
    files = [path for path in prepared.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for path in files:
        hub.write(name, path.relative_to(prepared).as_posix(), path.read_bytes())
    return name


def listed_anew(hub, repo, path, content):
    """Change a file and its checksum in the provenance: what somebody does who knows how it is checked."""
    hub.write(repo, path, content)
    provenance = json.loads(hub.files(repo)["provenance.json"])
    entry = next(file for file in provenance["files"] if file["path"] == path)
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    hub.write(repo, "provenance.json", json.dumps(provenance).encode())


def rewritten(prepared, tmp_path, change, about=lambda metadata: metadata):
    """The bytes of a shard whose table, or metadata, is changed."""
    table = change(tables.read_table(prepared / SHARD).replace_schema_metadata(None))
    path = tmp_path / "part.parquet"
    tables.write_part(path, table, about(tables.read_metadata(prepared / SHARD)))
    return path.read_bytes()


def with_column(table, name, values):
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def test_what_comes_back_is_what_was_published(client, masked, prepared, tmp_path):
    pulled = tmp_path / "pulled"
    facts = client.works("pull", "me/whole", "--out", pulled)
    assert facts["kept"] == 72
    assert identical(masked_table(pulled), masked_table(masked))
    assert [path.name for path in tables.parts(pulled)] == [path.name for path in tables.parts(masked)]
    assert client.works("verify", pulled)["wrong"] == []
    rows = ("--row", 11, "--rows", 3)
    assert client("show", pulled, *rows).out == client("show", masked, *rows).out
    for folder in (masked, pulled):
        client.works("export", folder, "--to", "trl", "--out", tmp_path / "export" / folder.name, "--check")
    assert not list(tmp_path.rglob("*.partial"))
    assert client.works("pull", "me/whole", "--out", pulled)["skipped"]


def test_the_pulled_folder_loads_and_is_published_as_the_same_rows(hub, client, masked, prepared, tmp_path):
    pulled = tmp_path / "pulled"
    client.works("pull", "me/whole", "--out", pulled)
    program = (
        "import sys; from datasets import load_dataset; print(len(load_dataset(sys.argv[1], split='train')))"
    )
    assert client.python(program, pulled).out == "24\n"
    puts = len(hub.puts)
    client.works("publish", pulled, "--repo", "me/republished", "--include-scores", *SPLIT)
    assert len(hub.puts) == puts
    first, second = hub.files("me/whole"), hub.files("me/republished")
    assert {p for p in first if first[p] != second[p]} == {
        "README.md",
        "provenance.json",
    }  # they name the repository


def test_a_revision(hub, client, masked, prepared, tmp_path):
    old = hub.repos["me/whole"]["branches"]["main"]
    hub.write("me/whole", "notes.md", b"new")
    client.works("pull", "me/whole", "--revision", old, "--out", tmp_path / "old")
    provenance = json.loads((tmp_path / "old/manifest.json").read_text())
    assert provenance["settings"]["commit"] == old
    line = client.fails(2, "pull", "me/whole", "--out", tmp_path / "old")
    assert "--force" in line
    assert "no such branch" in client.fails(
        1, "pull", "me/whole", "--revision", "none", "--out", tmp_path / "x"
    )


def test_missing_and_foreign_repositories(hub, client, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "no such dataset" in client.fails(1, "pull", "me/nowhere", *out)
    hub.create("another/plain")
    hub.write("another/plain", "data/part-00000.parquet", b"PAR1")
    assert "not a dataset that `publish` wrote" in client.fails(1, "pull", "another/plain", *out)
    assert "user/name" in client.fails(2, "pull", "nowhere", *out)
    assert "does not accept the token" in client.fails(1, "pull", "me/whole", *out, token="hf_of_nobody")
    assert not list(tmp_path.iterdir()) or not (tmp_path / "out").exists()


def _flip(table):
    keep = table["keep_mask"].to_pylist()
    response = table["response_mask"].to_pylist()[0]
    keep[0][response.index(True)] ^= True
    return with_column(table, "keep_mask", keep)


def _kept_prompt(table):
    keep, labels = table["keep_mask"].to_pylist(), table["labels"].to_pylist()
    keep[0][0], labels[0][0] = True, table["input_ids"].to_pylist()[0][0]
    return with_column(with_column(table, "keep_mask", keep), "labels", labels)


def _other_choice(table):
    """Consistent in itself: another token is kept."""
    keep, labels = table["keep_mask"].to_pylist(), table["labels"].to_pylist()
    ids, response = table["input_ids"].to_pylist()[0], table["response_mask"].to_pylist()[0]
    dropped = next(i for i, r in enumerate(response) if r and not keep[0][i])
    keep[0][dropped], labels[0][dropped] = True, ids[dropped]
    return with_column(with_column(table, "keep_mask", keep), "labels", labels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_flip, "labels that contradict its keep mask"),
        (_kept_prompt, "outside the responses"),
        (_other_choice, "other counts of examples and kept tokens"),
        (lambda table: table.slice(1), "other counts of examples and kept tokens"),
        (lambda table: table.drop_columns("labels"), "columns that no masked dataset has"),
        (
            lambda table: table.append_column("extra", table["example_id"]),
            "columns that no masked dataset has",
        ),
        (
            lambda table: with_column(table, "labels", [r[1:] for r in table["labels"].to_pylist()]),
            "unequal lengths",
        ),
    ],
)
def test_a_shard_that_contradicts_itself(hub, client, repo, prepared, tmp_path, change, said):
    listed_anew(hub, repo, SHARD, rewritten(prepared, tmp_path, change))
    line = client.fails(1, "pull", repo, "--out", tmp_path / "out")
    assert said in line
    assert SHARD in line
    assert not (tmp_path / "out").exists()


def test_a_shard_of_another_run(hub, client, repo, prepared, tmp_path):
    content = rewritten(prepared, tmp_path, lambda t: t, lambda m: m | {"rho": 0.1})
    listed_anew(hub, repo, SHARD, content)
    assert "was not made as" in client.fails(1, "pull", repo, "--out", tmp_path / "out")
    content = rewritten(prepared, tmp_path, lambda t: t, lambda m: m | {"stats": {}})
    listed_anew(hub, repo, SHARD, content)
    assert "damaged metadata" in client.fails(1, "pull", repo, "--out", tmp_path / "out")
    listed_anew(hub, repo, SHARD, b"PAR1 and no more")
    assert "not a readable Parquet file" in client.fails(1, "pull", repo, "--out", tmp_path / "out")


def test_changed_missing_and_added_files(hub, client, repo, prepared, tmp_path):
    out = ("--out", tmp_path / "out")
    content = (prepared / SHARD).read_bytes()
    hub.write(repo, SHARD, content[:-9] + b"x" + content[-8:])
    assert "size or checksum differs" in client.fails(1, "pull", repo, *out)
    hub.write(repo, SHARD, None)
    assert f"{SHARD} is missing" in client.fails(1, "pull", repo, *out)
    hub.write(repo, SHARD, content)
    hub.write(repo, "data/part-00009.parquet", content)
    assert "does not list it" in client.fails(1, "pull", repo, *out)
    hub.write(repo, "data/part-00009.parquet", None)
    template = hub.files(repo)["tokenizer/chat_template.jinja"]
    hub.write(repo, "tokenizer/chat_template.jinja", template.replace(b"e", b"E"))
    assert "checksum differs" in client.fails(1, "pull", repo, *out)
    hub.write(repo, "tokenizer/chat_template.jinja", template)
    client.works("pull", repo, *out)


def test_another_tokenizer(hub, client, repo, tmp_path):
    factories.save_tokenizer(tmp_path / "other", first="v")
    listed_anew(hub, repo, "tokenizer/tokenizer.json", (tmp_path / "other/tokenizer.json").read_bytes())
    assert "not the one that made the tokens" in client.fails(1, "pull", repo, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "path",
    ["../escape.parquet", "/etc/passwd", "tokenizer/../../x", "data/../part-00000.parquet", "tokenizer/.hidden",
     "data/part-00000.parquet/x", "data/x.parquet", "tokenizer//x", "tokenizer/a\\b", "other/part-00000.parquet"],
)  # fmt: skip
def test_a_provenance_that_leads_out_of_the_folder(hub, client, repo, tmp_path, path):
    provenance = json.loads(hub.files(repo)["provenance.json"])
    provenance["files"].append({"path": path, "bytes": 1, "sha256": "0" * 64})
    hub.write(repo, "provenance.json", json.dumps(provenance).encode())
    assert "no publication has" in client.fails(1, "pull", repo, "--out", tmp_path / "deep" / "out")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {".out.lock"}


@pytest.mark.parametrize(
    "change",
    [
        lambda p: "no JSON",
        lambda p: [],
        lambda p: p | {"masked": {}},
        lambda p: p | {"masked": p["masked"] | {"checkpoints": "<b>"}},
        lambda p: p | {"files": [{"path": 1}]},
        lambda p: {key: value for key, value in p.items() if key != "metrics"},
        lambda p: p | {"surprise": 1},
    ],
)
def test_a_provenance_that_is_none(hub, client, repo, tmp_path, change):
    changed = change(json.loads(hub.files(repo)["provenance.json"]))
    hub.write(
        repo,
        "provenance.json",
        changed.encode() if isinstance(changed, str) else json.dumps(changed).encode(),
    )
    assert "not the provenance" in client.fails(1, "pull", repo, "--out", tmp_path / "out")


def test_a_file_named_twice(hub, client, repo, tmp_path):
    provenance = json.loads(hub.files(repo)["provenance.json"])
    provenance["files"].append(provenance["files"][0])
    hub.write(repo, "provenance.json", json.dumps(provenance).encode())
    assert "names a file twice" in client.fails(1, "pull", repo, "--out", tmp_path / "out")


def test_counts_that_do_not_add_up(hub, client, repo, tmp_path):
    provenance = json.loads(hub.files(repo)["provenance.json"])
    provenance["metrics"]["kept"] += 1
    hub.write(repo, "provenance.json", json.dumps(provenance).encode())
    assert "counts other tokens" in client.fails(1, "pull", repo, "--out", tmp_path / "out")


def test_an_interrupted_pull_goes_on(hub, client, repo, prepared, tmp_path):
    content = (prepared / SHARD).read_bytes()
    entry = hub.repos[repo]["commits"][hub.repos[repo]["branches"]["main"]]["files"][SHARD]
    blob = hub.folder / entry["lfs"]
    blob.rename(tmp_path / "away")  # the Hub cannot give this one
    client.fails(1, "pull", repo, "--out", tmp_path / "out")
    assert (tmp_path / "out.partial" / "part-00000.parquet").is_file()
    shutil.move(tmp_path / "away", blob)
    assert hashlib.sha256(content).hexdigest() == entry["lfs"]
    first = (tmp_path / "out.partial" / "part-00000.parquet").stat().st_ino
    client.works("pull", repo, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_ino == first
