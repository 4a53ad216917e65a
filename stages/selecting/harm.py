"""Check whether a mask looks harmful: does it drop words and numbers, or the last number of each turn?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sstoken.selection import BoolArray, IntArray, num_kept, places
from sstoken.stages.selecting.text import ResponseText

MARGIN = 0.05
"""A mask gets a note if its kept share of words and numbers is lower than a prefix's by more than this."""
FEWEST = 100
"""Fewest words and numbers, or digits, for a note."""
COUNTS = (
    "content",
    "content_kept",
    "content_in_prefix",
    "result_digits",
    "result_digits_kept",
    "turns_with_number",
)


def harm_stats(text: ResponseText, kept: BoolArray, offsets: IntArray) -> dict[str, int]:
    """Return counts of a shard's N response tokens, which add up over shards; {} if only transformers reads them.

    `kept` is [N], `offsets` tells where each example starts, [E + 1].

    Returns:
        `content` (tokens with a letter or digit), `content_kept`, `content_in_prefix` (those among the first tokens of
        each example, as many as are kept in total), `result_digits` (tokens of the last number of each turn),
        `result_digits_kept`, `turns_with_number`.
    """
    if not text.quick:
        return {}
    content, number = text.where(_has_letter_or_digit), text.where(_is_number)
    counts = np.diff(offsets)
    share = kept.mean() if kept.size else 0.0
    ends = np.array([num_kept(int(n), share) if share else 0 for n in counts], dtype=np.int64)
    result, with_number = _last_runs(number, text.turns)
    return {
        "content": int(content.sum()),
        "content_kept": int((content & kept).sum()),
        "content_in_prefix": int((content & (places(offsets) < np.repeat(ends, counts))).sum()),
        "result_digits": int(result.sum()),
        "result_digits_kept": int((result & kept).sum()),
        "turns_with_number": with_number,
    }


def harm_notes(stats: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each thing that looks harmful; shards without counts (see `harm_stats`) are ignored."""
    known = [s for s in stats if "content" in s]
    total = {name: sum(s[name] for s in known) for name in (*COUNTS, "turns")}
    notes = []
    if total["content"] >= FEWEST:
        own, prefix = (total[name] / total["content"] for name in ("content_kept", "content_in_prefix"))
        if own < prefix - MARGIN:
            notes.append(
                f"{own:.1%} of the words and numbers are kept; as many tokens from the start of each answer would keep "
                f"{prefix:.1%}: compare with --method prefix --param of=response and with random"
            )
    digits = total["result_digits"]
    dropped = digits - total["result_digits_kept"]
    if digits >= FEWEST and 2 * dropped > digits and 2 * total["turns_with_number"] > total["turns"]:
        notes.append(
            f"{dropped:,} of the {digits:,} tokens of the answers' last numbers are dropped: a model may not learn to "
            r"state results; keep them with --protect 'regex:\d[\d.,]*(?=\D*\Z)'"
        )
    return notes


def _has_letter_or_digit(piece: str) -> bool:
    return any(c.isalnum() for c in piece)


def _is_number(piece: str) -> bool:
    return any(c.isdigit() for c in piece) and not any(c.isalpha() for c in piece)


def _last_runs(number: BoolArray, turns: IntArray) -> tuple[BoolArray, int]:
    """Return the last run of number tokens in each turn, [N], and the number of turns that have one."""
    found = np.zeros(number.size, dtype=bool)
    at = np.flatnonzero(number)
    if not at.size:
        return found, 0
    turn = np.searchsorted(turns, at, side="right") - 1
    breaks = np.append((np.diff(at) > 1) | (np.diff(turn) > 0), True)
    run = np.concatenate([[0], np.cumsum(breaks[:-1])])
    last = np.append(turn[1:] != turn[:-1], True)
    found[at[np.isin(run, run[last])]] = True
    return found, int(last.sum())
