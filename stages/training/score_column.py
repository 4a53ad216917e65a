"""Make the dataset for in-loop training: tokens with the history's signals from a scores folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sstoken.errors import SstokenError, UsageError
from sstoken.labels import labels_from_mask
from sstoken.signals import is_signal
from sstoken.stages import joins, tables

if TYPE_CHECKING:
    from datasets import Dataset


def with_history(tokens: str | Path, scores: str | Path, signals: Sequence[str] = ("loss",)) -> "Dataset":
    """Make a dataset for `SelfModulatedTrainer`: example_id, input_ids, labels and history_loss.

    Drops examples without a response token. Memory does not grow with the data: rows stay in cache files of
    `datasets`.

    Args:
        tokens: the folder that `encode` wrote.
        scores: the scores folder of one checkpoint, the history, such as `scores/base`.
        signals: columns to take from it; each becomes `history_SIGNAL`. `SelfModulation.columns` says which a method
            needs.

    Raises:
        UsageError: a folder has no shards, or the scores have no such signal.
        SstokenError: the scores belong to other tokens or mix several runs, or a shard is damaged.
    """
    pairs = _paired_shards(Path(tokens), Path(scores), signals)
    from datasets import concatenate_datasets, load_dataset

    sides = [
        load_dataset("parquet", data_files=[str(pair[i]) for pair in pairs], split="train") for i in (0, 1)
    ]
    measured = sides[1].select_columns(list(signals))
    measured = measured.rename_columns({name: f"history_{name}" for name in signals})
    joined = concatenate_datasets([sides[0], measured], axis=1)
    joined = joined.filter(_responds, batched=True, input_columns="response_mask")
    return joined.map(_labelled, batched=True, remove_columns="response_mask")


def _paired_shards(tokens: Path, scores: Path, signals: Sequence[str]) -> list[tuple[Path, Path]]:
    """Pair the shards of tokens and of scores, and check that their rows are the same examples."""
    parts = tables.parts(tokens)
    if not parts:
        raise UsageError(f"{tokens}: no part-*.parquet; name the folder that `encode` wrote")
    if not tables.parts(scores):
        raise UsageError(
            f"{scores}: no part-*.parquet; name the scores of one checkpoint, such as scores/base"
        )
    joins.check_scores(tokens, scores)
    found = [name for name in tables.columns(tables.parts(scores)[0]) if is_signal(name)]
    for name in signals:
        if name not in found:
            raise UsageError(
                f"{scores}: no signal {name!r}, only {', '.join(found)}; score the checkpoint again with "
                f"--signal {name}"
            )
    for folder in (tokens, scores):
        joins.check_one_run(folder)
    pairs = [(part, scores / part.name) for part in parts]
    for part, scored in pairs:
        table, measured = tables.read_table(part), tables.read_table(scored, ["example_id", signals[0]])
        aligned = table["example_id"].equals(measured["example_id"])
        lengths = [tables.flatten(column)[1] for column in (table["input_ids"], measured[signals[0]])]
        if not aligned or not np.array_equal(lengths[0], lengths[1]):
            raise SstokenError(f"{scored}: not row-aligned with {part}; score these tokens again")
        joins.check_shard(part, joins.measured_fingerprint(part, table), scored)
    return pairs


def _responds(response_masks: list[list[bool]]) -> list[bool]:
    return [any(mask) for mask in response_masks]


def _labelled(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    pairs = zip(rows["input_ids"], rows["response_mask"], strict=True)
    return {"labels": [labels_from_mask(ids, mask) for ids, mask in pairs]}
