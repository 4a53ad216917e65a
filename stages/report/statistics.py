"""The statistics of a report, from one pass over the shards: counts of all tokens, and a sample of their signals."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.selection import BoolArray, Float32Array, Float64Array, IntArray, places, runs
from sstoken.stages.report import compare
from sstoken.stages.report.folders import Folders, SignalFacts
from sstoken.stages.report.ngrams import NGrams
from sstoken.stages.report.sampling import Columns, Highest, Uniform
from sstoken.stages.report.shards import Shard
from sstoken.stages.report.token_classes import ALL_CLASSES, TokenClasses

NUM_DECILES, MOST_TURNS, NUM_LENGTHS, RHO_BINS = 10, 8, 14, 100
TOKENS_SAMPLED, CUTS_SAMPLED = 200_000, 20_000
EXAMPLES_SAMPLED, EXAMPLES_LEADING = 60, 20
FLAG_ROWS = 5
FLAGS = {
    "end_dropped": (
        "The end of a turn is dropped",
        "A model that never trains on its stop token may not learn to stop. `select --protect end_of_turn` keeps it.",
        "turn-ends-dropped",
    ),
    "unscored_kept": ("Kept without a score", "Tokens are kept though the method gave them no score.", None),
    "repetition": (
        "The answer repeats itself",
        "Fewer than 3 in 10 of its three-token sequences are different ones: often a loop of generated text.",
        None,
    ),
}
"""The report's own flags by name: title, meaning, and the kind of `audit` finding that reports the same."""
_PREFERRED = (("rel", "attention"), (".loss", ".entropy"), (".loss", ".attention"), (".loss", ".loss"))
_SHORT, _LOOP = 60, 0.3


@dataclass(frozen=True)
class Responses:
    """The N response tokens of a shard."""

    ids: NDArray[np.int32]
    offsets: IntArray
    """[E + 1], where each example's response tokens start."""
    turns: IntArray
    """[U + 1], where each turn starts."""
    keeps: list[BoolArray]
    has: list[BoolArray]
    """[N], whether the folder has the token's example."""
    example: IntArray
    """[N], its example within the shard."""
    place: IntArray
    """[N], its place within its example's response."""
    score: Float32Array | None
    signals: dict[str, Float32Array]


def responses(shard: Shard) -> Responses:
    """Return a shard's response tokens."""
    where = np.flatnonzero(shard.response)
    offsets = np.searchsorted(where, shard.offsets).astype(np.int64)
    counts = np.diff(offsets)
    score = shard.values[0].get("score")
    return Responses(
        shard.ids[where],
        offsets,
        runs(shard.response, shard.offsets),
        [keep[where] for keep in shard.keeps],
        [np.repeat(has, counts) for has in shard.has],
        np.repeat(np.arange(counts.size), counts),
        places(offsets),
        None if score is None else score[where],
        {name: values[where] for name, values in shard.signals.items()},
    )


class Breakdown:
    """Counts of tokens and kept tokens by a code, such as the class, for C codes and F folders."""

    def __init__(self, codes: int, folders: int) -> None:
        self.tokens = np.zeros(codes, np.int64)
        self.kept = np.zeros((folders, codes), np.int64)
        """[F, C]."""

    def add(self, code: NDArray[np.integer[Any]], keeps: list[BoolArray]) -> None:
        """Count N tokens, by their codes [N] and each folder's keep mask [N]."""
        self.tokens += np.bincount(code, minlength=self.tokens.size)
        for i, keep in enumerate(keeps):
            self.kept[i] += np.bincount(code[keep], minlength=self.tokens.size)


