"""`Tokens`, a method's input: the response tokens of some examples, as flat arrays, with their signals.

Arrays are numpy's offline and torch's in a training loop. A method is written once for both: it takes functions from
`tokens.xp`, which is `numpy` or `torch`, and operations over units from the methods of `Tokens`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from sstoken.errors import UsageError
from sstoken.selection import IntArray, keep_top, keep_top_tensor, minmax, minmax_tensor, places

Array = Any
"""A numpy array or a torch tensor; float64 unless stated otherwise."""


@dataclass(frozen=True)
class Tokens:
    """The N response tokens of E examples, back to back."""

    offsets: IntArray
    """[E + 1] on the host; where each example starts."""
    signals: Mapping[str, Array]
    """By `role.signal`, such as `history.loss`: [N] float64."""
    own_units: IntArray | None = None
    """[U + 1] on the host; where each unit of the scope starts: a turn, or all tokens. None: each example is one."""
    statistics: Mapping[str, Array] = field(default_factory=dict)
    """The method's statistics by name, each a scalar."""
    seed: tuple[int, ...] = (0,)
    """Seed of the method `random`."""
    positions: Array = None
    """[N] integers: each token's position in its sequence, prompt included; None: unknown."""
    lengths: IntArray | None = None
    """[E]: the length of each sequence, prompt included; None: unknown."""

    def __getitem__(self, name: str) -> Array:
        """Return the signal `role.signal`, [N].

        Raises:
            UsageError: it was not measured.
        """
        values = self.signals.get(name)
        if values is None:
            raise UsageError(f"the signal {name!r} is missing; score the checkpoint that gives it")
        return values

    def __contains__(self, name: str) -> bool:
        return self.signals.get(name) is not None

    def with_(self, **fields: Any) -> "Tokens":
        """Return a copy with some fields replaced."""
        return replace(self, **fields)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.offsets[-1])

    @cached_property
    def xp(self) -> Any:
        """`numpy`, or `torch` where the signals are tensors."""
        if all(isinstance(values, np.ndarray) for values in self.signals.values()):
            return np
        import torch

        return torch

    @property
    def rel(self) -> Array:
        """REL [N], in nats: history loss minus current loss; positive where the loss has fallen."""
        return self["history.loss"] - self["current.loss"]

    @property
    def units(self) -> IntArray:
        """[U + 1] on the host; where each unit of the scope starts."""
        return self.offsets if self.own_units is None else self.own_units

    @cached_property
    def counts(self) -> IntArray:
        """[U] on the host: how many tokens each unit has."""
        return np.diff(self.units)

    @cached_property
    def index(self) -> Array:
        """[N] integers: each token's index among the response tokens of its example, from 0."""
        return self.like(places(self.offsets))

    @cached_property
    def example(self) -> Array:
        """[N] integers, ascending: the example of each token."""
        return self.like(np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets)))

    def like(self, values: Any) -> Array:
        """Convert a host array to the signals' kind: a tensor on their device, or unchanged for numpy."""
        if self.xp is np:
            return values
        return self.xp.as_tensor(values, device=next(iter(self.signals.values())).device)

    def zeros(self) -> Array:
        """[N] float64."""
        return self.like(np.zeros(self.num_tokens))

    def minmax(self, values: Array) -> Array:
        """Scale each example's values to [0, 1) by their own minimum and range (ssToken, equation 6)."""
        if self.xp is np:
            return minmax(values, self.offsets)
        return minmax_tensor(values, self.example, len(self.offsets) - 1)

    def mean(self, values: Array) -> Array:
        """Mean of each example [E]; 0 for an example without tokens."""
        num = len(self.offsets) - 1
        counts = self.like(np.maximum(1, np.diff(self.offsets)).astype(np.float64))
        if self.xp is np:
            return np.bincount(self.example, weights=values, minlength=num) / counts
        return values.new_zeros(num).index_add(0, self.example, values) / counts

    def in_top(self, values: Array, quota: Callable[[int], int]) -> Array:
        """Mark the `quota(n)` highest values of each unit, [N] bool; ties go to the earlier token."""
        return self.top(values, [quota(int(n)) for n in self.counts])

    def top(self, values: Array, quotas: Sequence[int]) -> Array:
        """Like `in_top`, with one quota for each of the U units."""
        if self.xp is np:
            return keep_top(values, self.units, quotas)
        unit = self.like(np.repeat(np.arange(len(self.counts)), self.counts))
        return keep_top_tensor(values, unit, quotas)
