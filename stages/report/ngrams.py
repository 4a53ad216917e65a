"""Find the tokens, pairs and triples of tokens that a mask keeps most and least often."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import BoolArray, IntArray

if TYPE_CHECKING:
    import polars as pl

LONGEST = 3
_BITS = 21  # three ids in one int64
_MASK = (1 << _BITS) - 1
MOST_HELD = 400_000
"""Most distinct n-grams of one length to hold; beyond it, the rarest are forgotten."""


@dataclass
class NGrams:
    """Counts of all n-grams within turns, up to three tokens; rare ones may be forgotten."""

    held: "dict[int, pl.DataFrame]" = field(default_factory=dict)
    forgotten: dict[int, int] = field(default_factory=dict)
    """By length: n-grams seen at most this often may be missing, and other counts may be too low by this much."""

    def add(self, ids: NDArray[np.int32], turns: IntArray, keep: BoolArray, row_of: IntArray) -> None:
        """Count the n-grams of a shard's N response tokens.

        `turns` tells where each turn starts, [U + 1]; `keep` and `row_of`, the row of a token's example, are [N].
        """
        import polars as pl

        if not ids.size:
            return
        turn_of = np.repeat(np.arange(turns.size - 1), np.diff(turns))
        for n in range(1, LONGEST + 1):
            last = ids.size - n + 1
            if last <= 0:
                continue
            inside = turn_of[:last] == turn_of[n - 1 :]
            key = np.zeros(last, dtype=np.int64)
            kept = np.zeros(last, dtype=np.int64)
            for shift in range(n):
                key = (key << _BITS) | ids[shift : shift + last]
                kept += keep[shift : shift + last]
            found = pl.LazyFrame({"key": key[inside], "kept": kept[inside], "row": row_of[:last][inside]})
            found = found.with_columns(count=pl.lit(1, pl.Int64))
            if n in self.held:
                found = pl.concat([self.held[n].lazy(), found], how="diagonal")
            sums = found.group_by("key").agg(pl.col("count", "kept").sum(), pl.col("row").min())
            self.held[n] = self._pruned(n, sums.collect())

    def _pruned(self, n: int, frame: "pl.DataFrame") -> "pl.DataFrame":
        import polars as pl

        while frame.height > MOST_HELD:
            self.forgotten[n] = self.forgotten.get(n, 0) + 1
            frame = frame.filter(pl.col("count") > self.forgotten[n])
        return frame

    def extremes(self, n: int, share: float, number: int, *, least: bool) -> list[dict[str, Any]]:
        """Return at most `number` n-grams of `n` tokens that are kept most, or least, often.

        Ranked by the bound of a 95 % Wilson interval, so that rare n-grams do not lead by luck; `share` is the kept
        share of all tokens, in [0, 1].

        Returns:
            `ids`, `count`, `kept` (share in [0, 1]), `lift` (`kept` over `share`), `row` (an example that has it).
        """
        import polars as pl

        if n not in self.held:
            return []
        total = int(self.held[n]["count"].sum())
        lowest = max(5, total // 50_000, self.forgotten.get(n, 0) + 1)
        z, count, p = 1.96, pl.col("count"), pl.col("kept") / (pl.col("count") * n)
        spread = z * (p * (1 - p) / count + z * z / (4 * count * count)).sqrt()
        middle, scale = p + z * z / (2 * count), 1 + z * z / count
        bound = (middle + spread if least else middle - spread) / scale
        frame = (
            self.held[n]
            .lazy()
            .filter(count >= lowest, p < share if least else p > share)
            .with_columns(p.alias("share"), bound.alias("bound"))
            .sort(["bound", "count", "key"], descending=[not least, True, False])
            .head(number)
            .collect()
        )
        return [
            {
                "ids": [(row["key"] >> (_BITS * (n - 1 - i))) & _MASK for i in range(n)],
                "count": row["count"],
                "kept": row["share"],
                "lift": row["share"] / share if share else 0.0,
                "row": row["row"],
            }
            for row in frame.iter_rows(named=True)
        ]
