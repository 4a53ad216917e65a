"""Methods that weight by the likelihood ratio of two checkpoints, p_current / p_history = exp(rel)."""

from functools import partial
from typing import Annotated

from pydantic import Field

from sstoken.methods.base import Method, Params
from sstoken.methods.policies import Weight
from sstoken.methods.tokens import Array, Tokens

_IW_SFT = "iw-SFT 2025, arXiv 2507.12856; emmyqin/iw_sft"


class IwSftParams(Params):
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the mean."""
    most: Annotated[float, Field(gt=0)] = 16.0
    """The largest weight."""


class IwSftTokenParams(Params):
    clip: Annotated[float, Field(ge=0, le=1)] = 0.8
    """The ratio is clipped to 1 - clip and 1 + clip."""


class PsftParams(Params):
    clip: Annotated[float, Field(ge=0)] = 0.28
    """A ratio above 1 + clip gets weight 0."""


def _sequence(tokens: Tokens, params: IwSftParams) -> Array:
    weight = tokens.xp.exp(params.temperature * tokens.mean(tokens.rel))
    return tokens.xp.clip(weight, None, params.most)[tokens.example]


def _token(tokens: Tokens, params: IwSftTokenParams) -> Array:
    return tokens.xp.clip(tokens.xp.exp(tokens.rel), 1 - params.clip, 1 + params.clip)


def _psft(tokens: Tokens, params: PsftParams) -> Array:
    ratio = tokens.xp.exp(tokens.rel)
    return tokens.xp.where(ratio <= 1 + params.clip, ratio, 0.0)


_method = partial(Method, family="likelihood ratio", inputs=("history.loss", "current.loss"))
METHODS = (
    _method(
        name="iw-sft",
        formula="min(exp(temperature * mean over the example of rel), most)",
        source=_IW_SFT,
        score=_sequence,
        policy=Weight("soft weights, one an example"),
        params=IwSftParams,
        scopes=("sample",),
        evidence="A",
    ),
    _method(
        name="iw-sft-token",
        formula="exp(rel) within 1 - clip and 1 + clip",
        source=f"{_IW_SFT}, unused branch",
        score=_token,
        policy=Weight(),
        params=IwSftTokenParams,
        evidence="A",
        aliases=("iw-sft-per-token",),
    ),
    _method(
        name="psft",
        formula="exp(rel), 0 above 1 + clip; history is the old policy",
        source="PSFT 2025, arXiv 2508.17784; zwhong714/PSFT; meant for the loop",
        score=_psft,
        policy=Weight(),
        params=PsftParams,
        evidence="F",
    ),
)
