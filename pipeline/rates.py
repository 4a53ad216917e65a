"""Estimates how long a job will take, from the rates of earlier runs on this machine.

A rate is FLOPs per second for stages that run a model, tokens per second for the others, per worker. The last run of
each kind stores its rate in the user's cache.
"""

import json
from math import inf
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.pipeline.cost import estimate, measured
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

Rates = dict[str, dict[str, float]]
"""By kind of job: its `rate`, and the `seconds` of the run that gave it."""
_FEWEST = 2000
"""Tokens below which a run stores no rate, as start-up dominates."""
_STEADY = 30.0
"""A run of this many seconds may replace the rate of a longer run."""


def remember(job: Job, seconds: float) -> None:
    """Store the rate of a job that ran from start to end in `seconds`; do nothing if it cannot be told or stored.

    Sharded stages recorded the time that workers spent on shards, which is used instead.
    """
    inputs = job.inputs.get("tokens") or job.inputs.get("masked")
    folder = job.out if isinstance(job.stage, Encode) else inputs
    if folder is None:  # it reads no rows of a run, as `pull`
        return
    try:
        took = read_manifest(job.out)
        spent = took.took.get("worker_seconds", seconds * _workers(job)) if took else 0.0
        size = measured(folder)
        known, kind = read(), _kind(job)
        if size.tokens < _FEWEST or not spent > min(_STEADY, known.get(kind, {}).get("seconds", 0.0)):
            return
        flops, _ = estimate(job, size)
        known[kind] = {"rate": (flops or size.tokens) / spent, "seconds": spent}
        storage.of(cache()).make_folder(cache())
        write_atomic(_file(), json.dumps(known, indent=1))
    except (OSError, KeyError, ValueError, SstokenError):
        return


def seconds(job: Job, work: float, known: Rates) -> float | None:
    """Estimate how long a job takes for this many FLOPs or tokens; None: none of its kind has run here."""
    rate = known.get(_kind(job), {}).get("rate")
    return work / (rate * _workers(job)) if rate else None


def _file() -> Path:
    return cache() / "rates.json"


def read() -> Rates:
    """Return the rates of earlier runs."""
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
