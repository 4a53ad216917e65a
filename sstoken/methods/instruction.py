"""Methods that compare a response's loss with and without its prompt."""

from typing import Annotated

from pydantic import Field

from sstoken.methods.base import Method, Params, Statistic
from sstoken.methods.policies import Where
from sstoken.methods.tokens import Array, Tokens


class TshirtParams(Params):
    """Parameters of T-SHIRT."""

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of tokens that count."""


def _difference(tokens: Tokens, params: Params) -> Array:
    return tokens["current.loss"] - tokens["current.loss_unconditional"]


def _sizes(tokens: Tokens, params: Params) -> Array:
    size = abs(_difference(tokens, params))
    return size[size == size]  # a response's first token has no unconditional loss


def _counts(scores: Array, tokens: Tokens, params: Params) -> Array:
    return abs(scores) > tokens.statistics["q"]


METHODS = (
    Method(
        name="t-shirt",
        family="instruction",
        inputs=("current.loss", "current.loss_unconditional"),
        formula="loss - loss_unconditional",
        source="T-SHIRT, Fu et al. 2025, arXiv 2506.01317; Dynamite321/T-SHIRT; its tokens, see also --example",
        score=_difference,
        policy=Where("keeps absolute values above their 1 - ratio quantile", _counts),
        params=TshirtParams,
        scopes=("global",),
        statistics={"q": Statistic(_sizes, lambda params: 1 - params.ratio)},
        evidence="A",
        aliases=("tshirt",),
    ),
)
