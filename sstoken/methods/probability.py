"""Methods that use the token's own probability p = exp(-loss)."""

import math
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from sstoken.methods.base import Method, Params, Statistic
from sstoken.methods.policies import Weight, Where
from sstoken.methods.tokens import Array, Tokens

Share = Annotated[float, Field(ge=0, le=1)]


class ProfitParams(Params):
    direction: Literal["higher", "lower", "middle"] = "higher"
    """Keep probabilities of at least tau, of at most tau, or between tau and upper."""
    tau: Share = 0.1
    """The threshold, inclusive."""
    upper: Share = 1.0
    """The upper threshold of `middle`."""

    @model_validator(mode="after")
    def _ordered(self) -> "ProfitParams":
        if self.direction == "middle" and self.upper < self.tau:
            raise ValueError(
                f"upper is {self.upper:g}, below tau, {self.tau:g}; legal is {self.tau:g} <= upper <= 1"
            )
        return self


class PriftMassParams(Params):
    tau: Share = 0.5
    """Keep a token if at least this much probability mass lies below it."""


class InfosftParams(Params):
    P: Annotated[float, Field(gt=0.5, lt=1)] = 0.93
    """The weight is 0 from this probability on."""


class TalrParams(Params):
    median: Literal["sequence", "token"] = "sequence"
    """tau is the median of the sequences' mean losses, or of all tokens' losses."""
    w_min: Share = 0.01
    """The smallest weight."""


class PQParams(Params):
    form: Literal["power", "top", "bottom"] = "power"
    """Weight p^q; or weight 1 if p is at least tau (top) or at most tau (bottom), else 0."""
    q: Annotated[float, Field(gt=0)] = 1.0
    """The exponent."""
    tau: Share = 0.1
    """The threshold of `top` and `bottom`, inclusive."""


class XtfParams(Params):
    tau: Share = 0.05
    """Keep a token if 1 - p is at least this."""


class AsftParams(Params):
    kl: Annotated[float, Field(ge=0)] = 0.1
    """The weight of the KL penalty; 0.05 in the authors' README."""
    loss: Literal["dft", "sft"] = "dft"
    """The loss to which the penalty is added: p * loss, or the plain loss."""


def probability(tokens: Tokens, role: str = "current") -> Array:
    """exp(-loss), [N]."""
    return tokens.xp.exp(-tokens[f"{role}.loss"])


def _profit(p: Array, tokens: Tokens, params: ProfitParams) -> Array:
    if params.direction == "lower":
        return p <= params.tau
    return (p >= params.tau) & ((p <= params.upper) | (params.direction == "higher"))


def _mass_below(tokens: Tokens, params: Params) -> Array:
    tied = tokens["history.ties"] * probability(tokens, "history")
    return 1 - tokens["history.mass_above"] - tied


def _infosft(tokens: Tokens, params: InfosftParams) -> Array:
    xp, p = tokens.xp, probability(tokens)
    below = xp.clip(p, None, params.P)  # from P on the weight is 0; p = 1 has no logit
    logit = -tokens["current.loss"] - xp.log1p(-below)
    scaled = 1 - logit / (math.log(params.P) - math.log1p(-params.P))
    return xp.where(p >= params.P, 0.0, p * xp.clip(scaled, 0, None))


def _losses(tokens: Tokens, params: TalrParams) -> Array:
    loss = tokens["current.loss"]
    if params.median == "token":
        return loss
    return tokens.mean(loss)[tokens.like(np.flatnonzero(np.diff(tokens.offsets)))]


def _talr(tokens: Tokens, params: TalrParams) -> Array:
    tau = max(tokens.statistics["tau"], 1e-12)  # if half of the losses are 0, only a loss of 0 has weight 1
    return tokens.xp.clip(tokens.xp.exp(-tokens["current.loss"] / tau), params.w_min, 1)


def _deft(tokens: Tokens, params: Params) -> Array:
    a = tokens["current.sum_p2"]
    return tokens.xp.exp(-tokens["current.loss"] * a) * a / (a + 1e-6)


def _cayley(tokens: Tokens, params: Params) -> Array:
    f, d = tokens.statistics["mean_p"] / 2, 1 - probability(tokens) + 1e-8
    a = tokens.xp.clip(f + (1 - f) * (1 - d) / (1 + d + 1e-8), 0.001, 1)
    return tokens.xp.exp(-tokens["current.loss"] * a) * a / (a + 1e-8)


def _power(tokens: Tokens, params: PQParams) -> Array:
    p = probability(tokens)
    if params.form == "power":
        return p**params.q
    kept = p >= params.tau if params.form == "top" else p <= params.tau
    return tokens.xp.where(kept, tokens.xp.ones_like(p), 0.0)


def _asft(tokens: Tokens, params: AsftParams) -> Array:
    loss = tokens["current.loss"]
    weight = probability(tokens) if params.loss == "dft" else 1
    return weight * loss + params.kl * tokens["current.reverse_kl@history"]


