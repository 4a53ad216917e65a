"""Methods that use the entropy of the distribution that predicts the token."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from sstoken.methods.base import Method, Params, Statistic
from sstoken.methods.excess_loss import KEEP_SHARE, Share
from sstoken.methods.policies import ABOVE_ZERO, Top, Weight, Where
from sstoken.methods.probability import probability
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import num_kept

_EAFT = "EAFT 2026, arXiv 2601.02151"
_TRL = "Wang et al. 2025, arXiv 2506.01939; TRL; an analogy for fine-tuning"


class EaftParams(Params):
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """The exponent."""


class EaftMaskParams(Params):
    quantile: Annotated[float, Field(ge=0, le=1)] = 0.15
    """The lower quantile."""


class ShareParams(Params):
    rho: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The share of response tokens to keep."""


class EksftParams(Params):
    share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share that each signal excludes."""
    combine: Literal["union", "intersection", "kl", "entropy"] = "union"
    """Exclude the tokens that either signal, both, or only the named one picks."""


class TypicalParams(Share):
    floor: Annotated[float, Field(gt=0)] = 0.1
    """Added to the variance, in nats squared, so that where the model is certain a small surprise is no outlier."""


def _pilot(tokens: Tokens, params: Params) -> Array:
    unsure = tokens["current.entropy"] <= tokens.statistics["entropy"]
    dropped = unsure & (probability(tokens) <= tokens.statistics["p"])
    return tokens.xp.where(dropped, 0.0, tokens.xp.ones_like(tokens["current.entropy"]))


def _above(tokens: Tokens, params: Params, *, quantile: str) -> Array:
    return tokens["current.entropy"] - tokens.statistics[quantile]


def _quantile(params: EaftMaskParams) -> float:
    return params.quantile


def _eksft(tokens: Tokens, params: EksftParams, *, kl: str, entropy: str) -> Array:
    by_kl = tokens.in_top(tokens[kl], lambda n: int(params.share * n))
    by_entropy = tokens.in_top(tokens[entropy], lambda n: int(params.share * n))
    chosen = {
        "union": by_kl | by_entropy,
        "intersection": by_kl & by_entropy,
        "kl": by_kl,
        "entropy": by_entropy,
    }[params.combine]
    return tokens.xp.where(chosen, 0.0, tokens.xp.ones_like(tokens[kl]))


def _entropy(tokens: Tokens, params: Params) -> Array:
    return tokens["current.entropy"]


def _typical(tokens: Tokens, params: TypicalParams) -> Array:
    """Minus the distance of the surprise from its expectation, the entropy, in standard deviations."""
    surprise = tokens["current.loss"] - tokens["current.entropy"]
    return -tokens.xp.abs(surprise) / tokens.xp.sqrt(tokens["current.varentropy"] + params.floor)


_method = partial(Method, family="entropy")
METHODS = (
    _method(
        name="eaft",
        inputs=("current.entropy_top20",),
        formula="(entropy_top20 / 3)^alpha",
        source=f"{_EAFT}; LLaMA-Factory, ymxyll/ms-swift-EAFT",
        score=lambda tokens, params: (tokens["current.entropy_top20"] / 3) ** params.alpha,
        policy=Weight(),
        params=EaftParams,
        evidence="A",
    ),
    _method(
        name="eaft-axolotl",
        inputs=("current.entropy_top20",),
        formula="entropy_top20^alpha",
        source=f"{_EAFT}; Axolotl, which does not divide by 3",
        score=lambda tokens, params: tokens["current.entropy_top20"] ** params.alpha,
        policy=Weight(),
        params=EaftParams,
        evidence="T",
        aliases=("eaft-in-axolotl",),
    ),
    _method(
        name="eaft-pilot",
        inputs=("current.entropy", "current.loss"),
        formula="0 where both the entropy and p are within their lowest quantile, 1 elsewhere",
        source=f"{_EAFT}, pilot study",
        score=_pilot,
        policy=ABOVE_ZERO,
        params=EaftMaskParams,
        scopes=("global",),
        statistics={
            "entropy": Statistic(_entropy, _quantile),
            "p": Statistic(lambda t, _: probability(t), _quantile),
        },
        evidence="F",
    ),
    _method(
        name="eaft-masked",
        inputs=("current.entropy",),
        formula="entropy - its lower quantile",
        source=f"{_EAFT}, Masked SFT",
        score=partial(_above, quantile="low"),
        policy=ABOVE_ZERO,
        params=EaftMaskParams,
        scopes=("global",),
        statistics={"low": Statistic(_entropy, _quantile)},
        evidence="F",
        aliases=("masked-sft",),
    ),
    _method(
        name="token-entropy",
        inputs=("current.entropy",),
        formula="entropy - its (1 - rho) quantile",
        source=_TRL,
        score=partial(_above, quantile="high"),
        policy=Where("keeps what is at least 0", lambda scores, tokens, params: scores >= 0),
        params=ShareParams,
        scopes=("global",),
        statistics={"high": Statistic(_entropy, lambda params: 1 - params.rho)},
        evidence="T",
        aliases=("80-20", "80-20-forking-tokens", "top-entropy"),
    ),
    _method(
        name="se-kd",
        inputs=("current.entropy",),
        formula="entropy of the student",
        source="SE-KD 2026, arXiv 2602.01395; almogtavor/SE-KD3x",
        score=_entropy,
        policy=Top("keeps the max(1, ceil(rho n)) highest", lambda n, p: max(1, num_kept(n, p.rho))),
        params=ShareParams,
        scopes=("sample", "turn", "global"),
        evidence="A",
    ),
    _method(
        name="eksft",
        inputs=("current.kl_at@history", "current.entropy_at"),
        formula="0 where KL(current || history) or the entropy is among the int(share * n) highest, 1 elsewhere; "
        "of the distribution AT the token, as published",
        source="EKSFT 2026, arXiv 2605.29303; MINE-USTC/EKSFT",
        score=partial(_eksft, kl="current.kl_at@history", entropy="current.entropy_at"),
        policy=ABOVE_ZERO,
        params=EksftParams,
        scopes=("sample", "turn"),
        evidence="A",
    ),
    _method(
        name="eksft-aligned",
        inputs=("current.kl@history", "current.entropy"),
        formula="as eksft, of the distribution that predicts the token",
        source="EKSFT 2026, arXiv 2605.29303, as presumably meant",
        score=partial(_eksft, kl="current.kl@history", entropy="current.entropy"),
        policy=ABOVE_ZERO,
        params=EksftParams,
        scopes=("sample", "turn"),
        evidence="F",
    ),
    _method(
        name="typical",
        inputs=("current.loss", "current.entropy", "current.varentropy"),
        formula="-|loss - entropy| / sqrt(varentropy + floor)",
        source="baseline: the tokens as surprising as the model expects; the deviation of locally typical sampling "
        "(Meister et al. 2022, arXiv 2202.00666) in standard deviations",
        score=_typical,
        policy=KEEP_SHARE,
        params=TypicalParams,
        scopes=("sample", "turn", "global"),
    ),
)
