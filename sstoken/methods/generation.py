"""Methods that judge a token by what the model generates without it."""

from typing import Literal

from sstoken.methods.base import Method, Params
from sstoken.methods.policies import Where
from sstoken.methods.tokens import Array, Tokens


class CriticalParams(Params):
    untried: Literal["drop", "keep"] = "drop"
    """Drop or keep the tokens that were not tried: those over the budget, and all of a problem answered wrongly."""


def _critical(tokens: Tokens, params: CriticalParams) -> Array:
    critical = tokens["current.critical"]
    return tokens.xp.where(tokens.xp.isnan(critical), float(params.untried == "keep"), critical)


METHODS = (
    Method(
        name="critical-tokens",
        family="generation",
        inputs=("current.critical",),
        formula="1 if every greedy continuation with the token replaced by its 2nd or 3rd candidate ends wrong",
        source="Critical Token Fine-tuning, 2025, arXiv 2510.10974; rule second-hand",
        score=_critical,
        policy=Where("keeps the critical tokens", lambda scores, tokens, params: scores > 0),
        params=CriticalParams,
        evidence="S",
        in_loop=False,
    ),
)
