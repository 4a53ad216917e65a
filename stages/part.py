"""Stage `part`: take every T-th example of a tokens folder, for methods that train part by part."""

from collections import Counter
from functools import partial, reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sstoken.errors import NothingLeftError, UsageError
from sstoken.stages import folders, joins, tables
from sstoken.stages.encoding.token_stats import merge, metrics, no_stats
from sstoken.stages.sharded import ShardedStage, Work
from sstoken.stages.stage import Context, Task, Worker


class Part(ShardedStage):
    """Reads `tokens`; writes a tokens folder with one part of its examples."""

    name: ClassVar[str] = "part"
    folder: ClassVar[str] = "tokens"

    part: Annotated[int, Field(ge=0)]
    """Which part, from 0."""
    parts: Annotated[int, Field(ge=1)]
    """Number of parts. Example i belongs to part i modulo this number, so every part is a fair sample."""

    def check(self) -> None:
        """See `Stage.check`."""
        if self.part >= self.parts:
            raise UsageError(f"part is {self.part} of {self.parts}; legal: 0 to {self.parts - 1}")

    def work(self, context: Context) -> Work:
        """See `ShardedStage.work`."""
        tasks, first = [], 0
        for path in tables.parts(context.inputs["tokens"]):
            tasks.append(Task(context.out / path.name, 1, (path, first)))
            first += tables.num_rows(path)
        return Work(partial(_take_part, self, context.out, context.fingerprint), tasks)

    def finish(self, context: Context) -> dict[str, Any]:
        """Copy the tokenizer; add up the shards' counts.

        Raises:
            NothingLeftError: the part has no example.
        """
        tokens = context.inputs["tokens"]
        folders.copy_folder(tokens / "tokenizer", context.out / "tokenizer")
        stats = [tables.read_metadata(path)["stats"] for path in tables.parts(context.out)]
        total = reduce(merge, stats, no_stats())
        if not total["examples"]:
            raise NothingLeftError(
                f"{tokens}: no example in part {self.part} of {self.parts}; make fewer parts"
            )
        return metrics(total)


def _take_part(stage: Part, out: Path, fingerprint: str, shard: tuple[Path, int], worker: Worker) -> None:
    """Write the part's examples of one shard."""
    path, first = shard
    table = tables.read_table(path)
    joins.measured_fingerprint(path, table)  # refuses tokens that were edited
    taken = np.flatnonzero((first + np.arange(len(table))) % stage.parts == stage.part)
    table = table.take(pa.array(taken)).combine_chunks()
    facts = tables.read_metadata(path) | {
        joins.TOKENS: joins.tokens_fingerprint(table),
        joins.RUN: fingerprint,
        "stats": _stats(table),
    }
    tables.write_part(out / path.name, table, facts)


def _stats(table: pa.Table) -> dict[str, Any]:
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    response = tables.flatten(table["response_mask"])[0]
    return no_stats() | {
        "rows": len(table),
        "examples": len(table),
        "tokens": int(lengths.sum()),
        "response_tokens": int(np.count_nonzero(response)),
        "lengths": dict(Counter(str(n) for n in sorted(lengths))),
    }
