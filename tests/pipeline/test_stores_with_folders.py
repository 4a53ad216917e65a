"""Deleting where a store has folders, as sftp does, and where it has none: nothing is left, and nothing else goes."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from sstoken.pipeline.verbs import stages as api
from sstoken.stages import storage
from sstoken.stages.object_store import ObjectStore
from tests.object_stores import BUCKET, needs_s3
from tests.pipeline.worlds import World

STORE = ObjectStore()


class Folders(LocalFileSystem):
    """Real folders; a folder is no file to remove, and one that is missing or not empty cannot be removed."""

    protocol = "folders"
    local_file = False
    rm = AbstractFileSystem.rm

    @classmethod
    def _strip_protocol(cls, path: object) -> str:
        return "/" + str(path).removeprefix("folders:").strip("/")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder of a file system that has folders; the local path below it is `tmp_path / "out"`."""
    fsspec.register_implementation("folders", Folders, clobber=True)
    fsspec.config.conf["folders"] = {"auto_mkdir": True}
    yield storage.address(f"folders:/{tmp_path}/out")
    del fsspec.config.conf["folders"]


@pytest.mark.parametrize("files", [(), ("a",), ("a", "b/c", "b/d", "e/f/manifest.json", "g[ab]")])
def test_a_folder_goes_with_its_folders(place: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "out" / "empty" / "deep").mkdir(parents=True)
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    (tmp_path / "other").touch()
    STORE.delete(place)
    assert os.listdir(tmp_path) == ["other"]
    STORE.delete(place)  # missing


def test_a_file_goes_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("a", "b"):
        (tmp_path / "out" / name).touch()
    STORE.delete(place / "a")
    assert os.listdir(tmp_path / "out") == ["b"]


def test_a_stage_leaves_nothing_but_its_output(world: World, place: Path, tmp_path: Path) -> None:
    call = {"data": str(world.data), "model": str(world.base), "workers": 1, "out": place}
    api.encode(**call, shard_rows=10)
    api.encode(**call, shard_rows=100, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert [path.name for path in sorted((tmp_path / "out").glob("part-*"))] == ["part-00000.parquet"]


@needs_s3
@pytest.mark.usefixtures("s3")
def test_a_name_that_reads_as_a_pattern_is_no_pattern() -> None:
    store = fsspec.filesystem("s3", use_listings_cache=False)
    for name in ("run[12]", "run1", "run2"):
        for file in ("a", "b", "c"):
            store.pipe_file(f"{BUCKET}/patterns/{name}/{file}", b"content")
    STORE.delete(storage.address(f"s3://{BUCKET}/patterns/run[12]"))
    left = [key.removeprefix(f"{BUCKET}/patterns/") for key in store.find(f"{BUCKET}/patterns")]
    assert left == [f"{name}/{file}" for name in ("run1", "run2") for file in ("a", "b", "c")]
