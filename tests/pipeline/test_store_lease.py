"""One of several machines gets a folder in an object store; a dead machine's lease is taken over."""

import os
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sstoken.errors import SstokenError
from sstoken.pipeline import lease
from sstoken.pipeline.lease import StoreLease
from sstoken.pipeline.locks import one_run_at_a_time
from sstoken.stages import conditional_write, remote_cache, storage
from sstoken.stages.remote_path import RemotePath
from tests.object_stores import BUCKET, needs_s3
from tests.pipeline.small_run import PIPELINE, environment, save_conversations
from tests.pipeline.worlds import World
from tests.support import PATIENCE

pytestmark = [needs_s3, pytest.mark.usefixtures("s3")]


@pytest.fixture
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "PATIENCE", 2.0)
    monkeypatch.setattr(lease, "_LOOK", 0.05)
    place = storage.address(f"s3://{BUCKET}/{request.node.originalname}/.out.lease")
    assert isinstance(place, RemotePath)
    return place


def on_machine(name: str, file: RemotePath) -> StoreLease:
    made = StoreLease(file, name)
    made._own = lease.Holder(**{**vars(made._own), "host": name, "boot": name})
    return made


def test_a_write_is_done_if_nobody_else_was_first(file: RemotePath) -> None:
    assert conditional_write.create(file, b"a")
    assert not conditional_write.create(file, b"b")
    first = conditional_write.version_of(file)
    assert first is not None
    assert conditional_write.replace(file, b"c", first)
    assert not conditional_write.replace(file, b"d", first)
    assert file.read_bytes() == b"c"
    conditional_write.remove(file)
    conditional_write.remove(file)
    assert not conditional_write.replace(file, b"d", first)
    assert conditional_write.version_of(file) is None


def test_a_living_machine_keeps_others_out(file: RemotePath, tmp_path: Path) -> None:
    out = file.with_name("out")
    other = on_machine("elsewhere", file)
    other.take()
    try:
        with (
            pytest.raises(SstokenError, match=r"another run is writing here: process .* on elsewhere since"),
            one_run_at_a_time(out),  # type: ignore[arg-type]
        ):
            raise AssertionError
        other.check()
    finally:
        other.release()
    with one_run_at_a_time(out) as check:  # type: ignore[arg-type]
        check()
        assert lease.holder(file).boot == remote_cache.machine()  # type: ignore[arg-type, union-attr]
    assert not file.exists()


def test_a_dead_machine_is_watched_then_taken_over(
    file: RemotePath, capsys: pytest.CaptureFixture[str]
) -> None:
    other = on_machine("elsewhere", file)
    other.take()
    other._ended.set()  # as if it had lost power
    own = on_machine("here", file)
    own.take(watched=lambda found: print(f"watching {found.host}"))
    assert capsys.readouterr().out == "watching elsewhere\n"
    with pytest.raises(SstokenError, match=r"on here .*took over while this process was"):
        other.check()
    other._beat()
    own.check()
    other._remove = lambda: pytest.fail("it is not its own")  # type: ignore[method-assign]
    other.release()
    own.release()
    assert not file.exists()


def test_of_machines_that_come_together_one_is_let_in(file: RemotePath) -> None:
    dead = on_machine("dead", file)
    dead.take()
    dead._ended.set()
    let_in, refused = [], []
    start = threading.Barrier(4)

    def come(name: str) -> None:
        own = on_machine(name, file)
        start.wait()
        try:
            own.take()
            let_in.append(own)
        except SstokenError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come, args=(f"machine-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = let_in
    assert len(refused) == 3
    assert all("another run is writing here" in line for line in refused)
    winner.check()
    winner.release()


def test_ranks_on_several_machines_wait_for_each_other(file: RemotePath) -> None:
    other = on_machine("elsewhere", file)
    other.take()
    threading.Timer(0.5, other.release).start()
    own = on_machine("here", file)
    own.take(wait=60)
    own.check()
    own.release()


@pytest.mark.slow
def test_a_second_machine_is_told_who_is_at_work(world: World, tmp_path: Path, s3: str) -> None:
    """Two command lines, each with a cache of its own."""
    data = save_conversations(tmp_path / "data.jsonl", 4000)
    out = f"s3://{BUCKET}/two/tokens"
    command = [*PIPELINE, "encode", "--data", str(data), "--model", str(world.base), "--out", out]
    command += ["--workers", "1", "--shard-rows", "2"]
    env = {name: value for name, value in environment().items() if name != "HF_HUB_OFFLINE"}
    first = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    try:
        while not storage.address(f"{out}.partial/part-00001.parquet").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(
            command,
            env=env | {"SSTOKEN_CACHE": str(tmp_path / "another-machine")},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    finally:
        with suppress(ProcessLookupError):
            os.kill(first.pid, 9)
        first.wait(PATIENCE)
    assert second.returncode == 1
    assert f"another run is writing here: process {first.pid} of " in second.stderr.splitlines()[-1]
    assert "Traceback" not in second.stderr
