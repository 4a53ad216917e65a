"""The examples that a page shows: the text of their tokens, with every recorded value."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.methods.presets import shown_name
from sstoken.selection import BoolArray, Float32Array
from sstoken.stages.report.folders import Folders
from sstoken.stages.report.shards import Shard
from sstoken.stages.report.statistics import Statistics, responses, surprise
from sstoken.stages.token_text import token_texts, visible

DATA_BYTES = 3_000_000
"""Most bytes of a page's examples, so that the page stays below 5 MB."""
MOST_TOKENS = 1500
"""Most tokens shown of one example."""
_BEFORE = 300
"""Tokens of the prompt that a clipped example keeps before its response."""
_DIGITS = 3


def gather(
    stats: Statistics, wanted: Mapping[str, Sequence[int]], budget: int = DATA_BYTES
) -> list[dict[str, Any]]:
    """Read the rows wanted, by reason, until the budget (bytes of JSON) is spent; the first reasons take precedence.

    Returns:
        One dictionary per example, in the order of the rows: `row`, `id`, `why`, `tokens`, `first` (number of tokens
        left out before those shown), `differ`, `surprise`, `kept` (a share for each folder), `text` and `ids` for each
        token; `special`, `response` and `keep` as strings of 0 and 1 (`keep` for each folder); and for the response
        tokens only, `score` and `weight` for each folder and `signals` by name.
    """
    why: dict[int, list[str]] = {}
    for reason, rows in wanted.items():
        for row in rows:
            why.setdefault(row, []).append(reason)
    rank = {row: place for place, row in enumerate(why)}
    found: dict[int, tuple[int, dict[str, Any]]] = {}
    spent = 0
    for shard in stats.folders.shards(list(why)):
        after = shard.first_row + len(shard.example_ids)
        surprising = _surprise(stats, shard)
        for row in sorted(r for r in why if shard.first_row <= r < after):
            example = _example(stats, shard, row - shard.first_row, surprising)
            example["why"] = list(dict.fromkeys(why[row]))
            size = len(json.dumps(example))
            found[row] = (size, example)
            spent += size
        while spent > budget and len(found) > 1:
            last = max(found, key=lambda row: rank[row])
            spent -= found.pop(last)[0]
    return [found[row][1] for row in sorted(found)]


def _surprise(stats: Statistics, shard: Shard) -> NDArray[np.float64] | None:
    r = responses(shard)
    if stats.pair is None or any(name not in r.signals for name in stats.pair):
        return None
    a, b = (r.signals[name] for name in stats.pair)
    return surprise(a, b, r.example, r.offsets)


def _example(
    stats: Statistics, shard: Shard, at: int, surprising: NDArray[np.float64] | None
) -> dict[str, Any]:
    start, stop = int(shard.offsets[at]), int(shard.offsets[at + 1])
    response = shard.response[start:stop]
    first, last = _window(response)
    kept = [keep[start:stop] for keep in shard.keeps]
    has = [bool(each[at]) for each in shard.has]
    differ = np.any([k[response] != kept[0][response] for k, h in zip(kept, has, strict=True) if h], axis=0)
    shown = slice(start + first, start + last)
    inside = shard.response[shown]
    ids = shard.ids[shown].tolist()

    def compact(values: Float32Array | None) -> list[float | None] | None:
        return None if values is None else _rounded(values[shown][inside])

    return {
        "row": shard.first_row + at,
        "id": visible(shard.example_ids[at], newline=" "),
        "tokens": stop - start,
        "first": first,
        "surprise": None if surprising is None else round(float(surprising[at]), _DIGITS),
        "differ": round(float(differ.mean()), _DIGITS) if differ.size else 0,
        "kept": [
            round(float(k[response].mean()), _DIGITS) if h and response.any() else None
            for k, h in zip(kept, has, strict=True)
        ],
        "text": [visible(text, newline="\n") for text in token_texts(stats.token_classes.tokenizer, ids)],
        "ids": ids,
        "special": _bits(stats.token_classes.is_special(shard.ids[shown])),
        "response": _bits(inside),
        "keep": [_bits(k[first:last]) if h else None for k, h in zip(kept, has, strict=True)],
        "score": [compact(values.get("score")) for values in shard.values],
        "weight": [compact(values.get("weight")) for values in shard.values],
        "signals": {name: compact(values) for name, values in shard.signals.items()},
    }


def _window(response: BoolArray) -> tuple[int, int]:
    """Return the part of a long example to show: the end of its prompt, then its response."""
    if response.size <= MOST_TOKENS:
        return 0, int(response.size)
    first = int(response.argmax()) - _BEFORE if response.any() else 0
    first = max(0, min(first, response.size - MOST_TOKENS))
    return first, first + MOST_TOKENS


def _bits(mask: BoolArray) -> str:
    return "".join("1" if flag else "0" for flag in mask)


def _rounded(values: Float32Array) -> list[float | None]:
    """Round to three significant digits: enough to compare, and a third of the bytes."""
    return [float(f"{v:.{_DIGITS}g}") if np.isfinite(v) else None for v in values.tolist()]


def scale(values: NDArray[np.float64], signed: bool) -> list[float]:
    """Return the six values between seven colours that give each as many tokens; symmetric about 0 if signed."""
    known = values[np.isfinite(values)]
    if not known.size:
        return []
    if signed:
        low, middle, high = np.quantile(np.abs(known), (0.2, 0.5, 0.8))
        steps = [-high, -middle, -low, low, middle, high]
    else:
        steps = np.quantile(known, np.arange(1, 7) / 7).tolist()
    return [float(f"{step:.{_DIGITS}g}") for step in steps]


def as_json(data: Any) -> str:
    """Return JSON that is safe inside a `<script>` element, whatever text it contains."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def titles(folders: Folders) -> list[dict[str, Any]]:
    """Return the facts about each folder that a page shows."""
    return [
        {
            "name": visible(each.name, newline=" "),
            "kind": each.kind,
            "method": visible(shown_name(each.facts), newline=" "),
            "rho": each.facts.get("rho"),
        }
        for each in folders.all
    ]
