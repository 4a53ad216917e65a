"""`SelfModulation`: the settings of in-loop selection; `Schedule`: a value that changes during training."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from sstoken.errors import UsageError
from sstoken.in_loop.rule import CURRENT, CURRENT_ATTENTION, Rule, check_in_loop, column_of
from sstoken.methods import Denominator, Input, Method, get_method

_DEFAULT_DECAY = 0.99
_DEFAULT_EVERY = {"ema": 1, "snapshot": 100}


@dataclass(frozen=True)
class Schedule:
    """A value that moves from `start`, at the first step that selects, to `end`, at the last step of training."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"
    """`cosine` is half a period: slow at both ends."""

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
        UsageError: a value out of its range, or a method that cannot run in the loop.
    """

    rho: float | Schedule | None = None
    """Share of response tokens to keep, in (0, 1]. Short for `params={"rho": ...}`. None: the method's default, 0.6
    for ssToken."""
    gamma: float | Schedule | None = None
    """Weight of REL against attention, in [0, 1]. 0 needs no history loss, 1 no attention. Short for
    `params={"gamma": ...}`. None: 0.5."""
    layer: int | Literal["last"] = "last"
    """Decoder layer whose attention is measured, negative from the end. "last": the last with softmax attention; if
    weights are sharded before training, the last."""
    warmup_steps: int = 0
    """Optimizer steps at the start that train on every response token."""
    scope: Literal["sample", "turn", "batch"] | None = None
    """Rank tokens within each example, each turn, or the whole batch that goes through the model. None: the method's
    default; a method that ranks the whole dataset offline ranks the batch here."""
    history: Literal["scores", "base", "ema", "snapshot"] = "scores"
    """Source of the history losses: the dataset's column `history_loss` ("scores"), the base model under a LoRA
    adapter, a moving average of the weights, or the weights of at most `history_every` steps ago. All but "scores"
    cost a forward pass without gradients."""
    history_every: int | None = None
    """Optimizer steps between updates of the average (None: 1) or of the snapshot (None: 100)."""
    history_decay: float | None = None
    """Decay of the average, in (0, 1): `average = decay * average + (1 - decay) * weights`. None: 0.99."""
    offload_history: bool = False
    """Keep the average or the snapshot in CPU memory between forward passes."""
    method: str = "sstoken"
    """Selection or weighting method, as in `select`."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """The method's parameters; a number may be a `Schedule`."""
    denominator: Denominator | None = None
    """Average the loss over the kept tokens or over all response tokens. None: as the method was published."""

    def __post_init__(self) -> None:
        _one_of("history", self.history, ("scores", "base", "ema", "snapshot"))
        if self.scope is not None:
            _one_of("scope", self.scope, ("sample", "turn", "batch"))
        if self.denominator is not None:
            _one_of("denominator", self.denominator, ("kept", "response"))
        if self.layer != "last" and not isinstance(self.layer, int):
            raise UsageError(f"layer is {self.layer!r}; legal: 'last', or the number of a layer")
        if self.warmup_steps < 0:
            raise UsageError(f"warmup_steps is {self.warmup_steps}; it must be at least 0")
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
        for name in ("rho", "gamma"):
            if getattr(self, name) is not None and name in self.params:
                raise UsageError(f"{name} is given twice, also in params; give it once")
        check_in_loop(self.of, self.history)
        list(self._rules)  # reads the parameters

    @cached_property
    def of(self) -> Method:
        """The method itself."""
        return get_method(self.method)

    @property
    def _given(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rho", "gamma")}
        return {name: value for name, value in own.items() if value is not None} | dict(self.params)

    @property
    def _rules(self) -> Iterator[Rule]:
        """The rules at the first and the last step that selects."""
        yield self._rule_at(0.0)
        if any(isinstance(value, Schedule) for value in self._given.values()):
            yield self._rule_at(1.0)

    def _rule_at(self, progress: float) -> Rule:
        params = {k: v.at(progress) if isinstance(v, Schedule) else v for k, v in self._given.items()}
        scope = self.of.check_scope("global" if self.scope == "batch" else self.scope)
        return Rule(
            self.of, self.of.read_params(params), "batch" if scope == "global" else scope, self.denominator
        )

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The inputs that the method reads at some step, as `role.signal`."""
        return frozenset().union(*(rule.inputs for rule in self._rules))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that the dataset must have, such as `history_loss`."""
        if self.history != "scores":
            return ()
        return tuple(column_of(name) for name in self.of.inputs if name in self.inputs and _is_frozen(name))

    @cached_property
    def needs_history(self) -> bool:
        """Whether the method reads the history at some step."""
        return any(map(_is_frozen, self.inputs)) or any("@" in name for name in self.inputs)

    @property
    def needs_attention(self) -> bool:
        """Whether the method reads attention at some step."""
        return CURRENT_ATTENTION in self.inputs

    @property
    def keeps_all(self) -> bool:
        """Whether every step keeps all tokens."""
        return all(rule.keeps_all for rule in self._rules)

    @property
    def divides_late(self) -> bool:
        """Whether losses are divided by a number of kept tokens that is known only after the forward passes."""
        return any(rule.divides_late for rule in self._rules)

    @property
    def every(self) -> int:
        """Optimizer steps between updates of the average or snapshot."""
        return self.history_every or _DEFAULT_EVERY[self.history]

    @property
    def decay(self) -> float:
        """Decay of the average; 0 for a snapshot."""
        return self.history_decay or _DEFAULT_DECAY if self.history == "ema" else 0.0

    def record(self, num_steps: int) -> dict[str, Any]:
        """Return all that the masks of `num_steps` optimizer steps follow from, with defaults, for JSON."""
        rule = next(self._rules)
        found: dict[str, Any] = {"method": self.method, **rule.params.model_dump(mode="json")}
        schedules = {k: repr(v) for k, v in self._given.items() if isinstance(v, Schedule)}
        found |= schedules | {"scope": rule.scope, "denominator": rule.denominator}
        found |= {"warmup_steps": self.warmup_steps}
        found |= {"num_steps": num_steps} if schedules else {}
        found |= {"history": self.history} if self.needs_history else {}
        return found | ({"layer": self.layer} if self.needs_attention else {})

    def rule(self, step: int, num_steps: int) -> Rule:
        """Return the rule after `step` of `num_steps` optimizer steps, warm-up included.

        During the warm-up, that is `full`, which keeps every token.
        """
        if step < self.warmup_steps:
            full = get_method("full")
            return Rule(full, full.read_params({}), "sample")
        last = max(1, num_steps - 1 - self.warmup_steps)
        return self._rule_at(min(1.0, max(0, step - self.warmup_steps) / last))


def _is_frozen(name: str) -> bool:
    return Input(name).role != CURRENT


def _one_of(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise UsageError(f"{name} is {value!r}; legal: {', '.join(legal)}")
