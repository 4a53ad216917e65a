"""Prepare rows for a trainer: truncate them, drop those with nothing to train on, compute weights.

E rows with M tokens in all; token arrays are flat, and `offsets` [E + 1] holds where each row starts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sstoken.errors import SstokenError, UsageError
from sstoken.labels import IGNORED_LABEL, labels_from_mask
from sstoken.selection import places, sums
from sstoken.stages import tables

SMALLEST_RANGE = 1e-8
"""Added to the range of an example's scores, so that kept tokens never weigh 0, and 1 if all scores are equal."""


@dataclass(frozen=True)
class Rows:
    """The rows of one shard, as given to a trainer."""

    example_id: pa.Array
    """[E]"""
    ids: NDArray[np.int32]
    """[M]"""
    labels: NDArray[np.int32]
    """[M]: the token's own id if kept, else -100; the first of each row is always -100."""
    offsets: NDArray[np.int32]
    """[E + 1]"""
    weights: NDArray[np.float32] | None
    """[M]: positive if kept, else 0. None: not requested."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[M]"""
        return self.labels != IGNORED_LABEL

    def column(self, values: NDArray[Any]) -> pa.Array:
        """Return one value per token [M] as a column of lists [E]."""
        return tables.lists(values, self.offsets, pa.list_(pa.from_numpy_dtype(values.dtype)))


@dataclass(frozen=True)
class Prepared:
    """A masked shard prepared for a trainer."""

    rows: Rows
    sidecar: pa.Table
    """Columns that no trainer reads (example_id, masks, signals, score), row-aligned with `rows`."""
    counts: dict[str, int]
    """Counts that add up over shards, except `longest`."""


def prepare(table: pa.Table, max_length: int | None, weighted: bool) -> Prepared:
    """Cut the rows of a masked shard to `max_length` tokens, and drop those without a token to train on.

    Raises:
        UsageError: weights are requested and the dataset has no scores.
        SstokenError: a weight is not finite.
    """
    ids, offsets = tables.flatten(table["input_ids"])
    keep = tables.flatten(table["keep_mask"])[0].astype(bool)
    lengths = np.diff(offsets)
    position = places(offsets)
    weights = token_weights(table, keep) if weighted else None

    trained = keep & (position > 0)  # nothing predicts the first token, except another document in a pack
    inside = np.ones(ids.size, bool) if max_length is None else position < max_length
    per_row = sums(trained & inside, offsets)
    taken_E = per_row > 0
    taken_M = inside & np.repeat(taken_E, lengths)
    cut_lengths = np.minimum(lengths, max_length or lengths.max(initial=0))[taken_E]
    new_offsets = np.concatenate([[0], np.cumsum(cut_lengths)]).astype(np.int32)
    all_taken = taken_M.all() and taken_E.all()

    def cut(column: pa.ChunkedArray) -> pa.Array:
        if not pa.types.is_list(column.type):
            return column.filter(pa.array(taken_E)).combine_chunks()
        values = column.combine_chunks().flatten().filter(pa.array(taken_M))
        return pa.ListArray.from_arrays(pa.array(new_offsets), values, type=column.type)

    rest = table.drop_columns([c for c in ("input_ids", "labels") if c in table.column_names])
    sidecar = rest if all_taken else pa.table({name: cut(rest[name]) for name in rest.column_names})
    labels = labels_from_mask(ids, trained)[taken_M]
    rows = Rows(
        example_id=sidecar["example_id"].combine_chunks(),
        ids=ids[taken_M].astype(np.int32),
        labels=labels,
        offsets=new_offsets,
        weights=None if weights is None else np.where(trained, weights, 0)[taken_M].astype(np.float32),
    )
    counts = {
        "examples": int(taken_E.sum()),
        "dropped": int((~taken_E).sum()),
        "truncated": int((cut_lengths < lengths[taken_E]).sum()),
        "tokens": rows.ids.size,
        "kept": int(rows.kept.sum()),
        "kept_lost": int(keep.sum()) - int(rows.kept.sum()),
        "longest": int(cut_lengths.max(initial=0)),
    }
    return Prepared(rows, sidecar, counts)


def token_weights(table: pa.Table, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return token weights [M]: the method's where it gave them, else by the score; 0 where a token is not kept.

    By the score: w = (score - lowest + 1e-8) / (highest - lowest + 1e-8), with the extremes taken over all response
    tokens of the example before truncation: the best token weighs 1, and every kept token more than 0.
    """
    if "weight" in table.column_names:
        given = tables.flatten(table["weight"])[0].astype(np.float64)
        return _finite(np.where(keep, given, 0.0))
    if "score" not in table.column_names:
        raise UsageError("--weights needs scores, and this masked dataset is lean; select it without --lean")
    score, offsets = tables.flatten(table["score"])
    score = score.astype(np.float64)
    weights = np.zeros(score.size)
    full = np.diff(offsets) > 0
    starts, lengths = offsets[:-1][full], np.diff(offsets)[full]
    if not starts.size:
        return weights
    if np.isnan(score[keep]).any():
        raise UsageError("--weights needs the score of every kept token, and this masked dataset has none")
    lowest = np.repeat(np.fmin.reduceat(score, starts), lengths)
    highest = np.repeat(np.fmax.reduceat(score, starts), lengths)
    with np.errstate(invalid="ignore"):
        np.divide(score - lowest + SMALLEST_RANGE, highest - lowest + SMALLEST_RANGE, out=weights, where=keep)
    return _finite(weights)


def _finite(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Refuse weights that no loss can be multiplied by."""
    if not np.isfinite(weights).all():
        raise SstokenError(
            "the weight of a kept token is infinite or not a number; select again, or export without weights "
            "(--no-weights)"
        )
    return weights


def merge_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    """Add up the counts of all shards."""
    merged = {key: sum(c[key] for c in counts) for key in counts[0]}
    return merged | {"longest": max(c["longest"] for c in counts)}
