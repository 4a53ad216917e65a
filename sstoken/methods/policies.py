"""Policies: from a method's scores to what is kept, and with which weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sstoken.methods.tokens import Array, Tokens


class Outcome(NamedTuple):
    """What a method decides about N tokens."""

    keep: Array
    """[N] bool: whether the token is learned."""
    weight: Array | None
    """[N] float64: what its loss is multiplied by; None: 1 where it is kept."""


@dataclass(frozen=True)
class Policy:
    """Base: decides token by token, from the scores alone."""

    text: str
    """For the table of methods."""

    @property
    def ranks(self) -> bool:
        """Whether it ranks the tokens of a unit against each other."""
        return False

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Decide about the tokens [N]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Top(Policy):
    """Keep the highest scores of each unit of the scope."""

    quota: Callable[[int, Any], int]
    """`quota(n, params)`: how many of n tokens are kept."""
    drop: bool = False
    """The highest are dropped instead, and the others kept."""
    negative: Callable[[int, Any], tuple[int, float]] | None = None
    """`negative(n, params)`: how many of those that follow get which weight; the others get 0."""

    @property
    def ranks(self) -> bool:
        """It does."""
        return True

    def quotas(self, num_tokens: int, params: Any) -> list[int]:
        """The ranks at which the outcome changes, of a unit of that size."""
        first = self.quota(num_tokens, params)
        if self.negative is None:
            return [first]
        return [first, min(num_tokens, first + self.negative(num_tokens, params)[0])]

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Rank the tokens of each unit."""
        quotas = [self.quotas(int(n), params) for n in tokens.counts]
        within = [tokens.top(scores, each) for each in zip(*quotas, strict=True)] if quotas else []
        if not within:
            within = [scores > 0] * (1 if self.negative is None else 2)  # no unit, no token
        return self.decide(within, scores, tokens, params)

    def decide(self, within: Sequence[Array], scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """From whether each token stands above each of `quotas`."""
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


@dataclass(frozen=True)
class Weight(Policy):
    """The score is the weight; a token of weight 0 is not kept."""

    text: str = "soft weights"
    of: Callable[[Array, Tokens, Any], Array] | None = None
    """`of(scores, tokens, params) -> [N]`; None: the score itself."""

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Take the score as the weight."""
        weight = scores if self.of is None else self.of(scores, tokens, params)
        return Outcome(weight != 0, weight)


@dataclass(frozen=True)
class Everything(Policy):
    """Keep every token."""

    text: str = "keeps every token"

    def apply(self, scores: Array, tokens: Tokens, params: Any) -> Outcome:
        """Keep them."""
        return Outcome(scores == scores, None)