class Statistics:
    """The result of a pass over the shards."""

    def __init__(self, folders: Folders, seed: int = 0) -> None:
        self.folders = folders
        self.token_classes = TokenClasses(folders.tokenizer)
        self.examples = self.tokens = 0
        sizes = {"class": len(ALL_CLASSES), "decile": NUM_DECILES, "turn": MOST_TURNS, "length": NUM_LENGTHS}
        self.by = {name: Breakdown(size, len(folders.all)) for name, size in sizes.items()}
        self.pair: tuple[str, str] | None = None
        """The two signals to compare."""
        self.sample = Uniform(TOKENS_SAMPLED, seed)
        """Sample of response tokens: every signal, `score`, `keep` and `class`."""
        self.cuts = Uniform(CUTS_SAMPLED, seed + 1)
        """Sample of examples: the lowest score that was kept."""
        self.by_rho = np.zeros((len(ALL_CLASSES), RHO_BINS), np.int64)
        """[classes, RHO_BINS]: tokens by the share of their example's tokens that score higher."""
        self.losses: dict[str, Float64Array] = {}
        """[4] by checkpoint: sum of losses and number of kept tokens, then of dropped tokens."""
        self.ngrams = NGrams()
        self.random = Uniform(EXAMPLES_SAMPLED, seed + 2)
        """Rows of examples to show; those below lead by how far signals, or masks, disagree."""
        self.surprising = Highest(EXAMPLES_LEADING)
        self.disagreeing = Highest(EXAMPLES_LEADING)
        self.flags: dict[str, tuple[int, list[int]]] = {name: (0, []) for name in FLAGS}
        """Number of examples and the first rows, by flag."""

    @property
    def response_tokens(self) -> int:
        """Number of response tokens."""
        return int(self.by["class"].tokens.sum())

    def kept(self, folder: int = 0) -> int:
        """Number of kept tokens."""
        return int(self.by["class"].kept[folder].sum())

    def kept_share(self, folder: int = 0) -> float:
        """Share of the response tokens that is kept, in [0, 1]."""
        return self.kept(folder) / max(1, self.response_tokens)

    @property
    def selective(self) -> bool:
        """Whether some response token is dropped, so that kept and dropped can be compared."""
        return 0 < self.kept() < self.response_tokens

    @cached_property
    def agreement(self) -> dict[str, Any]:
        """See `compare.agreement`; for several folders."""
        return compare.agreement({each.name: each.path for each in self.folders.all})

    def present(self) -> list[SignalFacts]:
        """Return the score and the signals, those with a value for some sampled token."""
        columns = self.sample.columns()
        return [
            s
            for s in self.folders.signals()
            if s.key in columns and np.isfinite(columns[s.key].astype(np.float64)).any()
        ]

    def rows_to_show(self) -> dict[str, list[int]]:
        """Return rows of examples to show, by the reason."""
        reasons = ("disagreeing", "surprising", "random")
        found = {name: getattr(self, name).columns().get("row", np.empty(0)) for name in reasons}
        return {name: [int(row) for row in rows] for name, rows in found.items()}


def measure(folders: Folders, seed: int = 0) -> Statistics:
    """Read every shard once. Memory depends on the largest shard and the vocabulary, not on the dataset."""
    stats = Statistics(folders, seed)
    for shard in folders.shards():
        _add(stats, shard, responses(shard))
    return stats


def _add(stats: Statistics, shard: Shard, r: Responses) -> None:
    counts = np.diff(r.offsets)
    stats.examples += len(shard.example_ids)
    stats.tokens += shard.ids.size
    classes = stats.token_classes.classify(r.ids, r.turns)
    turn = np.repeat(_turn_numbers(r), np.diff(r.turns))
    length = np.log2(np.maximum(1, counts)).astype(np.int64)[r.example]
    codes: dict[str, NDArray[np.integer[Any]]] = {
        "class": classes,
        "decile": r.place * NUM_DECILES // np.maximum(1, counts[r.example]),
        "turn": np.minimum(turn, MOST_TURNS - 1),
        "length": np.minimum(length, NUM_LENGTHS - 1),
    }
    for name, code in codes.items():
        stats.by[name].add(code, r.keeps)
    keep = r.keeps[0]
    sampled: Columns = {"keep": keep, "class": classes, **r.signals}
    if r.score is not None:
        sampled["score"] = r.score
        higher = _higher(r.score, r.example, r.offsets)
        known = ~np.isnan(r.score)
        at = np.minimum((higher[known] * RHO_BINS).astype(np.int64), RHO_BINS - 1)
        np.add.at(stats.by_rho, (classes[known], at), 1)
        lowest = np.full(counts.size, np.inf)
        np.minimum.at(lowest, r.example[keep & known], r.score[keep & known])
        cut = lowest[np.isfinite(lowest)]
        stats.cuts.add(cut.size, {"cut": cut})
    stats.sample.add(r.ids.size, sampled)
    for checkpoint in stats.folders.scores:
        if (values := r.signals.get(f"{checkpoint}.loss")) is not None:
            sums = stats.losses.setdefault(checkpoint, np.zeros(4))
            kept, dropped = (values[mask & ~np.isnan(values)] for mask in (keep, ~keep))
            sums += [kept.sum(), kept.size, dropped.sum(), dropped.size]
    rows = shard.first_row + np.arange(counts.size)
    stats.ngrams.add(r.ids, r.turns, keep, rows[r.example])
    _choose(stats, r, rows)
    _flag(stats, r, classes, rows)


