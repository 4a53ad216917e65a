"""One shard of `scores/<checkpoint>/`, row-aligned with the shard of tokens of the same name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sstoken.signals import Signal, get_signal
from sstoken.stages import tables

Column = NDArray[np.float32] | NDArray[np.int32]


def write_scores(
    path: Path,
    example_ids: Sequence[str],
    offsets: NDArray[np.integer[Any]],
    response: NDArray[np.bool_],
    signals: Mapping[str, Column],
    provenance: Mapping[str, Any],
) -> None:
    """Write it, with the sums that a summary needs and each signal's unit and meaning.

    Args:
        path: of the shard.
        example_ids: of each of E rows.
        offsets: [E + 1]; row i has the tokens `offsets[i]:offsets[i + 1]`.
        response: [M] over all tokens of the shard, row after row.
        signals: by name, compact: a value for each token that `measured_tokens` gives.
        provenance: `checkpoint`, `layer`, `dtype`, the fingerprints of the shard of tokens and of the run (see
            `sstoken.stages.joins`) and, if known, `computed_with`, for the file's metadata.
    """
    named = {name: get_signal(name) for name in signals}
    columns: list[pa.Array] = [pa.array(example_ids, pa.string())]
    fields = [pa.field("example_id", pa.string())]
    stats: dict[str, Any] = {"examples": len(example_ids), "response_tokens": int(response.sum())}
    for name, values in signals.items():
        kind = tables.SIGNAL_COLUMNS[named[name].dtype]
        columns.append(_scatter(values, measured_tokens(named[name], response, offsets), offsets, kind))
        fields.append(pa.field(name, kind))
        stats[f"{name}_sum"] = float(values.sum(dtype=np.float64))
        if named[name].from_second:
            stats[f"{name}_count"] = len(values)
    about = {name: {"unit": s.unit, "meaning": s.meaning} for name, s in named.items()}
    metadata = {"kind": "scores", "signals": about, **provenance, "stats": stats}
    tables.write_part(path, pa.Table.from_arrays(columns, schema=pa.schema(fields)), metadata)


def measured_tokens(
    signal: Signal, response: NDArray[np.bool_], offsets: NDArray[np.integer[Any]]
) -> NDArray[np.bool_]:
    """The tokens of a shard that have that signal.

    Args:
        signal: which.
        response: [M] over all tokens of the shard.
        offsets: [E + 1], where its examples start.

    Returns:
        [M].
    """
    if not signal.from_second:
        return response
    places = np.flatnonzero(response)
    firsts = np.searchsorted(places, offsets[:-1])  # of each example; that of an empty one is another's
    ends = np.searchsorted(places, offsets[1:])
    measured = response.copy()
    measured[places[firsts[firsts < ends]]] = False
    return measured


def _scatter(
    values: Column, measured: NDArray[np.bool_], offsets: NDArray[np.integer[Any]], kind: pa.ListType
) -> pa.ListArray:
    """Compact values as a list column that is null wherever nothing was measured."""
    full = np.zeros(measured.size, values.dtype)
    full[measured] = values
    flat = pa.array(full, kind.value_type, mask=~measured)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind)


def summarize_scores(folder: Path, checkpoint: str) -> dict[str, Any]:
    """The metrics of a finished folder of scores, from its shards' sums."""
    metadata = [tables.read_metadata(p) for p in tables.parts(folder)]
    stats = [m["stats"] for m in metadata]
    num_tokens = sum(s["response_tokens"] for s in stats)
    summary: dict[str, Any] = {
        "checkpoint": checkpoint,
        "examples": sum(s["examples"] for s in stats),
        "response_tokens": num_tokens,
    }
    for key in (key for key in stats[0] if key.endswith("_sum")) if stats else ():
        name = key.removesuffix("_sum")
        count = sum(s.get(f"{name}_count", s["response_tokens"]) for s in stats)
        summary[f"mean_{name}"] = sum(s[key] for s in stats) / max(1, count)
    if remarks := sorted({m["computed_with"] for m in metadata if m.get("computed_with")}):
        summary["computed_with"] = "; ".join(remarks)
    return summary
