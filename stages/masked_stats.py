"""Counts of a masked dataset: per shard, and added up."""

from typing import Any

import numpy as np

from sstoken.methods import Tokens
from sstoken.selection import BoolArray, keep_per_example

NUM_DECILES = 10


def shard_stats(tokens: Tokens, kept: BoolArray, rho: float | None) -> dict[str, Any]:
    """Counts of one shard that add up over shards."""
    counts = np.diff(tokens.offsets)
    position = np.arange(kept.size) - np.repeat(tokens.offsets[:-1], counts)
    decile = position * NUM_DECILES // np.maximum(1, np.repeat(counts, counts))
    stats: dict[str, Any] = {
        "examples": int((counts > 0).sum()),
        "left_out": int((counts == 0).sum()),
        "response_tokens": int(kept.size),
        "kept": int(kept.sum()),
        "decile_tokens": np.bincount(decile, minlength=NUM_DECILES).tolist(),
        "decile_kept": np.bincount(decile[kept], minlength=NUM_DECILES).tolist(),
    }
    if rho and all(name in tokens for name in ("history.loss", "current.loss", "current.attention")):
        by_rel = keep_per_example(tokens.rel, tokens.offsets, rho)
        by_attention = keep_per_example(tokens["current.attention"], tokens.offsets, rho)
        stats["by_either_signal"] = int(by_rel.sum())
        stats["by_both_signals"] = int((by_rel & by_attention).sum())
    return stats


def merge_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of all shards.

    Returns:
        examples, left_out (no response token), response_tokens, kept, dropped, kept_share,
        kept_share_by_decile (of the position in the response; None where no token falls) and, where both
        signals were measured, signal_overlap: the share of the tokens chosen by REL alone that attention alone
        chooses too.
    """

    def total(key: str) -> int:
        return sum(s[key] for s in stats)

    tokens_D = np.sum([s["decile_tokens"] for s in stats], axis=0)
    kept_D = np.sum([s["decile_kept"] for s in stats], axis=0)
    summary: dict[str, Any] = {key: total(key) for key in ("examples", "left_out", "response_tokens", "kept")}
    summary["dropped"] = summary["response_tokens"] - summary["kept"]
    summary["kept_share"] = summary["kept"] / max(1, summary["response_tokens"])
    summary["kept_share_by_decile"] = [
        round(float(k / n), 4) if n else None for k, n in zip(kept_D, tokens_D, strict=True)
    ]
    if all("protected" in s for s in stats):
        names = stats[0]["protected"] if stats else {}
        summary["protected"] = {name: sum(s["protected"][name] for s in stats) for name in names}
        summary["protected_added"] = total("protected_added")
    if all("by_both_signals" in s for s in stats):
        summary["signal_overlap"] = total("by_both_signals") / max(1, total("by_either_signal"))
    return summary
