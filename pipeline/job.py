"""A job: a stage bound to its folders, and how far it is."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sstoken.errors import UsageError
from sstoken.stages import joins, storage
from sstoken.stages import manifest as manifests
from sstoken.stages.manifest import Digests, Manifest
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.stage import EngineOptions, Stage
from sstoken.version import __version__

FINGERPRINT_FILE = ".fingerprint"
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
    replaced: tuple[str, ...] = ()
    """How what stood there before differed, where a run made its step anew: `select.rho 0.6 -> 0.4`."""


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
        """Where it works."""
        return storage.of(self.place).workplace(self.place)


@dataclass(frozen=True)
class Identity:
    """What decides a job's output."""

    fingerprint: str
    inputs: dict[str, str]
    sources: dict[str, Any]


def state(job: Job, digests: Digests) -> State:
    """How far the job is, without doing anything.

    Raises:
        SstokenError: an input is not finished or cannot be read, or a finished output has lost a file.
    """
    found = state_of(job, identify(job, digests))
    if found is State.FINISHED:
        manifests.finished(job.out, job.stage.folder)
    return found


def superseded(job: Job, digests: Digests) -> Path | None:
    """Unfinished work of other settings or inputs beside the job's output, if there is any."""
    other = partial_fingerprint(job.partial)
    return job.partial if other and other != identify(job, digests).fingerprint else None


def identify(job: Job, digests: Digests) -> Identity:
    """Read what decides the job's output."""
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
    return Identity(digest[:16], inputs, sources)


def _input(name: str, folder: Path) -> Manifest:
    manifest = manifests.finished(folder, name)
    expected = _MADE_BY.get(name, ("score", "observed", "critical"))
    if manifest.stage not in expected:
        raise UsageError(
            f"{folder}: written by {manifest.stage!r}; {name} has to be what {expected[0]!r} wrote"
        )
    # a pulled shard says the run that selected it
    joins.check_one_run(folder, None if manifest.stage == "pull" else manifest.fingerprint)
    return manifest


def only_sources_changed(job: Job, identity: Identity, there: Manifest) -> bool:
    """Whether the finished output is of the same call, before what it reads was changed in place."""
    return (
        job.stage.follows_sources
        and _without_engine(there.settings) == settings_of(job.stage)
        and there.inputs == identity.inputs
        and there.sources != identity.sources
    )


def state_of(job: Job, identity: Identity) -> State:
    """How far the job of that identity is; looks at the marks alone."""
    finished = manifests.read_manifest(job.out)
    if finished is not None and finished.fingerprint == identity.fingerprint:
        return State.FINISHED
    if partial_fingerprint(job.partial) == identity.fingerprint:
        return State.RESUMABLE
    return State.MISSING if finished is None else State.STALE


def partial_fingerprint(partial: Path) -> str | None:
    """The fingerprint of unfinished work; None where there is none."""
    path = partial / FINGERPRINT_FILE
    return path.read_text() if path.is_file() else None


_ENGINE = {*EngineOptions.model_fields, "rank", "world_size"}


def settings_of(stage: Stage) -> dict[str, Any]:
    """The stage's fields, for its manifest: without those of the engine, which never change what is written."""
    return _without_engine(stage.model_dump(mode="json"))


def _without_engine(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _ENGINE}


def num_ranks(job: Job) -> int:
    """Parts that the job's work is cut into."""
    return job.stage.world_size if isinstance(job.stage, ShardedStage) else 1
