"""Methods that shorten: a prefix of the sequence, or its easiest or hardest tokens."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from sstoken.errors import UsageError
from sstoken.methods.base import Method, Params
from sstoken.methods.excess_loss import KEEP_SHARE, Share
from sstoken.methods.policies import ABOVE_ZERO
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import num_kept


class PrefixParams(Params):
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of it to keep."""
    of: Literal["sequence", "response"] = "sequence"
    """Cut the whole sequence, prompt included, as published; or the response alone."""


class TrimmingParams(Share):
    keep: Literal["high", "low"] = "high"
    """Keep the tokens with the highest losses, or those with the lowest."""


def _prefix(tokens: Tokens, params: PrefixParams) -> Array:
    """Tokens left until the prefix ends, counting this one; 0 or less is outside it."""
    if params.of == "response":
        ends = np.array([num_kept(int(n), params.share) for n in np.diff(tokens.offsets)], dtype=np.float64)
        return tokens.like(ends)[tokens.example] - tokens.index
    if tokens.positions is None or tokens.lengths is None:
        raise UsageError(
            "method 'prefix' needs the tokens' positions, which are not known here; set of=response"
        )
    ends = np.array([max(1, int(n * params.share)) for n in tokens.lengths], dtype=np.float64)
    return tokens.like(ends)[tokens.example] - tokens.positions


def _trimming(tokens: Tokens, params: TrimmingParams) -> Array:
    return tokens["current.loss"] if params.keep == "high" else -tokens["current.loss"]


METHODS = (
    Method(
        name="prefix",
        family="length",
        inputs=(),
        formula="the first max(1, int(share * length)) tokens of the sequence",
        source="Chen et al. 2025, arXiv 2512.21002; weiruichen01/distilling-the-essence",
        score=_prefix,
        policy=ABOVE_ZERO,
        params=PrefixParams,
        evidence="A",
    ),
    Method(
        name="trimming",
        family="length",
        inputs=("current.loss",),
        formula="current_loss, or minus it",
        source="loss trimming, a common baseline",
        score=_trimming,
        policy=KEEP_SHARE,
        params=TrimmingParams,
        scopes=("sample", "turn", "global"),
        evidence="F",
        aliases=("trim",),
    ),
)
