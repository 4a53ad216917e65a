"""Split packed rows into documents, by position_ids or seq_lengths."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sstoken.selection import IntArray
from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.findings import Audit, Family

FAMILY = Family("packs")
POSITIONS = FAMILY.error(
    "bad-positions",
    "rows whose position_ids or seq_lengths do not fit their tokens",
    "count positions from 0 in each document; the lengths of a pack's documents add up to its tokens",
)


def documents(
    example: Example, positions: IntArray | None, lengths: IntArray | None, audit: Audit
) -> Iterator[Example]:
    """Yield the documents packed into a row, by its position_ids, [T], or their lengths; or the row itself."""
    starts = [0]
    if positions is not None:
        starts = _by_positions(example, positions, audit)
    if lengths is not None:
        if lengths.sum() == len(example.ids) and (lengths > 0).all():
            starts = [0, *np.cumsum(lengths)[:-1].tolist()]
        else:
            said = f"the lengths add up to {lengths.sum()}, there are {len(example.ids)} tokens"
            audit.report(POSITIONS, example, (0, 0), said)
    if len(starts) == 1:
        yield example
        return
    for start, stop in zip(starts, [*starts[1:], len(example.ids)], strict=True):
        part = slice(start, stop)
        yield replace(
            example,
            ids=example.ids[part],
            trained=example.trained[part],
            response=None if example.response is None else example.response[part],
            padding=None if example.padding is None else example.padding[part],
            whole=False,
            offset=start,
        )


def _by_positions(example: Example, positions: IntArray, audit: Audit) -> list[int]:
    places = np.arange(len(positions)) if example.padding is None else np.flatnonzero(~example.padding)
    counted = positions[places]
    if not counted.size:
        return [0]
    zeros = counted == 0
    last = int(np.flatnonzero(~zeros)[-1]) if (~zeros).any() else 0
    zeros[last + 1 :] = False  # padding without an attention mask, often at position 0
    good = zeros[1 : last + 1] | (np.diff(counted)[:last] == 1)
    if counted[0] != 0 or not good.all():
        at = int(places[0] if counted[0] != 0 else places[int(np.argmin(good)) + 1])
        audit.report(POSITIONS, example, at, f"position {positions[at]} at token {at}")
        return [0]
    return [0, *(int(i) for i in places[zeros] if i > places[0])]
