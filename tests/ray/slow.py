"""Stages whose shards take long enough to be caught at work, and may fail; Ray's processes import this by name."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sstoken.pipeline.job import Job
from sstoken.pipeline.runner import execute
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.manifest import Digests
from sstoken.stages.score import Score
from sstoken.stages.select import Select
from sstoken.stages.sharded import ShardedStage, Work
from sstoken.stages.stage import Context, Task, Worker

SECONDS = 0.25
LOG, POISON = "log.txt", "poison"
"""Beside the output: a line for each shard that was begun; the name of a shard that kills whoever makes it."""


class _Slow:
    def __init__(self, function: Any, beside: Path) -> None:
        self._function, self._beside = function, beside

    def __call__(self, work: tuple[str, Any], worker: Worker) -> None:
        shard, given = work
        with open(self._beside / LOG, "a") as log:
            log.write(f"{shard} {os.getpid()}\n")
        if (self._beside / POISON).exists() and shard == (self._beside / POISON).read_text():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SECONDS)
        self._function(given, worker)


class _Slowly:
    def work(self, context: Context) -> Work:
        work: Work = super().work(context)  # type: ignore[misc]
        tasks = (Task(task.output, task.size, (task.output.name, task.work)) for task in work.tasks)
        return Work(_Slow(work.function, context.out.parent), tasks, work.total)


class SlowEncode(_Slowly, Encode):
    """Encodes, and takes its time."""


class SlowScore(_Slowly, Score):
    """Scores, and takes its time."""


class SlowSelect(_Slowly, Select):
    """Selects, and takes its time."""


class SlowExport(_Slowly, Export):
    """Exports, and takes its time."""


KINDS: dict[str, type[ShardedStage]] = {
    kind.name: kind for kind in (SlowEncode, SlowScore, SlowSelect, SlowExport)
}


def run(kind: str, inputs: dict[str, Path | str], out: Path, **settings: Any) -> None:
    """Run a stage slowly."""
    given = {name: Path(folder) for name, folder in inputs.items()}
    execute(Job(KINDS[kind](**settings), given, out, seed=0), Digests())


def score(tokens: Path, checkpoint: Path, out: Path, **options: Any) -> None:
    """Score slowly."""
    run("score", {"tokens": tokens}, out, checkpoint=str(checkpoint), attention=True, device="cpu", **options)


if __name__ == "__main__":
    kind, inputs, out, settings = sys.argv[1:]
    run(kind, json.loads(inputs), Path(out), **json.loads(settings))
