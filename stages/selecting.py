"""From a shard's signals to what its method decides; what the whole dataset decides is found first, as streams."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from sstoken.methods import Method, Params, Statistic, Tokens, Top, get_method
from sstoken.selection import BoolArray, Cut, Float64Array, global_cuts, global_quantile, keep_above
from sstoken.stages.shards import Shard

HELD = 1 << 22
"""Up to so many values (32 MiB) are held between the passes over the dataset; more are made again each time."""


@dataclass(frozen=True)
class Whole:
    """What the whole dataset decides, and where in it one shard stands."""

    statistics: dict[str, float] = field(default_factory=dict)
    cuts: tuple[Cut, ...] | None = None
    """Of a method that ranks all tokens; None: each unit is ranked by itself."""
    ties: tuple[int, ...] = ()
    """For each cut: how many scores equal to it stand in the shards before."""


@dataclass(frozen=True)
class Decided:
    """What was decided about the N response tokens of a shard."""

    scores: Float64Array
    keep: BoolArray
    weight: Float64Array | None


@dataclass(frozen=True)
class Decider:
    """A method with its parameters; pickles into worker processes."""

    method: str
    params: Params
    scope: str

    @property
    def of(self) -> Method:
        """The method."""
        return get_method(self.method)

    def scores(self, tokens: Tokens, whole: Whole) -> Float64Array:
        """The method's scores [N]."""
        scores: Float64Array = self.of.score(tokens.with_(statistics=whole.statistics), self.params)
        return scores

    def decide(self, tokens: Tokens, whole: Whole) -> Decided:
        """What the method decides about the tokens of a shard."""
        tokens = tokens.with_(statistics=whole.statistics)
        scores, policy = self.scores(tokens, whole), self.of.policy
        if whole.cuts is not None and isinstance(policy, Top):
            above = [
                keep_above(scores, cut, ties)[0] for cut, ties in zip(whole.cuts, whole.ties, strict=True)
            ]
            keep, weight = policy.decide(above, scores, tokens, self.params)
        else:
            keep, weight = policy.apply(scores, tokens, self.params)
        return Decided(scores, keep, weight)


def _values(statistic: Statistic, params: Params, tokens: Tokens) -> Float64Array:
    values: Float64Array = statistic.values(tokens, params)
    return values


@dataclass(frozen=True)
class WholeDataset:
    """All shards, for what has to be known of all before one is decided."""

    decider: Decider
    shards: Sequence[Shard]

    def tasks(self) -> Iterator[tuple[Shard, Whole]]:
        """Each shard, not yet read, with what the whole dataset decides about it."""
        method, params = self.decider.of, self.decider.params
        statistics = {}
        for name, statistic in method.statistics.items():
            stream = self._stream(partial(_values, statistic, params))
            if statistic.quantile is not None:
                statistics[name] = global_quantile(stream, statistic.quantile(params))
            else:
                sums = [(float(values.sum()), values.size) for values in stream()]
                statistics[name] = sum(s for s, _ in sums) / max(1, sum(n for _, n in sums))
        whole = Whole(statistics)
        if self.decider.scope != "global" or not method.policy.ranks:
            for shard in self.shards:
                yield shard, whole
            return
        assert isinstance(method.policy, Top)
        stream = self._stream(lambda tokens: self.decider.scores(tokens, whole))
        total = sum(scores.size for scores in stream())
        cuts = tuple(global_cuts(stream, method.policy.quotas(total, params) if total else ()))
        ties = [0] * len(cuts)
        for shard, scores in zip(self.shards, stream(), strict=True):
            yield shard, replace(whole, cuts=cuts, ties=tuple(ties))
            ties = [keep_above(scores, cut, before)[1] for cut, before in zip(cuts, ties, strict=True)]

    def _stream(self, values: Callable[[Tokens], Float64Array]) -> Callable[[], Iterator[Float64Array]]:
        """Values of all shards, as often as they are asked for."""
        held: list[Float64Array] = []

        def made() -> Iterator[Float64Array]:
            for shard in self.shards:
                yield np.asarray(values(replace(shard).measured), dtype=np.float64)

        def stream() -> Iterator[Float64Array]:
            if held:
                yield from held
                return
            kept: list[Float64Array] | None = []
            for chunk in made():
                yield chunk
                if kept is not None:
                    kept.append(chunk)
                    kept = kept if sum(c.size for c in kept) <= HELD else None
            held.extend(kept or ())

        return stream
