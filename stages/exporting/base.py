"""What a target of `export` is: one trainer's way to take tokens and labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from sstoken.stages import tables
from sstoken.stages.exporting.rows import Rows
from sstoken.stages.files import atomic_file

DATA = "data"
"""The folder of an export that its trainer reads. Nothing else is in it."""
FAST = 1
"""Level of zstd: a third faster than 3 on tokens and labels, and as small."""
SCORES = "scores"
"""The folder of the sidecar: shards of the same names and rows as those in `data`."""


@dataclass(frozen=True)
class Facts:
    """What a target may say of an export in its README and settings."""

    examples: int
    longest: int
    """Tokens of the longest row."""
    fingerprint: str
    """Of the export: another one for other content."""
    weights: bool
    shards: list[str]
    """Names in `data`, in order."""


class Target(ABC):
    """One trainer. Subclasses say how a shard is written, and how the trainer reads it."""

    name: ClassVar[str]
    """What `--to` calls it."""
    weights: ClassVar[bool] = False
    """Whether it can use a float weight for each token."""

    @abstractmethod
    def shard_name(self, index: int, shards: int) -> str:
        """File name of shard `index` of `shards` in `data`."""

    @abstractmethod
    def write(self, path: Path, rows: Rows) -> None:
        """Write one shard atomically."""

    @abstractmethod
    def read(self, folder: Path) -> Iterator[pa.Table]:
        """The rows of a finished export, in order, by the loader that the trainer uses."""

    @abstractmethod
    def usage(self, facts: Facts) -> str:
        """The README's section (Markdown): the exact command, and what to mind. Paths are relative to the export."""

    def files(self, facts: Facts) -> dict[str, str]:
        """Text files that the trainer runs, imports or reads, by their place in the export."""
        return {}

    def seen(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[float] | None]:
        """Of one row as `read` gave it: ids, the labels of those ids (unshifted), weights if there are any."""
        return row["input_ids"], row["labels"], row.get("weights")

    def front_matter(self) -> str:
        """Return the card's lines by which `datasets` finds the rows; empty where it needs none."""
        return ""


class ParquetTarget(Target):
    """Parquet files with nothing of ours or of any library in their metadata."""

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """The columns the trainer wants."""
        return {
            "input_ids": tables.lists(rows.ids, rows.offsets, tables.IDS),
            "labels": tables.lists(rows.labels, rows.offsets, tables.IDS),
        }

    def shard_name(self, index: int, shards: int) -> str:
        """As in the masked dataset."""
        return tables.part_name(index)

    def write(self, path: Path, rows: Rows) -> None:
        """One Parquet file."""
        tables.write_part(path, pa.table(self.columns(rows)), None, compression_level=FAST)

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Streamed by `datasets`."""
        return stream("parquet", folder, "part-*.parquet")

    def front_matter(self) -> str:
        """Names the shards of `data`, and so not those of the sidecar."""
        return f"configs: [{{config_name: default, data_files: {DATA}/part-*.parquet}}]"


class JsonLinesTarget(Target):
    """A JSON object a line."""

    @abstractmethod
    def lines(self, rows: Rows) -> Iterator[bytes]:
        """A JSON document for each row."""

    def shard_name(self, index: int, shards: int) -> str:
        """As in the masked dataset, but for the suffix."""
        return tables.part_name(index).removesuffix(".parquet") + ".jsonl"

    def write(self, path: Path, rows: Rows) -> None:
        """One file; a row at a time."""
        with atomic_file(path) as file:
            for line in self.lines(rows):
                file.write(line + b"\n")

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Streamed by `datasets`."""
        return stream("json", folder, "part-*.jsonl")

    def front_matter(self) -> str:
        """Names the shards of `data`."""
        return f"configs: [{{config_name: default, data_files: {DATA}/part-*.jsonl}}]"


def stream(kind: str, folder: Path, pattern: str) -> Iterator[pa.Table]:
    """The files of `data` that hold a row, in order, read by `datasets.load_dataset` without a cache."""
    from datasets import load_dataset

    files = [str(p) for p in sorted((folder / DATA).glob(pattern), key=lambda p: (len(p.name), p.name))]
    rows = load_dataset(kind, data_files=files, split="train", streaming=True)
    yield from rows.with_format("arrow").iter(batch_size=1000)


def ones(rows: Rows) -> pa.Array:
    """An attention mask: every position is a token."""
    return tables.lists(np.ones(rows.ids.size, np.int8), rows.offsets, INT8)


INT8 = pa.list_(pa.int8())
