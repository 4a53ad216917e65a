"""The interface of `export` targets: how one trainer takes tokens and labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from sstoken.stages import tables
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

    longest: int
    """Tokens of the longest row."""
    fingerprint: str
    """The export's fingerprint: changes with its content."""
    weights: bool
    shards: list[str]
    """File names in `data`, in order."""


Changes = Mapping[str, Any]
"""What each setting of a trainer has to be: a value, `ABSENT`, or one of the classes below."""
ABSENT = object()
"""The setting must not be there."""


@dataclass(frozen=True)
class AtLeast:
    """A lower limit: a larger value of the user's stays."""

    value: int
    or_none: bool = False
    """Null means no limit, and stays too."""


@dataclass(frozen=True)
class IfGiven:
    """A value for a setting that is changed if the user's configuration has it, but not added."""

    value: Any


NO_EVALUATION: Changes = {
    "eval_strategy": IfGiven("no"),
    "do_eval": IfGiven(False),
    "eval_on_start": IfGiven(False),
    "load_best_model_at_end": IfGiven(False),
}
"""For transformers' Trainer, which refuses to begin where it is to evaluate and has nothing to evaluate on."""


class Target(ABC):
    """One trainer. Subclasses define how a shard is written and how the trainer reads it."""

    name: ClassVar[str]
    """The name for `--to`."""
    weights: ClassVar[bool] = False
    """Whether the trainer supports a float weight per token."""
    training: ClassVar[str]
    """The README's section on training (Markdown): the exact command and its pitfalls. Here and in `program`,
    `$longest` and `$fingerprint` stand for the export's `Facts`."""
    program: ClassVar[tuple[str, str] | None] = None
    """Name and text of a file that the trainer runs, imports or reads."""

    @abstractmethod
    def shard_name(self, index: int, shards: int) -> str:
        """Return the file name of shard `index` of `shards` in `data`."""

    @abstractmethod
    def write(self, path: Path, rows: Rows) -> None:
        """Write one shard atomically."""

    @abstractmethod
    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Yield the rows of a finished export in order, through the trainer's own loader."""

    def usage(self, facts: Facts) -> str:
        """Return `training`, filled in."""
        return Template(self.training).substitute(vars(facts))

    def files(self, facts: Facts) -> dict[str, str]:
        """Return the text files of the export, by their path in it: `program`, filled in."""
        if self.program is None:
            return {}
        name, text = self.program
        return {name: Template(text).substitute(vars(facts))}

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


class ShardedTarget(Target):
    """Files of one format that `datasets` reads, named as the shards of the masked dataset."""

    format: ClassVar[str]
    """The name by which `load_dataset` knows the format."""
    suffix: ClassVar[str]

    def shard_name(self, index: int, shards: int) -> str:
        """Use the names of the masked dataset, with the format's suffix."""
        return f"{Path(tables.part_name(index)).stem}{self.suffix}"

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Stream the rows of the files that have some, in order, without a cache."""
        from datasets import load_dataset

        found = (folder / DATA).glob(f"part-*{self.suffix}")
        files = [str(p) for p in sorted(found, key=lambda p: (len(p.name), p.name))]
        rows = load_dataset(self.format, data_files=files, split="train", streaming=True)
        yield from rows.with_format("arrow").iter(batch_size=1000)

    def front_matter(self, facts: Facts) -> str:
        """Name the shards of `data`, so that those of the sidecar are not loaded."""
        return dataset_configs(f"{DATA}/part-*{self.suffix}", facts.fingerprint)


class ParquetTarget(ShardedTarget):
    """Parquet files without any metadata."""

    format = "parquet"
    suffix = ".parquet"

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Return the columns the trainer expects."""
        return {"input_ids": rows.column(rows.ids), "labels": rows.column(rows.labels)}

    def write(self, path: Path, rows: Rows) -> None:
        """Write one Parquet file."""
        tables.write_part(path, pa.table(self.columns(rows)), None, compression_level=FAST)


class JsonLinesTarget(ShardedTarget):
    """One JSON object per line."""

    format = "json"
    suffix = ".jsonl"

    @abstractmethod
    def lines(self, rows: Rows) -> Iterator[bytes]:
        """Yield the JSON object of each row."""

    def write(self, path: Path, rows: Rows) -> None:
        """Write one file, row by row."""
        with atomic_file(path) as file:
            for line in self.lines(rows):
                file.write(line + b"\n")


def ones(rows: Rows) -> pa.Array:
    """Return an attention mask in which every position is a token."""
    return rows.column(np.ones(rows.ids.size, np.int8))
