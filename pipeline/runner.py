"""The runner: one stage, from finished input folders to one finished output folder, or to none at all.

A stage works in `<out>.partial`; its manifest is the last file written, then the folder is renamed. A killed
run leaves the partial folder, whose complete shards the next run with the same fingerprint goes on from.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Thread
from typing import Any

from sstoken.errors import NothingLeftError, SstokenError, UsageError
from sstoken.pipeline.engines import make_engine
from sstoken.pipeline.progress import no_progress_bar, progress_bar
from sstoken.pipeline.writing import check_writable, naming_full_disk, one_run_at_a_time
from sstoken.stages import joins, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.checkpoints import read_ahead
from sstoken.stages.files import UNFINISHED, write_atomic
from sstoken.stages.manifest import MANIFEST, Digests, Manifest
from sstoken.stages.processes import is_main_process, num_processes
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.stage import Context, Engine, EngineOptions, Settings, Stage
from sstoken.version import __version__

_FINGERPRINT_FILE = ".fingerprint"
_COMPLETE_WORK = ("part-*.parquet", "*.safetensors")
"""What is worth keeping of a stage that failed."""
_MADE_BY = {"tokens": ("encode", "part"), "masked": ("select", "pull")}
"""Which stages an input can come from; any other one is a checkpoint's scores."""


class State(Enum):
    """How far a step is."""

    FINISHED = "finished"
    RESUMABLE = "interrupted: goes on where it stopped"
    STALE = "settings or inputs changed: runs again"
    MISSING = "not run yet"


@dataclass(frozen=True)
class Result:
    """What a step gave."""

    folder: Path
    metrics: dict[str, Any]
    skipped: bool
    """It was finished already; nothing was done."""


@dataclass(frozen=True)
class Job:
    """A stage bound to its folders."""

    stage: Stage
    inputs: Mapping[str, Path]
    """Finished folders by name."""
    out: Path
    seed: int

    @property
    def place(self) -> Path:
        """Where the output folder stands: `out`, or what it links to. A link stays, and its target is written."""
        return self.out.resolve() if self.out.is_symlink() else self.out

    @property
    def partial(self) -> Path:
        """Where it works: beside its place, so on the same disk."""
        return self.place.with_name(self.place.name + ".partial")


@dataclass(frozen=True)
class _Identity:
    fingerprint: str
    inputs: dict[str, str]
    sources: dict[str, Any]


def state(job: Job, digests: Digests) -> State:
    """How far the job is, without doing anything.

    Raises:
        SstokenError: an input is not finished or cannot be read, or a finished output has lost a file.
    """
    found = _state(job, _identify(job, digests))
    if found is State.FINISHED:
        manifests.finished(job.out, job.stage.folder)
    return found


def superseded(job: Job, digests: Digests) -> Path | None:
    """Unfinished work of other settings or inputs beside the job's output, if there is any."""
    other = _partial_fingerprint(job.partial)
    return job.partial if other and other != _identify(job, digests).fingerprint else None


