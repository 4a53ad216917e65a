"""Baselines: one signal alone, chance, every token."""

from functools import partial

import numpy as np

from sstoken.methods.base import Method, Params
from sstoken.methods.excess_loss import KEEP_SHARE, Share
from sstoken.methods.policies import Everything
from sstoken.methods.tokens import Array, Tokens


def _random(tokens: Tokens, params: Params) -> Array:
    return tokens.like(np.random.default_rng(tokens.seed).random(tokens.num_tokens))


_ranking = partial(
    Method,
    family="baselines",
    policy=KEEP_SHARE,
    params=Share,
    scopes=("sample", "turn", "global"),
    ignores=("gamma",),
)
METHODS = (
    _ranking(
        name="attention",
        inputs=("current.attention",),
        formula="attention",
        source="ssToken, Qin et al. 2025, arXiv 2510.18250 (gamma = 0)",
        score=lambda tokens, params: tokens["current.attention"],
        evidence="A",
    ),
    _ranking(
        name="loss",
        inputs=("current.loss",),
        formula="current_loss",
        source="baseline: the tokens that the model finds hardest",
        score=lambda tokens, params: tokens["current.loss"],
    ),
    _ranking(
        name="random",
        inputs=(),
        formula="uniform(0, 1), seeded",
        source="baseline",
        score=_random,
    ),
    Method(
        name="full",
        family="baselines",
        inputs=(),
        formula="0 (keeps every response token, whatever rho)",
        source="baseline: ordinary fine-tuning",
        score=lambda tokens, params: tokens.zeros(),
        policy=Everything(),
        ignores=("rho", "gamma", "scope"),
    ),
)
