"""Read one shard of a report's folders: the masks, scores and signals of the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sstoken.errors import SstokenError
from sstoken.selection import BoolArray, Float32Array, IntArray
from sstoken.signals import is_signal
from sstoken.stages import joins, tables
from sstoken.stages.manifest import Manifest

_OWN = ("rel", "attention")
"""Signals in a masked folder itself."""
_DECIDED = ("score", "weight")


@dataclass(frozen=True)
class OpenedFolder:
    """A finished folder of a kind that can be shown."""

    name: str
    path: Path
    kind: str
    facts: dict[str, Any]
    """The metadata of its first shard."""
    manifest: Manifest
    columns: list[str]

    @property
    def lean(self) -> bool:
        """Whether it does not record which tokens are response tokens."""
        return "response_mask" not in self.columns

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of its tokens."""
        return self.facts.get(joins.TOKENS) if self.kind == "masked" else joins.folder_fingerprint(self.path)


@dataclass(frozen=True)
class Shard:
    """The tokens of E examples in flat arrays of M; NaN where nothing was measured."""

    first_row: int
    """Row of its first example in the first folder."""
    example_ids: list[str]
    offsets: IntArray
    """[E + 1]"""
    ids: NDArray[np.int32]
    response: BoolArray
    """[M]; for a lean folder, its keep mask."""
    keeps: list[BoolArray]
    """[M], one for each folder; all false in examples that the folder does not have."""
    values: list[dict[str, Float32Array]]
    """`score` and `weight`, [M], as far as each folder has them."""
    has: list[BoolArray]
    """[E], one for each folder: whether it has the example."""
    signals: dict[str, Float32Array]


def read_shard(
    part: Path,
    first_row: int,
    first: OpenedFolder,
    others: Sequence[OpenedFolder],
    scores: Mapping[str, Path],
) -> Shard:
    """Read a shard of the first folder, with the masks of the others and the signals of its tokens."""
    wanted = ["example_id", "input_ids", "response_mask", "keep_mask", *_DECIDED, *_OWN]
    table = tables.read_table(part, [name for name in wanted if name in first.columns])
    ids, offsets = tables.flatten(table["input_ids"])
    response = _flags(table, "response_mask")
    keep = _flags(table, "keep_mask") if first.kind == "masked" else response
    assert keep is not None
    shard = Shard(
        first_row,
        table["example_id"].to_pylist(),
        offsets.astype(np.int64),
        ids,
        keep if response is None else response,
        [keep],
        [_present(table, _DECIDED, ids.size)],
        [np.ones(len(table), dtype=bool)],
        _present(table, _OWN if first.kind == "masked" else (), ids.size),
    )
    for other in others:
        _add_other(shard, other, part.name)
    for checkpoint, folder in scores.items():
        _add_scores(shard, checkpoint, folder / part.name)
    return shard


def _add_other(shard: Shard, other: OpenedFolder, name: str) -> None:
    """Add the keep mask, score and weight from another folder's shard of that name."""
    size = shard.ids.size
    keep, has = np.zeros(size, dtype=bool), np.zeros(len(shard.example_ids), dtype=bool)
    values: dict[str, Float32Array] = {}
    part = next((path for path in tables.parts(other.path) if path.name == name), None)
    if part is not None:
        known = ("example_id", "input_ids", "keep_mask", *_DECIDED)
        table = tables.read_table(part, [name for name in other.columns if name in known])
        offsets = tables.flatten(table["input_ids"])[1].astype(np.int64)
        rows = {example: row for row, example in enumerate(table["example_id"].to_pylist())}
        places = [rows.get(example, -1) for example in shard.example_ids]
        kept = _flags(table, "keep_mask")
        assert kept is not None
        source, target = _aligned(shard, places, offsets, f"{part}: its examples differ; select it again")
        keep[target] = kept[source]
        has[:] = np.array(places) >= 0
        for column, own in _present(table, _DECIDED, kept.size).items():
            values[column] = _scattered(own, source, target, size)
    shard.keeps.append(keep)
    shard.has.append(has)
    shard.values.append(values)


def _add_scores(shard: Shard, checkpoint: str, part: Path) -> None:
    names = [name for name in tables.columns(part) if is_signal(name)]
    table = tables.read_table(part, ["example_id", *names])
    places = _subsequence(shard.example_ids, table["example_id"].to_pylist(), part)
    for name in names:
        offsets = tables.flatten(table[name])[1].astype(np.int64)
        values = _values(table, name, int(offsets[-1]))
        if values is not None:
            if np.isinf(values).any():
                raise SstokenError(f"{part}: column {name!r} holds an infinite value; score again")
            source, target = _aligned(
                shard, places, offsets, f"{part}: not row-aligned; score these tokens again"
            )
            shard.signals[f"{checkpoint}.{name}"] = _scattered(values, source, target, shard.ids.size)


def _subsequence(wanted: Sequence[str], there: Sequence[str], part: Path) -> list[int]:
    """Return the index of each wanted example; `select` only leaves examples out, so the order is the same."""
    places, at = [], 0
    for example in wanted:
        while at < len(there) and there[at] != example:
            at += 1
        if at == len(there):
            raise SstokenError(f"{part}: example {example!r} is missing; score these tokens again")
        places.append(at)
        at += 1
    return places


def _aligned(
    shard: Shard, places: Sequence[int], offsets: IntArray, problem: str
) -> tuple[IntArray, IntArray]:
    """Return the indices of the same tokens in another shard and in this one, without examples at place -1."""
    at = np.array(places, dtype=np.int64)
    here = np.flatnonzero(at >= 0)
    lengths = np.diff(shard.offsets)[here]
    if not np.array_equal(lengths, np.diff(offsets)[at[here]]):
        raise SstokenError(problem)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return (
        np.repeat(offsets[:-1][at[here]], lengths) + within,
        np.repeat(shard.offsets[:-1][here], lengths) + within,
    )


def _scattered(values: Float32Array, source: IntArray, target: IntArray, size: int) -> Float32Array:
    column = np.full(size, np.nan, dtype=np.float32)
    column[target] = values[source]
    return column


def _flags(table: pa.Table, name: str) -> BoolArray | None:
    return tables.flatten(table[name])[0].astype(bool) if name in table.column_names else None


def _present(table: pa.Table, names: Sequence[str], size: int) -> dict[str, Float32Array]:
    """Return those of the named columns of numbers that are there and have a value."""
    found = {name: _values(table, name, size) for name in names}
    return {name: values for name, values in found.items() if values is not None}


def _values(table: pa.Table, name: str, size: int) -> Float32Array | None:
    """Return a column of numbers; None if it is missing or has no value at all."""
    if name not in table.column_names or table[name].null_count == len(table):
        return None
    values = tables.flatten(table[name])[0].astype(np.float32)
    if values.size != size:
        raise SstokenError(
            f"column {name!r} has {values.size} values for {size} tokens; make the folder again"
        )
    return values
