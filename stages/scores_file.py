"""Write and summarize shards of `scores/<checkpoint>/`, row-aligned with the shards of tokens."""

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
    """Write one shard of scores. Its metadata hold each signal's unit, meaning and sum.

    Args:
        path: the file.
        example_ids: [E].
        offsets: [E + 1]; row i has the tokens `offsets[i]:offsets[i + 1]`.
        response: [M], True on the response tokens of all rows.
        signals: by name; one value for each True in `measured_tokens`.
        provenance: `checkpoint`, `layer`, `dtype`, the fingerprints of the shard of tokens and of the run (see
            `sstoken.stages.joins`) and, if known, `computed_with`, for the metadata.
    """
    named = {name: get_signal(name) for name in signals}
    columns: list[pa.Array] = [pa.array(example_ids, pa.string())]
    fields = [pa.field("example_id", pa.string())]
    stats: dict[str, Any] = {"examples": len(example_ids), "response_tokens": int(response.sum())}
    for name, values in signals.items():
        kind = tables.SIGNAL_COLUMNS[named[name].dtype]
        measured = measured_tokens(named[name], response, offsets)
        columns.append(tables.scattered(values, measured, offsets, kind))
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
    """Return which tokens of a shard have a value of the signal, [M].

    Args:
        signal: some leave out the first response token of each example.
        response: [M], True on the shard's response tokens.
        offsets: [E + 1], where each example starts.
    """
    if not signal.from_second:
        return response
    places = np.flatnonzero(response)
    firsts = np.searchsorted(places, offsets[:-1])  # of an example without a response: another example's
    ends = np.searchsorted(places, offsets[1:])
    measured = response.copy()
    measured[places[firsts[firsts < ends]]] = False
    return measured


def summarize_scores(folder: Path, checkpoint: str) -> dict[str, Any]:
    """Return the metrics of a folder of scores, from its shards' sums."""
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
