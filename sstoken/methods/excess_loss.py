"""Methods that compare the losses of two checkpoints. `history` is the frozen one: base or reference."""

from typing import Annotated

from pydantic import Field

from sstoken.methods.base import Method, Params
from sstoken.methods.policies import Top
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import num_kept

Rho = Annotated[float, Field(gt=0, le=1)]
_PAPER = "ssToken, Qin et al. 2025, arXiv 2510.18250"


class Share(Params):
    """How much is kept."""

    rho: Rho = 0.6
    """The share of response tokens to keep."""


class SstokenParams(Share):
    """ssToken's."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The weight of REL against attention."""


KEEP_SHARE = Top("keeps the ceil(rho n) highest", lambda n, p: num_kept(n, p.rho))


def sstoken_score(tokens: Tokens, params: SstokenParams) -> Array:
    """`gamma * minmax(rel) + (1 - gamma) * attention` (paper, equation 7)."""
    score = tokens.zeros()
    if params.gamma > 0:
        score = score + params.gamma * tokens.minmax(tokens.rel)
    if params.gamma < 1:
        score = score + (1 - params.gamma) * tokens["current.attention"]
    return score


METHODS = (
    Method(
        name="sstoken",
        family="excess loss",
        inputs=("history.loss", "current.loss", "current.attention"),
        formula="gamma * minmax(rel) + (1 - gamma) * attention",
        source=_PAPER,
        score=sstoken_score,
        policy=KEEP_SHARE,
        params=SstokenParams,
        scopes=("sample", "turn", "global"),
        evidence="A",
    ),
    Method(
        name="rel",
        family="excess loss",
        inputs=("history.loss", "current.loss"),
        formula="rel = history_loss - current_loss",
        source=_PAPER + " (gamma = 1)",
        score=lambda tokens, params: tokens.rel,
        policy=KEEP_SHARE,
        params=Share,
        scopes=("sample", "turn", "global"),
        evidence="A",
        ignores=("gamma",),
    ),
)
