"""Estimates what the steps of a run will take: tokens, FLOPs, device-hours, bytes and time.

Sizes of data that is not encoded yet are guessed from its first rows. Finished steps are not estimated: their manifests
record what they took.
"""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.pipeline import rates
from sstoken.pipeline.config import RunConfig
from sstoken.pipeline.cost import Sizes, estimate, measured
from sstoken.pipeline.job import Job
from sstoken.pipeline.plan import promised_steps, run_steps
from sstoken.pipeline.runner import execute
from sstoken.stages import manifest as manifests
from sstoken.stages.encode import Encode
from sstoken.stages.encoding.ranges import cut
from sstoken.stages.manifest import Digests, Manifest
from sstoken.stages.part import Part
from sstoken.stages.storage import expanded

SAMPLE = 256
"""Rows to encode for estimating the size of a dataset that is not encoded yet."""


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one step and, if it is finished, what it took."""

    step: str
    tokens: float | None
    """Tokens that it reads; None: unknown before an earlier step has run."""
    flops: float | None
    device_hours: float | None
    """At the assumed speed."""
    bytes: float | None
    """Bytes that it writes."""
    guessed: bool
    """Whether it was estimated from a sample of the data."""
    took_hours: float | None = None
    """Worker-hours that the finished step took."""
    took_bytes: int | None = None
    """Bytes that the finished step wrote."""


def costs(config: RunConfig, tflops: float) -> list[Cost]:
    """Estimate the cost of each step on devices that do `tflops` * 10^12 FLOPs per second.

    Raises:
        SstokenError: a config.json or the data cannot be read.
    """
    found = []
    for name, job, size, done in sized(config):
        flops, written = estimate(job, size) if size is not None else (None, None)
        hours = None if flops is None else flops / (tflops * 1e12) / 3600
        tokens, guessed = (None, False) if size is None else (size.tokens, size.guessed)
        cost = Cost(name, tokens, flops, hours, written, guessed)
        if done is not None:
            seconds = done.took.get("worker_seconds", done.seconds)
            cost = replace(cost, took_hours=seconds / 3600, took_bytes=sum(f.bytes for f in done.files))
        found.append(cost)
    return found


@dataclass(frozen=True)
class Estimate:
    """Estimated needs of an unfinished step."""

    step: str
    tokens: float | None
    """Tokens that it reads; None: unknown before an earlier step has run."""
    seconds: float | None
    """Its duration, at the rate of the last run of its kind; None: there was none on this machine."""
    bytes: float | None
    """Bytes that it writes."""
    guessed: bool
    """Whether it was estimated from a sample of the data."""


def estimates(config: RunConfig, steps: set[str]) -> list[Estimate]:
    """Estimate the needs of the steps with these names, in the order of the run.

    Raises:
        SstokenError: the data cannot be read.
    """
    known, found = rates.read(), []  # before the data is sampled, which is a run, too
    for name, job, size, _ in sized(config):
        if not {name, name.partition("/")[0]} & steps:  # jobs that wait are listed by their step
            continue
        if size is None:
            found.append(Estimate(name, None, None, None, guessed=False))
            continue
        seconds = written = None
        with suppress(SstokenError):  # the model is not on this machine
            flops, written = estimate(job, size)
            seconds = rates.seconds(job, flops or size.tokens, size.tokens, known)
        found.append(Estimate(name, size.tokens, seconds, written, size.guessed))
    return found


def sized(config: RunConfig) -> Iterator[tuple[str, Job, Sizes | None, Manifest | None]]:
    """Yield each step's name, job, size of its input (None: unknown yet), and manifest (None: not finished).

    Raises:
        SstokenError: the data cannot be read.
    """
    sizes: dict[Path, Sizes | None] = {}
    steps = list(run_steps(config))
    if any(step.job is None for step in steps):  # an anchor run has yet to leave its checkpoints
        steps = list(promised_steps(config))
    for step in steps:
        assert step.job is not None, "every checkpoint is known or promised"
        done = manifests.read_manifest(step.job.out)
        sizes[step.job.out] = size = _sizes(step.job, sizes, done)
        yield step.name, step.job, size, done


def _sizes(job: Job, known: dict[Path, Sizes | None], done: Manifest | None) -> Sizes | None:
    """Size of the tokens folder that a step reads, or writes itself; None: unknown yet."""
    stage = job.stage
    if isinstance(stage, Encode):
        return measured(job.out) if done is not None else _sampled(stage)
    source = job.inputs.get("tokens", job.inputs.get("masked"))
    size = None if source is None else known.get(source)
    if isinstance(stage, Part) and size is not None:
        return measured(job.out) if done is not None else size.times(1 / stage.parts, size.guessed)
    return size


def _sampled(stage: Encode) -> Sizes | None:
    """Estimate from the first rows; None if counting the rows would read all data over the network."""
    if "://" in stage.data or not (expanded(stage.data).exists() or any(c in stage.data for c in "*?[")):
        return None
    rows = sum(
        piece.num_rows for shard in cut(stage.data, stage.split, 1 << 16, stage.limit) for piece in shard
    )
    few = stage.model_copy(update={"limit": min(SAMPLE, rows), "workers": 1, "engine": "local"})
    with tempfile.TemporaryDirectory(prefix="sstoken-") as folder:
        out = Path(folder) / "tokens"
        execute(Job(few, {}, out, seed=0), Digests())
        return measured(out).times(rows / min(SAMPLE, rows), guessed=rows > SAMPLE)
