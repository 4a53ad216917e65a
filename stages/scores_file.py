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
    columns: dict[str, pa.Array] = {}
    stats: dict[str, Any] = {"examples": len(example_ids), "response_tokens": int(response.sum())}
    for name, values in signals.items():
        signal = get_signal(name)
        kind = tables.SIGNAL_COLUMNS[signal.dtype]
        columns[name] = tables.scattered(values, measured_tokens(signal, response, offsets), offsets, kind)
        stats[f"{name}_sum"] = float(values.sum(dtype=np.float64))
        if signal.from_second:
            stats[f"{name}_count"] = len(values)
    write_columns(path, example_ids, columns, provenance, stats)


def write_columns(
    path: Path,
    example_ids: Sequence[str],
    columns: Mapping[str, pa.Array],
    provenance: Mapping[str, Any],
    stats: Mapping[str, Any],
) -> None:
    """Write one shard of scores from list columns by signal, with its counts `stats`; see `write_scores`."""
    signals = {name: get_signal(name) for name in columns}
    about = {name: {"unit": signal.unit, "meaning": signal.meaning} for name, signal in signals.items()}
    metadata = {"kind": "scores", "signals": about, **provenance, "stats": stats}
    table = pa.table({"example_id": pa.array(example_ids, pa.string()), **columns})
    tables.write_part(path, table, metadata)


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
    return summary | remarks(metadata)


def remarks(metadata: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return `computed_with`: how the shards with these metadata were computed; {} if none says so."""
    found = sorted({m["computed_with"] for m in metadata if m.get("computed_with")})
    return {"computed_with": "; ".join(found)} if found else {}