def _turn_numbers(r: Responses) -> IntArray:
    """Return the number of each turn within its example, from 0, [U]."""
    example = r.example[r.turns[:-1]] if r.ids.size else np.empty(0, np.int64)
    first = np.searchsorted(example, example)
    return (np.arange(example.size) - first).astype(np.int64)


def _higher(values: Float32Array, example: IntArray, offsets: IntArray) -> Float64Array:
    """Return the share of the example's other tokens with a higher value, in [0, 1), [N]; NaN counts as lowest."""
    order = np.lexsort((np.nan_to_num(-values, nan=np.inf), example))
    place = np.empty(values.size)
    place[order] = np.arange(values.size) - offsets[:-1][example[order]]
    shares: Float64Array = place / np.maximum(1, np.diff(offsets))[example]
    return shares


def _choose(stats: Statistics, r: Responses, rows: IntArray) -> None:
    counts = np.diff(r.offsets)
    some = counts > 0
    stats.random.add(int(some.sum()), {"row": rows[some]})
    stats.pair = stats.pair or pair_of(r.signals)
    if stats.pair is not None and all(name in r.signals for name in stats.pair):
        values = surprise(r.signals[stats.pair[0]], r.signals[stats.pair[1]], r.example, r.offsets)
        stats.surprising.add(np.where(counts >= 8, values, np.nan), {"row": rows})
    if len(r.keeps) > 1:
        both = np.logical_and.reduce(r.has)
        differ = (np.any([k != r.keeps[0] for k in r.keeps[1:]], axis=0) & both).astype(float)
        share = np.bincount(r.example, differ, minlength=counts.size) / np.maximum(1, counts)
        stats.disagreeing.add(np.where(share > 0, share, np.nan), {"row": rows})


def surprise(a: Float32Array, b: Float32Array, example: IntArray, offsets: IntArray) -> Float64Array:
    """Return how far two signals disagree, [E]: the mean distance of a token's ranks in its example, in [0, 1]."""
    distance = np.abs(_higher(a, example, offsets) - _higher(b, example, offsets))
    distance[np.isnan(a) | np.isnan(b)] = 0
    counts = np.diff(offsets)
    means: Float64Array = np.bincount(example, distance, minlength=counts.size) / np.maximum(1, counts)
    return means


def pair_of(signals: dict[str, Float32Array]) -> tuple[str, str] | None:
    """Return the two signals to compare, by preference REL and prompt attention; None if there are fewer than two."""
    for first, second in _PREFERRED:
        a = [name for name in signals if _is(name, first)]
        b = [name for name in signals if _is(name, second) and name not in a[:1]]
        if a and b:
            return a[0], b[-1]
    return (*signals,)[:2] if len(signals) > 1 else None  # type: ignore[return-value]


def _is(name: str, wanted: str) -> bool:
    """Return whether `name` is the wanted signal; `.loss` stands for the loss under any checkpoint."""
    return name.endswith(wanted) if wanted.startswith(".") else name == wanted


def _flag(stats: Statistics, r: Responses, classes: NDArray[np.int8], rows: IntArray) -> None:
    counts, keep, number = np.diff(r.offsets), r.keeps[0], rows.size
    ends = classes == ALL_CLASSES.index("end of turn")
    found = {"repetition": (counts >= _SHORT) & (_distinct(r) < _LOOP)}
    if stats.folders.first.kind == "masked":
        found["end_dropped"] = np.bincount(r.example[ends & ~keep], minlength=number) > 0
        if r.score is not None:
            found["unscored_kept"] = np.bincount(r.example[keep & np.isnan(r.score)], minlength=number) > 0
    for name, mask in found.items():
        count, first = stats.flags[name]
        stats.flags[name] = (count + int(mask.sum()), [*first, *rows[mask].tolist()][:FLAG_ROWS])


def _distinct(r: Responses) -> Float64Array:
    """Return the share of each example's token trigrams that are distinct, [E]; 1 if it has none."""
    import polars as pl

    shares, size = np.ones(r.offsets.size - 1), max(0, r.ids.size - 2)
    ids, example = r.ids.astype(np.int64), r.example[:size]
    key = (ids[:size] * 1_000_003 + ids[1 : size + 1]) * 1_000_003 + ids[2:]
    inside = example == r.example[2:]
    frame = pl.DataFrame({"example": example[inside], "key": key[inside]})
    found = frame.group_by("example").agg(share=pl.col("key").n_unique() / pl.len())
    shares[found["example"].to_numpy()] = found["share"].to_numpy()
    return shares
