"""Methods that use the token's rank in the distribution that predicts it."""

import math

from sstoken.methods.base import Method, Params
from sstoken.methods.policies import Weight
from sstoken.methods.probability import probability
from sstoken.methods.tokens import Array, Tokens

_SOURCE = "RankTuner 2026, arXiv 2602.01745"


def _code(tokens: Tokens, params: Params) -> Array:
    xp, p = tokens.xp, probability(tokens)
    bits = tokens["current.entropy"] / math.log(2)
    expected = xp.where(bits >= 2, 0.25 * 2**bits + 1, 2 - tokens["current.max_prob"])  # a lower bound
    rank = tokens["current.rank"] + tokens["current.ties"] + 1
    exponent = 1 / xp.log2(xp.maximum(expected, rank) + 1) ** 2
    return p * xp.clip(p * expected, 1e-6, None) ** (-exponent)


def _paper(tokens: Tokens, params: Params) -> Array:
    xp = tokens.xp
    expected = 1 / xp.log2(tokens["current.expected_rank"] + 1)
    return probability(tokens) * 2 ** (expected - 1 / xp.log2(tokens["current.rank"] + 2))


METHODS = (
    Method(
        name="ranktuner",
        family="rank",
        inputs=("current.loss", "current.entropy", "current.max_prob", "current.rank", "current.ties"),
        formula="p * max(p s, 1e-6)^(-1 / log2(max(s, R) + 1)^2), s a lower bound of the expected rank",
        source=f"{_SOURCE}; code as stored",
        score=_code,
        policy=Weight(),
        evidence="A",
        aliases=("ranktuner-code",),
    ),
    Method(
        name="ranktuner-paper",
        family="rank",
        inputs=("current.loss", "current.expected_rank", "current.rank"),
        formula="p * 2^(f(E[R]) - f(R)), f(x) = 1 / log2(x + 1)",
        source=f"{_SOURCE}; the paper's form, from notes",
        score=_paper,
        policy=Weight(),
        evidence="S",
    ),
)
