"""One run at a time, known by name; a dead one's lease is taken over, also where locks do not reach."""

import json
import re
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from sstoken.errors import SstokenError
from sstoken.pipeline import lease
from sstoken.pipeline.lease import Lease
from sstoken.pipeline.locks import one_run_at_a_time


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "PATIENCE", 1.0)
    monkeypatch.setattr(lease, "_LOOK", 0.05)
    return tmp_path / ".out.lease"


def of_another_machine(file: Path, fingerprint: str = "") -> Lease:
    """A lease whose lock this machine cannot see."""
    other = Lease(file, fingerprint)
    other._own = lease.Holder(**{**vars(other._own), "host": "elsewhere", "boot": "another", "pid": 7})
    return other


def test_the_loser_says_who_holds_it(tmp_path: Path) -> None:
    with (
        one_run_at_a_time(tmp_path / "out", fingerprint="abc") as check,
        pytest.raises(SstokenError) as caught,
        one_run_at_a_time(tmp_path / "out"),
    ):
        raise AssertionError
    check()
    held = r"out: another run is writing it: process \d+ of \S+ on \S+ since [\d-]+ [\d:]+, of work abc; wait"
    assert re.search(held, str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_a_killed_runs_lease_is_taken_over_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of this machine: the lock was free, so its process is gone, whatever uses its number now."""
    monkeypatch.setattr(lease, "PATIENCE", 1e9)
    Lease(file).take()
    (file.parent / f"{file.name}.01234567.tmp").touch()
    with one_run_at_a_time(file.parent / "out") as check:
        check()
    assert [path.name for path in file.parent.iterdir()] == [".out.lock"]


def test_a_living_holder_on_another_machine_is_refused(file: Path) -> None:
    other = of_another_machine(file)
    other.take()
    try:
        with pytest.raises(SstokenError, match=r"another run is writing here: process 7 of .* on elsewhere"):
            Lease(file).take()
        other.check()
    finally:
        other.release()
    assert not file.exists()


def test_a_rank_waits_for_a_holder_that_ends_soon(file: Path) -> None:
    other = of_another_machine(file)
    other.take()
    threading.Timer(0.3, other.release).start()
    own = Lease(file)
    own.take(wait=60)
    own.check()
    own.release()


def test_a_dead_holder_on_another_machine_is_watched_then_taken_over(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = of_another_machine(file)
    other.take()
    other._ended.set()  # as if its machine had lost power: no sign of life, and nothing released
    with one_run_at_a_time(file.parent / "out") as check:
        check()
        assert lease.holder(file).host != "elsewhere"
    assert "process 7" in capsys.readouterr().err


def test_a_holder_that_was_held_up_does_not_publish(file: Path) -> None:
    """Nor does it write into its successor's lease, or release it."""
    slow = of_another_machine(file)
    slow.take()
    own = Lease(file, "mine")
    slow._ended.set()
    own.take()
    own._ended.set()
    own._thread.join()
    before = file.read_bytes()
    slow._beat()
    assert file.read_bytes() == before
    with pytest.raises(SstokenError, match="of work mine took over"):
        slow.check()
    slow.release()
    own.check()
    own.release()
    assert not file.exists()


def test_of_two_that_take_over_at_once_one_publishes(file: Path) -> None:
    """The other one is refused at once, or else before it publishes."""
    dead = of_another_machine(file)
    dead.take()
    dead._ended.set()
    published = []

    def work(name: str) -> None:
        own = Lease(file, name)
        with suppress(SstokenError):
            own.take()
            taken.wait()
            own.check()
            published.append(name)
            done.wait()
            own.release()

    taken, done = threading.Event(), threading.Event()
    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    threads[0].join(3)  # long enough for both to take it, or be refused; not needed to pass
    taken.set()
    threads[0].join(1)
    done.set()
    for thread in threads:
        thread.join()
    assert len(published) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"pid": 1})])
def test_a_lease_that_cannot_be_read_is_none(text: str, file: Path) -> None:
    file.write_text(text)
    own = Lease(file)
    own.take()
    own.check()
    own.release()
