"""Decide which tokens of a shard to keep. What depends on the whole dataset is computed first, in passes over it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from sstoken.errors import SstokenError
from sstoken.methods import Method, Params, Statistic, Tokens, Top, get_method
from sstoken.selection import BoolArray, Cut, Float64Array, IntArray, global_cuts, global_quantile, keep_above
from sstoken.stages.selecting.shard import Shard

HELD = 1 << 22
"""Most values (32 MiB) to hold between passes over the dataset; more are computed again in each pass."""


@dataclass(frozen=True)
class Whole:
    """What one shard needs to know of the whole dataset."""

    statistics: dict[str, float] = field(default_factory=dict)
    cuts: tuple[Cut, ...] | None = None
    """The cuts of a method that ranks all tokens together; None if each unit is ranked on its own."""
    ties: tuple[int, ...] = ()
    """For each cut, the number of scores equal to it in the shards before."""


@dataclass(frozen=True)
class Decided:
    """The decision about the N response tokens of a shard."""

    scores: Float64Array
    keep: BoolArray
    weight: Float64Array | None
    protected: dict[str, BoolArray]
    """[N] by name: the tokens kept whatever their score."""
    added: int
    """Number of protected tokens that the method would not have kept."""


@dataclass(frozen=True)
class Decider:
    """A method with its parameters. Picklable, for worker processes."""

    method: str
    params: Params
    scope: str
    budget: int | None = None
    """Number of tokens of the whole dataset to keep, instead of a share."""
    pool: str = "token"
    """With `word` or `sentence`, its tokens share their mean score and are kept or dropped together."""
    protect: tuple[str, ...] = ()

    @property
    def of(self) -> Method:
        """The registered method."""
        return get_method(self.method)

    def scores(self, shard: Shard, whole: Whole) -> Float64Array:
        """Return the scores that the policy decides by, [N]."""
        tokens = shard.measured.with_(statistics=whole.statistics)
        scores = self._score(tokens)
        if self.pool == "token" or self.of.weighted:
            return scores
        return _span_mean(scores, shard.text.spans(self.pool))

    def _score(self, tokens: Tokens) -> Float64Array:
        """Return the method's scores, checked, since a method may be a user's own code.

        Raises:
            SstokenError: the method failed, or did not return a finite number for each token that it ranks.
        """
        with _running(self.method):
            scores = np.asarray(self.of.score(tokens, self.params), dtype=np.float64)
        if scores.shape != (tokens.num_tokens,):
            raise SstokenError(
                f"method {self.method!r} gave scores of shape {scores.shape} for {tokens.num_tokens} tokens"
            )
        if isinstance(self.of.policy, Top) and not np.isfinite(scores).all():
            raise SstokenError(f"method {self.method!r} gave a score that is not finite; it cannot be ranked")
        return scores

    def values(self, statistic: Statistic, shard: Shard) -> Float64Array:
        """Return what a statistic of the method is computed from."""
        with _running(self.method):
            return np.asarray(statistic.values(shard.measured, self.params), dtype=np.float64)

    def quotas(self, num_tokens: int) -> list[int]:
        """Return the ranks in the whole dataset at which the outcome changes."""
        assert isinstance(self.of.policy, Top)
        if self.budget is not None:
            return [min(self.budget, num_tokens)]
        with _running(self.method):
            return self.of.policy.quotas(num_tokens, self.params)

    def decide(self, shard: Shard, whole: Whole) -> Decided:
        """Decide about the tokens of a shard."""
        tokens, policy = shard.measured.with_(statistics=whole.statistics), self.of.policy
        scores = self.scores(shard, whole)
        if whole.cuts is not None and isinstance(policy, Top):
            above = [
                keep_above(scores, cut, ties)[0] for cut, ties in zip(whole.cuts, whole.ties, strict=True)
            ]
            keep, weight = policy.decide(above, tokens, self.params)
        else:
            with _running(self.method):
                keep, weight = policy.apply(scores, tokens, self.params)
            if weight is not None and not np.isfinite(weight).all():
                raise SstokenError(
                    f"method {self.method!r} gave a weight that is not finite; it cannot be trained with"
                )
        if self.pool != "token":
            spans = shard.text.spans(self.pool)
            if weight is not None:
                weight = _span_mean(weight, spans)
                keep = weight > 0 if isinstance(policy, Top) else weight != 0
            else:
                keep = _span_mean(keep.astype(np.float64), spans) > 0
        protected = shard.text.protected(self.protect) if self.protect else {}
        forced = np.logical_or.reduce([np.zeros(keep.size, bool), *protected.values()])
        added = int((forced & ~keep).sum())
        if weight is not None and forced.any():
            weight = np.where(forced, 1.0, weight)
        return Decided(scores, keep | forced, weight, protected, added)


@contextmanager
def _running(method: str) -> Iterator[None]:
    """Turn whatever a method's own code raises into one line."""
    try:
        yield
    except SstokenError:
        raise
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise SstokenError(f"method {method!r} failed on these signals ({line})") from error


def _span_mean(values: Float64Array, spans: IntArray) -> Float64Array:
    """Replace each value by the mean over its span, ignoring NaN."""
    lengths, known = np.diff(spans), np.isfinite(values)
    span = np.repeat(np.arange(lengths.size), lengths)
    counts = np.bincount(span[known], minlength=lengths.size)
    sums = np.bincount(span[known], weights=values[known], minlength=lengths.size)
    means = np.divide(sums, counts, out=np.full(lengths.size, np.nan), where=counts > 0)
    return means[span]


def with_whole(decider: Decider, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Whole]]:
    """Yield each shard with what it needs to know of the whole dataset.

    Each is a copy that has read nothing yet, so that dropping it frees what it reads.
    """
    statistics = {}
    for name, statistic in decider.of.statistics.items():
        stream = _stream(shards, partial(decider.values, statistic))
        if statistic.quantile is not None:
            statistics[name] = global_quantile(stream, statistic.quantile(decider.params))
        else:
            sums = [(float(values.sum()), values.size) for values in stream()]
            statistics[name] = sum(s for s, _ in sums) / max(1, sum(n for _, n in sums))
    whole = Whole(statistics)
    if decider.scope != "global" or not isinstance(decider.of.policy, Top):
        for shard in shards:
            yield replace(shard), whole
        return
    stream = _stream(shards, lambda shard: decider.scores(shard, whole))
    total = sum(scores.size for scores in stream())
    cuts = tuple(global_cuts(stream, decider.quotas(total) if total else ()))
    ties = [0] * len(cuts)
    for shard, scores in zip(shards, stream(), strict=True):
        yield replace(shard), replace(whole, cuts=cuts, ties=tuple(ties))
        ties = [keep_above(scores, cut, before)[1] for cut, before in zip(cuts, ties, strict=True)]


def _stream(
    shards: Sequence[Shard], values: Callable[[Shard], Float64Array]
) -> Callable[[], Iterator[Float64Array]]:
    """Return a function that yields the values of all shards each time it is called."""
    held: list[Float64Array] = []

    def stream() -> Iterator[Float64Array]:
        if held:
            yield from held
            return
        kept: list[Float64Array] | None = []
        for shard in shards:
            chunk = values(replace(shard))
            yield chunk
            if kept is not None:
                kept.append(chunk)
                # Values that will be too many are not held meanwhile, either, if further shards are like these.
                expected = sum(c.size for c in kept) / len(kept) * len(shards)
                kept = kept if expected <= HELD else None
        held.extend(kept or ())

    return stream
