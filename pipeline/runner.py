"""Runs jobs unless they are finished: one, as one of several ranks or under torchrun; or several as one queue."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from sstoken.errors import UsageError
from sstoken.pipeline.job import Job, Result, identify
from sstoken.pipeline.output_folder import (
    End,
    context_of,
    engine_of,
    found_finished,
    locked_folder,
    run_stage,
    skipped,
)
from sstoken.pipeline.ranks import execute_rank
from sstoken.stages.manifest import Digests
from sstoken.stages.processes import is_main_process, num_processes
from sstoken.stages.sharded import ShardedStage, run_queue
from sstoken.stages.stage import Context


def execute(job: Job, digests: Digests, *, replace: bool = False, force: bool = False) -> Result:
    """Run the job unless it is finished.

    With `replace`, finished output of other settings is replaced instead of refused; `force` runs a finished job again.

    Raises:
        UsageError: wrong settings, or an output folder that is not this job's.
        SstokenError: the work failed; a partial folder may remain, from which the same call resumes.
    """
    check_job(job)
    identity = identify(job, digests)
    if isinstance(job.stage, ShardedStage) and job.stage.world_size > 1:
        return execute_rank(job, job.stage, identity)
    if num_processes() > 1 and not job.stage.distributed:
        raise UsageError(
            f"{job.stage.name} cannot be run by several processes (WORLD_SIZE is {num_processes()}); run it without "
            "torchrun, and only anchor with it"
        )
    if not is_main_process():
        # Do not look into the folder: the main process may be about to change it.
        if not job.stage.agree(None):
            return skipped(job)
        return Result(job.out, run_stage(job, identity), skipped=False)
    if not force and (found := found_finished(job, identity)):
        job.stage.agree(False)
        return found
    with locked_folder(job, identity, replace=replace, force=force) as end:
        if end is None:
            job.stage.agree(False)
            return skipped(job)
        job.stage.agree(True)
        start = time.monotonic()
        return end(run_stage(job, identity), start)


def execute_together(
    jobs: Sequence[Job],
    digests: Digests,
    listener: Callable[[int, Result], None],
    *,
    replace: bool = False,
    force: bool = False,
) -> list[Result]:
    """Run independent jobs as one queue of shards; each has its own folder and manifest.

    Args:
        jobs: all with the same engine options.
        digests, replace, force: see `execute`.
        listener: called with a job's index and result as soon as it is finished.

    Raises:
        UsageError: as `execute`; before any work.
        SstokenError: the work failed; `listener` was called for the jobs that finished.
    """
    results: dict[int, Result] = {}

    def add(index: int, result: Result) -> None:
        results[index] = result
        listener(index, result)

    by_shards = all(isinstance(job.stage, ShardedStage) and job.stage.world_size == 1 for job in jobs)
    if len(jobs) == 1 or not by_shards or num_processes() > 1:
        for index, job in enumerate(jobs):
            add(index, execute(job, digests, replace=replace, force=force))
        return list(results.values())
    for job in jobs:
        check_job(job)
    left: list[_Begun] = []
    with ExitStack() as all_folders:
        for index, job in enumerate(jobs):
            identity = identify(job, digests)
            if not force and (found := found_finished(job, identity)):
                add(index, found)
                continue
            folder = all_folders.enter_context(ExitStack())
            end = folder.enter_context(locked_folder(job, identity, replace=replace, force=force))
            if end is None:
                add(index, skipped(job))
            else:
                assert isinstance(job.stage, ShardedStage)
                left.append(_Begun(index, job.stage, context_of(job, identity), end, folder))

        def done(number: int, began: float) -> None:
            begun = left[number]
            result = begun.end(begun.stage.finish(begun.context), began)
            begun.folder.close()
            add(begun.index, result)

        if left:
            run_queue([(begun.stage, begun.context) for begun in left], done)
    return [results[index] for index in range(len(jobs))]


@dataclass(frozen=True)
class _Begun:
    """A job in progress."""

    index: int
    stage: ShardedStage
    context: Context
    end: End
    folder: ExitStack
    """Releases the output folder when it is closed."""


def check_job(job: Job) -> None:
    """Check a job as far as possible without reading data.

    Raises:
        UsageError: wrong settings, an unknown engine or rank, or an output path without a name.
    """
    if job.place.name in ("", ".."):
        raise UsageError(
            f"{job.place}: name the output folder itself, such as {job.place / job.stage.folder}"
        )
    job.stage.check()
    engine_of(job.stage)
