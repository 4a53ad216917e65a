"""The interface of `export` targets: how one trainer takes tokens and labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from sstoken.stages import tables
from sstoken.stages.exporting.into import Changes
from sstoken.stages.exporting.rows import Rows
from sstoken.stages.masked_card import dataset_configs
from sstoken.stages.storage import atomic_file

DATA = "data"
"""The folder of an export that the trainer reads; it holds nothing else."""
FAST = 1
"""zstd level: a third faster than level 3 on tokens and labels, and as small."""
SCORES = "scores"
"""The folder of the sidecar: shards with the same names and rows as those in `data`."""


@dataclass(frozen=True)
class Facts:
    """Facts about an export for its README and settings."""

    examples: int
    longest: int
    """Tokens of the longest row."""
    fingerprint: str
    """The export's fingerprint: changes with its content."""
    weights: bool
    shards: list[str]
    """File names in `data`, in order."""


class Target(ABC):
    """One trainer. Subclasses define how a shard is written and how the trainer reads it."""

    name: ClassVar[str]
    """The name for `--to`."""
    weights: ClassVar[bool] = False
    """Whether the trainer supports a float weight per token."""

    @abstractmethod
    def shard_name(self, index: int, shards: int) -> str:
        """Return the file name of shard `index` of `shards` in `data`."""

    @abstractmethod
    def write(self, path: Path, rows: Rows) -> None:
        """Write one shard atomically."""

    @abstractmethod
    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Yield the rows of a finished export in order, through the trainer's own loader."""

    @abstractmethod
    def usage(self, facts: Facts) -> str:
        """Return the README's section on training (Markdown): the exact command and its pitfalls."""

    def files(self, facts: Facts) -> dict[str, str]:
        """Return extra text files that the trainer runs, imports or reads, by their path in the export."""
        return {}

    def settings(self, facts: Facts, out: Path) -> Changes | None:
        """Return the changes to a user's YAML configuration that make it train on the export at `out` (absolute).

        None if the trainer is not configured by a YAML file, or not by settings alone.
        """
        return None

    def seen(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[float] | None]:
        """Return the ids, labels (unshifted) and weights, if any, of one row as `read` yielded it."""
        return row["input_ids"], row["labels"], row.get("weights")

    def front_matter(self, facts: Facts) -> str:
        """Return the front matter by which `datasets` loads the export as one dataset; empty if none is needed."""
        return ""


class ParquetTarget(Target):
    """Parquet files without any metadata."""

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Return the columns the trainer expects."""
        return {
            "input_ids": tables.lists(rows.ids, rows.offsets, tables.IDS),
            "labels": tables.lists(rows.labels, rows.offsets, tables.IDS),
        }

    def shard_name(self, index: int, shards: int) -> str:
        """Use the same names as the masked dataset."""
        return tables.part_name(index)

    def write(self, path: Path, rows: Rows) -> None:
        """Write one Parquet file."""
        tables.write_part(path, pa.table(self.columns(rows)), None, compression_level=FAST)

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Stream the rows with `datasets`."""
        return stream("parquet", folder, "part-*.parquet")

    def front_matter(self, facts: Facts) -> str:
        """Name the shards of `data`, so that those of the sidecar are not loaded."""
        return dataset_configs(f"{DATA}/part-*.parquet", facts.fingerprint)


class JsonLinesTarget(Target):
    """One JSON object per line."""

    @abstractmethod
    def lines(self, rows: Rows) -> Iterator[bytes]:
        """Yield the JSON object of each row."""

    def shard_name(self, index: int, shards: int) -> str:
        """Use the same names as the masked dataset, with another suffix."""
        return tables.part_name(index).removesuffix(".parquet") + ".jsonl"

    def write(self, path: Path, rows: Rows) -> None:
        """Write one file, row by row."""
        with atomic_file(path) as file:
            for line in self.lines(rows):
                file.write(line + b"\n")

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Stream the rows with `datasets`."""
        return stream("json", folder, "part-*.jsonl")

    def front_matter(self, facts: Facts) -> str:
        """Name the shards of `data`."""
        return dataset_configs(f"{DATA}/part-*.jsonl", facts.fingerprint)


def stream(kind: str, folder: Path, pattern: str) -> Iterator[pa.Table]:
    """Stream the files of `data` that have rows, in order, with `datasets.load_dataset` and no cache."""
    from datasets import load_dataset

    files = [str(p) for p in sorted((folder / DATA).glob(pattern), key=lambda p: (len(p.name), p.name))]
    rows = load_dataset(kind, data_files=files, split="train", streaming=True)
    yield from rows.with_format("arrow").iter(batch_size=1000)


def ones(rows: Rows) -> pa.Array:
    """Return an attention mask in which every position is a token."""
    return tables.lists(np.ones(rows.ids.size, np.int8), rows.offsets, INT8)


INT8 = pa.list_(pa.int8())
