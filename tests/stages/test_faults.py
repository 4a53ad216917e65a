"""Faults on purpose happen where they were asked for, once or from then on, and never in a normal run."""

import errno
import os
import signal
from collections.abc import Iterator

import pytest

from sstoken.errors import UsageError
from sstoken.stages import faults, storage


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Set the variable as if a process had been started with it."""

    def set_to(text: str) -> None:
        monkeypatch.setenv(faults.VARIABLE, text)
        faults.plan.cache_clear()

    yield set_to
    faults.plan.cache_clear()


def test_a_normal_run_has_no_faults(tmp_path, monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.plan.cache_clear()
    assert faults.plan() is None
    with faults.create(tmp_path / "file") as file:
        assert not isinstance(file.raw, faults._Faulty)


@pytest.mark.parametrize("point", ["write", "fsync", "rename"])
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EACCES"])
def test_the_second_file_alone_is_refused_and_leaves_nothing(kind, point, ask, tmp_path):
    ask(f"{kind}:{point}:2")
    storage.write_atomic(tmp_path / "1", "first")
    with pytest.raises(OSError, match=os.strerror(getattr(errno, kind))) as caught:
        storage.write_atomic(tmp_path / "2", "second")
    assert caught.value.filename == str(tmp_path / "2")
    storage.write_atomic(tmp_path / "3", "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_every_later_file_is_refused_too(ask, tmp_path):
    ask("EIO:commit:1+")
    storage.write_atomic(tmp_path / "other", "a rename, but no commit")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            storage.write_atomic(tmp_path / "manifest.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_short_write_is_gone_on_with(ask, tmp_path):
    ask("short:write:1")
    storage.write_atomic(tmp_path / "file", "abcdefgh" * 10_000)
    assert (tmp_path / "file").read_text() == "abcdefgh" * 10_000
    assert faults.plan().passed["write"] > 1


def test_a_kill_leaves_half_a_file_under_a_name_that_nobody_reads(ask, tmp_path):
    child = os.fork()
    if child == 0:
        ask("kill:write:1")
        storage.write_atomic(tmp_path / "file", "abcdefgh")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_text() == "abcd"
    assert left.suffix == storage.UNFINISHED


@pytest.mark.parametrize("text", ["kill", "boom:write:1", "kill:read:1", "kill:write:x"])
def test_another_text_is_refused(text, ask):
    ask(text)
    with pytest.raises(UsageError, match="KIND:POINT:N"):
        faults.plan()
