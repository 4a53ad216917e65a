"""Counts and lengths of encoded examples, merged shard by shard in constant memory."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

Stats = dict[str, Any]
"""Counts; `lengths`: the number of examples of each length (in tokens; keys are strings, as in JSON); and the
dicts listed in `COUNTED`."""
COUNTED = ("bad_rows", "passed_over", "unused", "notes")
"""How many rows were bad, by reason; how many the user chose to skip; how many examples have each unused column or
key; and notes on changes that are not visible in the rows."""


def merge(left: Stats, right: Stats) -> Stats:
    """Add up the statistics of two sets of rows."""
    both = {name: left[name] + right[name] for name in left if not isinstance(left[name], dict)}
    for name in ("lengths", *COUNTED):
        both[name] = dict(Counter(left[name]) + Counter(right[name]))
    return both


def metrics(stats: Stats) -> dict[str, Any]:
    """Return what the manifest keeps. Lengths are in tokens; the response share is of all tokens."""
    lengths = sorted((int(n), k) for n, k in stats["lengths"].items())
    return {
        "rows": stats["rows"],
        "examples": stats["examples"],
        "tokens": stats["tokens"],
        "response_tokens": stats["response_tokens"],
        "response_share": round(stats["response_tokens"] / max(stats["tokens"], 1), 4),
        "length": {f"p{q}": percentile(lengths, q) for q in (50, 90, 99)} | {"max": percentile(lengths, 100)},
        "truncated": stats["truncated"],
        "dropped_no_response": stats["dropped"],
    } | {name: dict(sorted(stats[name].items())) for name in COUNTED}


def no_stats() -> Stats:
    """Return the statistics of zero rows."""
    counts = ("rows", "examples", "tokens", "response_tokens", "truncated", "dropped")
    return dict.fromkeys(counts, 0) | {name: {} for name in ("lengths", *COUNTED)}


def percentile(lengths: Iterable[tuple[int, int]], q: int) -> int:
    """Return the nearest-rank percentile: the smallest length that q percent of the examples do not exceed.

    Takes sorted pairs of length and count, which add up over shards; numpy.percentile needs every length at once.
    """
    pairs = list(lengths)
    rank = -(-q * sum(k for _, k in pairs) // 100)
    for length, k in pairs:
        rank -= k
        if rank <= 0:
            return length
    return 0
