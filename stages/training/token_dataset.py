"""Tokens as a memory-mapped, map-style dataset for a trainer."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sstoken.errors import SstokenError
from sstoken.labels import labels_from_mask
from sstoken.stages import tables
from sstoken.stages.files import UNFINISHED

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Extent:
    """What a model must be able to process."""

    examples: int
    """The number of examples to train on: they have a response token after the first token."""
    skipped: int
    """The number of examples without one."""
    largest_id: int
    longest: int
    """In tokens."""


def build(tokens: Path, file: Path) -> None:
    """Copy the examples to train on from Parquet into one Arrow file that can be memory-mapped.

    An example without response tokens would contribute nothing, or, alone in a batch, a division by zero.

    Raises:
        SstokenError: `tokens` has no shards or no such example, or a shard is damaged or not ours.
    """
    parts = tables.parts(tokens)
    if not parts:
        raise SstokenError(f"{tokens}: no part-*.parquet; name the folder that `encode` wrote")
    schema = pa.schema([tables.TOKENS.field("input_ids"), tables.TOKENS.field("response_mask")])
    examples = skipped = largest_id = longest = 0
    temporary = file.with_name(file.name + UNFINISHED)
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in parts:
            tables.read_metadata(part)
            for batch in tables.read_batches(part, _ROWS_AT_ONCE, schema.names):
                kept = batch.cast(schema).filter(_trains(batch["response_mask"]))
                skipped += batch.num_rows - kept.num_rows
                if kept.num_rows:
                    examples += kept.num_rows
                    largest_id = max(largest_id, pc.max(kept["input_ids"].flatten()).as_py())
                    longest = max(longest, pc.max(pc.list_value_length(kept["input_ids"])).as_py())
                    writer.write_batch(kept)
    if not examples:
        raise SstokenError(f"{tokens}: none of its {skipped} examples has a response token to train on")
    with open(file.with_suffix(".extent"), "w") as note:
        note.write(f"{examples} {skipped} {largest_id} {longest}")
    os.replace(temporary, file)


def read_extent(file: Path) -> Extent:
    """Return what `build` counted."""
    return Extent(*map(int, file.with_suffix(".extent").read_text().split()))


def _trains(masks: pa.ListArray) -> pa.Array:
    """Return which rows have a response token that a preceding token predicts."""
    return pa.array([bool(np.asarray(mask.values)[1:].any()) for mask in masks], pa.bool_())


class TokenDataset:
    """Rows of a file that `build` wrote: `input_ids`, and `labels` that are -100 outside the response."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def _table(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self._file))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._table["input_ids"][index].values.to_numpy()
        mask = self._table["response_mask"][index].values.to_numpy(zero_copy_only=False)
        return {"input_ids": ids.tolist(), "labels": labels_from_mask(ids, mask).tolist()}

    def __getstate__(self) -> dict[str, Path]:
        return {"_file": self._file}  # each worker process maps the file itself
