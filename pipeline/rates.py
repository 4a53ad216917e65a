"""Estimates how long a job will take, from the rates of earlier runs on this machine.

A rate is FLOPs per second for stages that run a model, tokens per second for the others, per worker. The last run of
each kind stores its rate in the user's cache; a model of quite another size has another rate.
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
from sstoken.stages.model_options import ModelOptions
from sstoken.stages.remote_cache import cache
from sstoken.stages.score import Score
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.storage import write_atomic

Rates = dict[str, dict[str, float]]
"""By kind of job: its `rate`, and the `seconds` and FLOPs `per_token` of the run that gave it."""
_FEWEST = 2000
"""Tokens below which a run stores no rate, as start-up dominates."""
_STEADY = 30.0
"""A run of this many seconds may replace the rate of a longer run."""
_ALIKE = 4.0
"""Models whose FLOPs per token differ by a larger factor have different rates."""


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
        work = estimate(job, size)[0] or size.tokens
        known[kind] = {"rate": work / spent, "seconds": spent, "per_token": work / size.tokens}
        storage.of(cache()).make_folder(cache())
        write_atomic(_file(), json.dumps(known, indent=1))
    except (OSError, KeyError, ValueError, SstokenError):
        return


def seconds(job: Job, work: float, tokens: float, known: Rates) -> float | None:
    """Estimate how long a job takes for this many FLOPs (without a model, tokens) and tokens.

    None: none of its kind, with a model of about this size, has run here.
    """
    found = known.get(_kind(job))
    if found is None or not 1 / _ALIKE < work / max(1.0, tokens) / found["per_token"] < _ALIKE:
        return None
    return work / (found["rate"] * _workers(job))


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
        isinstance(found.get(name), float) and 0 < found[name] < inf
        for name in ("rate", "seconds", "per_token")
    )


def _kind(job: Job) -> str:
    """A key for jobs with the same rate: the stage, its engine and, if it runs a model, how."""
    stage, how = job.stage, [job.stage.name]
    if isinstance(stage, ModelOptions):
        how += [_device(stage.device), stage.dtype, str(stage.fingerprinted()["backend"])]  # never `auto`
    if isinstance(stage, Score):
        how += stage.measured
    if isinstance(stage, Anchor):
        how += [_device("auto"), stage.precision, "full" if stage.lora_rank is None else "lora"]
    if isinstance(stage, ShardedStage) and stage.engine != "local":
        how.append(stage.engine)
    return "/".join(how)


def _device(named: str) -> str:
    import torch

    from sstoken.stages.backends.hf import pick_device

    device = str(pick_device(named.partition(",")[0]))
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _workers(job: Job) -> int:
    stage = job.stage
    if not isinstance(stage, ShardedStage):
        return 1
    return stage.workers or (num_cores() if stage.every_core else 1)
