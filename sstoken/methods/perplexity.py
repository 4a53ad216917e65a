"""Methods that threshold a token's perplexity, exp(loss)."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from sstoken.methods.base import Method, Params
from sstoken.methods.policies import Where
from sstoken.methods.tokens import Array, Tokens

_SOURCE = "STM, Wu et al. 2025, arXiv 2501.14315; appier-research/robust-llm-finetunes"
_MOST_LOSS = 88.0
"""Nats; a larger loss counts as this one, whose perplexity is a float32."""
_NOT_USABLE = 88888.0
"""The perplexity that the authors assign to a token that tuning made less likely."""


class Tau(Params):
    tau: Annotated[float, Field(allow_inf_nan=False)] = 2.5
    """The highest perplexity kept; 0 or less keeps every token."""


class StmParams(Tau):
    drop: Literal["highest", "lowest"] = "highest"
    """Drop the tokens above tau, or those below it, as in the authors' ablation."""


def _perplexity(tokens: Tokens, role: str) -> Array:
    return tokens.xp.exp(tokens.xp.clip(tokens[f"{role}.loss"], None, _MOST_LOSS))


def _at_most(scores: Array, tokens: Tokens, params: Tau) -> Array:
    return (scores <= params.tau) | (params.tau <= 0)


def _stm(scores: Array, tokens: Tokens, params: StmParams) -> Array:
    return scores >= params.tau if params.drop == "lowest" else _at_most(scores, tokens, params)


def _stm_dpf(tokens: Tokens, params: Tau) -> Array:
    return tokens.xp.where(tokens.rel < 0, _NOT_USABLE, _perplexity(tokens, "history"))


def _dpf(tokens: Tokens, params: Tau) -> Array:
    return _perplexity(tokens, "current") - _perplexity(tokens, "history")


_method = partial(Method, family="perplexity")
METHODS = (
    _method(
        name="stm",
        inputs=("history.loss",),
        formula="exp(history_loss)",
        source=_SOURCE,
        score=lambda tokens, params: _perplexity(tokens, "history"),
        policy=Where("keeps what is at most tau", _stm),
        params=StmParams,
        evidence="A",
    ),
    _method(
        name="stm-dpf",
        inputs=("history.loss", "current.loss"),
        formula="exp(history_loss), or 88888 where current_loss > history_loss",
        source=_SOURCE,
        score=_stm_dpf,
        policy=Where("keeps what is at most tau", _at_most),
        params=Tau,
        evidence="A",
    ),
    _method(
        name="dpf",
        inputs=("history.loss", "current.loss"),
        formula="exp(current_loss) - exp(history_loss)",
        source=_SOURCE,
        score=_dpf,
        policy=Where("keeps what is at most tau", _at_most),
        params=Tau,
        evidence="A",
    ),
)
