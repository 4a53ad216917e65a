"""Check a scores folder: is every response token measured, and do the values differ?"""

from pathlib import Path
from typing import Any

import numpy as np

from sstoken.signals import get_signal, is_signal
from sstoken.stages import tables
from sstoken.stages.auditing.findings import Audit, Family

FAMILY = Family("scores")
MISSING = FAMILY.error(
    "signal-missing", "rows with response tokens that were not measured", "score them again (--force)"
)
CONSTANT = FAMILY.warning(
    "signal-constant",
    "rows, all of them, in which a signal is the same number on every token",
    "a method learns nothing from it: check that the right checkpoint was scored",
)


def check(scores: Path, tokens: Path, audit: Audit) -> dict[str, Any]:
    """Compare the shards of a scores folder with those of its tokens; return the range of each signal."""
    ranges: dict[str, tuple[float, float]] = {}
    num_rows = 0
    for part in tables.parts(scores):
        table = tables.read_table(part)
        masks = tables.rows(tables.read_table(tokens / part.name, ["response_mask"])["response_mask"])
        names = table["example_id"].to_pylist()
        for name in table.column_names:
            if name == "example_id":
                continue
            for number, (values, mask) in enumerate(zip(tables.rows(table[name]), masks, strict=True)):
                of_response = values.astype(float)[mask.astype(bool)]
                known = of_response[np.isfinite(of_response)]
                if known.size:
                    low, high = ranges.get(name, (np.inf, -np.inf))
                    ranges[name] = min(low, float(known.min())), max(high, float(known.max()))
                if lost := of_response.size - known.size:
                    detail = f"{name} is null on {lost} of {of_response.size} tokens of {names[number]!r}"
                    audit.report_row(MISSING, f"{part.name} row {number}", num_rows + number, detail)
        num_rows += len(names)
    same = [
        f"{name} is {low:zg}"
        for name, (low, high) in ranges.items()
        if low == high and not (is_signal(name) and get_signal(name).may_be_constant)
    ]
    if same:
        audit.report_count(CONSTANT, num_rows, None, ", ".join(same))
    return {name: {"min": low, "max": high} for name, (low, high) in ranges.items()}
