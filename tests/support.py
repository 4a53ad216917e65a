"""What tests of several stages share."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sstoken.stages.stage import Context, Progress, Task, Worker

PATIENCE = 1800
"""Seconds that a process may take. No test waits for the clock: on a busy machine only a hang takes longer."""
_PROGRESS = re.compile(r"[\d,]+(/[\d,]+)? \w+(, [\d,.]+/s)?(, [\d,]+ s left)?")

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and not os.environ.get("CI"),
    reason="torch.compile needs a C++ compiler, which is the user's to have; CI has one and runs this",
)


def messages(err: str) -> list[str]:
    """The lines of a standard error, without those of progress, which come where work takes more than seconds."""
    return [line for line in err.splitlines() if line and not _PROGRESS.fullmatch(line)]


class PlainWorker:
    device = None

    def advance(self, amount: int = 1) -> None:
        pass


class PlainEngine:
    """The plainest engine: one task after the other, in this process."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def map(
        self, function: Callable[[Any, Worker], Any], tasks: Iterable[Task[Any]], progress: Progress
    ) -> Iterator[Any]:
        for task in tasks:
            result = function(task.work, PlainWorker())
            progress.advance(task.size)
            yield result


class NullProgress:
    def advance(self, amount: int = 1) -> None:
        pass


@contextmanager
def null_progress(unit: str, total: int | None) -> Iterator[Progress]:
    yield NullProgress()


def make_context(
    out: Path,
    inputs: Mapping[str, Path] | None = None,
    seed: int = 0,
    progress: Callable[[str, int | None], AbstractContextManager[Progress]] = null_progress,
) -> Context:
    """A context as the runner would make it; `out` is created."""
    out.mkdir(parents=True, exist_ok=True)
    return Context(
        inputs=dict(inputs or {}),
        out=out,
        seed=seed,
        fingerprint="0" * 16,
        engine=PlainEngine(),
        progress=progress,
    )
