"""A job's output folder: locked, prepared, worked in, and published as a whole or not at all.

A stage works in `<out>.partial`. The manifest is the last file written; then the folder is renamed. A killed run leaves
the partial folder, and the next run with the same fingerprint reuses its complete shards.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as with_other
from functools import partial
from pathlib import Path
from typing import Any

from sstoken.errors import ChangedError, NothingLeftError, QuarantinedError, SstokenError, UsageError
from sstoken.pipeline import rates
from sstoken.pipeline.disk import check_not_inside, check_writable, naming_full_disk
from sstoken.pipeline.engines import make_engine
from sstoken.pipeline.job import (
    FINGERPRINT_FILE,
    Identity,
    Job,
    Result,
    State,
    changes,
    check_unchanged,
    only_sources_changed,
    partial_fingerprint,
    settings_of,
    state_of,
    superseded,
)
from sstoken.pipeline.locks import forget_dead_run, one_run_at_a_time, ranks_at_work
from sstoken.pipeline.progress import progress_bar
from sstoken.pipeline.saying import say
from sstoken.stages import joins, sharded, storage, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.manifest import Manifest
from sstoken.stages.processes import is_main_process
from sstoken.stages.shard_border import StoppedError
from sstoken.stages.sharded import QUARANTINE, ShardedStage
from sstoken.stages.stage import Context, Engine, EngineOptions, Settings, no_progress_bar
from sstoken.stages.storage import write_atomic
from sstoken.version import __version__

_COMPLETE_WORK = ("part-*.parquet", "*.safetensors")
"""A failed stage's partial folder is kept if it has any of these."""
OF_UNFINISHED_WORK = (FINGERPRINT_FILE, ".job.json", "completions", sharded.TOOK)
"""Files and folders that publishing removes."""

End = Callable[[dict[str, Any], float], Result]
"""`end(metrics, start)` publishes the work that began at `start` (`time.monotonic`)."""


@contextmanager
def locked_folder(job: Job, identity: Identity, *, replace: bool, force: bool) -> Iterator[End | None]:
    """Lock the job's output folder for this process, and prepare its partial folder.

    Yields:
        The function that publishes the work; None if the job turns out to be finished.

    Raises:
        UsageError, SstokenError: the folder is not this job's, or another process is at work on it.
    """
    check_out(job)
    with one_run_at_a_time(job.place, fingerprint=identity.fingerprint) as check_lease:
        recover(job, identity)
        if state_of(job, identity) is State.FINISHED and not force:
            yield None
            return
        there = manifests.read_manifest(job.out)
        if there is not None and not (replace or force or only_sources_changed(job, identity, there)):
            changed = "; ".join(changes(job.stage.name, job, lambda path: identity.read[path][1]))
            raise UsageError(
                f"{job.out}: holds finished work of other settings or inputs{changed and f' ({changed})'}; choose "
                "another output folder, or --force to make it again"
            )
        if there is not None and (own := manifests.unlisted(job.out, there)):
            raise UsageError(
                f"{job.out}: would be replaced, but {own[0]} in it was not written by sstoken ({len(own)} such files); "
                "move them elsewhere first"
            )
        if others := ranks_at_work(job.place):
            raise SstokenError(f"{job.out}: {others[0]} is writing it; wait for the ranks, then `commit`")

        def end(metrics: dict[str, Any], began: float) -> Result:
            if not job.stage.reads_once:
                check_unchanged(job, identity)
            check_lease()
            seconds = time.monotonic() - began
            _finish(job, identity, metrics, seconds, there)
            if from_the_start:
                rates.remember(job, seconds)
            return Result(job.out, metrics, skipped=False)

        from_the_start = force or partial_fingerprint(job.partial) != identity.fingerprint
        with _keeping_complete_files(job):
            prepare(job, identity, fresh=force)
            storage.of(job.partial).sweep(job.partial)
            yield end


def found_finished(job: Job, identity: Identity) -> Result | None:
    """Return a finished job's result, with what killed runs left beside it; None: there is work to do.

    Does not test the folder for writing: it may be on a read-only disk.
    """
    if state_of(job, identity) is not State.FINISHED or storage.of(job.place).is_interrupted(job.place):
        return None
    forget_dead_run(job.place)
    return with_other(skipped(job), superseded=superseded(job, identity))


def skipped(job: Job) -> Result:
    """The result of a job that was finished before."""
    return Result(job.out, manifests.finished(job.out, job.stage.folder).metrics, skipped=True)


@contextmanager
def _keeping_complete_files(job: Job) -> Iterator[None]:
    """If the work fails, delete the partial folder, unless it has complete files to resume from."""
    try:
        with naming_full_disk(storage.of(job.partial).on_this_machine(job.partial)):
            yield
    except Exception as error:
        if isinstance(error, (QuarantinedError, StoppedError)):
            raise
        if isinstance(error, (NothingLeftError, ChangedError)) or not _holds_work(job.partial):
            storage.of(job.partial).delete(job.partial)
        raise


