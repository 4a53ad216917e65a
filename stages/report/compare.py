"""Compare masked datasets: how far their masks agree, and where they differ."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import joins, tables
from sstoken.stages.report.token_classes import ALL_CLASSES, CLASSES, TokenClasses

if TYPE_CHECKING:
    import polars as pl

NUM_TENTHS = 10
_COLUMNS = ("example_id", "input_ids", "keep_mask", "response_mask")


def compare_masked(masked: Mapping[str, Path], num_examples: int = 5) -> dict[str, Any]:
    """Compare the keep masks of masked datasets of the same tokens, each with the first and with every other.

    `num_examples` is how many examples to list for each pair, those that differ most.

    Returns:
        `examples`, `response_tokens`: counts of what all have in common; `kept`: share kept, by name; `left_out`:
        number of examples that not all have, by name; `pairs`: for each two names `first`, `second`, `jaccard` (kept
        by both over kept by either; 1 if neither keeps any), `kappa` (Cohen's; 1 if the masks are equal),
        `only_first`, `only_second` (tokens), and where they differ: `by_tenth`, `by_class`, `by_example`.

    Raises:
        UsageError: fewer than two folders.
        SstokenError: a folder is lean or not a masked dataset, or two have different tokens.
    """
    import polars as pl

    if len(masked) < 2:
        raise UsageError(f"{len(masked)} masked dataset given; name two or more to compare")
    names = list(masked)
    common, left_out = _common_examples(masked)
    counts: dict[str, pl.DataFrame] = {}
    kept, num_tokens = [0] * len(names), 0
    by_id = [ALL_CLASSES[i] for i in TokenClasses(masked[names[0]] / "tokenizer").classes]
    classes = pl.DataFrame({"input_ids": np.arange(len(by_id), dtype=np.int32), "class": by_id})
    place, length = pl.int_range(pl.len()).over("example_id"), pl.len().over("example_id")
    for tokens in _aligned(masked, common):
        frame = tokens.with_columns(tenth=place * NUM_TENTHS // length).join(
            classes, on="input_ids", how="left"
        )
        num_tokens += frame.height
        kept = [total + int(frame[_mask(i)].sum()) for i, total in enumerate(kept)]
        for key in ("tenth", "class", "example_id"):
            counts[key] = _add(counts.get(key), frame, len(names), key)
    return {
        "examples": len(common),
        "response_tokens": num_tokens,
        "kept": {name: number / max(1, num_tokens) for name, number in zip(names, kept, strict=True)},
        "left_out": left_out,
        "pairs": [
            {"first": names[i], "second": names[j], **_pair(counts, f"{i}-{j}", num_examples)}
            for i, j in combinations(range(len(names)), 2)
        ],
    }


def agreement(masked: Mapping[str, Path]) -> dict[str, Any]:
    """Return how far every two datasets agree.

    Returns:
        `jaccard` and `kappa`, each as rows of a symmetric matrix in the order of `masked`, and the number of
        `examples` that all have.
    """
    facts = compare_masked(masked, num_examples=0)
    pairs = {(pair["first"], pair["second"]): pair for pair in facts["pairs"]}
    names = list(masked)

    def value(a: str, b: str, key: str) -> float:
        return 1.0 if a == b else float((pairs.get((a, b)) or pairs[b, a])[key])

    return {
        "examples": facts["examples"],
        **{key: [[value(a, b, key) for b in names] for a in names] for key in ("jaccard", "kappa")},
    }


def _mask(number: int) -> str:
    """Return the column name of a dataset's mask; the dataset's own name could clash with another column."""
    return f"mask-{number}"


def _common_examples(masked: Mapping[str, Path]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the examples that all have, numbered in the order of the first, and how many others each has."""
    ids: dict[str, list[str]] = {}
    fingerprints: dict[str, Any] = {}
    for name, folder in masked.items():
        parts = tables.parts(folder)
        if not parts:
            raise SstokenError(f"{folder}: not a masked dataset (no part-*.parquet); name what select wrote")
        facts = tables.read_metadata(parts[0])
        if facts.get("kind") != "masked":
            raise SstokenError(f"{folder}: not a masked dataset; name what select wrote")
        if "response_mask" not in tables.columns(parts[0]):
            raise SstokenError(
                f"{folder}: lean, so its response tokens are not known; select it without --lean"
            )
        fingerprints[name] = facts.get(joins.TOKENS)
        ids[name] = [
            i for path in parts for i in tables.read_table(path, ["example_id"])["example_id"].to_pylist()
        ]
    first = next(iter(masked))
    for name, fingerprint in fingerprints.items():
        if fingerprint != fingerprints[first]:
            raise SstokenError(
                f"{masked[name]}: made from other tokens than {masked[first]}; compare selections of the same tokens"
            )
    everywhere = set.intersection(*map(set, ids.values()))
    if not everywhere:
        raise SstokenError(
            f"{', '.join(map(str, masked.values()))}: no example in common; nothing to compare"
        )
    numbered = {i: number for number, i in enumerate(i for i in ids[first] if i in everywhere)}
    return numbered, {name: len(own) - len(everywhere) for name, own in ids.items()}


def _aligned(masked: Mapping[str, Path], common: Mapping[str, int]) -> Iterator["pl.DataFrame"]:
    """Yield a table per shard with a row per response token: example id, token id and a column for each mask."""
    import polars as pl

    paths = [tables.parts(folder) for folder in masked.values()]
    by_name = [{path.name: path for path in each} for each in paths]
    for part in sorted(set.union(*map(set, by_name)), key=lambda n: (len(n), n)):
        frames = []
        for number, shards in enumerate(by_name):
            if part not in shards:
                break
            table = pl.from_arrow(tables.read_table(shards[part], list(_COLUMNS)))
            assert isinstance(table, pl.DataFrame)
            rows = table.filter(pl.col("example_id").is_in(list(common)))
            frames.append(
                rows.explode("input_ids", "keep_mask", "response_mask")
                .filter("response_mask")
                .select("example_id", "input_ids", pl.col("keep_mask").alias(_mask(number)))
            )
        if len(frames) < len(masked):
            continue
        first = frames[0].select("example_id", "input_ids")
        for name, frame in zip(masked, frames, strict=True):
            if not frame.select("example_id", "input_ids").equals(first):
                raise SstokenError(
                    f"{masked[name] / part}: its examples differ from the first's; select it again"
                )
        yield pl.concat([first, *(f.select(_mask(i)) for i, f in enumerate(frames))], how="horizontal")


def _add(before: "pl.DataFrame | None", frame: "pl.DataFrame", num_masks: int, key: str) -> "pl.DataFrame":
    """Count by `key` the tokens that both or only one of each two masks keep; add the counts of earlier shards."""
    import polars as pl

    sums = {"n": pl.len()}
    for i, j in combinations(range(num_masks), 2):
        a, b = pl.col(_mask(i)), pl.col(_mask(j))
        sums[f"both-{i}-{j}"] = (a & b).sum()
        sums[f"first-{i}-{j}"] = (a & ~b).sum()
        sums[f"second-{i}-{j}"] = (~a & b).sum()
    found = frame.group_by(key, maintain_order=True).agg(**sums)
    if before is None:
        return found
    return pl.concat([before, found]).group_by(key, maintain_order=True).sum()


def _pair(counts: "Mapping[str, pl.DataFrame]", pair: str, num_examples: int) -> dict[str, Any]:
    def rows(key: str) -> list[dict[str, Any]]:
        table = counts[key].select(
            key, "n", *(counts[key][f"{part}-{pair}"].alias(part) for part in ("both", "first", "second"))
        )
        return [
            {
                key: row[key],
                "tokens": row["n"],
                "only_first": row["first"],
                "only_second": row["second"],
                "differ": (row["first"] + row["second"]) / row["n"],
                "jaccard": _jaccard(row["both"], row["first"], row["second"]),
            }
            for row in table.iter_rows(named=True)
        ]

    total = {part: int(counts["tenth"][f"{part}-{pair}"].sum()) for part in ("both", "first", "second")}
    number = int(counts["tenth"]["n"].sum())
    by_example = sorted(rows("example_id"), key=lambda row: -row["differ"])
    shares = np.array([row["jaccard"] for row in by_example])
    return {
        "jaccard": _jaccard(total["both"], total["first"], total["second"]),
        "kappa": _kappa(total["both"], total["first"], total["second"], number),
        "only_first": total["first"],
        "only_second": total["second"],
        "by_tenth": sorted(rows("tenth"), key=lambda row: row["tenth"]),
        "by_class": sorted(rows("class"), key=lambda row: CLASSES.index(row["class"]) if row["class"] else 9),
        "by_example": {
            "jaccard_quartiles": [float(q) for q in np.quantile(shares, (0.25, 0.5, 0.75))],
            "most_different": [row for row in by_example[:num_examples] if row["differ"]],
        },
    }


def _jaccard(both: int, first: int, second: int) -> float:
    either = both + first + second
    return both / either if either else 1.0


def _kappa(both: int, first: int, second: int, number: int) -> float:
    """Return Cohen's kappa, agreement beyond chance; 1 if the masks are equal."""
    if not first and not second:
        return 1.0
    observed = 1 - (first + second) / number
    a, b = (both + first) / number, (both + second) / number
    expected = a * b + (1 - a) * (1 - b)
    return (observed - expected) / (1 - expected)
