"""`select`: from scores to the masked dataset. No model, no GPU: a sweep over rho takes seconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import NothingLeftError, SstokenError
from sstoken.labels import labels_from_mask
from sstoken.methods import Signals, get_method
from sstoken.selection import (
    BoolArray,
    Cut,
    FloatArray,
    check_ratio,
    global_cut,
    keep_above,
    keep_per_example,
    num_kept,
)
from sstoken.stages import folders, joins, tables
from sstoken.stages.masked_card import write_card
from sstoken.stages.masked_stats import merge_stats, shard_stats
from sstoken.stages.stage import SPEED_ONLY, Context, Stage
from sstoken.version import __version__


class Select(Stage):
    """Reads `tokens` and, as its method needs them, the scores `history`, `current` and `attention`."""

    name: ClassVar[str] = "select"
    folder: ClassVar[str] = "masked"
    seeded: ClassVar[bool] = True

    method: str = "sstoken"
    """Selection method; `sstoken-curate methods` lists them."""
    rho: float = 0.6
    """Selection ratio: the share of response tokens kept, in (0, 1]."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Balance: the weight of REL against attention, in [0, 1]."""
    scope: Literal["sample", "global"] = "sample"
    """Keep the best share of each example, or of the whole dataset."""
    lean: bool = False
    """Write only example_id, input_ids, labels and keep_mask."""
    workers: Annotated[int, Field(ge=1), SPEED_ONLY] = 1
    """Processes."""

    def check(self) -> None:
        """Refuse an unknown method and a ratio out of range."""
        get_method(self.method)
        check_ratio(self.rho)

    def run(self, context: Context) -> dict[str, Any]:
        """Select shard by shard; shards that are there already are kept."""
        token_parts = tables.parts(context.inputs["tokens"])
        scores = {k: v for k, v in context.inputs.items() if k in ("history", "current", "attention")}
        for folder in scores.values():
            joins.check_scores(context.inputs["tokens"], folder)

        def shards() -> Iterator[Shard]:
            for index, path in enumerate(token_parts):
                yield Shard(index, path, scores, context.seed)

        cut = None
        if self.scope == "global" and get_method(self.method).selective:
            cut = self._global_cut(shards)
        provenance = self._provenance(context, scores)
        select_shard = _SelectShard(self, context.out, provenance)
        with context.progress("shards", len(token_parts)) as progress:
            for _ in context.map(select_shard, self._tasks(shards, cut), workers=self.workers):
                progress.advance()
        folders.copy_folder(context.inputs["tokens"] / "tokenizer", context.out / "tokenizer")
        summary = merge_stats([tables.read_metadata(p)["stats"] for p in tables.parts(context.out)])
        if not summary["examples"]:
            raise NothingLeftError(
                f"{context.inputs['tokens']}: no example has a response token; nothing to select"
            )
        write_card(context.out, provenance, summary)
        return summary

    def scores(self, shard: "Shard") -> FloatArray:
        """What the method ranks the shard's response tokens by, [N]."""
        return get_method(self.method).score(shard.signals, self.gamma)

    def _global_cut(self, shards: Callable[[], Iterator["Shard"]]) -> Cut | None:
        def chunks() -> Iterator[FloatArray]:
            return (self.scores(shard) for shard in shards())

        total = sum(shard.signals.num_tokens for shard in shards())
        return global_cut(chunks, num_kept(total, self.rho)) if total else None

    def _tasks(
        self, shards: Callable[[], Iterator["Shard"]], cut: Cut | None
    ) -> Iterator[tuple["Shard", BoolArray | None]]:
        """The shards, each with its keep mask where the cut is global (whose ties depend on the order)."""
        ties = 0
        for shard, unread in zip(shards(), shards(), strict=True):
            kept = None
            if cut is not None:
                kept, ties = keep_above(self.scores(shard), cut, ties)
            yield unread, kept  # unread, so that no table is sent to a worker process

    def _provenance(self, context: Context, scores: dict[str, Path]) -> dict[str, Any]:
        folder = context.inputs["tokens"]
        tokens = tables.read_metadata(tables.parts(folder)[0])
        del tokens["stats"], tokens["kind"]
        tokens[joins.TOKENS] = joins.folder_fingerprint(folder)
        used = {role: tables.read_metadata(tables.parts(folder)[0]) for role, folder in scores.items()}
        return {
            "kind": "masked",
            "method": self.method,
            "rho": self.rho,
            "gamma": self.gamma,
            "scope": self.scope,
            "seed": context.seed,
            "checkpoints": {
                role: {"name": scores[role].name, "checkpoint": facts["checkpoint"], "dtype": facts["dtype"]}
                for role, facts in used.items()
            },
            "layer": used["attention"]["layer"] if "attention" in used else None,
            **tokens,
            "version": __version__,
            "fingerprint": context.fingerprint,
        }


