"""Fixed-size samples of a stream: uniform, or the rows with the highest keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import Float64Array

Columns = dict[str, NDArray[np.generic]]


@dataclass
class Highest:
    """The rows with the highest keys among all that were added; at most `size`."""

    size: int
    _keys: Float64Array = field(default_factory=lambda: np.empty(0))
    _columns: Columns = field(default_factory=dict)

    def add(self, keys: Float64Array, columns: Mapping[str, NDArray[np.generic]]) -> None:
        """Add N rows, except those whose key is NaN; a column that a call lacks is NaN in its rows."""
        wanted = np.flatnonzero(~np.isnan(keys))
        if self._keys.size >= self.size:
            wanted = wanted[keys[wanted] > self._keys.min()]
        if wanted.size > self.size:
            wanted = wanted[np.argpartition(-keys[wanted], self.size - 1)[: self.size]]
        before, after = self._keys.size, wanted.size
        joined: Columns = {}
        for name in dict.fromkeys([*self._columns, *columns]):
            old = self._columns.get(name, np.full(before, np.nan, np.float32))
            new = columns[name][wanted] if name in columns else np.full(after, np.nan, np.float32)
            joined[name] = np.concatenate([old, new])
        self._keys = np.concatenate([self._keys, keys[wanted]])
        self._columns = joined
        if self._keys.size > self.size:
            best = np.argpartition(-self._keys, self.size - 1)[: self.size]
            self._keys = self._keys[best]
            self._columns = {name: values[best] for name, values in self._columns.items()}

    def columns(self) -> Columns:
        """Return the sample, highest key first."""
        order = np.argsort(-self._keys, kind="stable")
        return {name: values[order] for name, values in self._columns.items()}


class Uniform:
    """A uniform sample without replacement of all rows that were added; at most `size`."""

    def __init__(self, size: int, seed: int) -> None:
        self._highest, self._seed, self._calls = Highest(size), seed, 0

    def add(self, number: int, columns: Mapping[str, NDArray[np.generic]]) -> None:
        """Add `number` rows."""
        self._highest.add(np.random.default_rng([self._seed, self._calls]).random(number), columns)
        self._calls += 1

    def columns(self) -> Columns:
        """Return the sample, in random order."""
        return self._highest.columns()
