"""Methods that compare the losses of two checkpoints. `history` is the frozen one: base or reference."""

from functools import partial
from typing import Annotated

from pydantic import Field

from sstoken.methods.base import Method, Params
from sstoken.methods.policies import Top, Where
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import num_kept

Rho = Annotated[float, Field(gt=0, le=1)]
_PAPER = "ssToken, Qin et al. 2025, arXiv 2510.18250"


class Share(Params):
    rho: Rho = 0.6
    """The share of response tokens to keep."""


class SstokenParams(Share):
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The weight of REL against attention."""


class TossParams(Params):
    discard: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share of response tokens to drop."""


class ForgettingParams(Params):
    rho: Rho = 0.7
    """The share of response tokens to learn; the others are forgotten."""
    forget: Annotated[float, Field(ge=0)] = 0.25
    """Tokens to forget get minus this weight; the authors raise it from 0 to 0.25 during training."""


KEEP_SHARE = Top("keeps the ceil(rho n) highest", lambda n, p: num_kept(n, p.rho))


def sstoken_score(tokens: Tokens, params: SstokenParams) -> Array:
    """`gamma * minmax(rel) + (1 - gamma) * attention` (paper, equation 7)."""
    score = tokens.zeros()
    if params.gamma > 0:
        score = score + params.gamma * tokens.minmax(tokens.rel)
    if params.gamma < 1:
        score = score + (1 - params.gamma) * tokens["current.attention"]
    return score


_method = partial(Method, family="excess loss", inputs=("history.loss", "current.loss"))
METHODS = (
    _method(
        name="sstoken",
        inputs=("history.loss", "current.loss", "current.attention"),
        formula="gamma * minmax(rel) + (1 - gamma) * attention",
        source=_PAPER,
        score=sstoken_score,
        policy=KEEP_SHARE,
        params=SstokenParams,
        scopes=("sample", "turn", "global"),
        evidence="A",
    ),
    _method(
        name="rel",
        formula="rel = history_loss - current_loss",
        source=_PAPER + " (gamma = 1)",
        score=lambda tokens, params: tokens.rel,
        policy=KEEP_SHARE,
        params=Share,
        scopes=("sample", "turn", "global"),
        evidence="A",
        ignores=("gamma",),
    ),
    _method(
        name="rho-1",
        formula="current_loss - history_loss; history is the reference",
        source="Rho-1, Lin et al. 2024, arXiv 2404.07965; share and scope second-hand",
        score=lambda tokens, params: -tokens.rel,
        policy=KEEP_SHARE,
        params=Share,
        scopes=("global", "sample", "turn"),
        evidence="S",
    ),
    _method(
        name="token-cleaning",
        formula="history_loss - current_loss; history is the base, current the warmed-up reference",
        source="Token Cleaning, Pang et al. 2025, arXiv 2502.01968; UCSC-REAL/TokenCleaning",
        score=lambda tokens, params: tokens.rel,
        policy=Top("keeps the int(n * rho) highest", lambda n, p: int(n * p.rho)),
        params=Share,
        scopes=("global", "sample", "turn"),
        evidence="A",
        aliases=("token-cleaning-fixed",),
    ),
    _method(
        name="toss",
        formula="history_loss - current_loss; history is the utility model, current the safety-degraded one",
        source="TOSS 2026, arXiv 2603.01185; Polly-LYP/TOSS",
        score=lambda tokens, params: tokens.rel,
        policy=Top("drops the int(n * discard) highest", lambda n, p: int(n * p.discard), drop=True),
        params=TossParams,
        scopes=("global",),
        evidence="A",
    ),
    _method(
        name="forgetting",
        formula="history_loss - current_loss",
        source="Forgetting 2025, arXiv 2508.04329; AliTaheri2002/Forgetting-...",
        score=lambda tokens, params: tokens.rel,
        policy=Top(
            "weight 1 for the int(n * rho) highest, -forget for the int(n * (1 - rho)) after them",
            lambda n, p: int(n * p.rho),
            negative=lambda n, p: (int(n * (1 - p.rho)), -p.forget),
        ),
        params=ForgettingParams,
        scopes=("global",),
        evidence="A",
    ),
    _method(
        name="t3s",
        formula="history_loss - current_loss; current is the checkpoint of lowest training accuracy",
        source="T3S 2026, arXiv 2601.10348",
        score=lambda tokens, params: tokens.rel,
        policy=Where("drops what is above 0", lambda scores, tokens, params: scores <= 0),
        evidence="S",
    ),
)
