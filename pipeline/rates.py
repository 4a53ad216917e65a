"""How fast stages have run on this machine, and how long the steps of a run will take by that.

A rate is FLOPs a second for what runs a model, tokens a second for the rest, for one worker. The last run of each kind
leaves its own in this user's cache.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sstoken.errors import SstokenError
from sstoken.pipeline.job import Job
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
"""Tokens; smaller work is mostly start-up, and leaves no rate."""
_STEADY = 30.0
"""Seconds from which a run's rate replaces that of a longer run."""


@dataclass(frozen=True)
class Estimate:
    """What a step that is still to do needs."""

    step: str
    tokens: float | None
    """That it reads. None: not known before an earlier step has run."""
    seconds: float | None
    """By the last run of its kind on this machine. None: there was none."""
    bytes: float | None
    """That it writes."""
    guessed: bool
    """From a sample of the data."""


def estimates(config: "RunConfig", steps: set[str]) -> list[Estimate]:
    """Return what the steps of these names need, in their order.

    Raises:
        SstokenError: the data cannot be read.
    """
    from sstoken.pipeline import cost

    known, found = _known(), []
    for name, job, size, _ in cost.sized(config):
        if name not in steps and name.partition("/")[0] not in steps:  # what waits is not known one by one
            continue
        if size is None:
            found.append(Estimate(name, None, None, None, guessed=False))
            continue
        try:
            flops, written = cost.estimate(job, size)
        except SstokenError:  # a model that is not here
            found.append(Estimate(name, size.tokens, None, None, size.guessed))
            continue
        rate = known.get(_kind(job), {}).get("rate")
        seconds = (flops or size.tokens) / (rate * _workers(job)) if rate else None
        found.append(Estimate(name, size.tokens, seconds, written, size.guessed))
    return found


def remember(job: Job, seconds: float) -> None:
    """Keep the rate of a job that has just run from its start to its end.

    A rate is a convenience: where it cannot be told or kept, there is none.

    Args:
        job: its output is finished.
        seconds: that it took; of a sharded stage, what its workers took on shards counts.
    """
    from sstoken.pipeline import cost

    try:
        took = read_manifest(job.out)
        spent = took.took.get("worker_seconds", seconds * _workers(job)) if took else 0.0
        size = cost.measured(job.out if isinstance(job.stage, Encode) else _tokens(job))
        known, kind = _known(), _kind(job)
        if size.tokens < _FEWEST or not spent > min(_STEADY, known.get(kind, {}).get("seconds", 0.0)):
            return
        flops, _ = cost.estimate(job, size)
        known[kind] = {"rate": (flops or size.tokens) / spent, "seconds": spent}
        cache().mkdir(parents=True, exist_ok=True)
        write_atomic(_file(), json.dumps(known, indent=1))
    except (OSError, KeyError, ValueError, SstokenError):
        return


def _file() -> Path:
    return cache() / "rates.json"


def _known() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(job: Job) -> str:
    """What shares a rate: the stage and, where it runs a model, how."""
    stage = job.stage
    if isinstance(stage, Score):
        return "/".join((stage.name, _device(stage.device), stage.dtype, stage.backend))
    if isinstance(stage, Anchor):
        return "/".join(
            (stage.name, _device("auto"), stage.precision, "full" if stage.lora_rank is None else "lora")
        )
    return stage.name


def _device(named: str) -> str:
    from sstoken.stages.backends.hf import pick_device

    return str(pick_device(named.partition(",")[0])).partition(":")[0]


def _workers(job: Job) -> int:
    stage = job.stage
    if not isinstance(stage, ShardedStage):
        return 1
    if stage.workers is not None or not stage.every_core:
        return stage.workers or 1
    from joblib import cpu_count

    return int(cpu_count())


def _tokens(job: Job) -> Path:
    return next(job.inputs[name] for name in ("tokens", "masked") if name in job.inputs)
