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
from sstoken.stages.manifest import Digests
from sstoken.stages.score import Score
from sstoken.stages.sharded import Work
from sstoken.stages.stage import Context, Worker

SECONDS = 0.25
LOG, POISON = "log.txt", "poison"
"""Beside the output: a line for each shard that was begun; the name of a shard that kills whoever makes it."""


class _Slow:
    def __init__(self, function: Any, beside: Path) -> None:
        self._function, self._beside = function, beside

    def __call__(self, tokens: Path, worker: Worker) -> None:
        with open(self._beside / LOG, "a") as log:
            log.write(f"{tokens.name} {os.getpid()}\n")
        if (self._beside / POISON).exists() and tokens.name == (self._beside / POISON).read_text():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SECONDS)
        self._function(tokens, worker)


class SlowScore(Score):
    """Scores, and takes its time."""

    def work(self, context: Context) -> Work:
        work = super().work(context)
        return Work(_Slow(work.function, context.out.parent), work.tasks, work.total)


def score(tokens: Path, checkpoint: Path, out: Path, **options: Any) -> None:
    """Score slowly."""
    stage = SlowScore(checkpoint=str(checkpoint), attention=True, device="cpu", **options)
    execute(Job(stage, {"tokens": tokens}, out, seed=0), Digests())


if __name__ == "__main__":
    score(*map(Path, sys.argv[1:4]), **json.loads(sys.argv[4]))
