"""A job: a stage with its folders, its state, and how a finished output differs from what it would write now."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sstoken.errors import ChangedError, UsageError
from sstoken.pipeline.locks import is_at_work
from sstoken.pipeline.plain_yaml import short
from sstoken.pipeline.sections import MASKED, TOKENS
from sstoken.stages import folders, joins, storage
from sstoken.stages import manifest as manifests
from sstoken.stages.manifest import Digests, Manifest
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY, EngineOptions, Stage
from sstoken.version import __version__

FINGERPRINT_FILE = ".fingerprint"
_MADE_BY = {"tokens": TOKENS, "masked": (*MASKED, "pull")}
"""The stages that can write an input; all other inputs are a checkpoint's scores."""


class State(Enum):
    """State of a step."""

    FINISHED = "finished"
    RESUMABLE = "interrupted: goes on where it stopped"
    STALE = "settings or inputs changed: runs again"
    MISSING = "not run yet"


@dataclass(frozen=True)
class Result:
    """The result of a step."""

    folder: Path
    metrics: dict[str, Any]
    skipped: bool
    """Whether it was finished already, so that nothing was done."""
    replaced: tuple[str, ...] = ()
    """How this output differs from the one that it replaced: `select.rho 0.6 -> 0.4`."""
    superseded: Path | None = None
    """The partial folder beside a finished output, if it holds work that these settings never resume."""


def linked(out: Path) -> Path:
    """Return the target of an output folder that is a link, else the folder. A dangling link is no error here."""
    return Path(os.path.realpath(out)) if out.is_symlink() else out


@dataclass(frozen=True)
class Job:
    """A stage with its input and output folders."""

    stage: Stage
    inputs: Mapping[str, Path]
    """Finished folders by name."""
    out: Path
    seed: int

    @property
    def place(self) -> Path:
        """The folder to write: `out`, or the target if `out` is a link, which stays."""
        return linked(self.out)

    @property
    def partial(self) -> Path:
        """The partial folder in which it works."""
        return storage.of(self.place).workplace(self.place)


