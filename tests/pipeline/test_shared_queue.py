"""Several checkpoints are scored as one queue of shards: the bytes of one after the other, and each loaded once."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sstoken.errors import QuarantinedError, SstokenError
from sstoken.pipeline import api
from sstoken.pipeline.job import Job, Result
from sstoken.pipeline.locks import one_run_at_a_time
from sstoken.pipeline.runner import execute, execute_together
from sstoken.stages import score, tables
from sstoken.stages.manifest import MANIFEST, Digests
from sstoken.stages.score import Score
from sstoken.stages.sharded import QUARANTINE, Work
from sstoken.stages.stage import Context, Worker
from tests.pipeline.worlds import SHARD_ROWS, World
from tests.support import PATIENCE

POISON = "poison"
"""A file beside the outputs: the folder and the shard whose disk fails."""


def jobs_of(world: World, out: Path, kind: type[Score] = Score, **settings: Any) -> list[Job]:
    tokens = settings.pop("tokens", world.tokens)
    return [
        Job(kind(checkpoint=str(ref), device="cpu", **settings), {"tokens": tokens}, out / ref.name, seed=0)
        for ref in (world.base, world.later)
    ]


def run(jobs: Sequence[Job]) -> list[str]:
    """Return the folders in the order in which they were finished."""
    finished: list[Result] = []
    results = execute_together(jobs, Digests(), lambda index, result: finished.append(result))
    assert [result.folder for result in results] == [job.out for job in jobs]
    return [result.folder.name for result in finished]


def shards(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("part-*.parquet")}


class _Meeting:
    """Waits, before its shard is scored, until a shard of the other checkpoint is at work as well."""

    def __init__(self, function: Any, out: Path) -> None:
        self._function, self._out = function, out

    def __call__(self, work: Any, worker: Worker) -> None:
        beside = self._out.parent
        (beside / f"{self._out.name}.begun").touch()
        end = time.monotonic() + PATIENCE
        while len(list(beside.glob("*.begun"))) < 2:
            if time.monotonic() > end:
                raise SstokenError("no shard of the other checkpoint was begun meanwhile")
            time.sleep(0.02)
        self._function(work, worker)


class MeetingScore(Score):
    def work(self, context: Context) -> Work:
        work = super().work(context)
        return Work(_Meeting(work.function, context.out), work.tasks, work.total)


class _Poisoned:
    def __init__(self, function: Any, out: Path) -> None:
        self._function, self._out = function, out

    def __call__(self, work: Any, worker: Worker) -> None:
        poison = self._out.parent / POISON
        if poison.exists() and poison.read_text() == f"{self._out.name}/{work.name}":
            raise ConnectionError("no answer")
        self._function(work, worker)


class PoisonedScore(Score):
    def work(self, context: Context) -> Work:
        work = super().work(context)
        return Work(_Poisoned(work.function, context.out), work.tasks, work.total)


@pytest.mark.slow
def test_checkpoints_are_scored_side_by_side(world: World, tmp_path: Path) -> None:
    given = {"data": str(world.data), "model": str(world.base), "shard_rows": 10 * SHARD_ROWS, "workers": 1}
    tokens = api.encode(**given, out=tmp_path / "tokens").folder
    assert len(tables.parts(tokens)) == 1
    run(jobs_of(world, tmp_path / "together", MeetingScore, workers=2, tokens=tokens))
    for job in jobs_of(world, tmp_path / "apart", tokens=tokens):
        execute(job, Digests())
    assert shards(tmp_path / "together") == shards(tmp_path / "apart")


def test_each_checkpoint_is_loaded_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Counter[str] = Counter()
    load = score.make_backend

    def counted(name: str, options: Any) -> Any:
        loaded[options.checkpoint] += 1
        return load(name, options)

    monkeypatch.setattr(score._backend, "_make", counted)
    score._backend.held.clear()
    assert run(jobs_of(world, tmp_path)) == ["base", "later"]
    assert loaded == {str(world.base): 1, str(world.later): 1}
    assert len(shards(tmp_path)) == 6
    loaded.clear()
    assert run(jobs_of(world, tmp_path)) == ["base", "later"]
    assert not loaded, "what is finished is not made again"


def test_a_failing_shard_holds_no_other_checkpoint_up(world: World, tmp_path: Path) -> None:
    (tmp_path / POISON).write_text("base.partial/part-00001.parquet")
    jobs = jobs_of(world, tmp_path, PoisonedScore)
    told: list[int] = []
    with pytest.raises(QuarantinedError, match=r"base\.partial/part-00001\.parquet \(ConnectionError: no an"):
        execute_together(jobs, Digests(), lambda index, result: told.append(index))
    assert told == [1]
    assert (tmp_path / "later" / MANIFEST).exists()
    assert not list(tmp_path.glob(f"later*/{QUARANTINE}*"))
    assert not (tmp_path / "later.partial").exists()
    (record,) = (tmp_path / "base.partial" / f"{QUARANTINE}.jsonl").read_text().splitlines()
    assert json.loads(record)["file"] == "part-00001.parquet"
    made = {path: path.stat().st_ino for path in (tmp_path / "base.partial").glob("part-*")}
    assert len(made) == 2
    (tmp_path / POISON).unlink()
    assert run(jobs) == ["later", "base"]
    assert {(tmp_path / "base" / path.name).stat().st_ino for path in made} == {*made.values()}


def test_a_folder_that_is_taken_stops_before_any_work(world: World, tmp_path: Path) -> None:
    with one_run_at_a_time(tmp_path / "later"), pytest.raises(SstokenError, match="another run is writing"):
        run(jobs_of(world, tmp_path))
    assert not shards(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
