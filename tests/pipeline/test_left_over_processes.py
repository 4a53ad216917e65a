"""A parent killed alone takes its workers with it; what one of them still writes gets into no finished folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sstoken.errors import SstokenError
from sstoken.pipeline import api
from sstoken.pipeline.engines.local import LocalEngine
from sstoken.pipeline.job import Job
from sstoken.pipeline.runner import execute
from sstoken.stages.manifest import Digests
from sstoken.stages.select import Select
from sstoken.stages.stage import Context, EngineOptions, Progress, Task, Worker
from tests.pipeline.worlds import make_world
from tests.support import PATIENCE, ROOT, wait_until


def mark_and_sleep(folder: Path, worker: Worker) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(PATIENCE)


def start_two_workers(folder: str) -> None:
    tasks = [Task(Path(folder), 1, Path(folder))] * 4
    for _ in LocalEngine(EngineOptions(workers=2)).map(mark_and_sleep, tasks, Progress()):
        pass


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = f"from {__name__} import start_two_workers; start_two_workers({str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        assert parent.pid not in workers
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(PATIENCE)
    wait_until(lambda: not any(is_alive(worker) for worker in workers))


def is_alive(process: int) -> bool:
    """An ended one that nobody has waited for yet does not count."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Overtaken(Select):
    """A selection while which a process of an earlier attempt, with another rho, writes a shard."""

    def run(self, context: Context) -> dict[str, Any]:
        metrics = super().run(context)
        if (late := Path(os.environ["LATE_SHARD"])).is_file():
            shutil.copy(late, context.out)
        return metrics


def test_a_shard_of_an_earlier_attempt_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    inputs = {"tokens": world.tokens, "history": world.scores / "base", "current": world.scores / "later"}
    inputs["attention"] = world.scores / "later"
    earlier = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "0.3", rho=0.3).folder
    job = Job(Overtaken(rho=0.6), inputs, tmp_path / "out", seed=0)
    monkeypatch.setenv("LATE_SHARD", str(earlier / "part-00001.parquet"))
    with pytest.raises(SstokenError, match=r"part-00001\.parquet: .* earlier attempt"):
        execute(job, Digests())
    assert not job.out.exists()
    monkeypatch.setenv("LATE_SHARD", str(tmp_path / "none"))
    execute(job, Digests())
    same = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "0.6", rho=0.6).folder
    for part in same.glob("part-*"):
        assert part.read_bytes() == (job.out / part.name).read_bytes()
