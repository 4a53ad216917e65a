"""T-SHIRT's choice of examples: those whose tokens the prompt helps, also under noise (arXiv 2506.01317)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from sstoken.errors import NothingLeftError
from sstoken.selection import BoolArray, Float64Array, global_quantile, num_kept, sums
from sstoken.stages.selecting.shard import Shard
from sstoken.stages.stage import Settings

SCORER = "scorer"
"""The role of the checkpoint whose losses T-SHIRT judges examples by."""


def _share_or_number(keep: float) -> float:
    if keep > 1 and not keep.is_integer():
        raise ValueError("legal is a share up to 1, or a whole number")
    return keep


class ExampleChoice(Settings):
    """How to choose examples before choosing tokens in them."""

    method: Literal["t-shirt"] = "t-shirt"
    """The only one."""
    keep: Annotated[float, Field(gt=0), AfterValidator(_share_or_number)] = 0.05
    """Examples to keep: a share up to 1, or a number."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of tokens that count."""
    draws: Annotated[int, Field(ge=0)] = 0
    """Number of noise draws (signals `pmi_noisy@1`, ...). 0: no noise, and examples are ranked by their mean alone."""

    def inputs(self, scores: Mapping[str, Path]) -> tuple[str, ...]:
        """Return the signals that it reads, of the role `scorer` if there is one, else of `current`."""
        role = SCORER if SCORER in scores else "current"
        noisy = (f"{role}.pmi_noisy@{draw}" for draw in range(1, self.draws + 1))
        return f"{role}.loss", f"{role}.loss_unconditional", *noisy

    def number(self, num_examples: int) -> int:
        """Return the number of examples to keep."""
        return num_kept(num_examples, self.keep) if self.keep <= 1 else min(num_examples, int(self.keep))


@dataclass(frozen=True)
class Steadiness:
    """What T-SHIRT ranks examples by, [E] each; NaN for an example without a token that counts."""

    ifd: Float64Array
    """exp(mean loss - mean unconditional loss); 1 or more if the prompt does not help the answer."""
    mean: Float64Array
    """The mean over the draws of exp(mean of the differences that count)."""
    std: Float64Array
    """The standard deviation over the draws."""


def choose_examples(choice: ExampleChoice, shards: Sequence[Shard], inputs: Sequence[str]) -> list[BoolArray]:
    """Return the chosen examples of each shard, [E].

    Takes twice the number wanted, by highest mean among the examples with an IFD below 1, then keeps those with the
    smallest standard deviation.

    Raises:
        NothingLeftError: no example has an IFD below 1.
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
            f"none of {ifd.size:,} examples has an IFD below 1: their prompts help no answer; leave examples out"
        )
    chosen = np.zeros(ifd.size, dtype=bool)
    chosen[candidates] = True
    ends = np.cumsum([j.ifd.size for j in judged])
    return np.split(chosen, ends[:-1])


def judge(shard: Shard, inputs: Sequence[str], threshold: float) -> Steadiness:
    """Measure how much, and how steadily, the prompt helps each example's tokens."""
    tokens = shard.measured
    loss, alone = tokens[inputs[0]], tokens[inputs[1]]
    every = sums(np.isfinite(loss), tokens.offsets)
    known = np.isfinite(alone)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums(loss, tokens.offsets) / every
        ifd = np.exp(means - sums(np.where(known, alone, 0), tokens.offsets) / sums(known, tokens.offsets))
    draws = []
    for draw in _draws(shard, inputs):
        counts = np.isfinite(draw) & (np.abs(draw) > threshold)
        num = sums(counts, tokens.offsets)
        draws.append(np.exp(sums(np.where(counts, draw, 0), tokens.offsets) / np.maximum(1, num)))
    return Steadiness(ifd, np.mean(draws, axis=0), np.std(draws, axis=0))


def _draws(shard: Shard, inputs: Sequence[str]) -> list[Float64Array]:
    """Return loss with the prompt minus loss without it for each draw, [N]; NaN at the start of an answer."""
    tokens = shard.measured
    return [tokens[name] for name in inputs[2:]] or [tokens[inputs[0]] - tokens[inputs[1]]]
