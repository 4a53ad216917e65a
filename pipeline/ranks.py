"""Work shared by ranks that know nothing of each other, such as the tasks of a SLURM array.

Rank R of W does every W-th task, beginning with its own number, and leaves an empty completion file. `commit` checks
that every shard is there, sums up and publishes. All work in one folder: a rank that was killed is run again, and so
is a shard that two ranks make, with the same bytes.
"""

import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.job import Identity, Job, Result, State, identify, partial_fingerprint, state_of
from sstoken.pipeline.runner import (
    check_out,
    context_of,
    finish,
    keeping_what_is_complete,
    prepare,
    recover,
    run_stage,
)
from sstoken.pipeline.writing import RANKS, at_work, forget_parts, naming_full_disk, one_run_at_a_time
from sstoken.stages import manifest as manifests
from sstoken.stages import storage
from sstoken.stages.manifest import MANIFEST, Digests
from sstoken.stages.sharded import ShardedStage

JOB_FILE = ".job.json"
"""In a partial folder: the job that its ranks do."""
COMPLETIONS = "completions"
"""Folder, in a partial folder, with an empty file for each finished rank."""
_STAGES = {
    "encode": "sstoken.stages.encode:Encode",
    "score": "sstoken.stages.score:Score",
    "critical": "sstoken.stages.critical:Critical",
    "part": "sstoken.stages.part:Part",
    "select": "sstoken.stages.select:Select",
    "export": "sstoken.stages.export:Export",
}
_SOON = 60.0
"""Seconds that a rank waits for another one to prepare the folder."""


def execute_rank(job: Job, stage: ShardedStage, identity: Identity) -> Result:
    """Do this rank's share of the job unless it is done.

    Raises:
        UsageError: an output folder that is not this job's.
        SstokenError: the work failed, or other settings are being worked on; the same call goes on.
    """
    part = f"rank-{stage.rank:05d}-of-{stage.world_size:05d}"
    metrics = {"rank": stage.rank, "world_size": stage.world_size}
    if state_of(job, identity) is State.FINISHED:
        return Result(job.out, manifests.finished(job.out, stage.folder).metrics, skipped=True)
    check_out(job)
    disk = storage.of(job.partial).on_this_machine(job.partial)
    with one_run_at_a_time(job.place, part, fingerprint=identity.fingerprint):
        with one_run_at_a_time(job.place, wait=_SOON):
            recover(job, identity)
            if partial_fingerprint(job.partial) not in (None, identity.fingerprint) and (
                others := [other for other in at_work(job.place, RANKS) if other != part]
            ):
                raise SstokenError(
                    f"{job.out}: {others[0]} works on it with other settings; wait for it to end"
                )
            with naming_full_disk(disk):
                prepare(job, identity, fresh=False)
                storage.of(job.partial).put_if_absent(job.partial / JOB_FILE, _record(job, identity))
        done = job.partial / COMPLETIONS / part.removeprefix("rank-")
        with naming_full_disk(disk):
            run_stage(job, identity)
            storage.of(done).make_folder(done.parent)
            storage.of(done).put_if_absent(done, b"")
    return Result(job.partial, metrics, skipped=False)


def commit(out: Path) -> dict[str, Result]:
    """Finish the work of all ranks: in `out`, or in each folder directly below it.

    Raises:
        UsageError: no rank worked there.
        SstokenError: a shard is missing, a rank is at work, or what the ranks read has changed since.
    """
    below = out.iterdir() if out.is_dir() else ()
    known = {
        _place(folder) for folder in below if any((folder / mark).is_file() for mark in (JOB_FILE, MANIFEST))
    }
    own = _workplace(out).is_dir() or (out / MANIFEST).is_file() or not known
    return {place.name: _commit(place) for place in ([out] if own else sorted(known))}


def _commit(out: Path) -> Result:
    partial = _workplace(out)
    record = _read_record(partial / JOB_FILE)
    if record is None:
        done = manifests.read_manifest(out)
        if done is None:
            raise UsageError(f"{out}: no rank has worked on it; run the ranks first, with the same --out")
        return Result(out, done.metrics, skipped=True)
    job = _job(out, record)
    identity = identify(job, Digests())
    if identity.fingerprint != record["fingerprint"]:
        raise SstokenError(f"{out}: settings or inputs have changed since the ranks began; run them again")
    with one_run_at_a_time(job.place, fingerprint=identity.fingerprint) as check_lease:
        if others := at_work(job.place, RANKS):
            raise SstokenError(f"{out}: {others[0]} is still at work; commit when all have ended")
        recover(job, identity)
        if state_of(job, identity) is State.FINISHED:
            return Result(out, manifests.finished(out, job.stage.folder).metrics, skipped=True)
        there = manifests.read_manifest(out)
        with keeping_what_is_complete(job):
            start = time.monotonic()
            storage.of(partial).sweep(partial)
            context = context_of(job, identity)
            assert isinstance(job.stage, ShardedStage)
            _check_complete(out, partial, job.stage.outputs(context))
            metrics = job.stage.finish(context)
            check_lease()
            finish(job, identity, metrics, time.monotonic() - start, there)
        forget_parts(job.place, RANKS)
    return Result(out, metrics, skipped=False)


def _check_complete(out: Path, partial: Path, outputs: list[Path]) -> None:
    """Refuse work of which a shard is missing; say which ranks to run again."""
    missing = [index for index, file in enumerate(outputs) if storage.of(file).size(file) is None]
    if not missing:
        return
    done = [file.name for file in storage.of(partial).list(partial / COMPLETIONS)]
    sizes = {int(name.rpartition("-")[2]) for name in done}
    ranks = ""
    if len(sizes) == 1:
        (world_size,) = sizes
        ranks = f" (rank {', '.join(map(str, sorted({index % world_size for index in missing})))} of {world_size})"
    names = ", ".join(outputs[index].name for index in missing[:3]) + (", ..." if len(missing) > 3 else "")
    raise SstokenError(
        f"{out}: {len(missing)} of {len(outputs)} shards are missing: {names}; run their ranks again{ranks}"
    )


def _workplace(out: Path) -> Path:
    place = out.resolve() if out.is_symlink() else out
    return storage.of(place).workplace(place)


def _place(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(".partial"))


def _record(job: Job, identity: Identity) -> bytes:
    left_out = {"rank", "world_size"}
    record = {
        "stage": job.stage.name,
        "settings": job.stage.model_dump(mode="json", exclude_unset=True, exclude=left_out),
        "inputs": {name: str(folder.absolute()) for name, folder in job.inputs.items()},
        "seed": job.seed,
        "fingerprint": identity.fingerprint,
    }
    return json.dumps(record, indent=1).encode()


def _read_record(file: Path) -> dict[str, Any] | None:
    if storage.of(file).size(file) is None:
        return None
    with storage.of(file).open(file) as opened:
        try:
            record: dict[str, Any] = json.load(opened)
        except ValueError:
            raise SstokenError(f"{file}: damaged; delete it and run one of the ranks again") from None
    return record


def _job(out: Path, record: dict[str, Any]) -> Job:
    module, _, name = _STAGES[record["stage"]].partition(":")
    stage = getattr(import_module(module), name).model_validate(record["settings"])
    return Job(
        stage,
        {name: storage.address(folder) for name, folder in record["inputs"].items()},
        out,
        record["seed"],
    )
