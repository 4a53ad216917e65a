"""The engines' scheduler at 1 to 1,000 workers, on a clock that is not real: where it stops being linear, and why.

It runs the code that hands out shards (`sstoken.pipeline.engines.dispatch`) with workers that only say how long a shard
takes. The times are those of a real `score` run on this machine, scaled to the mean asked for. Each trouble is added by
itself: stragglers, workers that die, storage that serves all workers together, and a driver that needs time for each
shard. Efficiency is the work of all shards over the time of all workers.

Then the arithmetic for a number of tokens: FLOPs, device-hours, bytes, shards, and what the driver has to hold.
"""

import argparse
import heapq
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rounds import middle
from sstoken.errors import QuarantinedError
from sstoken.pipeline.engines.dispatch import Attempt, Died, dispatch
from sstoken.stages.stage import Progress, Task

WORKERS = (1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class World:
    """What a cluster is like."""

    workers: int
    times: tuple[float, ...]
    """Seconds that shards take, to draw from."""
    driver: float = 0.0
    """Seconds of the driver for each shard."""
    straggling: float = 0.0
    """Share of the attempts that take ten times as long."""
    deaths: float = 0.0
    """Deaths an hour of one worker; it is back after a minute."""
    storage: float = 0.0
    """Seconds in which the storage reads and writes one shard, one after the other."""
    seed: int = 0


class Simulated:
    """A `Pool` whose attempts end when the clock says so."""

    def __init__(self, world: World) -> None:
        self._world, self._draw = world, random.Random(world.seed)
        self.window = world.workers
        self.now = 0.0
        self.worked = 0.0
        """Seconds of shards that were finished."""
        self._driver = self._storage = 0.0
        """When each is free."""
        self._ends: list[tuple[float, int, Attempt, Any]] = []
        self._back: list[float] = []
        """When workers that died are back."""
        self._count = 0

    def start(self, attempt: Attempt) -> None:
        """See `Pool`."""
        world, draw = self._world, self._draw
        begin = self._driver = max(self.now, self._driver) + world.driver
        if len(self._back) and len(self._ends) + len(self._back) >= self.window:
            begin = max(begin, heapq.heappop(self._back))
        takes = draw.choice(world.times)
        if draw.random() < world.straggling:
            takes *= 10
        end, result = begin + takes, None
        if world.deaths and (life := draw.expovariate(world.deaths / 3600)) < takes:
            end, result = begin + life, Died("died")
            heapq.heappush(self._back, end + 60)
        else:
            self.worked += takes
            if world.storage:
                self._storage = max(self._storage, begin) + world.storage
                end = max(end, self._storage)
        self._count += 1
        heapq.heappush(self._ends, (end, self._count, attempt, result))

    def ended(self) -> list[tuple[Attempt, Any]]:
        """See `Pool`."""
        end, _, attempt, result = heapq.heappop(self._ends)
        self.now = max(self.now, end)
        while self._back and self._back[0] <= self.now:
            heapq.heappop(self._back)
        return [(attempt, result)]

    def stop(self) -> None:
        """See `Pool`."""


def tasks(count: int) -> Iterator[Task[None]]:
    """Shards."""
    return (Task(Path(f"part-{index:06d}.parquet"), 1, None) for index in range(count))


def simulate(world: World, shards: int) -> dict[str, float]:
    """Run once; return hours, efficiency, and how many shards failed for good."""
    pool, failed = Simulated(world), 0
    try:
        for _ in dispatch(pool, tasks(shards), Progress()):
            pass
    except QuarantinedError as error:
        failed = len(error.failed)
    return {
        "hours": round(pool.now / 3600, 3),
        "efficiency": round(pool.worked / (pool.now * world.workers), 3),
        "quarantined": failed,
    }


def measured(shards: int) -> tuple[float, ...]:
    """Seconds that `score` takes for each of some shards of very different lengths, on this machine."""
    from benchmarks.scaling import save_inputs
    from sstoken.pipeline import api
    from sstoken.stages import tables

    with TemporaryDirectory() as name:
        tokens, model = save_inputs(Path(name), shards, 4)
        out = Path(name) / "scores"
        api.score(tokens=tokens, checkpoints=[f"m={model}"], out=out, device="cpu", workers=1)
        ends = sorted(path.stat().st_mtime_ns for path in tables.parts(out / "m"))
        return tuple((b - a) / 1e9 for a, b in zip(ends, ends[1:], strict=False))


def driver_seconds() -> float:
    """What one shard costs the code that hands it out, here and now."""
    world = World(1000, (1.0,))

    def once() -> dict[str, float]:
        start = time.perf_counter()
        simulate(world, 5000)
        return {"seconds": (time.perf_counter() - start) / 5000}

    return float(middle(once)["seconds"])


def arithmetic(tokens: float, parameters: float, tflops: float, shard_tokens: float) -> dict[str, float]:
    """Numbers for one checkpoint; bytes of a token as measured on GSM8K, half of the tokens in responses."""
    flops = 2 * parameters * tokens
    shards = tokens / shard_tokens
    return {
        "flops_per_checkpoint": flops,
        "device_hours_per_checkpoint": round(flops / (tflops * 1e12) / 3600),
        "tokens_folder_tb": round(1.02 * tokens / 1e12, 2),
        "scores_tb_per_signal": round(2.5 * tokens / 2 / 1e12, 2),
        "masked_tb": round((1.02 + 0.64 + 3 * 2.5 / 2) * tokens / 1e12, 2),
        "shards": round(shards),
        "manifest_mb": round(shards * 150 / 1e6, 1),
        "seconds_per_shard": round(flops / shards / (tflops * 1e12), 1),
    }


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the shards")
    parser.add_argument("--mean", type=float, default=60.0, help="seconds of a shard, in the mean")
    parser.add_argument("--driver-ms", type=float, default=5.0, help="of the driver, for each shard")
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--parameters", type=float, default=8e9)
    parser.add_argument("--tflops", type=float, default=400.0, help="that a device reaches")
    parser.add_argument("--shard-tokens", type=float, default=2e7)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    given = parser.parse_args()
    shards = 2000 if given.quick else 20_000
    times = measured(12 if given.quick else 60)
    mean = sum(times) / len(times)
    times = tuple(given.mean * t / mean for t in times)
    driver = given.driver_ms / 1e3
    plain = World(1, times)
    worlds = {
        "plain": plain,
        "driver": replace(plain, driver=driver),
        "stragglers": replace(plain, driver=driver, straggling=0.01),
        "deaths": replace(plain, driver=driver, deaths=0.1),
        "storage": replace(plain, driver=driver, storage=given.mean / 500),
        "all": replace(plain, driver=driver, straggling=0.01, deaths=0.1, storage=given.mean / 500),
    }
    found: dict[str, Any] = {
        "shards": shards,
        "spread": round(max(times) / given.mean, 2),
        "dispatch_us_per_shard": round(1e6 * driver_seconds(), 1),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    print("\nefficiency by workers".ljust(24) + "".join(f"{w:>8}" for w in WORKERS))
    for name, world in worlds.items():
        runs = [simulate(replace(world, workers=w), shards) for w in WORKERS]
        found[name] = {w: run["efficiency"] for w, run in zip(WORKERS, runs, strict=True)}
        failed = sum(run["quarantined"] for run in runs)
        print(
            name.ljust(23)
            + "".join(f"{run['efficiency']:>8.3f}" for run in runs)
            + (f"  {failed:g} in quarantine" if failed else "")
        )
    print(
        f"\n{given.tokens:.3g} tokens, {given.parameters:.3g} parameters, {given.tflops:g} TFLOP/s a device"
    )
    found["arithmetic"] = arithmetic(given.tokens, given.parameters, given.tflops, given.shard_tokens)
    for name, value in found["arithmetic"].items():
        print(f"{name}: {value:,.6g}")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
