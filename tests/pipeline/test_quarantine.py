"""A shard that fails each time is named and set aside while all others are made; the next run tries it again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sstoken.errors import QuarantinedError, SstokenError
from sstoken.pipeline import api
from sstoken.pipeline.engines.dispatch import ATTEMPTS
from sstoken.pipeline.job import Job
from sstoken.pipeline.runner import execute
from sstoken.stages import shard_border
from sstoken.stages.export import Export
from sstoken.stages.manifest import Digests
from sstoken.stages.select import Select
from sstoken.stages.sharded import Work
from sstoken.stages.stage import Context, Worker
from tests.pipeline.small_run import PIPELINE, environment, save_conversations
from tests.pipeline.worlds import World
from tests.support import PATIENCE, ROOT

POISON = "poison"
"""A file beside the output: `kill`, or the name of an error, for the second shard."""


class _Poisoned:
    def __init__(self, function: Any, file: Path) -> None:
        self._function, self._file = function, file

    def __call__(self, work: Any, worker: Worker) -> None:
        if self._file.exists() and "part-00001" in repr(work):
            poison = self._file.read_text()
            if poison == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"ConnectionError": ConnectionError, "SstokenError": SstokenError}[poison]("no answer")
        self._function(work, worker)


class PoisonedSelect(Select):
    def work(self, context: Context) -> Work:
        work = super().work(context)
        return Work(_Poisoned(work.function, context.out.parent / POISON), work.tasks, work.total)


class PoisonedExport(Export):
    def work(self, context: Context) -> Work:
        work = super().work(context)
        return Work(_Poisoned(work.function, context.out.parent / POISON), work.tasks, work.total)


def select_job(world: World, out: Path, **settings: Any) -> Job:
    inputs = {"tokens": world.tokens, "history": world.scores / "base", "current": world.scores / "later"}
    return Job(PoisonedSelect(**settings), inputs | {"attention": world.scores / "later"}, out, seed=0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("poison", "why", "workers"),
    [
        pytest.param("kill", "killed by SIGKILL", 2, marks=pytest.mark.slow),  # processes start four times
        ("ConnectionError", "ConnectionError: no answer", 1),
    ],
)
def test_a_poisoned_shard_is_named_and_tried_again(
    world: World, tmp_path: Path, poison: str, why: str, workers: int
) -> None:
    (tmp_path / POISON).write_text(poison)
    job = select_job(world, tmp_path / "out", workers=workers)
    with pytest.raises(QuarantinedError, match=rf"part-00001\.parquet \({why}\)") as caught:
        execute(job, Digests())
    assert caught.value.exit_code == 1
    assert len(str(caught.value).splitlines()) == 1
    made = {path: path.stat().st_mtime_ns for path in job.partial.glob("part-*")}
    assert [path.name for path in sorted(made)] == ["part-00000.parquet", "part-00002.parquet"]
    (listed,) = map(json.loads, (job.partial / "quarantine.jsonl").read_text().splitlines())
    assert listed == {"file": "part-00001.parquet", "attempts": ATTEMPTS, "error": why}
    (tmp_path / POISON).unlink()
    kept = {path.name: path.stat().st_ino for path in made}
    execute(job, Digests())
    assert {name: (job.out / name).stat().st_ino for name in kept} == kept, "nothing is made twice"
    assert not (job.out / "quarantine.jsonl").exists()
    clean = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "clean").folder
    for part in clean.glob("part-*"):
        assert part.read_bytes() == (job.out / part.name).read_bytes()


def test_what_is_not_a_table_is_kept_too(world: World, tmp_path: Path) -> None:
    masked = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked").folder
    (tmp_path / POISON).write_text("ConnectionError")
    job = Job(PoisonedExport(to="jsonl", scores=False), {"masked": masked}, tmp_path / "export", seed=0)
    with pytest.raises(QuarantinedError):
        execute(job, Digests())
    assert len(list((job.partial / "data").iterdir())) == 2


def test_a_refusal_stops_at_once(world: World, tmp_path: Path) -> None:
    (tmp_path / POISON).write_text("SstokenError")
    with pytest.raises(SstokenError, match=r"^no answer$") as caught:
        execute(select_job(world, tmp_path / "out", workers=1), Digests())
    assert not isinstance(caught.value, QuarantinedError)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_a_run_between_two_shards(world: World, tmp_path: Path, workers: int) -> None:
    data = save_conversations(tmp_path / "data.jsonl", 240)
    given = {"data": str(data), "model": str(world.base), "shard_rows": 2, "workers": 1}
    api.encode(**given, out=tmp_path / "one")
    command = [*PIPELINE, "encode", "--data", data, "--model", world.base, "--shard-rows", 2]
    process = subprocess.Popen(
        [str(part) for part in (*command, "--workers", workers, "--out", tmp_path / "two")],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    partial = tmp_path / "two.partial"
    while len(list(partial.glob("part-*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM does: the workers get it too
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == shard_border.STATUS, err
    assert "error: stopped by SIGTERM at a shard's border" in err
    assert not list(partial.glob("*.tmp"))
    made = {path.name: path.stat().st_ino for path in partial.glob("part-*.parquet")}
    assert 2 <= len(made) < 120
    api.encode(**given, out=tmp_path / "two")
    for part in sorted((tmp_path / "one").glob("part-*")):
        assert part.read_bytes() == (tmp_path / "two" / part.name).read_bytes()
        assert made.setdefault(part.name, ino := (tmp_path / "two" / part.name).stat().st_ino) == ino


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_a_shard_that_takes_longer_is_given_up(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from sstoken.stages import shard_border\n"
        "shard_border.GRACE = 0.3\n"
        "with shard_border.at_a_border() as stopped:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stopped()\n"
        f"    time.sleep({PATIENCE})\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE).returncode
        == shard_border.STATUS
    )