def _holds_work(partial: Path) -> bool:
    return any(next(partial.rglob(pattern), None) for pattern in _COMPLETE_WORK)


def check_out(job: Job) -> None:
    """Refuse an output folder that cannot be written, or that this stage did not write."""
    out = job.place
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; the output has to be a folder")
    check_not_inside(out)
    if out.is_dir():
        made = manifests.read_manifest(out)
        others = set(out.iterdir()) - set(out.glob(".*.lock")) - set(out.glob(".*.lease"))
        if made is None and others and out / storage.CLAIM not in others:
            raise UsageError(f"{out}: exists and was not written by sstoken; choose another output folder")
        if made is not None and made.stage != job.stage.name:
            raise UsageError(f"{out}: holds what {made.stage!r} wrote; choose another output folder")
    check_writable(out)


def recover(job: Job, identity: Identity) -> None:
    """Publish the work of a run that was killed between writing its manifest and renaming its folder."""
    storage.of(job.place).recover(job.place)
    written = manifests.read_manifest(job.partial)
    if written is not None and written.fingerprint == identity.fingerprint:
        _publish(job)
    elif written is not None:
        storage.of(job.partial).delete(job.partial)


def prepare(job: Job, identity: Identity, *, fresh: bool) -> None:
    """Create the job's partial folder; unfinished work of other settings is deleted."""
    store = storage.of(job.partial)
    left = partial_fingerprint(job.partial)
    if left not in (None, identity.fingerprint) and _holds_work(job.partial):
        say(f"note: {job.partial}: unfinished work of other settings or inputs is deleted", err=True)
    if fresh or left != identity.fingerprint:
        store.delete(job.partial)
    store.make_folder(job.partial)
    write_atomic(job.partial / FINGERPRINT_FILE, identity.fingerprint)


def run_stage(job: Job, identity: Identity) -> dict[str, Any]:
    """Run the stage in its partial folder; return its metrics."""
    context = context_of(job, identity)
    if isinstance(job.stage, ShardedStage):
        return job.stage.run(context)
    store = storage.of(context.out)
    with store.local_work(context.out) as out:  # libraries write these stages' files
        keep = partial(store.keep_work, out, context.out)
        return job.stage.run(with_other(context, out=out, keep=keep))


def context_of(job: Job, identity: Identity) -> Context:
    """Make the stage's context."""
    return Context(
        inputs=job.inputs,
        out=job.partial,
        seed=job.seed,
        fingerprint=identity.fingerprint,
        engine=engine_of(job.stage),
        unchanged=partial(check_unchanged, job, identity),
        progress=partial(progress_bar, faster=job.stage.faster) if is_main_process() else no_progress_bar,
    )


def engine_of(stage: Settings) -> Engine:
    """Make the engine that the stage's options name."""
    options = stage if isinstance(stage, EngineOptions) else EngineOptions()
    return make_engine(options, getattr(stage, "rank", 0), getattr(stage, "world_size", 1))


def _finish(
    job: Job, identity: Identity, metrics: dict[str, Any], seconds: float, there: Manifest | None
) -> None:
    """Write the manifest and publish, replacing `there`, the output when the work began.

    Raises:
        SstokenError: another run has published in the meantime.
    """
    files = [
        file
        for file in manifests.list_files(job.partial)
        if file.path.partition("/")[0] not in OF_UNFINISHED_WORK and not file.path.startswith(QUARANTINE)
    ]
    if job.stage.name != "pull":  # pulled shards carry the fingerprint of the run that selected them
        _check_own(job.partial, identity.fingerprint)
    manifests.write_manifest(
        job.partial,
        Manifest(
            stage=job.stage.name,
            fingerprint=identity.fingerprint,
            settings=settings_of(job.stage),
            seed=job.seed,
            inputs=identity.inputs,
            sources=identity.sources,
            version=__version__,
            seconds=round(seconds, 3),
            took=sharded.time_taken(job.partial),
            metrics=metrics,
            files=files,
        ),
    )
    now = manifests.read_manifest(job.out)
    if (now and now.digest) != (there and there.digest):
        storage.of(job.partial).delete(job.partial)
        raise SstokenError(f"{job.out}: another run finished it first; its output stands, not this one's")
    _publish(job)


def _check_own(partial: Path, fingerprint: str) -> None:
    """Delete and refuse shards that a process left over from another attempt wrote in the meantime."""
    others = [p for p in tables.parts(partial) if tables.read_metadata(p).get(joins.RUN) != fingerprint]
    for path in others:
        storage.of(path).delete(path)
    if others:
        raise SstokenError(
            f"{others[0]}: written meanwhile by a process of an earlier attempt, and removed; end such processes and "
            "run the same command again"
        )


def _publish(job: Job) -> None:
    """Move finished work to its place."""
    store = storage.of(job.partial)
    for name in OF_UNFINISHED_WORK:
        store.delete(job.partial / name)
    for record in job.partial.glob(f"{QUARANTINE}*.jsonl"):
        store.delete(record)
    store.publish(job.place)
