"""One shard of `scores/<checkpoint>/`, row-aligned with the shard of tokens of the same name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sstoken.stages import tables


def write_scores(
    path: Path,
    example_ids: Sequence[str],
    offsets: NDArray[np.integer[Any]],
    loss: NDArray[np.float32],
    attention: NDArray[np.float32] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write it, with the sums that a summary needs.

    Args:
        path: of the shard.
        example_ids: of each of E rows.
        offsets: [E + 1]; row i has the values `offsets[i]:offsets[i + 1]`.
        loss: [M], of every token of the shard, row after row; NaN where there is none.
        attention: likewise; None: not measured.
        provenance: `checkpoint`, `layer`, `dtype`, the fingerprints of the shard of tokens and of the run (see
            `sstoken.stages.joins`) and, if known, `computed_with`, for the file's metadata.
    """
    columns = [pa.array(example_ids, pa.string()), tables.lists(loss, offsets, tables.VALUES)]
    stats: dict[str, Any] = {
        "examples": len(example_ids),
        "response_tokens": int(np.isfinite(loss).sum()),
        "loss_sum": _sum(loss),
    }
    schema = tables.SCORES
    if attention is not None:
        schema = tables.SCORES_WITH_ATTENTION
        columns.append(tables.lists(attention, offsets, tables.VALUES))
        stats["attention_sum"] = _sum(attention)
    metadata = {"kind": "scores", **provenance, "stats": stats}
    tables.write_part(path, pa.Table.from_arrays(columns, schema=schema), metadata)


def summarize_scores(folder: Path, checkpoint: str) -> dict[str, Any]:
    """The metrics of a finished folder of scores, from its shards' sums."""
    metadata = [tables.read_metadata(p) for p in tables.parts(folder)]
    stats = [m["stats"] for m in metadata]
    num_tokens = sum(s["response_tokens"] for s in stats)
    summary: dict[str, Any] = {
        "checkpoint": checkpoint,
        "examples": sum(s["examples"] for s in stats),
        "response_tokens": num_tokens,
        "mean_loss": sum(s["loss_sum"] for s in stats) / max(1, num_tokens),
    }
    if all("attention_sum" in s for s in stats):
        summary["mean_attention"] = sum(s["attention_sum"] for s in stats) / max(1, num_tokens)
    if remarks := sorted({m["computed_with"] for m in metadata if m.get("computed_with")}):
        summary["computed_with"] = "; ".join(remarks)
    return summary


def _sum(values: NDArray[np.float32]) -> float:
    return float(np.nansum(values, dtype=np.float64))
