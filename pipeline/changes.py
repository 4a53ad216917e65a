"""Differences between a finished output and what its job would write now, in words."""

import json
from collections.abc import Iterator
from typing import Any

from sstoken.pipeline.job import Job
from sstoken.pipeline.plain_yaml import short
from sstoken.stages import manifest as manifests
from sstoken.stages.manifest import Digests, Manifest
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY
from sstoken.version import __version__


def changes(step: str, job: Job, digests: Digests) -> tuple[str, ...]:
    """List every setting and input that differs from the finished output's, such as `select.rho 0.6 -> 0.4`.

    Args:
        step: the step's name, with which lines begin.
        job: the step's job; its inputs are finished.
        digests: cache of file digests.

    Returns:
        One line per difference; empty if there is no finished output, or if it is up to date.
    """
    there = manifests.read_manifest(job.out)
    if there is None or there.stage != job.stage.name:
        return ()
    return (
        *_settings(step, job, there),
        *_inputs(step, job, there),
        *_sources(step, job, there, digests),
        *([f"sstoken {there.version} -> {__version__}"] if there.version != __version__ else []),
    )


def _settings(step: str, job: Job, there: Manifest) -> Iterator[str]:
    now = job.stage.model_dump(mode="json")
    for name, field in type(job.stage).model_fields.items():
        if any(mark in (SPEED_ONLY, BY_CONTENT) for mark in field.metadata):
            continue
        default = field.get_default(call_default_factory=True)
        before = there.settings.get(name, json.loads(json.dumps(default, default=str)))
        if before != now[name]:
            yield f"{step}.{name} {_shown(before)} -> {_shown(now[name])}"
    if job.stage.seeded and there.seed != job.seed:
        yield f"seed {there.seed} -> {job.seed}"


def _inputs(step: str, job: Job, there: Manifest) -> Iterator[str]:
    for name in sorted({*job.inputs, *there.inputs}):
        manifest = manifests.read_manifest(job.inputs[name]) if name in job.inputs else None
        now = manifest.fingerprint if manifest is not None else None
        if now != there.inputs.get(name):
            place = f", now {job.inputs[name].name}" if name in job.inputs else ", now none"
            yield f"{step} reads another input {name}{place}"


def _sources(step: str, job: Job, there: Manifest, digests: Digests) -> Iterator[str]:
    now = json.loads(json.dumps(job.stage.sources(digests), default=str))
    for name in sorted({*now, *there.sources}):
        if now.get(name) != there.sources.get(name):
            before, after = there.settings.get(name), getattr(job.stage, name, None)
            named = f" {_shown(before)} -> {_shown(after)}" if before != after else ", whose content changed"
            yield f"{step}.{name}{named}"


def _shown(value: Any) -> str:
    return short(value) if isinstance(value, (str, dict, list)) else str(value).lower()
