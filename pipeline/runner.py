"""Runs one job, unless it is finished: alone, as one of several ranks, or as one process of a distributed stage."""

import time

from sstoken.errors import UsageError
from sstoken.pipeline.job import Job, Result, identify
from sstoken.pipeline.output_folder import engine_of, found_finished, locked_folder, run_stage, skipped
from sstoken.pipeline.ranks import execute_rank
from sstoken.stages.manifest import Digests
from sstoken.stages.processes import is_main_process, num_processes
from sstoken.stages.sharded import ShardedStage


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
