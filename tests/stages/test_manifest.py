"""Manifests: what they hold, what they find, and digests that are remembered."""

import json
import os
import re
from uuid import uuid4

import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.manifest import (
    MANIFEST,
    Digests,
    Manifest,
    finished,
    finished_inside,
    list_files,
    problems,
    read_manifest,
    unlisted,
    write_manifest,
)
from sstoken.stages.storage import address


def make(folder, **changes):
    """A finished folder of two files."""
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "b.txt").write_text("four")
    facts = {
        "stage": "encode",
        "fingerprint": "f" * 16,
        "settings": {"rho": 0.5},
        "seed": 3,
        "inputs": {"tokens": "t" * 16},
        "sources": {},
        "version": "1.0",
        "seconds": 2.5,
        "metrics": {"kept": 1},
        "files": list_files(folder),
    }
    manifest = Manifest(**facts | changes)
    write_manifest(folder, manifest)
    return manifest


def test_what_is_written_is_read(tmp_path):
    manifest = make(tmp_path / "run")
    read = read_manifest(tmp_path / "run")
    assert read.model_copy(update={"digest": manifest.digest}) == manifest
    assert re.fullmatch("[0-9a-f]+", read.digest)
    assert set(read.digest) != {"0"}
    assert [(f.path, f.bytes) for f in read.files] == [("a.txt", 3), ("deep/b.txt", 4)]
    text = (tmp_path / "run" / MANIFEST).read_text()
    assert text.startswith('{\n "stage"')
    write_manifest(tmp_path / "run", read)
    assert (tmp_path / "run" / MANIFEST).read_text() == text
    assert finished(tmp_path / "run", "tokens") == read


def test_no_manifest_and_no_folder(tmp_path):
    assert read_manifest(tmp_path) is None
    with pytest.raises(SstokenError, match=r"unfinished \(no manifest.json\), or not a folder of tokens"):
        finished(tmp_path, "tokens")
    with pytest.raises(
        UsageError, match="gone: no such folder; it should be the folder that holds the tokens"
    ):
        finished(tmp_path / "gone", "tokens")


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file: is a file; it should be the folder that holds the tokens$"):
        finished(tmp_path / "file", "tokens")


def test_a_folder_of_finished_ones_names_them(tmp_path):
    for number in range(9):
        make(tmp_path / f"run{number}")
    inside = [str(tmp_path / f"run{number}") for number in range(8)]
    assert finished_inside(tmp_path) == inside
    assert finished_inside(tmp_path / "run0") == []
    assert finished_inside(tmp_path / "run0" / "a.txt") == []
    assert finished_inside(tmp_path / "gone") == []
    with pytest.raises(UsageError) as raised:
        finished(tmp_path, "tokens")
    several = f"a folder of several, {', '.join(inside)}; name the one that holds the tokens, or make it"
    assert str(raised.value) == f"{tmp_path}: {several}"


def test_finished_compares_sizes_alone(tmp_path):
    manifest = make(tmp_path / "run")
    (tmp_path / "run" / "a.txt").write_text("two")
    assert finished(tmp_path / "run", "tokens").files == manifest.files


def test_the_digest_is_the_manifests_own_whatever_else_looks_like_it(tmp_path):
    make(tmp_path / "run", settings={"regex": "0" * 64})
    assert read_manifest(tmp_path / "run").settings == {"regex": "0" * 64}


def test_in_an_object_store_the_first_manifest_stands():
    folder = address(f"memory://{uuid4()}/run")
    facts = {"settings": {}, "seed": 0, "inputs": {}, "sources": {}, "seconds": 0, "metrics": {}, "files": []}
    first = Manifest(stage="encode", fingerprint="f", version="1", **facts)
    write_manifest(folder, first)
    with pytest.raises(SstokenError) as raised:
        write_manifest(folder, first.model_copy(update={"fingerprint": "g"}))
    assert str(raised.value) == (
        f"{folder}: another run finished it first; its output stands, run again to see it"
    )
    assert read_manifest(folder).fingerprint == "f"


