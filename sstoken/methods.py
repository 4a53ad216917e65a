"""Every selection method: which signals it needs and the score that it ranks tokens by.

To add one: write a function from `Signals` to scores and enter it in `METHODS`. Nothing else changes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sstoken.errors import UsageError
from sstoken.selection import FloatArray, IntArray, minmax


@dataclass(frozen=True)
class Signals:
    """The measurements of some examples' response tokens, flat: N tokens (see `sstoken.selection`)."""

    offsets: IntArray
    """[E + 1]; where each example starts."""
    history_loss: FloatArray | None = None
    """[N], nats, of the history checkpoint."""
    current_loss: FloatArray | None = None
    """[N], nats, of the current checkpoint."""
    attention: FloatArray | None = None
    """[N], in [0, 1]: attention mass on the prompt."""
    seed: tuple[int, ...] = (0,)
    """What `random` draws from."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.offsets[-1])

    @property
    def rel(self) -> FloatArray | None:
        """Retrospective excess loss [N], nats: history minus current, positive where the model has learned."""
        if self.history_loss is None or self.current_loss is None:
            return None
        return self.history_loss - self.current_loss


@dataclass(frozen=True)
class Method:
    """One way to score tokens."""

    name: str
    signals: tuple[str, ...]
    """Which of `history_loss`, `current_loss`, `attention` it reads."""
    formula: str
    cost: str
    """What measuring its signals takes."""
    source: str
    score: Callable[[Signals, float], FloatArray]
    """`score(signals, gamma) -> [N]`; higher is kept first."""
    selective: bool = True
    """False: it keeps every token, whatever rho."""


def _given(values: FloatArray | None, name: str) -> FloatArray:
    if values is None:
        raise UsageError(f"the signal {name!r} is missing; score the checkpoint that gives it")
    return values


def sstoken_score(signals: Signals, gamma: float) -> FloatArray:
    """`gamma * minmax(rel) + (1 - gamma) * attention` (paper, equation 7)."""
    score = np.zeros(signals.num_tokens)
    if gamma > 0:
        score += gamma * minmax(_given(signals.rel, "rel"), signals.offsets)
    if gamma < 1:
        score += (1 - gamma) * _given(signals.attention, "attention")
    return score


def _random_score(signals: Signals, gamma: float) -> FloatArray:
    return np.random.default_rng(signals.seed).random(signals.num_tokens)


_PAPER = "ssToken, Qin et al. 2025, arXiv 2510.18250"
_TWO_PASSES = "one forward pass of the history and one of the current checkpoint"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="sstoken",
            signals=("history_loss", "current_loss", "attention"),
            formula="gamma * minmax(rel) + (1 - gamma) * attention",
            cost=_TWO_PASSES,
            source=_PAPER,
            score=sstoken_score,
        ),
        Method(
            name="rel",
            signals=("history_loss", "current_loss"),
            formula="rel = history_loss - current_loss",
            cost=_TWO_PASSES,
            source=_PAPER + " (gamma = 1)",
            score=lambda signals, gamma: _given(signals.rel, "rel"),
        ),
        Method(
            name="attention",
            signals=("attention",),
            formula="attention",
            cost="one forward pass of the current checkpoint",
            source=_PAPER + " (gamma = 0)",
            score=lambda signals, gamma: _given(signals.attention, "attention"),
        ),
        Method(
            name="loss",
            signals=("current_loss",),
            formula="current_loss",
            cost="one forward pass of the current checkpoint",
            source="baseline: the tokens that the model finds hardest",
            score=lambda signals, gamma: _given(signals.current_loss, "current_loss"),
        ),
        Method(
            name="random",
            signals=(),
            formula="uniform(0, 1), seeded",
            cost="none",
            source="baseline",
            score=_random_score,
        ),
        Method(
            name="full",
            signals=(),
            formula="0 (keeps every response token, whatever rho)",
            cost="none",
            source="baseline: ordinary fine-tuning",
            score=lambda signals, gamma: np.zeros(signals.num_tokens),
            selective=False,
        ),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; lists those there are.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"method {name!r} is not known; legal: {', '.join(METHODS)}") from None
