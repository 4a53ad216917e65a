"""Work shared by independent ranks, such as the tasks of a SLURM array.

Rank R of W does every W-th task, starting with task R, and leaves an empty completion file. `commit` checks that every
shard is there, sums up and publishes. All ranks work in one folder. A killed rank is simply run again; if two ranks
write the same shard, they write the same bytes.
"""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sstoken.errors import ChangedError, SstokenError, UsageError
from sstoken.pipeline.config import validated
from sstoken.pipeline.disk import naming_full_disk
from sstoken.pipeline.job import (
    Identity,
    Job,
    Result,
    State,
    check_unchanged,
    identify,
    linked,
    partial_fingerprint,
    state_of,
)
from sstoken.pipeline.locks import forget_ranks, one_run_at_a_time, ranks_at_work
from sstoken.pipeline.output_folder import (
    check_out,
    context_of,
    locked_folder,
    prepare,
    recover,
    run_stage,
    skipped,
)
from sstoken.stages import manifest as manifests
from sstoken.stages import plain_json, storage
from sstoken.stages.manifest import MANIFEST, Digests
from sstoken.stages.sharded import ShardedStage

JOB_FILE = ".job.json"
"""In a partial folder: the job that its ranks share."""
COMPLETIONS = "completions"
"""Folder, in a partial folder, with an empty file for each finished rank."""
_SOON = 60.0
"""Seconds that a rank waits for another one to prepare the folder."""


class _Record(BaseModel):
    """What a job's ranks leave for `commit`."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    fingerprint: str


def execute_rank(job: Job, stage: ShardedStage, identity: Identity) -> Result:
    """Do this rank's share of the job, unless it is done already.

    Raises:
        UsageError: the output folder is not this job's.
        SstokenError: the work failed, so that the same call resumes it, or ranks with other settings are at work.
    """
    part = f"rank-{stage.rank:05d}-of-{stage.world_size:05d}"
    metrics = {"rank": stage.rank, "world_size": stage.world_size}
    if state_of(job, identity) is State.FINISHED:
        return skipped(job)
    check_out(job)
    disk = storage.of(job.partial).on_this_machine(job.partial)
    with naming_full_disk(disk), one_run_at_a_time(job.place, part, fingerprint=identity.fingerprint):
        with one_run_at_a_time(job.place, wait=_SOON):
            recover(job, identity)
            if partial_fingerprint(job.partial) not in (None, identity.fingerprint) and (
                others := [other for other in ranks_at_work(job.place) if other != part]
            ):
                raise SstokenError(
                    f"{job.out}: {others[0]} is at work with other settings; wait for it to end"
                )
            prepare(job, identity, fresh=False)
            storage.of(job.partial).put_if_absent(job.partial / JOB_FILE, _record(job, identity))
        run_stage(job, identity)
        _check_unchanged(job, stage, identity)
        done = job.partial / COMPLETIONS / part.removeprefix("rank-")
        storage.of(done).make_folder(done.parent)
        storage.of(done).put_if_absent(done, b"")
    return Result(job.partial, metrics, skipped=False)


def _check_unchanged(job: Job, stage: ShardedStage, identity: Identity) -> None:
    """Delete this rank's shards if what it read was changed meanwhile, and say so."""
    try:
        check_unchanged(job, identity)
    except ChangedError:
        outputs = stage.outputs(context_of(job, identity))
        for output in outputs[stage.rank :: stage.world_size]:
            storage.of(output).delete(output)
        raise


def commit(out: Path) -> dict[str, Result]:
    """Finish the work of all ranks: in `out`, or in each folder directly below it.

    Raises:
        UsageError: no rank worked there.
        SstokenError: a shard is missing, a rank is still at work, or the ranks' inputs have changed.
    """
    below = out.iterdir() if out.is_dir() else ()
    known = {
        _place(folder) for folder in below if any((folder / mark).is_file() for mark in (JOB_FILE, MANIFEST))
    }
    own = _workplace(out).is_dir() or (out / MANIFEST).is_file() or not known
    return {place.name: _commit(place) for place in ([out] if own else sorted(known))}


def _commit(out: Path) -> Result:
    record = _read_record(_workplace(out) / JOB_FILE)
    if record is None:
        done = manifests.read_manifest(out)
        if done is None:
            raise UsageError(f"{out}: no rank has worked on it; run the ranks first, with the same --out")
        return Result(out, done.metrics, skipped=True)
    job = _job(out, record)
    identity = identify(job, Digests())
    if identity.fingerprint != record.fingerprint:
        raise SstokenError(f"{out}: settings or inputs have changed since the ranks began; run them again")
    if others := ranks_at_work(job.place):
        raise SstokenError(f"{out}: {others[0]} is still at work; commit when all have ended")
    with locked_folder(job, identity, replace=True, force=False) as end:
        if end is None:
            return skipped(job)
        start = time.monotonic()
        assert isinstance(job.stage, ShardedStage)
        context = context_of(job, identity)
        _check_complete(job, job.stage, job.stage.outputs(context))
        result = end(job.stage.finish(context), start)
        forget_ranks(job.place)
    return result


def _check_complete(job: Job, stage: ShardedStage, outputs: list[Path]) -> None:
    """Delete damaged shards, then refuse to commit while any is missing; say which ranks to run again."""
    for file in outputs:
        if file.exists() and not stage.is_done(file):
            storage.of(file).delete(file)
    missing = [index for index, file in enumerate(outputs) if not file.is_file()]
    if not missing:
        return
    done = [file.name for file in storage.of(job.partial).list(job.partial / COMPLETIONS)]
    sizes = {int(name.rpartition("-")[2]) for name in done}
    ranks = ""
    if len(sizes) == 1:
        (world_size,) = sizes
        ranks = f" (rank {', '.join(map(str, sorted({index % world_size for index in missing})))} of {world_size})"
    names = ", ".join(outputs[index].name for index in missing[:3]) + (", ..." if len(missing) > 3 else "")
    raise SstokenError(
        f"{job.out}: {len(missing)} of {len(outputs)} shards are missing or damaged: {names}; run their ranks again"
        f"{ranks}"
    )


def _workplace(out: Path) -> Path:
    place = linked(out)
    return storage.of(place).workplace(place)


def _place(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(".partial"))


def _record(job: Job, identity: Identity) -> bytes:
    record = _Record(
        stage=job.stage.name,
        settings=job.stage.model_dump(mode="json", exclude_unset=True, exclude={"rank", "world_size"}),
        inputs={name: str(folder.absolute()) for name, folder in job.inputs.items()},
        seed=job.seed,
        fingerprint=identity.fingerprint,
    )
    return record.model_dump_json(indent=1).encode()


def _read_record(file: Path) -> _Record | None:
    if not file.is_file():
        return None
    with storage.of(file).open(file) as opened:
        try:
            record = _Record.model_validate(plain_json.parse(opened.read()))
            _stage(record.stage)
        except (ValueError, ImportError, StopIteration):
            raise SstokenError(f"{file}: damaged; delete it and run one of the ranks again") from None
    return record


def _job(out: Path, record: _Record) -> Job:
    inputs = {name: storage.address(folder) for name, folder in record.inputs.items()}
    stage = validated(_stage(record.stage), record.settings, str(_workplace(out) / JOB_FILE))
    return Job(stage, inputs, out, record.seed)


def _stage(name: str) -> type[ShardedStage]:
    """The class of a stage, from the file of its name."""
    module = import_module(f"sstoken.stages.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, ShardedStage)]
    return next(c for c in classes if c.__module__ == module.__name__ and getattr(c, "name", None) == name)