@pytest.mark.parametrize("change", ["settings", "digest", "half", "field"])
def test_a_changed_manifest_is_damaged(tmp_path, change):
    make(tmp_path / "run")
    path = tmp_path / "run" / MANIFEST
    text = path.read_text()
    if change == "settings":
        text = text.replace("0.5", "0.6")
    elif change == "digest":
        digest = json.loads(text)["digest"]
        text = text.replace(digest, digest[::-1])
    elif change == "half":
        text = text[: len(text) // 2]
    else:
        text = json.dumps({"stage": 1})
    path.write_text(text)
    with pytest.raises(SstokenError, match=r"manifest\.json"):
        read_manifest(tmp_path / "run")


def test_problems_are_named_by_file(tmp_path):
    folder = tmp_path / "run"
    manifest = make(folder)
    assert list(problems(folder, manifest)) == []
    (folder / "a.txt").write_text("two")
    assert list(problems(folder, manifest, checksums=False)) == []
    assert list(problems(folder, manifest)) == [f"{folder}/a.txt: content changed (checksum differs)"]
    (folder / "a.txt").write_text("twofold")
    (folder / "deep" / "b.txt").unlink()
    for checksums in (True, False):
        assert list(problems(folder, manifest, checksums=checksums)) == [
            f"{folder}/a.txt: 7 bytes, the manifest says 3",
            f"{folder}/deep/b.txt: missing",
        ]
    with pytest.raises(SstokenError, match=r"a.txt: 7 bytes.*; put the file back, or make .*run again"):
        finished(folder, "tokens")


def test_unlisted_files_but_hidden_ones_and_finished_folders(tmp_path):
    folder = tmp_path / "run"
    manifest = make(folder)
    assert unlisted(folder, manifest) == []
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x").write_text("x")
    make(folder / "inner")
    assert unlisted(folder, manifest) == []
    (folder / "deep" / "c.txt").write_text("x")
    (folder / "b.txt").write_text("x")
    assert unlisted(folder, manifest) == [folder / "b.txt", folder / "deep" / "c.txt"]


def count_reads(monkeypatch):
    """Count the files that are hashed."""
    from sstoken.stages import manifest

    read = []
    hash_one = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: (read.append(path), hash_one(path))[1])
    return read


def test_digests_are_remembered_while_a_file_stands(tmp_path, monkeypatch):
    read = count_reads(monkeypatch)
    file, cache = tmp_path / "file", tmp_path / "digests.json"
    file.write_text("one")
    digests = Digests(cache)
    first = digests(file)
    assert first == digests(file) == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert len(read) == 1
    assert Digests(cache)(file) == first
    assert len(read) == 1
    assert Digests()(file) == first
    assert len(read) == 2
    status = file.stat()
    file.write_text("two")  # as long, and its time set back
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Digests(cache)(file) != first


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"known": {}}', '{"digest": "0", "known": {"a": "b"}}', "\xff"]
)
def test_a_damaged_cache_is_no_cache(tmp_path, monkeypatch, text):
    read = count_reads(monkeypatch)
    file, cache = tmp_path / "file", tmp_path / "digests.json"
    file.write_text("one")
    cache.write_bytes(text.encode("latin-1"))
    Digests(cache)(file)
    Digests(cache)(file)
    assert len(read) == 1


def test_a_cache_edited_by_hand_is_not_believed(tmp_path):
    file, cache = tmp_path / "file", tmp_path / "digests.json"
    file.write_text("one")
    digest = Digests(cache)(file)
    cache.write_text(cache.read_text().replace(digest, digest[::-1]))
    assert Digests(cache)(file) == digest


def test_held_digests_are_written_by_save(tmp_path):
    file, cache = tmp_path / "file", tmp_path / "later" / "digests.json"
    file.write_text("one")
    digests = Digests(cache)
    digests(file)
    assert not cache.parent.exists()
    cache.parent.mkdir()
    with digests.held():
        digests(tmp_path / "file")
        (tmp_path / "other").write_text("x")
        digests(tmp_path / "other")
        assert not cache.exists()
    digests.save()
    assert len(json.loads(cache.read_text())["known"]) == 2
    cache.unlink()
    digests.save()
    assert not cache.exists()  # nothing new


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("one")
    cache = tmp_path / ("d" * 250)  # the temporary name beside it is too long for a file system
    digests = Digests(cache)
    assert digests(tmp_path / "file") == Digests()(tmp_path / "file")
    assert not cache.exists()


def test_saving_sweeps_what_killed_processes_left_of_the_cache_alone(tmp_path):
    (tmp_path / "file").write_text("one")
    left, others = tmp_path / "digests.json.0123abcd.tmp", tmp_path / "other.json.0123abcd.tmp"
    left.touch()
    others.touch()
    Digests(tmp_path / "digests.json")(tmp_path / "file")
    assert not left.exists()
    assert others.exists()


def test_a_file_that_its_manifest_denies_is_refused(tmp_path):
    make(tmp_path / "run")
    digests = Digests()
    digests(tmp_path / "run" / "a.txt")
    (tmp_path / "run" / "a.txt").write_text("two")
    with pytest.raises(SstokenError, match=r"a\.txt"):
        digests(tmp_path / "run" / "a.txt")
