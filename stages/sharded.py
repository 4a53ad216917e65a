"""Stages that work shard by shard: any engine can run their tasks, and several ranks can share them."""

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from sstoken.errors import QuarantinedError, SstokenError
from sstoken.stages import plain_json, storage, tables
from sstoken.stages.shard_border import at_a_border
from sstoken.stages.stage import SPEED_ONLY, Context, EngineOptions, Progress, Stage, Task, Worker
from sstoken.stages.storage import write_atomic

QUARANTINE = "quarantine"
"""Prefix of the files in a partial folder that list the shards whose every attempt failed."""
TOOK = ".took"
"""Folder in a partial folder, with a file for each run that worked on it: how many shards it made, in what time. Shards
cannot hold this: they are the same bytes, whoever makes them."""
_SAVE_EVERY = 30.0
"""Seconds between two saves of the time; a killed run loses the count since the last one."""


@dataclass(frozen=True)
class Work:
    """The tasks of a stage, and the function that does one."""

    function: Callable[[Any, Worker], None]
    """Does one task; must pickle."""
    tasks: Iterable[Task[Any]]
    """Every call returns the same tasks in the same order."""
    total: int | None = None
    """Sum of the tasks' sizes, if `tasks` is lazy and the sum is known."""


class ShardedStage(Stage, EngineOptions):
    """A stage in three steps: `work` lists the tasks, an engine does them shard by shard, `finish` sums up."""

    unit: ClassVar[str] = "shards"
    """What the progress bar counts."""

    rank: Annotated[int, Field(ge=0), SPEED_ONLY] = 0
    """Which part of the work to do here, from 0 to world-size - 1."""
    world_size: Annotated[int, Field(ge=1), SPEED_ONLY] = 1
    """Number of parts, each run on its own, for example by a SLURM array; `commit` finishes the folder."""

    def work(self, context: Context) -> Work:
        """Check the inputs and return one task for each shard."""
        raise NotImplementedError

    def finish(self, context: Context) -> dict[str, Any]:
        """Write the files beside the finished shards; return the metrics. Cheap, and runs once."""
        raise NotImplementedError

    def outputs(self, context: Context) -> list[Path]:
        """Return the output file of each task, in order."""
        return [task.output for task in self.work(context).tasks]

    def is_done(self, output: Path) -> bool:
        """Return whether an existing output, with all files that it stands for, is intact."""
        return storage.of(output).vouches_for(output) or tables.is_sound(output)

    def run(self, context: Context) -> dict[str, Any]:
        """Do the remaining tasks of this rank; a single rank then calls `finish`."""
        run_queue([(self, context)])
        return self.finish(context) if context.engine.world_size == 1 else {}


