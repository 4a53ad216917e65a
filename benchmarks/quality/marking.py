"""Marks a greedy answer."""

import re

from benchmarks.quality.planting import Row


def right(row: Row, text: str) -> bool:
    """Whether the last sentence that states a result states the right one.

    GSM8K: what follows `####`, else the last number. Families: the result stands in the last or the last but one
    sentence (a closing phrase may follow), whole.
    """
    if row.id.startswith("gsm8k"):
        marked = re.findall(r"####\s*\$?(-?[\d.,]+)", text) or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return bool(marked) and marked[-1].rstrip(".").replace(",", "") == row.result.replace(",", "")
    last = " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[-2:])
    return re.search(rf"(?<![\w-]){re.escape(row.result)}(?![\w-])", last) is not None