@dataclass(frozen=True)
class Shard:
    """One shard of tokens with the row-aligned shards of scores; read when first looked at."""

    index: int
    tokens: Path
    scores: dict[str, Path]
    """Folder by role: history, current, attention."""
    seed: int

    @cached_property
    def table(self) -> pa.Table:
        """The tokens."""
        return tables.read_table(self.tokens)

    @cached_property
    def response(self) -> BoolArray:
        """[M] over all tokens of the shard."""
        return tables.flatten(self.table["response_mask"])[0].astype(bool)

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens that were read."""
        return joins.measured_fingerprint(self.tokens, self.table)

    @cached_property
    def row_offsets(self) -> NDArray[np.int32]:
        """[E + 1] into the shard's tokens."""
        return tables.flatten(self.table["response_mask"])[1]

    @cached_property
    def signals(self) -> Signals:
        """Of the response tokens."""
        counts = np.concatenate([[0], np.cumsum(self.response)])
        return Signals(
            offsets=counts[self.row_offsets].astype(np.int64),
            history_loss=self._measured("history", "loss"),
            current_loss=self._measured("current", "loss"),
            attention=self._measured("attention", "attention"),
            seed=(self.seed, self.index),
        )

    def _measured(self, role: str, column: str) -> FloatArray | None:
        if role not in self.scores:
            return None
        path = self.scores[role] / self.tokens.name
        table = tables.read_table(path, ["example_id", column])
        values, offsets = tables.flatten(table[column])
        aligned = table["example_id"].equals(self.table["example_id"])
        if not aligned or not np.array_equal(offsets, self.row_offsets):
            raise SstokenError(f"{path}: not row-aligned with {self.tokens}; score these tokens again")
        joins.check_shard(self.tokens, self.fingerprint, path)
        measured = values[self.response].astype(np.float64)
        if not np.isfinite(measured).all():
            raise SstokenError(f"{path}: column {column!r} has no value for a response token; score again")
        return measured


class _SelectShard:
    """Writes one masked shard; pickles into worker processes."""

    def __init__(self, stage: Select, out: Path, provenance: dict[str, Any]) -> None:
        self._stage, self._out, self._provenance = stage, out, provenance

    def __call__(self, task: tuple[Shard, BoolArray | None]) -> None:
        shard, kept = task
        path = self._out / shard.tokens.name
        if path.exists():
            return
        stage, signals = self._stage, shard.signals
        scores = stage.scores(shard)
        if not get_method(stage.method).selective:
            kept = np.ones(scores.size, dtype=bool)
        elif kept is None:
            kept = keep_per_example(scores, signals.offsets, stage.rho)
        table = _masked_table(shard, kept, scores, tables.MASKED_LEAN if stage.lean else tables.MASKED)
        has_response = np.diff(signals.offsets) > 0
        stats = shard_stats(signals, kept, stage.rho)
        tables.write_part(path, table.filter(pa.array(has_response)), {**self._provenance, "stats": stats})


def _masked_table(shard: Shard, kept: BoolArray, scores: FloatArray, schema: pa.Schema) -> pa.Table:
    offsets, response, signals = shard.row_offsets, shard.response, shard.signals
    keep = np.zeros(response.size, dtype=bool)
    keep[response] = kept
    ids = tables.flatten(shard.table["input_ids"])[0]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "example_id": shard.table["example_id"],
        "input_ids": shard.table["input_ids"],
        "labels": tables.lists(labels_from_mask(ids, keep), offsets, tables.IDS),
        "keep_mask": tables.lists(keep, offsets, tables.MASK),
        "response_mask": shard.table["response_mask"],
    }
    for name, values in (("rel", signals.rel), ("attention", signals.attention), ("score", scores)):
        if values is None:
            columns[name] = pa.nulls(len(shard.table), tables.VALUES)
            continue
        column = np.full(response.size, np.nan, dtype=np.float32)
        column[response] = values
        columns[name] = tables.lists(column, offsets, tables.VALUES)
    return pa.table([columns[name] for name in schema.names], schema=schema)
