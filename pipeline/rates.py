"""Estimates how long the steps of a run will take, from the rates of earlier runs on this machine.

A rate is FLOPs per second for stages that run a model, tokens per second for the others, per worker. The last run of
each kind stores its rate in the user's cache.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from sstoken.errors import SstokenError
from sstoken.pipeline.engines.local import num_cores
from sstoken.pipeline.job import Job
from sstoken.stages import plain_json, storage
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.manifest import read_manifest
from sstoken.stages.remote_cache import cache
from sstoken.stages.score import Score
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.storage import write_atomic

if TYPE_CHECKING:
    from sstoken.pipeline.config import RunConfig

_FEWEST = 2000
"""Tokens below which a run stores no rate, as start-up dominates."""
_STEADY = 30.0
"""A run of this many seconds may replace the rate of a longer run."""


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


def estimates(config: "RunConfig", steps: set[str]) -> list[Estimate]:
    """Estimate the needs of the steps with these names, in the order of the run.

    Raises:
        SstokenError: the data cannot be read.
    """
    from sstoken.pipeline import cost

    known, found = _known(), []
    for name, job, size, _ in cost.sized(config):
        if (
            name not in steps and name.partition("/")[0] not in steps
        ):  # jobs that wait are listed by their step
            continue
        if size is None:
            found.append(Estimate(name, None, None, None, guessed=False))
            continue
        seconds = written = None
        with suppress(SstokenError):  # the model is not on this machine
            flops, written = cost.estimate(job, size)
            rate = known.get(_kind(job), {}).get("rate")
            seconds = (flops or size.tokens) / (rate * _workers(job)) if rate else None
        found.append(Estimate(name, size.tokens, seconds, written, size.guessed))
    return found


def remember(job: Job, seconds: float) -> None:
    """Store the rate of a job that ran from start to end in `seconds`; do nothing if it cannot be told or stored.

    Sharded stages recorded the time that workers spent on shards, which is used instead.
    """
    from sstoken.pipeline import cost

    inputs = job.inputs.get("tokens") or job.inputs.get("masked")
    measured = job.out if isinstance(job.stage, Encode) else inputs
    if measured is None:  # it reads no rows of a run, as `pull`
        return
    try:
        took = read_manifest(job.out)
        spent = took.took.get("worker_seconds", seconds * _workers(job)) if took else 0.0
        size = cost.measured(measured)
        known, kind = _known(), _kind(job)
        if size.tokens < _FEWEST or not spent > min(_STEADY, known.get(kind, {}).get("seconds", 0.0)):
            return
        flops, _ = cost.estimate(job, size)
        known[kind] = {"rate": (flops or size.tokens) / spent, "seconds": spent}
        storage.of(cache()).make_folder(cache())
        write_atomic(_file(), json.dumps(known, indent=1))
    except (OSError, KeyError, ValueError, SstokenError):
        return


def _file() -> Path:
    return cache() / "rates.json"


def _known() -> dict[str, dict[str, float]]:
    try:
        found = plain_json.parse_object(_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return {kind: rate for kind, rate in found.items() if _is_rate(rate)}


def _is_rate(found: object) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), float) and 0 < found[name] < inf for name in ("rate", "seconds")
    )


def _kind(job: Job) -> str:
    """A key for jobs with the same rate: the stage and, if it runs a model, how."""
    stage = job.stage
    if isinstance(stage, Score):
        return "/".join((stage.name, _device(stage.device), stage.dtype, stage.backend))
    if isinstance(stage, Anchor):
        trained = "full" if stage.lora_rank is None else "lora"
        return "/".join((stage.name, _device("auto"), stage.precision, trained))
    return stage.name


def _device(named: str) -> str:
    from sstoken.stages.backends.hf import pick_device

    return str(pick_device(named.partition(",")[0])).partition(":")[0]


def _workers(job: Job) -> int:
    stage = job.stage
    if not isinstance(stage, ShardedStage):
        return 1
    return stage.workers or (num_cores() if stage.every_core else 1)
