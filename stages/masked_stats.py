"""Counts of a masked dataset: per shard, and added up."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sstoken.methods import Input, Tokens, get_method
from sstoken.selection import BoolArray, Float64Array, IntArray, keep_per_example, places
from sstoken.signals import get_signal

NUM_DECILES = 10
WEAK_BASE = 3.0
"""Nats a token. pmi-band helped with bases of 0.7 and 1.5 and did harm with one of 5 (docs/choosing.md)."""
PROTECTED = "protected:"
"""Prefix of the counts of protected tokens, before the value of `protect`."""


def shard_stats(tokens: Tokens, kept: BoolArray, rho: float | None) -> dict[str, Any]:
    """Return counts of a shard's N response tokens, of which `kept`, [N], are kept. They add up over shards.

    `rho` is the share kept, for the overlap of REL and attention; None: no overlap is counted.
    """
    counts = np.diff(tokens.offsets)
    decile = places(tokens.offsets) * NUM_DECILES // np.maximum(1, np.repeat(counts, counts))
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


def signal_stats(tokens: Tokens, kept: BoolArray, inputs: Sequence[str], turns: IntArray) -> dict[str, Any]:
    """Return what `notes_on` needs about a shard's N response tokens; kept apart, since ranges do not add up.

    `kept` is [N], `inputs` names the signals that the method reads, `turns` tells where each turn starts, [U + 1].
    """
    ends = turns[1:][np.diff(turns) > 0] - 1
    stats: dict[str, Any] = {
        "turns": int(ends.size),
        "turn_ends_kept": int(kept[ends].sum()),
        "range": {name: _range(tokens[name]) for name in inputs},
    }
    if {"history.loss", "current.loss"} <= set(inputs):
        stats["rel_sum"], stats["rel_range"] = float(tokens.rel.sum()), _range(tokens.rel)
        stats["one_sided"] = _set_by_one_token(tokens.rel, tokens.offsets)
    for name in inputs:
        if name.endswith(".loss_unconditional"):
            loss = tokens[name.removesuffix("_unconditional")]
            stats["loss_sum"] = float(loss[np.isfinite(loss)].sum())
    return stats


def _set_by_one_token(values: Float64Array, offsets: IntArray) -> int:
    """Count examples of four tokens or more in which leaving out one token more than halves the range of values."""
    lengths = np.diff(offsets)
    starts, counts = offsets[:-1][lengths > 0], lengths[lengths > 0]
    if not counts.size:
        return 0

    def top_two(signed: Float64Array) -> tuple[Float64Array, Float64Array]:
        first = np.maximum.reduceat(signed, starts)
        at_top = signed == np.repeat(first, counts)
        second = np.maximum.reduceat(np.where(at_top, -np.inf, signed), starts)
        return first, np.where(np.add.reduceat(at_top, starts, dtype=np.int64) > 1, first, second)

    high, second = top_two(values)
    low, last_but_one = (-v for v in top_two(-values))
    without_one = np.minimum(second - low, high - last_but_one)
    return int(((2 * without_one < high - low) & (counts >= 4)).sum())


def _range(values: Float64Array) -> list[float] | None:
    known = values[np.isfinite(values)]
    return [float(known.min()), float(known.max())] if known.size else None


def notes_on(stats: Sequence[dict[str, Any]], method: str) -> list[str]:
    """Return one line for each thing that is allowed but looks wrong with a selection.

    `stats` has a dictionary for each shard: its counts, and those of `signal_stats`.
    """

    def total(key: str) -> Any:
        return sum(s.get(key, 0) for s in stats)

    def whole_range(ranges: Iterable[list[float] | None]) -> tuple[float, float] | None:
        known = [r for r in ranges if r is not None]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None

    notes = []
    num_tokens, num_turns = total("response_tokens"), total("turns")
    compared = all("rel_sum" in s for s in stats)
    if compared and whole_range(s["rel_range"] for s in stats) == (0.0, 0.0):
        notes.append(
            "history and current give every token the same loss; they look like one checkpoint, name another"
        )
    elif compared and total("rel_sum") < 0:
        mean = total("rel_sum") / max(1, num_tokens)
        notes.append(
            f"mean REL is {mean:.3f} nats: history fits these responses better than current; they may be swapped"
        )
    if method == "pmi-band" and num_tokens and all("loss_sum" in s for s in stats):
        mean = total("loss_sum") / num_tokens
        if mean > WEAK_BASE:
            notes.append(
                f"the base's mean loss is {mean:.2f} nats a token: it does not know such answers, and {method} did "
                "harm with such a base (docs/choosing.md); compare with --method full"
            )
    examples, one_sided = total("examples"), total("one_sided")
    if "minmax(rel)" in get_method(method).formula and 2 * one_sided > examples:
        notes.append(
            f"in {one_sided:,} of {examples:,} examples a single token sets more than half of REL's range, so min-max "
            "leaves the others close together and attention decides between them; compare with --method rel"
        )
    for name in stats[0]["range"] if stats else ():
        found = whole_range(s["range"][name] for s in stats)
        if found is None or found[0] != found[1] or num_tokens <= 1:
            continue
        if not get_signal(Input(name).signal).may_be_constant:
            notes.append(
                f"{name} is {found[0]:zg} on every token: {method} learns nothing from it; score it again"
            )
    dropped = num_turns - total("turn_ends_kept")
    if num_tokens and not total("kept"):
        notes.append("no token is kept: there is nothing to train on; change the method's parameters")
    elif 2 * dropped > num_turns:
        notes.append(
            f"the last token of {dropped:,} of {num_turns:,} turns is dropped: a model may not learn to stop; keep it "
            "with --protect end_of_turn"
        )
    return notes


def merge_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the shards' counts.

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
    if stats and all("passed_over" in s for s in stats):
        summary["passed_over"] = total("passed_over")
    if stats and all("protected_added" in s for s in stats):
        names = [key for key in stats[0] if key.startswith(PROTECTED)]
        summary["protected"] = {key.removeprefix(PROTECTED): total(key) for key in names}
        summary["protected_added"] = total("protected_added")
    if all("by_both_signals" in s for s in stats):
        summary["signal_overlap"] = total("by_both_signals") / max(1, total("by_either_signal"))
    return summary