def execute(
    job: Job,
    digests: Digests,
    *,
    replace: bool = False,
    force: bool = False,
    next_checkpoint: str | None = None,
) -> Result:
    """Run the job unless it is finished.

    Args:
        job: the stage and its folders.
        digests: of the files read from outside.
        replace: where `job.out` is the finished output of other settings, make it anew rather than refuse.
        force: run again even where it is finished.
        next_checkpoint: what the next job loads: read from disk beside this one, if this one has to run.

    Raises:
        UsageError: wrong settings, or an output folder that is not this job's.
        SstokenError: the work failed; a partial folder may remain and the same call goes on from it.
    """
    if job.place.name in ("", ".."):
        raise UsageError(
            f"{job.place}: name the output folder itself, such as {job.place / job.stage.folder}"
        )
    job.stage.check()
    identity = _identify(job, digests)
    if num_processes() > 1 and not job.stage.distributed:
        raise UsageError(
            f"{job.stage.name} cannot be run by several processes (WORLD_SIZE is {num_processes()}); run it without "
            "torchrun, and only anchor with it"
        )
    if not is_main_process():
        # What the folder holds, the main process may be about to change.
        if not job.stage.agree(None):
            return Result(job.out, manifests.finished(job.out, job.stage.folder).metrics, skipped=True)
        return Result(job.out, _run(job, identity), skipped=False)
    if not force and _state(job, identity) is State.FINISHED and not _replaced(job.place).exists():
        # Before the folder is tried: it may be on a disk that takes no files.
        job.stage.agree(False)
        return Result(job.out, manifests.finished(job.out, job.stage.folder).metrics, skipped=True)
    _check_out(job)
    with one_run_at_a_time(job.place):
        _finish_rename(job, identity)
        current = _state(job, identity)
        if current is State.FINISHED and not force:
            finished = manifests.finished(job.out, job.stage.folder)
            job.stage.agree(False)
            return Result(job.out, finished.metrics, skipped=True)
        there = manifests.read_manifest(job.out)
        if there is not None and not (replace or force or _only_sources_changed(job, identity, there)):
            raise UsageError(
                f"{job.out}: holds finished work of other settings or inputs; choose another output folder, or "
                "--force to make it again"
            )
        if there is not None and (own := manifests.unlisted(job.out, there)):
            raise UsageError(
                f"{job.out}: would be made anew, and {own[0]} in it is not of its making ({len(own)} such files); "
                "move them elsewhere first"
            )
        try:
            with naming_full_disk(job.partial):
                _prepare(job, identity, fresh=force)
                start = time.monotonic()
                if next_checkpoint is not None:
                    Thread(target=read_ahead, args=[next_checkpoint], daemon=True).start()
                job.stage.agree(True)
                metrics = _run(job, identity)
                _finish(job, identity, metrics, time.monotonic() - start)
        except Exception as error:
            kept = any(next(job.partial.rglob(pattern), None) for pattern in _COMPLETE_WORK)
            if isinstance(error, NothingLeftError) or not kept:
                _discard(job.partial)
            raise
        return Result(job.out, metrics, skipped=False)


