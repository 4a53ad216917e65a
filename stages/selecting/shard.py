"""A shard of tokens with its row-aligned shards of scores, as methods read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sstoken.errors import SstokenError
from sstoken.methods import Input, Tokens
from sstoken.selection import BoolArray, Float64Array, IntArray, places, runs, sums
from sstoken.signals import get_signal
from sstoken.stages import joins, tables
from sstoken.stages.selecting.text import ResponseText

SHOWN = ("history.loss", "current.loss", "current.attention")
"""Signals that a masked dataset has if they were measured, whether or not the method reads them."""


@dataclass(frozen=True)
class Shard:
    """One shard, read on first use."""

    index: int
    tokens: Path
    scores: Mapping[str, Path]
    """Folder of scores by role. A role named after a signal supplies that signal instead of the role that has it."""
    inputs: tuple[str, ...]
    """The signals to read, as `role.signal`."""
    scope: str
    """With `turn`, tokens are ranked within turns."""
    seed: int
    chosen: BoolArray | None = None
    """[E]: the examples to use; None: all."""

    @cached_property
    def table(self) -> pa.Table:
        """The shard of tokens."""
        return tables.read_table(self.tokens)

    @cached_property
    def response(self) -> BoolArray:
        """[M]: the response tokens of the examples to use, among all tokens of the shard."""
        response = tables.flatten(self.table["response_mask"])[0].astype(bool)
        return response if self.chosen is None else response & np.repeat(self.chosen, np.diff(self.offsets))

    @property
    def num_passed_over(self) -> int:
        """Number of examples with a response token that are not used."""
        if self.chosen is None:
            return 0
        response = tables.flatten(self.table["response_mask"])[0].astype(bool)
        return int(((sums(response, self.offsets) > 0) & ~self.chosen).sum())

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the tokens, computed from their content."""
        return joins.measured_fingerprint(self.tokens, self.table)

    @cached_property
    def offsets(self) -> NDArray[np.int32]:
        """[E + 1] into the shard's tokens, prompts included."""
        return tables.flatten(self.table["response_mask"])[1]

    @cached_property
    def turns(self) -> IntArray:
        """[U + 1] into the response tokens: where each turn (a run of response tokens in one example) starts."""
        return runs(self.response, self.offsets)

    @cached_property
    def text(self) -> ResponseText:
        """The text of the response tokens."""
        ids = tables.flatten(self.table["input_ids"])[0][self.response]
        at_most = tables.read_metadata(self.tokens).get("max_length")
        cut = places(self.offsets)[self.response][self.turns[1:] - 1] + 1 == at_most
        return ResponseText(ids, self.turns, self.tokens.parent / "tokenizer", cut)

    @cached_property
    def measured(self) -> Tokens:
        """The response tokens with their signals."""
        counts = np.concatenate([[0], np.cumsum(self.response)])
        offsets = counts[self.offsets].astype(np.int64)
        wanted: dict[str, list[str]] = {}
        for name in dict.fromkeys([*self.inputs, *SHOWN]):
            if (supplier := supplier_of(Input(name), self.scores)) is not None:
                wanted.setdefault(supplier, []).append(name)
        signals: dict[str, Float64Array] = {}
        for role, names in wanted.items():
            signals |= self._read(role, names)
        return Tokens(
            offsets=offsets,
            signals=signals,
            own_units=self.turns if self.scope == "turn" else None,
            seed=(self.seed, self.index),
            positions=places(self.offsets)[self.response],
            lengths=np.diff(self.offsets).astype(np.int64),
        )

    def _read(self, role: str, names: list[str]) -> dict[str, Float64Array]:
        path = self.scores[role] / self.tokens.name
        there = set(tables.columns(path))
        columns = {name: column_of(Input(name), self.scores) for name in names}
        columns = {name: column for name, column in columns.items() if column in there}
        table = tables.read_table(path, ["example_id", *dict.fromkeys(columns.values())])
        if not table["example_id"].equals(self.table["example_id"]):
            raise SstokenError(f"{path}: not row-aligned with {self.tokens}; score these tokens again")
        joins.check_shard(self.tokens, self.fingerprint, path)
        found = {}
        for name, column in columns.items():
            values, offsets = tables.flatten(table[column])
            if not np.array_equal(offsets, self.offsets):
                raise SstokenError(f"{path}: not row-aligned with {self.tokens}; score these tokens again")
            found[name] = values[self.response].astype(np.float64)
            signal = get_signal(column)
            if np.isinf(found[name]).any():
                raise SstokenError(f"{path}: column {column!r} holds an infinite value; score again")
            if not (signal.from_second or signal.partial) and np.isnan(found[name]).any():
                raise SstokenError(
                    f"{path}: column {column!r} has no value for a response token; score again"
                )
        return found


def supplier_of(name: Input, scores: Mapping[str, Path]) -> str | None:
    """Return the role whose scores have a signal; None if no folder was given for it."""
    return next((role for role in (name.signal, name.role) if role in scores), None)


def column_of(name: Input, scores: Mapping[str, Path]) -> str:
    """Return the column of a signal: for `kl@history`, `kl@` and the name of the checkpoint in that role."""
    kind, separator, role = name.signal.partition("@")
    return f"{kind}@{scores[role].name}" if separator and role in scores else name.signal