def _asft_weight(scores: Array, tokens: Tokens, params: AsftParams) -> Array:
    p = probability(tokens)
    return p if params.loss == "dft" else tokens.xp.ones_like(p)


_method = partial(Method, family="probability")
METHODS = (
    _method(
        name="dft",
        inputs=("current.loss",),
        formula="p",
        source="DFT, Wu et al. 2025, arXiv 2508.05629; yongliang-wu/DFT; LLaMA-Factory, TRL",
        score=lambda tokens, params: probability(tokens),
        policy=Weight(),
        evidence="A",
    ),
    _method(
        name="asft",
        inputs=("current.loss", "current.reverse_kl@history"),
        formula="p * loss + kl * KL(history || current); the weight is p, the value is in `score`",
        source="ASFT 2025, arXiv 2509.23753; zhuchichi56/ASFT",
        score=_asft,
        policy=Weight("soft weights; the penalty is no weight", of=_asft_weight),
        params=AsftParams,
        evidence="A",
        in_loop=False,
    ),
    _method(
        name="prift-prob",
        inputs=("history.loss",),
        formula="p of the pretrained model",
        source="PriFT 2026, arXiv 2606.09396; wang-kee/PriFT",
        score=lambda tokens, params: probability(tokens, "history"),
        policy=Weight(),
        evidence="A",
    ),
    _method(
        name="prift-mass",
        inputs=("history.loss", "history.mass_above", "history.ties"),
        formula="1 - mass_above - ties * p: the mass of strictly less likely tokens",
        source="PriFT 2026, arXiv 2606.09396; wang-kee/PriFT",
        score=_mass_below,
        policy=Where("keeps what is at least tau", lambda scores, tokens, params: scores >= params.tau),
        params=PriftMassParams,
        evidence="A",
    ),
    _method(
        name="profit",
        inputs=("current.loss",),
        formula="p",
        source="ProFit 2026, arXiv 2601.09195; Utaotao/ProFit",
        score=lambda tokens, params: probability(tokens),
        policy=Where("keeps what is at least tau, at most tau, or between", _profit),
        params=ProfitParams,
        evidence="A",
        denominator="response",
    ),
    _method(
        name="infosft",
        inputs=("current.loss",),
        formula="p * max(0, 1 - logit(p) / logit(P))",
        source="InfoSFT 2026, arXiv 2605.14967; Helloworld10011/InfoSFT",
        score=_infosft,
        policy=Weight(),
        params=InfosftParams,
        evidence="A",
    ),
    _method(
        name="talr",
        inputs=("current.loss",),
        formula="max(p^(1 / tau), w_min), tau the median loss",
        source="TALR 2025, arXiv 2509.20758; formula from notes",
        score=_talr,
        policy=Weight(),
        params=TalrParams,
        scopes=("global",),
        statistics={"tau": Statistic(_losses, lambda params: 0.5)},
        evidence="S",
    ),
    _method(
        name="deft",
        inputs=("current.loss", "current.sum_p2"),
        formula="p^a * a / (a + 1e-6), a = sum of p^2 over the vocabulary",
        source="DEFT 2026, arXiv 2602.11424; luludus/DEFT",
        score=_deft,
        policy=Weight(),
        evidence="A",
    ),
    _method(
        name="cayley",
        inputs=("current.loss",),
        formula="p^a * a / (a + 1e-8), a the Cayley transform of p with f = mean(p) / 2",
        source="DEFT 2026, arXiv 2602.11424; luludus/DEFT",
        score=_cayley,
        policy=Weight(),
        scopes=("global",),
        statistics={"mean_p": Statistic(lambda tokens, params: probability(tokens))},
        evidence="A",
    ),
    _method(
        name="p-q",
        inputs=("current.loss",),
        formula="p^q; or 1 where p >= tau, or where p <= tau",
        source="Beyond Log Likelihood 2025, arXiv 2510.00526; GaotangLi/Beyond-Log-Likelihood",
        score=_power,
        policy=Weight(),
        params=PQParams,
        evidence="A",
        aliases=("p-q-family", "bll"),
    ),
    _method(
        name="chord-phi",
        inputs=("current.loss",),
        formula="p * (1 - p)",
        source="CHORD 2025, arXiv 2508.11408; ms-swift",
        score=lambda tokens, params: probability(tokens) * (1 - probability(tokens)),
        policy=Weight(),
        evidence="T",
    ),
    _method(
        name="xtf-kn",
        inputs=("history.loss",),
        formula="1 - p of the base model; the KN part of XTF alone",
        source="XTF 2026, arXiv 2602.14536; from notes",
        score=lambda tokens, params: 1 - probability(tokens, "history"),
        policy=Where("drops what is below tau", lambda scores, tokens, params: scores >= params.tau),
        params=XtfParams,
        evidence="S",
        aliases=("xtf", "xtf-kn-part"),
    ),
)
