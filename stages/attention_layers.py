"""Find the layer whose prompt attention is steadiest between snapshots: a measured choice of the layer to select by."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import SstokenError, UsageError
from sstoken.signals import ATTENTION, is_signal
from sstoken.stages import joins, tables


@dataclass(frozen=True)
class LayerStability:
    """How steady the prompt attention of a layer is."""

    layer: int
    """As in the column's name, `attention@LAYER`."""
    stability: float
    """Mean over examples and consecutive snapshots of the correlation of their tokens' attention, in [-1, 1]."""
    spread: float
    """Mean over examples of the standard deviation over tokens: near 0, there is nothing to rank by."""
    attention: float
    """Mean over tokens and all snapshots but the last, in [0, 1]."""


def layer_stability(snapshots: Sequence[Path]) -> list[LayerStability]:
    """Compare every layer's prompt attention between consecutive snapshots.

    An example with constant attention counts as correlation 0. Holds one shard of two snapshots in memory.

    Args:
        snapshots: scores folders in the order of training, each with columns `attention@LAYER`.

    Returns:
        The layers that all of them have, the steadiest first.

    Raises:
        UsageError: fewer than two snapshots, or no layer that all have.
        SstokenError: the folders are scores of different tokens.
    """
    if len(snapshots) < 2:
        raise UsageError("layers are compared between snapshots; name the scores of two or more")
    columns = _common_columns(snapshots)
    sums = {column: np.zeros(3) for column in columns}
    examples = tokens = 0
    for before, after in pairwise(snapshots):
        for part in tables.parts(before):
            first, second = (_attention(path, columns) for path in (part, after / part.name))
            for column in columns:
                for a, b in zip(first[column], second[column], strict=True):
                    sums[column] += _statistics(a, b)
            examples += sum(row.size > 0 for row in first[columns[0]])
            tokens += sum(row.size for row in first[columns[0]])
    found = [
        LayerStability(
            layer=int(column.partition("@")[2]),
            stability=float(total[0] / max(1, examples)),
            spread=float(total[1] / max(1, examples)),
            attention=float(total[2] / max(1, tokens)),
        )
        for column, total in sums.items()
    ]
    return sorted(found, key=lambda layer: (-layer.stability, layer.layer))


def _common_columns(snapshots: Sequence[Path]) -> list[str]:
    """Return the attention columns that all snapshots have; refuse scores of different tokens."""
    columns, tokens = [], []
    for folder in snapshots:
        parts = tables.parts(folder)
        if not parts:
            raise UsageError(
                f"{folder}: no part-*.parquet; name the scores of one checkpoint, such as scores/step-0"
            )
        columns.append(
            [c for c in tables.columns(parts[0]) if c.startswith(f"{ATTENTION}@") and is_signal(c)]
        )
        tokens.append([(path.name, tables.read_metadata(path).get(joins.TOKENS)) for path in parts])
        if tokens[-1] != tokens[0]:
            raise SstokenError(f"{folder}: scores of other tokens than {snapshots[0]}; score the same tokens")
    common = [column for column in columns[0] if all(column in others for others in columns)]
    if not common:
        raise UsageError(
            f"no attention@LAYER is in all of {', '.join(f.name for f in snapshots)}; score them with --signal "
            "attention@0 --signal attention@1 ..."
        )
    return common


def _attention(path: Path, columns: Sequence[str]) -> dict[str, list[NDArray[np.float64]]]:
    """Read the response tokens' attention by column, a row for each example."""
    table = tables.read_table(path, list(columns))
    return {
        column: [row[~np.isnan(row)].astype(np.float64) for row in tables.rows(table[column])]
        for column in columns
    }


def _statistics(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the correlation of an example's attention with the later one's, its deviation, and its sum."""
    if not before.size:
        return np.zeros(3)
    centred, later = before - before.mean(), after - after.mean()
    norm = float(np.sqrt((centred**2).sum() * (later**2).sum()))
    correlation = float((centred * later).sum()) / norm if norm > 0 else 0.0
    return np.array([correlation, before.std(), before.sum()])
