"""How much each source of variance moves what is measured: runs that differ in one source alone."""

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.intervals import LEVEL, Interval
from benchmarks.quality.settings import MethodRun, Seed

if TYPE_CHECKING:
    from benchmarks.quality.study import Cells

SOURCES = ("data", "noise", "order", "drawn")
"""`drawn`: LoRA's first weights and the mask of `random`."""
FEWEST = 5
"""Runs without which nothing is said about a source."""


def variance(cells: "Cells") -> dict[str, Any]:
    """By method and source: the standard deviation of the held-out loss and of its difference from `full`.

    `all`: of the study's seeds, in which all sources differ. A source with fewer than `FEWEST` runs is left out.
    """
    study = cells.study
    full = {
        seed.key: _loss(cells, MethodRun(method="full"), seed) for seed in (*study.seeds, *study.variance)
    }
    found: dict[str, Any] = {}
    for method in study.variance_methods if study.variance else ():
        groups = {source: _alone(source, study.seeds[0], study.variance) for source in SOURCES}
        for source, seeds in (groups | {"all": study.seeds}).items():
            losses = {seed.key: _loss(cells, method, seed) for seed in seeds}
            done = [key for key, loss in losses.items() if loss is not None and full[key] is not None]
            if len(done) < FEWEST:
                continue
            own = np.array([losses[key] for key in done])
            less = own - np.array([full[key] for key in done])
            of_source = {"runs": len(done), "sd": deviation(own), "sd_less_full": deviation(less)}
            found.setdefault(method.key, {})[source] = of_source
    return found


def _alone(source: str, first: Seed, seeds: Sequence[Seed]) -> list[Seed]:
    """The first seed and those that differ from it in one source."""

    def others(seed: Seed) -> tuple[int, ...]:
        return tuple(getattr(seed, name) for name in SOURCES if name != source)

    return [first, *(s for s in seeds if others(s) == others(first) and s != first)]


def _loss(cells: "Cells", method: MethodRun, seed: Seed) -> float | None:
    path = cells.path(method, seed)
    if not path.exists():
        return None
    items = json.loads(path.read_text(encoding="utf-8"))["held_out"]
    return sum(i["loss_all"] for i in items) / sum(i["tokens_all"] for i in items)


def deviation(values: np.ndarray) -> Interval:
    """The standard deviation, with the interval that normal values would have."""
    freedom = len(values) - 1
    sd = float(np.std(values, ddof=1))
    low, high = _chi_square(freedom)
    return Interval(sd, sd * (freedom / high) ** 0.5, sd * (freedom / low) ** 0.5)


@cache
def _chi_square(freedom: int) -> tuple[float, float]:
    """The quantiles of the interval, by simulation."""
    drawn = np.random.default_rng(0).chisquare(freedom, 1_000_000)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
