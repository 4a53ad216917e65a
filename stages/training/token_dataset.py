"""A memory-mapped, map-style dataset of tokens for a trainer."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sstoken.errors import SstokenError
from sstoken.labels import labels_from_mask
from sstoken.stages import tables
from sstoken.stages.storage import atomic_file, write_atomic

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Extent:
    """What a model must be able to process."""

    largest_id: int
    longest: int
    """Tokens of the longest example."""


def build(source: Path, file: Path) -> None:
    """Copy the examples to train on from Parquet into one Arrow file that can be memory-mapped.

    A masked dataset trains its kept tokens, with their weights if it has any; a folder of tokens its responses.
    Examples with nothing to learn are skipped: alone in a batch, one would cause a division by zero.

    Args:
        source: a folder of tokens or a masked dataset.
        file: the Arrow file to write.

    Raises:
        SstokenError: `source` has no shard or no example to train on, or a shard is damaged.
    """
    parts = tables.parts(source)
    if not parts:
        raise SstokenError(f"{source}: no part-*.parquet; name the folder that `encode` or `select` wrote")
    there = tables.columns(parts[0])
    masked, weighted = "keep_mask" in there, tables.WEIGHT.name in there
    names = ["input_ids", tables.WEIGHT.name if weighted else "keep_mask" if masked else "response_mask"]
    schema = pa.schema(
        [("input_ids", tables.IDS), ("trained", tables.MASK), *([tables.WEIGHT] if weighted else [])]
    )
    examples = skipped = largest_id = longest = 0
    with atomic_file(file) as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in parts:
            tables.read_metadata(part)
            for batch in tables.read_batches(part, _ROWS_AT_ONCE, names):
                prepared = _prepared(batch, names[1], schema)
                # nothing predicts the first token
                trains = [bool(np.asarray(mask.values)[1:].any()) for mask in prepared["trained"]]
                kept = prepared.filter(pa.array(trains, pa.bool_()))
                skipped += batch.num_rows - kept.num_rows
                if kept.num_rows:
                    examples += kept.num_rows
                    largest_id = max(largest_id, pc.max(kept["input_ids"].flatten()).as_py())
                    longest = max(longest, pc.max(pc.list_value_length(kept["input_ids"])).as_py())
                    writer.write_batch(kept)
        if not examples:
            raise SstokenError(f"{source}: none of its {skipped} examples has a token to train on")
        write_atomic(file.with_suffix(".extent"), f"{examples} {skipped} {largest_id} {longest}")


def read_extent(file: Path) -> Extent:
    """Return what `build` counted; `SstokenError` if it was damaged since."""
    counted = file.with_suffix(".extent")
    try:
        _examples, _skipped, largest_id, longest = map(int, counted.read_bytes().split())
        return Extent(largest_id, longest)
    except (ValueError, TypeError):
        raise SstokenError(f"{counted}: damaged; remove {file.parent} to train anew") from None


def _prepared(batch: pa.RecordBatch, column: str, schema: pa.Schema) -> pa.RecordBatch:
    """Return ids, which tokens are trained and, for a weighting method, their weights: 0 where there is none."""
    ids, given = batch["input_ids"], batch[column]
    if column != tables.WEIGHT.name:
        return pa.record_batch([ids, given], schema=schema)
    weights = np.nan_to_num(given.values.to_numpy(zero_copy_only=False)).astype(np.float32)
    lists = [
        tables.lists(values, given.offsets.to_numpy(), kind)
        for values, kind in ((weights != 0, tables.MASK), (weights, tables.VALUES))
    ]
    return pa.record_batch([ids, *lists], schema=schema)


class TokenDataset:
    """Rows of a file that `build` wrote: `input_ids`, `labels` (-100 where nothing is trained), perhaps `weights`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def _table(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self._file))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def weighted(self) -> bool:
        """Whether rows have `weights`."""
        return tables.WEIGHT.name in self._table.column_names

    def __getitem__(self, index: int) -> dict[str, list[Any]]:
        ids = self._table["input_ids"][index].values.to_numpy()
        mask = self._table["trained"][index].values.to_numpy(zero_copy_only=False)
        row = {"input_ids": ids.tolist(), "labels": labels_from_mask(ids, mask).tolist()}
        if self.weighted:
            row["weights"] = self._table[tables.WEIGHT.name][index].values.to_numpy().tolist()
        return row

    def __getstate__(self) -> dict[str, Path]:
        return {"_file": self._file}  # each worker process maps the file itself
