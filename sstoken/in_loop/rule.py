"""What a method needs in the training loop, and what it decides there.

The methods are those of `select`, run on tensors instead of arrays. The role `current` is the model in training; every
other role is the history: columns of the dataset, or a model.

Shapes: N response tokens, U units of the scope.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sstoken.errors import UsageError
from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.methods import (
    Array,
    Denominator,
    Everything,
    Input,
    Method,
    Outcome,
    Params,
    Tokens,
    Top,
    Weight,
)
from sstoken.signals import SIGNALS, get_signal

CURRENT = "current"
"""The role of the model in training."""
CURRENT_ATTENTION = f"{CURRENT}.attention"


def column_of(name: str) -> str:
    """Return the dataset column that holds an input: `history_loss` for `history.loss`."""
    given = Input(name)
    return f"{given.role}_{given.signal}"


def check_in_loop(method: Method, history: str) -> None:
    """Refuse a method that cannot run in a training loop with this `SelfModulation.history`.

    Raises:
        UsageError: gives the method and the reason.
    """
    reason = next(_reasons(method, history), None)
    if reason:
        raise UsageError(f"in-loop selection: method {method.name!r} cannot run in the loop: {reason}")


def _reasons(method: Method, history: str) -> Iterator[str]:
    frozen = [role for role in method.roles if role != CURRENT]
    for name in method.inputs:
        given = Input(name)
        base, _, other = given.signal.partition("@")
        if base not in SIGNALS:
            yield f"{name} is not measured by a training step; select offline"
            continue
        needs = get_signal(given.signal).needs
        if given.role != CURRENT:
            if history != "scores" and needs != "distribution":
                yield f"history {history!r} cannot provide {given.signal}; use history 'scores', whose columns can"
        elif needs == "second pass":
            yield f"{name} needs another pass over the data at every step; select offline"
        elif needs == "second checkpoint" and history == "scores":
            yield (
                f"{name} compares whole distributions with the role {other!r}, which a column cannot hold; use "
                "history 'base', 'ema' or 'snapshot'"
            )
        elif needs == "attention" and name != CURRENT_ATTENTION:
            yield f"{name} is not captured in the loop, only the attention of the setting `layer`; select offline"
    if history != "scores" and len(frozen) > 1:
        yield (
            f"it compares the model in training with {len(frozen)} checkpoints ({', '.join(frozen)}), and history "
            f"{history!r} is only one; use history 'scores', with their columns"
        )
    if not method.in_loop:
        yield "its authors add a loss that is no weight, or it judges examples; select offline"


@dataclass(frozen=True)
class Rule:
    """A method with its parameters and scope at one training step."""

    method: Method
    params: Params
    scope: str
    requested_denominator: Denominator | None = None
    """None: as published."""

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The inputs that the method reads with these parameters, as `role.signal`; gamma = 1 needs no attention."""
        return frozenset() if self.keeps_all else _inputs_read(self.method, self.params)

    @property
    def keeps_all(self) -> bool:
        """Whether it keeps every token with weight 1, whatever the scores."""
        policy = self.method.policy
        if isinstance(policy, Top) and not policy.drop and policy.negative is None:
            return policy.quota(_MANY, self.params) == _MANY
        return isinstance(policy, Everything)

    @property
    def denominator(self) -> Denominator:
        """What the summed loss is divided by: the number of kept tokens, or of response tokens."""
        published = self.method.denominator
        soft = isinstance(self.method.policy, Weight)
        return self.requested_denominator or published or ("response" if soft else "kept")

    @property
    def divides_late(self) -> bool:
        """Whether the divisor is a number of kept tokens that depends on the scores."""
        return self.denominator == "kept" and not self.keeps_all and not isinstance(self.method.policy, Top)

    def num_kept(self, tokens: ResponseTokens) -> int | None:
        """How many tokens will be kept; None if that depends on their scores."""
        if self.keeps_all:
            return tokens.num_tokens
        policy = self.method.policy
        if not isinstance(policy, Top):
            return None
        counts = np.diff(tokens.units(self.scope)).tolist()
        quotas = [policy.quota(n, self.params) for n in counts]
        return sum(counts) - sum(quotas) if policy.drop else sum(quotas)

    def loss_weight(self, weight: Tensor | None, tokens: ResponseTokens) -> Tensor | None:
        """Return the factors of the losses: the weights, corrected for methods with negative ones.

        Those average separately over the tokens to learn and the tokens to forget (Forgetting, as published): the
        latter's weights are divided by their own number instead of the number of kept tokens.
        """
        policy = self.method.policy
        if weight is None or not isinstance(policy, Top) or policy.negative is None:
            return weight
        ranks = [policy.quotas(n, self.params) for n in np.diff(tokens.units(self.scope)).tolist()]
        learned, both = (sum(each) for each in zip(*ranks, strict=True))
        return torch.where(weight < 0, weight * learned / max(1, both - learned), weight)

    @torch.no_grad()
    def decide(
        self, signals: Mapping[str, Tensor], tokens: ResponseTokens, seed: tuple[int, ...] = (0,)
    ) -> Outcome:
        """Decide about the response tokens of a batch, as `select` does offline for the same values.

        Args:
            signals: by `role.signal`, [N].
            tokens: the response tokens of the batch.
            seed: of the method `random`.

        Returns:
            keep [N] bool, and weight [N] float64 or None, on the device of the tokens.

        Raises:
            UsageError: a signal that the method reads is missing.
        """
        device = tokens.positions.device
        if self.keeps_all:
            return Outcome(torch.ones(tokens.num_tokens, dtype=torch.bool, device=device), None)
        judged = Tokens(
            offsets=np.asarray(tokens.offsets),
            signals={name: _double(values) for name, values in signals.items()}
            or {"": _double(tokens.positions)},
            own_units=tokens.units(self.scope),
            seed=seed,
            positions=_on_cpu_if_mps(torch.as_tensor(tokens.places)),
            lengths=np.array([stop - start for _, start, stop in tokens.segments]),
        )
        keep, weight = self.method.decide(judged, self.params)[1]
        return Outcome(keep.to(device), None if weight is None else weight.to(device))


_MANY = 1 << 40
"""A number of tokens so large that any share below 1 drops some."""


def _inputs_read(method: Method, params: Params) -> frozenset[str]:
    """Run the method on three made-up tokens, and record which inputs it reads."""
    read: set[str] = set()

    class Recording(dict[str, Array]):
        def get(self, name: str, default: Any = None) -> Any:
            read.add(name)
            return np.full(3, 0.5)

    trial = Tokens(
        np.array([0, 3]),
        Recording(),
        own_units=np.array([0, 3]),
        positions=np.arange(1, 4),
        lengths=np.array([4]),
    )
    with np.errstate(all="ignore"):
        method.decide(trial, params)
    return frozenset(read) & frozenset(method.inputs)


def _double(values: Tensor) -> Tensor:
    """Convert to float64, as offline; on the CPU if the device has no float64."""
    return _on_cpu_if_mps(values).double()


def _on_cpu_if_mps(values: Tensor) -> Tensor:
    return values.cpu() if values.device.type == "mps" else values
