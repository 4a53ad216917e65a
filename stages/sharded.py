"""Stages whose work is a task a shard: any engine runs it, and several ranks may share it."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from sstoken.errors import QuarantinedError
from sstoken.stages import storage, tables
from sstoken.stages.shard_border import at_a_border
from sstoken.stages.stage import SPEED_ONLY, Context, Engine, EngineOptions, Progress, Stage, Task, Worker
from sstoken.stages.storage import write_atomic
from sstoken.stages.took import Took

QUARANTINE = "quarantine"
"""In a partial folder: the start of the names of the files that list the shards which failed each time."""


@dataclass(frozen=True)
class Work:
    """What there is to do."""

    function: Callable[[Any, Worker], None]
    """Does one task; must pickle."""
    tasks: Iterable[Task[Any]]
    """The same, in the same order, in every call."""
    total: int | None = None
    """Sum of the tasks' sizes where `tasks` is lazy and it is known anyway."""


class ShardedStage(Stage, EngineOptions):
    """A stage of three parts: what there is to do, doing it shard by shard, and what follows when all are there."""

    unit: ClassVar[str] = "shards"
    """What the progress bar counts."""

    rank: Annotated[int, Field(ge=0), SPEED_ONLY] = 0
    """Which part of the work is done here, from 0 to world-size - 1."""
    world_size: Annotated[int, Field(ge=1), SPEED_ONLY] = 1
    """Parts that the work is cut into, each run by itself, for example by a SLURM array; `commit` ends it."""

    def work(self, context: Context) -> Work:
        """Check the inputs and say what there is to do."""
        raise NotImplementedError

    def finish(self, context: Context) -> dict[str, Any]:
        """Write what follows from the finished shards; return the metrics. Cheap, and run once."""
        raise NotImplementedError

    def outputs(self, context: Context) -> list[Path]:
        """Return the file of each task, in order."""
        return [task.output for task in self.work(context).tasks]

    def is_done(self, output: Path) -> bool:
        """Whether a task's file that is there, and all that it stands for, is what was written."""
        return storage.of(output).vouches_for(output) or tables.is_sound(output)

    def run(self, context: Context) -> dict[str, Any]:
        """Do the tasks of this rank that are not done yet; a single rank finishes, too."""
        engine, work = context.engine, self.work(context)
        tasks, total = work.tasks, work.total
        if engine.world_size > 1:
            tasks, total = _own(tasks, engine.rank, engine.world_size), None
        if isinstance(work.tasks, Sequence):
            tasks = list(tasks)
            total = sum(task.size for task in tasks)
        record = context.out / _record_name(engine)
        storage.of(record).delete(record)
        with context.progress(self.unit, total) as bar, at_a_border() as stopped:
            took = Took(context.out, f"{engine.rank}-of-{engine.world_size}")
            try:
                for seconds in engine.map(_Timed(work.function), self._left(tasks, bar, stopped), bar):
                    took.add(seconds)
            except QuarantinedError as error:
                write_atomic(record, _as_lines(error))
                raise
            finally:
                took.save()
        return self.finish(context) if engine.world_size == 1 else {}

    def _left(
        self, tasks: Iterable[Task[Any]], bar: Progress, stopped: Callable[[], bool]
    ) -> Iterator[Task[Any]]:
        """The tasks that are not done. No manifest lists their files yet, so a damaged one is made again."""
        for task in tasks:
            if stopped():
                return
            if task.output.exists():
                if self.is_done(task.output):
                    bar.skip(task.size)
                    continue
                storage.of(task.output).delete(task.output)
            yield task


class _Timed:
    """A task's function that returns how many seconds it took; pickles into worker processes."""

    def __init__(self, function: Callable[[Any, Worker], None]) -> None:
        self._function = function

    def __call__(self, work: Any, worker: Worker) -> float:
        start = time.monotonic()
        self._function(work, worker)
        return time.monotonic() - start


def _own(tasks: Iterable[Task[Any]], rank: int, world_size: int) -> Iterator[Task[Any]]:
    return (task for index, task in enumerate(tasks) if index % world_size == rank)


def _record_name(engine: Engine) -> str:
    part = f"-{engine.rank:05d}-of-{engine.world_size:05d}" if engine.world_size > 1 else ""
    return f"{QUARANTINE}{part}.jsonl"


def _as_lines(error: QuarantinedError) -> str:
    rows = ({"file": Path(file).name, "attempts": error.attempts, "error": why} for file, why in error.failed)
    return "".join(json.dumps(row) + "\n" for row in rows)