@dataclass(frozen=True)
class Identity:
    """Everything that determines a job's output."""

    fingerprint: str
    inputs: dict[str, str]
    sources: dict[str, Any]
    read: Mapping[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Stamp and digest of each file among the sources."""


def state(job: Job, digests: Digests) -> State:
    """Determine the job's state, without changing anything.

    Raises:
        SstokenError: an input is not finished or cannot be read, or a file of the finished output is missing.
    """
    found = state_of(job, identify(job, digests))
    if found is State.FINISHED:
        manifests.finished(job.out, job.stage.folder)
    return found


def superseded(job: Job, identity: Identity) -> Path | None:
    """The partial folder beside the job's output, if the job would not resume it and no run is at work on it.

    It holds work with other settings or inputs, or that of a forced run of a finished job.
    """
    if not job.partial.exists() or is_at_work(job.place):
        return None
    left = partial_fingerprint(job.partial)
    resumed = left == identity.fingerprint and state_of(job, identity) is not State.FINISHED
    return None if resumed else job.partial


def identify(job: Job, digests: Digests) -> Identity:
    """Collect what determines the job's output."""
    inputs = {name: _input(name, folder).fingerprint for name, folder in job.inputs.items()}
    read = {}

    def digest(path: Path) -> str:
        stamp = storage.stamp(path)  # before it is read
        found = digests(path)
        read[path] = stamp, found
        return found

    sources = job.stage.sources(digest)
    facts = {
        "stage": job.stage.name,
        "settings": job.stage.fingerprinted(),
        "seed": job.seed if job.stage.seeded else None,
        "inputs": inputs,
        "sources": sources,
        "version": __version__,
    }
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return Identity(fingerprint[:16], inputs, sources, read)


def check_unchanged(job: Job, identity: Identity) -> None:
    """Refuse inputs and source files that changed since `identify`. Deleted files pass.

    Raises:
        ChangedError: names the file or folder.
    """
    instead = f"what {job.stage.name!r} made of it is dropped; run the same command again"
    for path, (stamp, digest) in identity.read.items():
        with suppress(FileNotFoundError):
            if storage.stamp(path) != stamp and folders.hash_file(path) != digest:
                raise ChangedError(f"{path}: changed while it was read; {instead}")
    for name, folder in job.inputs.items():
        there = manifests.read_manifest(folder)
        if there is None or there.fingerprint != identity.inputs[name]:
            raise ChangedError(f"{folder}: replaced while it was read; {instead}")


def _input(name: str, folder: Path) -> Manifest:
    manifest = manifests.finished(folder, name)
    expected = _MADE_BY.get(name, ("score", "observed", "critical"))
    if manifest.stage not in expected:
        raise UsageError(
            f"{folder}: written by {manifest.stage!r}; {name} has to be what {expected[0]!r} wrote"
        )
    # a pulled shard carries the fingerprint of the run that selected it
    joins.check_one_run(folder, None if manifest.stage == "pull" else manifest.fingerprint)
    return manifest


def only_sources_changed(job: Job, identity: Identity, there: Manifest) -> bool:
    """Whether the finished output came from the same call, and only the files that it read were edited since."""
    return (
        job.stage.follows_sources
        and _without_engine(there.settings) == settings_of(job.stage)
        and there.inputs == identity.inputs
        and there.sources != identity.sources
    )


def state_of(job: Job, identity: Identity) -> State:
    """Determine the job's state from manifest and fingerprint alone."""
    finished = manifests.read_manifest(job.out)
    if finished is not None and finished.fingerprint == identity.fingerprint:
        return State.FINISHED
    if partial_fingerprint(job.partial) == identity.fingerprint:
        return State.RESUMABLE
    return State.MISSING if finished is None else State.STALE


def partial_fingerprint(partial: Path) -> str | None:
    """The fingerprint of a partial folder; None if there is none."""
    path = partial / FINGERPRINT_FILE
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


_ENGINE = {*EngineOptions.model_fields, "rank", "world_size"}


def settings_of(stage: Stage) -> dict[str, Any]:
    """The stage's settings for its manifest, without the engine's, which never change the output."""
    return _without_engine(stage.model_dump(mode="json"))


def _without_engine(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _ENGINE}


def changes(step: str, job: Job, digests: Callable[[Path], str]) -> tuple[str, ...]:
    """List every setting and input that differs from the finished output's, such as `select.rho 0.6 -> 0.4`.

    The job's inputs have to be finished. `step` begins each line.
    """
    there = manifests.read_manifest(job.out)
    if there is None or there.stage != job.stage.name:
        return ()
    return (
        *_changed_settings(step, job, there),
        *_changed_inputs(step, job, there),
        *_changed_sources(step, job, there, digests),
        *([f"sstoken {there.version} -> {__version__}"] if there.version != __version__ else []),
    )


def _changed_settings(step: str, job: Job, there: Manifest) -> Iterator[str]:
    now = job.stage.model_dump(mode="json")
    for name, info in type(job.stage).model_fields.items():
        if any(mark in (SPEED_ONLY, BY_CONTENT) for mark in info.metadata):
            continue
        default = info.get_default(call_default_factory=True)
        before = there.settings.get(name, json.loads(json.dumps(default, default=str)))
        if before != now[name]:
            yield f"{step}.{name} {_shown(before)} -> {_shown(now[name])}"
    if job.stage.seeded and there.seed != job.seed:
        yield f"seed {there.seed} -> {job.seed}"


def _changed_inputs(step: str, job: Job, there: Manifest) -> Iterator[str]:
    for name in sorted({*job.inputs, *there.inputs}):
        manifest = manifests.read_manifest(job.inputs[name]) if name in job.inputs else None
        now = manifest.fingerprint if manifest is not None else None
        if now != there.inputs.get(name):
            place = f", now {job.inputs[name].name}" if name in job.inputs else ", now none"
            yield f"{step} reads another input {name}{place}"


def _changed_sources(step: str, job: Job, there: Manifest, digests: Callable[[Path], str]) -> Iterator[str]:
    now = json.loads(json.dumps(job.stage.sources(digests), default=str))
    for name in sorted({*now, *there.sources}):
        if now.get(name) != there.sources.get(name):
            before, after = there.settings.get(name), getattr(job.stage, name, None)
            named = f" {_shown(before)} -> {_shown(after)}" if before != after else ", whose content changed"
            yield f"{step}.{name}{named}"


def _shown(value: Any) -> str:
    return short(value) if isinstance(value, (str, dict, list)) else str(value).lower()
