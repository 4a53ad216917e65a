"""T-SHIRT's choice of examples: those whose tokens the prompt helps, and helps steadily (arXiv 2506.01317)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from sstoken.errors import NothingLeftError
from sstoken.selection import BoolArray, Float64Array, IntArray, global_quantile, num_kept
from sstoken.stages.selecting.shard import Shard
from sstoken.stages.stage import Settings

SCORER = "scorer"
"""The role of the checkpoint whose losses T-SHIRT judges examples by."""


class ExampleChoice(Settings):
    """How examples are chosen before their tokens are."""

    method: Literal["t-shirt"] = "t-shirt"
    """The only one."""
    keep: Annotated[float, Field(gt=0)] = 0.05
    """How many: a share up to 1, or a number."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of tokens that count."""
    draws: Annotated[int, Field(ge=0)] = 0
    """How many noise draws (the signals `pmi_noisy@1` and so on); 0: without noise, so that all are as steady."""

    def inputs(self, scores: Mapping[str, Path]) -> tuple[str, ...]:
        """The signals it reads: of the role `scorer` where there is one, else of `current`."""
        role = SCORER if SCORER in scores else "current"
        noisy = (f"{role}.pmi_noisy@{draw}" for draw in range(1, self.draws + 1))
        return f"{role}.loss", f"{role}.loss_unconditional", *noisy

    def number(self, num_examples: int) -> int:
        """How many of so many examples are kept."""
        return num_kept(num_examples, self.keep) if self.keep <= 1 else min(num_examples, int(self.keep))


@dataclass(frozen=True)
class Steadiness:
    """[E] each: what T-SHIRT judges an example by; NaN where an example has no token to judge it by."""

    ifd: Float64Array
    """exp(mean loss - mean unconditional loss): 1 and more is an answer that the prompt does not help."""
    mean: Float64Array
    """The mean over the draws of exp(mean of the differences that count)."""
    std: Float64Array
    """The standard deviation over the draws."""


def choose_examples(choice: ExampleChoice, shards: Sequence[Shard], inputs: Sequence[str]) -> list[BoolArray]:
    """For each shard which of its examples are chosen, [E].

    Among the examples with IFD below 1, take twice as many as wanted by highest mean, and keep the steadiest of those.

    Raises:
        NothingLeftError: none is below 1.
    """

    def sizes() -> Iterator[Float64Array]:
        for shard in shards:
            for draw in _draws(replace(shard), inputs):
                yield np.abs(draw[np.isfinite(draw)])

    threshold = global_quantile(sizes, 1 - choice.ratio)
    judged = [judge(replace(shard), inputs, threshold) for shard in shards]
    ifd, mean, std = (np.concatenate([getattr(j, name) for j in judged]) for name in ("ifd", "mean", "std"))
    wanted = choice.number(int(np.isfinite(ifd).sum()))
    candidates = np.flatnonzero(ifd < 1)
    candidates = candidates[np.argsort(-mean[candidates], kind="stable")][: 2 * wanted]
    candidates = candidates[np.argsort(std[candidates], kind="stable")][:wanted]
    if not candidates.size:
        raise NothingLeftError(
            f"none of {ifd.size:,} examples has an IFD below 1: their prompts help no answer; choose no examples"
        )
    chosen = np.zeros(ifd.size, dtype=bool)
    chosen[candidates] = True
    ends = np.cumsum([j.ifd.size for j in judged])
    return np.split(chosen, ends[:-1])


def judge(shard: Shard, inputs: Sequence[str], threshold: float) -> Steadiness:
    """How much, and how steadily, the prompt helps each example's tokens."""
    tokens = shard.measured
    loss, alone = tokens[inputs[0]], tokens[inputs[1]]
    every = _sums(np.isfinite(loss), tokens.offsets)
    known = np.isfinite(alone)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = _sums(loss, tokens.offsets) / every
        ifd = np.exp(means - _sums(np.where(known, alone, 0), tokens.offsets) / _sums(known, tokens.offsets))
    draws = []
    for draw in _draws(shard, inputs):
        counts = np.isfinite(draw) & (np.abs(draw) > threshold)
        num = _sums(counts, tokens.offsets)
        draws.append(np.exp(_sums(np.where(counts, draw, 0), tokens.offsets) / np.maximum(1, num)))
    return Steadiness(ifd, np.mean(draws, axis=0), np.std(draws, axis=0))


def _draws(shard: Shard, inputs: Sequence[str]) -> list[Float64Array]:
    """Loss with the prompt minus loss without it, [N], for each draw; NaN where an answer begins."""
    tokens = shard.measured
    return [tokens[name] for name in inputs[2:]] or [tokens[inputs[0]] - tokens[inputs[1]]]


def _sums(values: Float64Array | BoolArray, offsets: IntArray) -> Float64Array:
    totals: Float64Array = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return totals[offsets[1:]] - totals[offsets[:-1]]
