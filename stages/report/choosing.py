"""Choose the rows to show (by a text, or by how much signals disagree), and read a signal's values for them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.report.folders import Folders, open_folders
from sstoken.stages.report.sampling import Highest
from sstoken.stages.report.shards import Shard
from sstoken.stages.report.statistics import pair_of, responses, surprise


def choose(folder: Path, number: int, search: str | None, sort: str) -> list[int]:
    """Choose at most `number` rows of a masked or tokens folder whose text contains `search`, ignoring case.

    With `sort` as `surprise`, rows in which two signals disagree most about which tokens lead come first.

    Raises:
        SstokenError: no row contains the text, or there are no two signals to compare.
    """
    folders = open_folders({folder.name: folder})
    best = Highest(number)
    for shard in folders.shards():
        rows = shard.first_row + np.arange(len(shard.example_ids))
        keys = -rows.astype(np.float64) if sort == "row" else _surprise(folders, shard)
        if search is not None:
            keys = np.where(_holding(folders, shard, search), keys, np.nan)
        best.add(keys, {"row": rows})
        if sort == "row" and len(best.columns().get("row", ())) == number:
            break
    found = [int(row) for row in best.columns().get("row", ())]
    if not found:
        what = "has a response to compare" if search is None else f"holds {search!r}"
        raise SstokenError(f"{folder}: no row {what}")
    return found


def signal_values(folder: Path, rows: Sequence[int], signal: str) -> dict[int, list[float | None]]:
    """Return a signal's value for each token of some rows, by row; None where it was not measured.

    Raises:
        UsageError: it was not recorded; lists those that were.
    """
    folders = open_folders({folder.name: folder})
    found: dict[int, list[float | None]] = {}
    for shard in folders.shards(rows):
        columns = shard.signals | shard.values[0]
        if signal not in columns:
            legal = ", ".join(columns) or "none was recorded"
            raise UsageError(f"signal {signal!r} was not recorded for {folder}; legal: {legal}")
        for row in rows:
            at = row - shard.first_row
            if 0 <= at < len(shard.example_ids):
                values = columns[signal][shard.offsets[at] : shard.offsets[at + 1]].tolist()
                found[row] = [None if value != value else value for value in values]
    return found


def _surprise(folders: Folders, shard: Shard) -> np.ndarray:
    r = responses(shard)
    pair = pair_of(r.signals)
    if pair is None:
        raise SstokenError(
            f"{folders.first.path}: fewer than two signals were recorded, so there is nothing to compare; score its "
            "tokens into scores/ beside it"
        )
    values = surprise(r.signals[pair[0]], r.signals[pair[1]], r.example, r.offsets)
    return np.where(np.diff(r.offsets) > 0, values, np.nan)


def _holding(folders: Folders, shard: Shard, text: str) -> np.ndarray:
    tokenizer = load_tokenizer(str(folders.tokenizer))
    rows = [shard.ids[a:b].tolist() for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    wanted = text.lower()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return np.array([wanted in each.lower() for each in texts], dtype=bool)
