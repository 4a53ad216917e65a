"""Policies: from a method's scores to a keep mask and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sstoken.methods.tokens import Array, Tokens


class Outcome(NamedTuple):
    """A method's decision about N tokens."""

    keep: Array
    """[N] bool: whether the token is kept."""
    weight: Array | None
    """[N] float64: what the token's loss is multiplied by; None: 1 if it is kept, else 0."""


@dataclass(frozen=True)
class Policy:
    """Base class. Only a `Top` may rank tokens against one another; all others decide about each token alone."""

    text: str
    """What it does, for the table of methods."""

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Decide about N tokens, given their scores [N]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Top(Policy):
    """Keep the highest scores of each unit of the scope."""

    quota: Callable[[int, Any], int]
    """`quota(n, params)`: how many of n tokens to keep."""
    drop: bool = False
    """Drop the highest instead, and keep the others."""
    negative: Callable[[int, Any], tuple[int, float]] | None = None
    """`negative(n, params)`: how many tokens after the quota get a weight, and which; all others get 0."""

    def quotas(self, num_tokens: int, params: Any) -> list[int]:
        """The ranks at which the outcome changes, in a unit of `num_tokens`."""
        first = self.quota(num_tokens, params)
        if self.negative is None:
            return [first]
        return [first, min(num_tokens, first + self.negative(num_tokens, params)[0])]

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Rank the tokens of each unit, and decide by rank."""
        quotas = [self.quotas(int(n), params) for n in tokens.counts]
        number = 1 if self.negative is None else 2
        within = [tokens.top(scores, [each[i] for each in quotas]) for i in range(number)]
        return self.decide(within, tokens, params)

    def decide(self, within: Sequence[Array], tokens: Tokens, params: Any) -> Outcome:
        """Decide, given for each of `quotas` a mask [N] of the tokens within it."""
        if self.negative is None:
            return Outcome(~within[0] if self.drop else within[0], None)
        xp, below = tokens.xp, self.negative(1, params)[1]
        weight = xp.where(within[0], 1.0, xp.where(within[1], below, 0.0))
        return Outcome(within[0], weight)


@dataclass(frozen=True)
class Where(Policy):
    """Keep the tokens whose score passes a test."""

    test: Callable[[Array, Tokens, Any], Array]
    """`test(scores, tokens, params) -> [N] bool`."""

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Test each token."""
        return Outcome(self.test(scores, tokens, params), None)


ABOVE_ZERO = Where("keeps what is above 0", lambda scores, tokens, params: scores > 0)


@dataclass(frozen=True)
class Weight(Policy):
    """The score is the weight; a token of weight 0 is not kept."""

    text: str = "soft weights"
    of: Callable[[Array, Tokens, Any], Array] | None = None
    """`of(scores, tokens, params) -> [N]`: the weights; None: the scores themselves."""

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Use the scores as weights."""
        weight = scores if self.of is None else self.of(scores, tokens, params)
        return Outcome(weight != 0, weight)


@dataclass(frozen=True)
class Everything(Policy):
    """Keep every token."""

    text: str = "keeps every token"

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Keep all."""
        return Outcome(scores == scores, None)
