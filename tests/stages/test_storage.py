"""The local disk as a storage: complete or not there, whoever fails; no stage writes past it."""

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from sstoken.stages import storage, tables

ROOT = Path(__file__).parents[2]
DISK = storage.LocalDisk()


class BrokenError(Exception):
    pass


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "file"
    storage.write_atomic(file, "old")
    for error in (BrokenError(), OSError(28, "full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), DISK.put(file) as opened:  # noqa: PT012
            opened.write(b"half")
            assert file.read_text() == "old"
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"
    assert DISK.sizes(tmp_path, [file.name, "none"]) == {file.name: 3, "none": None}


def test_an_exception_in_a_parquet_writer_publishes_nothing(tmp_path: Path) -> None:
    table = pa.table({"example_id": pa.array(["a"])})

    def groups():
        yield table
        raise BrokenError

    with pytest.raises(BrokenError):
        tables.write_row_groups(tmp_path / "part-00000.parquet", groups(), table.schema, {})
    assert not list(tmp_path.iterdir())


def test_of_several_writers_one_wins(tmp_path: Path) -> None:
    assert DISK.put_if_absent(tmp_path / "mark", b"first")
    assert not DISK.put_if_absent(tmp_path / "mark", b"second")
    assert [path.read_bytes() for path in DISK.list(tmp_path)] == [b"first"]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with DISK.put_folder(folder) as place:
            (place / content).write_text(content)
    with pytest.raises(BrokenError), DISK.put_folder(folder) as place:  # noqa: PT012
        (place / "three").write_text("half")
        raise BrokenError
    assert [path.relative_to(tmp_path).as_posix() for path in DISK.list(tmp_path)] == ["folder/two"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_publishing_goes_on_where_it_was_interrupted(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its renames: then there is the old work or the new work, never none."""
    place, work = tmp_path / "out", DISK.workplace(tmp_path / "out")
    for folder, name in ((place, "old"), (work, "new")):
        folder.mkdir()
        (folder / name).touch()
    left = [renames]
    rename, rmtree = Path.rename, shutil.rmtree

    def dying(path: Path, target: Path) -> Path:
        if left[0] == 0:
            raise BrokenError
        left[0] -= 1
        return rename(path, target)

    def never(path: Path) -> None:
        raise BrokenError

    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr(shutil, "rmtree", never)
    with pytest.raises(BrokenError):
        DISK.publish(place)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    if work.exists():
        DISK.publish(place)
    DISK.recover(place)
    assert [path.name for path in DISK.list(place)] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet.0123abcd.tmp").touch()
    (tmp_path / "tokenizer.0123abcd.tmp").mkdir()
    (tmp_path / "mine.tmp").touch()
    DISK.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


def test_no_stage_writes_past_the_storage() -> None:
    """Nor the runner. Libraries that want a folder are given one by `put_folder`."""
    tricks = re.compile(
        r"\.rename\(|os\.replace|\.unlink\(|rmtree\(|\.write_text\(|\.write_bytes\(|os\.link|\.mkdir\(|\"wb?\"\)"
    )
    allowed = {
        "stages/local_disk.py",
        "stages/object_store.py",  # local scratch
        "stages/remote_cache.py",
        "stages/faults.py",  # for local_disk.py alone
        "stages/auditing/listing.py",  # a page of the documentation
        "stages/report/show.py",  # a picture where the user wants it
        "stages/report/page.py",  # as are pages,
        "pipeline/slurm.py",  # scripts
        "pipeline/new_configuration.py",  # and configurations
        "stages/hub/pull.py",  # a download that is not what was promised
        "stages/training/observed_losses.py",  # a database of its own
        "pipeline/locks.py",
        "pipeline/lease.py",
        "pipeline/claim.py",
        "pipeline/verbs/runs.py",
    }
    for package in ("stages", "pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name not in allowed and not name.startswith("pipeline/demo/"):
                found = tricks.search(path.read_text())
                assert found is None, f"{name}: {found}"
