"""`export --check`: read an export back as its trainer would and compare it with the masked dataset token by token."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from sstoken.errors import SstokenError, reason
from sstoken.labels import IGNORED_LABEL, labels_from_mask
from sstoken.stages import tables
from sstoken.stages.exporting.base import Target
from sstoken.stages.exporting.rows import SMALLEST_RANGE

Expected = tuple[str, list[int], list[int], list[float]]
"""Example id, ids, labels and weights."""


def check_export(
    masked: Path, folder: Path, target: Target, max_length: int | None, weighted: bool
) -> dict[str, int]:
    """Compare every token of an export with the masked dataset.

    The expected rows are derived from the keep mask, row by row, without using any code that wrote the export.

    Returns:
        examples, tokens, kept: how many were compared.

    Raises:
        SstokenError: names the first row that differs or cannot be read.
    """
    counts = {"examples": 0, "tokens": 0, "kept": 0}
    for row, (expected, seen) in enumerate(
        zip_longest(_expected(masked, max_length, weighted), _seen(folder, target))
    ):
        if expected is None or seen is None:
            what = "more" if expected is None else "fewer"
            raise SstokenError(f"{folder}: {what} rows than the {row} of {masked}; export it again (--force)")
        name, ids, labels, weights = expected
        wanted = (ids, labels, weights if weighted else [float(label != IGNORED_LABEL) for label in labels])
        for what, ours, theirs in zip(("input_ids", "labels", "weights"), wanted, seen, strict=True):
            _compare(folder, row, name, what, ours, theirs)
        counts["examples"] += 1
        counts["tokens"] += len(ids)
        counts["kept"] += sum(label != IGNORED_LABEL for label in labels)
    return counts


def _expected(masked: Path, max_length: int | None, weighted: bool) -> Iterator[Expected]:
    columns = ["example_id", "input_ids", "keep_mask"]
    for path in tables.parts(masked):
        if weighted:
            given = "weight" in tables.columns(path)
            columns = [*columns[:3], *(["weight"] if given else ["response_mask", "score"])]
        for batch in tables.read_table(path, columns).to_batches(1000):
            for row in batch.to_pylist():
                ids, keep = row["input_ids"][:max_length], row["keep_mask"][:max_length]
                labels = labels_from_mask(ids, keep, skip_first=True).tolist()
                if all(label == IGNORED_LABEL for label in labels):
                    continue
                weights = _weights(row, labels) if weighted else []
                yield row["example_id"], ids, labels, weights


def _weights(row: dict[str, Any], labels: list[int]) -> list[float]:
    if "weight" in row:
        return [
            0.0 if label == IGNORED_LABEL else weight
            for label, weight in zip(labels, row["weight"], strict=False)
        ]
    scores = [s for s, r in zip(row["score"], row["response_mask"], strict=True) if r]
    lowest, highest = min(scores), max(scores)
    return [
        0.0
        if label == IGNORED_LABEL
        else (score - lowest + SMALLEST_RANGE) / (highest - lowest + SMALLEST_RANGE)
        for label, score in zip(labels, row["score"], strict=False)
    ]


def _seen(folder: Path, target: Target) -> Iterator[tuple[list[int], list[int], list[float] | None]]:
    try:
        for table in target.read(folder):
            for row in table.to_pylist():
                yield target.seen(row)
    except SstokenError:  # a target's own reason
        raise
    except Exception as error:  # each loader raises its own types
        raise SstokenError(
            f"{folder}: {target.name} cannot read it ({reason(error)}); export it again (--force)"
        ) from error


def _compare(folder: Path, row: int, name: str, what: str, ours: list[Any], theirs: list[Any] | None) -> None:
    if theirs is None:  # a trainer without weights
        return
    if len(ours) != len(theirs):
        where = f"{what} has {len(theirs)} tokens, the masked dataset has {len(ours)}"
    elif not np.allclose(ours, theirs, rtol=1e-6, atol=0):
        i = int(np.argmin(np.isclose(ours, theirs, rtol=1e-6, atol=0)))
        where = f"{what} of token {i} is {theirs[i]}, by the masked dataset {ours[i]}"
    else:
        return
    raise SstokenError(f"{folder}: row {row} (example {name!r}): {where}; export it again (--force)")