class _Share:
    """One stage's share of a queue."""

    def __init__(self, index: int, stage: ShardedStage, context: Context) -> None:
        self.index, self._stage, self._out = index, stage, context.out
        rank, world_size, work = context.engine.rank, context.engine.world_size, stage.work(context)
        self.function, self.total = work.function, work.total
        self._tasks = work.tasks
        if world_size > 1:
            self._tasks, self.total = islice(work.tasks, rank, None, world_size), None
        if isinstance(work.tasks, Sequence):
            self._tasks = list(self._tasks)
            self.total = sum(task.size for task in self._tasks)
        part = f"-{rank:05d}-of-{world_size:05d}" if world_size > 1 else ""
        self._record = context.out / f"{QUARANTINE}{part}.jsonl"
        storage.of(self._record).delete(self._record)
        self._took = context.out / TOOK / f"{rank}-of-{world_size}-{secrets.token_hex(4)}.json"
        self.began = self._saved = time.monotonic()
        self._shards, self._seconds = 0, 0.0
        self._running, self._read, self._ended = 0, False, False

    def tasks(self, bar: Progress, stopped: Callable[[], bool]) -> Iterator[Task[Any]]:
        """Yield the tasks that are not done, or whose output is damaged: no manifest protects it yet."""
        self.began = time.monotonic()
        for task in self._tasks:
            if stopped():
                return
            if task.output.exists():
                if self._stage.is_done(task.output):
                    bar.skip(task.size)
                    continue
                storage.of(task.output).delete(task.output)
            self._running += 1
            yield Task(task.output, task.size, (self.index, task.work))
        self._read = True

    def count(self, seconds: float) -> None:
        """Count a completed task."""
        self._running -= 1
        self._shards += 1
        self._seconds += seconds
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def ends(self) -> bool:
        """Return True once: when all of its tasks are done."""
        if self._ended or self._running or not self._read:
            return False
        self.save()
        self._ended = True
        return True

    def save(self) -> None:
        """Record the time spent so far; not once it has ended, since its folder may be published already."""
        self._saved = time.monotonic()
        if self._shards and not self._ended:
            storage.of(self._took).make_folder(self._took.parent)
            write_atomic(self._took, json.dumps({"shards": self._shards, "seconds": self._seconds}))

    def quarantine(self, error: QuarantinedError) -> None:
        """List its shards whose every attempt failed."""
        lines = [
            json.dumps({"file": Path(file).name, "attempts": error.attempts, "error": why}) + "\n"
            for file, why in error.failed
            if file.startswith(f"{self._out}/")
        ]
        if lines:
            write_atomic(self._record, "".join(lines))


def run_queue(
    stages: Sequence[tuple[ShardedStage, Context]], done: Callable[[int, float], None] | None = None
) -> None:
    """Do the tasks of several stages as one queue, so that no worker waits for the last shard of a stage.

    Workers get the tasks in order, so each loads what a stage needs once.

    Args:
        stages: each stage with its context; the first context's engine and progress bar are used for all.
        done: called when all tasks of a stage are done, with its index and the time (`time.monotonic`) at which its
            first task started.

    Raises:
        QuarantinedError: every attempt at some tasks failed; all others are done.
        StoppedError: SIGTERM arrived.
    """
    (stage, context), *_ = stages
    shares = [_Share(index, *each) for index, each in enumerate(stages)]
    totals = [share.total for share in shares]
    total = None if None in totals else sum(filter(None, totals))
    done = done or (lambda index, began: None)
    with context.progress(stage.unit, total) as bar, at_a_border() as stopped:
        tasks = (task for share in shares for task in share.tasks(bar, stopped))
        function = partial(_timed, [share.function for share in shares])

        def end() -> None:
            for share in shares:
                if share.ends():
                    done(share.index, share.began)

        try:
            for index, seconds in context.engine.map(function, tasks, bar):
                shares[index].count(seconds)
                end()
            end()  # stages with nothing left to do
        except SstokenError as error:
            if isinstance(error, QuarantinedError):
                for share in shares:
                    share.quarantine(error)
            end()  # a stage that was finished before another one failed is kept
            raise
        finally:
            for share in shares:
                share.save()


def _timed(
    functions: Sequence[Callable[[Any, Worker], None]], work: tuple[int, Any], worker: Worker
) -> tuple[int, float]:
    """Do a task of any stage; return the stage's index and the seconds it took."""
    index, given = work
    start = time.monotonic()
    functions[index](given, worker)
    return index, time.monotonic() - start


def time_taken(out: Path) -> dict[str, Any]:
    """Add up `shards` and `worker_seconds` of all runs that worked on a partial folder; {} if there is no record.

    Raises:
        SstokenError: a record is damaged.
    """
    shards, seconds = 0, 0.0
    store = storage.of(out)
    for file in store.list(out / TOOK):
        with store.open(file) as opened:
            try:
                said = plain_json.parse_object(opened.read())
                shards, seconds = shards + int(said["shards"]), seconds + float(said["seconds"])
            except (ValueError, TypeError, KeyError, OverflowError):
                raise SstokenError(
                    f"{file}: damaged; it only says how long the work took, remove it to go on without"
                ) from None
    return {"shards": shards, "worker_seconds": round(seconds, 3)} if shards else {}
