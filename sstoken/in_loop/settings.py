"""`SelfModulation`: the settings of in-loop selection; `Schedule`: a value that changes during training."""

import math
from dataclasses import dataclass
from typing import Literal

from sstoken.errors import UsageError
from sstoken.selection import check_ratio

_DEFAULT_DECAY = 0.99
_DEFAULT_EVERY = {"ema": 1, "snapshot": 100}


@dataclass(frozen=True)
class Schedule:
    """Moves from `start`, at the first step that selects, to `end`, at the last step of training."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"
    """cosine: half a period, slow at both ends."""

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise UsageError(f"schedule {self.shape!r} is not known; legal: linear, cosine")

    def at(self, progress: float) -> float:
        """Return the value at `progress` in [0, 1], rounded to 6 decimals."""
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return round(self.start + (self.end - self.start) * share, 6)


@dataclass(frozen=True)
class SelfModulation:
    """The settings of in-loop selection.

    Raises:
        UsageError: a value out of its range.
    """

    rho: float | Schedule = 0.6
    """Selection ratio: the share of response tokens kept, in (0, 1]."""
    gamma: float | Schedule = 0.5
    """Balance: the weight of REL against attention, in [0, 1]. 0 needs no history loss, 1 no attention."""
    layer: int | Literal["last"] = "last"
    """Decoder layer whose attention is measured; negative counts from the end. "last": the last with softmax
    attention; where weights are sharded before training, the last."""
    warmup_steps: int = 0
    """Optimizer steps at the start that train on every response token."""
    scope: Literal["sample", "batch"] = "sample"
    """Keep the best share of each example, or of all the examples that go through the model together."""
    history: Literal["scores", "base", "ema", "snapshot"] = "scores"
    """Source of the history losses: the dataset's column `history_loss` ("scores"), the base model under a LoRA
    adapter, a moving average of the weights, or the weights of `history_every` or fewer steps ago. All but "scores"
    cost a forward pass without gradients."""
    history_every: int | None = None
    """Optimizer steps between updates of the average (None: 1) or of the snapshot (None: 100)."""
    history_decay: float | None = None
    """Decay of the average, in (0, 1): `average = decay * average + (1 - decay) * weights`. None: 0.99."""
    offload_history: bool = False
    """Keep the average or the snapshot in CPU memory between forward passes."""

    def __post_init__(self) -> None:
        for rho in _ends(self.rho):
            check_ratio(rho)
        for gamma in _ends(self.gamma):
            if not (isinstance(gamma, int | float) and 0 <= gamma <= 1):
                raise UsageError(f"gamma is {gamma}; legal is 0 <= gamma <= 1 (the weight of REL)")
        if self.warmup_steps < 0:
            raise UsageError(f"warmup_steps is {self.warmup_steps}; it must be at least 0")
        _one_of("scope", self.scope, ("sample", "batch"))
        _one_of("history", self.history, ("scores", "base", "ema", "snapshot"))
        kept = self.history in _DEFAULT_EVERY
        if not kept and (self.history_every is not None or self.offload_history):
            raise UsageError(
                f"history is {self.history!r}; history_every and offload_history belong to 'ema' and 'snapshot'"
            )
        if self.history != "ema" and self.history_decay is not None:
            raise UsageError(f"history is {self.history!r}; history_decay belongs to 'ema'")
        if self.history_every is not None and self.history_every < 1:
            raise UsageError(f"history_every is {self.history_every}; it must be at least 1")
        if self.history_decay is not None and not 0 < self.history_decay < 1:
            raise UsageError(f"history_decay is {self.history_decay}; it must lie between 0 and 1")

    @property
    def needs_history(self) -> bool:
        """Whether REL has weight at any step."""
        return any(_ends(self.gamma))

    @property
    def needs_attention(self) -> bool:
        """Whether attention has weight at any step."""
        return any(gamma != 1 for gamma in _ends(self.gamma))

    @property
    def every(self) -> int:
        """Optimizer steps between updates of the average or snapshot."""
        return self.history_every or _DEFAULT_EVERY[self.history]

    @property
    def decay(self) -> float:
        """Decay of the average; 0 for a snapshot."""
        return self.history_decay or _DEFAULT_DECAY if self.history == "ema" else 0.0

    def at(self, step: int, num_steps: int) -> tuple[float, float]:
        """Return rho and gamma at an optimizer step.

        Args:
            step: finished optimizer steps.
            num_steps: optimizer steps of the whole training, including the warm-up.

        Returns:
            rho (1 during the warm-up) and gamma.
        """
        last = max(1, num_steps - 1 - self.warmup_steps)
        progress = min(1.0, max(0, step - self.warmup_steps) / last)
        rho = 1.0 if step < self.warmup_steps else _value(self.rho, progress)
        return rho, _value(self.gamma, progress)


def _ends(setting: float | Schedule) -> tuple[float, ...]:
    return (setting.start, setting.end) if isinstance(setting, Schedule) else (setting,)


def _value(setting: float | Schedule, progress: float) -> float:
    return setting.at(progress) if isinstance(setting, Schedule) else setting


def _one_of(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise UsageError(f"{name} is {value!r}; legal: {', '.join(legal)}")