def _identify(job: Job, digests: Digests) -> _Identity:
    inputs = {name: _input(name, folder).fingerprint for name, folder in job.inputs.items()}
    sources = job.stage.sources(digests)
    facts = {
        "stage": job.stage.name,
        "settings": job.stage.fingerprinted(),
        "seed": job.seed if job.stage.seeded else None,
        "inputs": inputs,
        "sources": sources,
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return _Identity(digest[:16], inputs, sources)


def _input(name: str, folder: Path) -> Manifest:
    manifest = manifests.finished(folder, name)
    expected = _MADE_BY.get(name, ("score", "observed"))
    if manifest.stage not in expected:
        raise UsageError(
            f"{folder}: written by {manifest.stage!r}; {name} has to be what {expected[0]!r} wrote"
        )
    # a pulled shard says the run that selected it
    joins.check_one_run(folder, None if manifest.stage == "pull" else manifest.fingerprint)
    return manifest


def _only_sources_changed(job: Job, identity: _Identity, there: Manifest) -> bool:
    """Whether the finished output is of the same call, before what it reads was changed in place."""
    return (
        job.stage.follows_sources
        and there.settings == job.stage.model_dump(mode="json")
        and there.inputs == identity.inputs
        and there.sources != identity.sources
    )


def _state(job: Job, identity: _Identity) -> State:
    finished = manifests.read_manifest(job.out)
    if finished is not None and finished.fingerprint == identity.fingerprint:
        return State.FINISHED
    if _partial_fingerprint(job.partial) == identity.fingerprint:
        return State.RESUMABLE
    return State.MISSING if finished is None else State.STALE


def _partial_fingerprint(partial: Path) -> str | None:
    path = partial / _FINGERPRINT_FILE
    return path.read_text() if path.is_file() else None


def _check_out(job: Job) -> None:
    """Refuse an output folder that cannot be written or is somebody else's."""
    out = job.place
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; the output has to be a folder")
    if out.is_dir():
        made = manifests.read_manifest(out)
        if made is None and set(out.iterdir()) - set(out.glob(".*.lock")):
            raise UsageError(f"{out}: exists and was not written by sstoken; choose another output folder")
        if made is not None and made.stage != job.stage.name:
            raise UsageError(f"{out}: holds what {made.stage!r} wrote; choose another output folder")
    check_writable(out)


def _finish_rename(job: Job, identity: _Identity) -> None:
    """Finish what a run killed between its manifest and its rename had left."""
    written = manifests.read_manifest(job.partial)
    if written is not None and written.fingerprint == identity.fingerprint:
        _promote(job)
    elif written is not None:
        _discard(job.partial)
    replaced = _replaced(job.place)
    if replaced.exists():
        if job.place.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(job.place)


def _prepare(job: Job, identity: _Identity, *, fresh: bool) -> None:
    if fresh or _partial_fingerprint(job.partial) != identity.fingerprint:
        _discard(job.partial)
    job.partial.mkdir(parents=True, exist_ok=True)
    for leftover in list(job.partial.rglob("*" + UNFINISHED)):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    write_atomic(job.partial / _FINGERPRINT_FILE, identity.fingerprint)


def _discard(partial: Path) -> None:
    """Remove unfinished work; what says that it can be used goes first, so that half of it never is."""
    for mark in (_FINGERPRINT_FILE, MANIFEST):
        (partial / mark).unlink(missing_ok=True)
    if partial.exists():
        shutil.rmtree(partial)


def _run(job: Job, identity: _Identity) -> dict[str, Any]:
    context = Context(
        inputs=job.inputs,
        out=job.partial,
        seed=job.seed,
        fingerprint=identity.fingerprint,
        engine=_engine(job.stage),
        progress=progress_bar if is_main_process() else no_progress_bar,
    )
    return job.stage.run(context)


def _engine(stage: Settings) -> Engine:
    options = stage if isinstance(stage, EngineOptions) else EngineOptions()
    if isinstance(stage, ShardedStage):
        return make_engine(options, stage.rank, stage.world_size)
    return make_engine(options)


def _finish(job: Job, identity: _Identity, metrics: dict[str, Any], seconds: float) -> None:
    files = [f for f in manifests.list_files(job.partial) if f.path != _FINGERPRINT_FILE]
    if job.stage.name != "pull":  # whose shards say the run that selected them
        _check_own(job.partial, identity.fingerprint)
    manifests.write_manifest(
        job.partial,
        Manifest(
            stage=job.stage.name,
            fingerprint=identity.fingerprint,
            settings=job.stage.model_dump(mode="json"),
            seed=job.seed,
            inputs=identity.inputs,
            sources=identity.sources,
            version=__version__,
            seconds=round(seconds, 3),
            metrics=metrics,
            files=files,
        ),
    )
    _promote(job)


def _check_own(partial: Path, fingerprint: str) -> None:
    """Refuse shards that a process left over from an attempt with other settings wrote in between."""
    others = [p for p in tables.parts(partial) if tables.read_metadata(p).get(joins.RUN) != fingerprint]
    for path in others:
        path.unlink()
    if others:
        raise SstokenError(
            f"{others[0]}: written meanwhile by a process of an earlier attempt, and removed; end such processes, then "
            "the same command goes on from there"
        )


def _replaced(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")


def _promote(job: Job) -> None:
    (job.partial / _FINGERPRINT_FILE).unlink(missing_ok=True)
    if job.place.exists():
        job.place.rename(_replaced(job.place))
    job.partial.rename(job.place)
    shutil.rmtree(_replaced(job.place), ignore_errors=True)
