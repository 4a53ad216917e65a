"""The dataset column `history_loss`: checked before training, then carried into each batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sstoken.errors import SstokenError, UsageError
from sstoken.in_loop.response_tokens import IGNORED

HISTORY = "history_loss"
"""Name of the column: one list per example, as long as `input_ids`, in nats; null or NaN off the response."""
_ROWS_AT_ONCE = 1000


class CarryHistory:
    """Wraps a data collator and adds `history_loss` [B, T] float32 to its batch, 0 where there is none."""

    def __init__(self, collator: Callable[..., Mapping[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate the examples and place each history loss where its token went, padded, flattened or packed.

        Raises:
            UsageError: an example has no history losses, too few, or NaN on the response.
            SstokenError: the collator drops tokens or changes their order.
        """
        for feature in features:
            _check_example(feature, _named(feature))
        plain = [{k: v for k, v in feature.items() if k != HISTORY} for feature in features]
        batch = dict(self._collator(plain))
        ids = np.concatenate([np.asarray(feature["input_ids"]) for feature in features])
        history = np.concatenate([_floats(feature[HISTORY]) for feature in features])
        flat_ids = batch["input_ids"].reshape(-1)
        if batch.get("attention_mask") is not None:
            places = batch["attention_mask"].reshape(-1).nonzero()[:, 0]
        else:
            places = torch.arange(min(ids.size, flat_ids.numel()))
        if places.numel() != ids.size or not np.array_equal(flat_ids[places].numpy(), ids):
            raise SstokenError(
                f"{type(self._collator).__name__} gives {places.numel()} tokens for {ids.size}, or others: history "
                "losses cannot follow; let the data collator pad and nothing else"
            )
        carried = torch.zeros(flat_ids.numel())
        carried[places] = torch.from_numpy(np.nan_to_num(history))
        batch[HISTORY] = carried.view(batch["input_ids"].shape)
        return batch


def check_column(dataset: Any) -> None:
    """Refuse a dataset whose history losses are missing, misaligned or not finite.

    Checks every example, except in a streamed dataset, which `CarryHistory` checks batch by batch.

    Raises:
        UsageError: names the first bad example.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        for needed in ("input_ids", "labels", HISTORY):
            if needed not in columns:
                raise UsageError(
                    f"the training dataset has no column {needed!r}, it has {', '.join(columns)}; history 'scores' "
                    "needs input_ids, labels and history_loss, as sstoken.stages.training.score_column.with_history "
                    "makes them"
                )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return
    for index, example in enumerate(_examples(dataset)):
        _check_example(example, f"training example {example.get('example_id', index)}")


def _examples(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all examples; a Hugging Face dataset is read in blocks, and only the columns that matter."""
    if not hasattr(dataset, "with_format") or dataset.format["type"] == "custom":
        yield from (dataset[i] for i in range(len(dataset)))
        return
    names = [n for n in ("example_id", "input_ids", "labels", HISTORY) if n in dataset.column_names]
    for block in dataset.select_columns(names).with_format("numpy").iter(_ROWS_AT_ONCE):
        for row in range(len(block[HISTORY])):
            yield {name: values[row] for name, values in block.items()}


def _named(example: Mapping[str, Any]) -> str:
    name = example.get("example_id")
    if name is not None:
        return f"training example {name!r}"
    return f"the training example that starts with the tokens {np.asarray(example['input_ids'])[:8].tolist()}"


def _check_example(example: Mapping[str, Any], name: str) -> None:
    if example.get(HISTORY) is None:
        raise UsageError(
            f"{name} has no {HISTORY}; score the history checkpoint, or take another history than 'scores'"
        )
    history, num_tokens = _floats(example[HISTORY]), len(example["input_ids"])
    if history.size != num_tokens:
        raise UsageError(
            f"{name}: {history.size} history losses for {num_tokens} tokens; they must be the scores of these tokens"
        )
    labels = example.get("labels")
    wanted = np.ones(num_tokens, bool) if labels is None else np.asarray(labels) != IGNORED
    wanted[:1] = False  # predicted from nothing
    wrong = wanted & ~np.isfinite(history)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise UsageError(
            f"{name}: {HISTORY} is {history[place]} at token {place}, which is a response token; score again"
        )


def _floats(values: Any) -> NDArray[np.float32]:
    """Return the values as an array; None becomes NaN."""
    return np.asarray(values.cpu() if torch.is_tensor(values) else values, dtype=np.float32)


def join_history(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[NDArray[np.int64]]]:
    """Store each history loss in the upper 32 bits of its label. -100 stays -100.

    TRL truncates and packs `input_ids` and `labels` and drops all other columns; this way the losses follow.
    """
    joined = []
    for labels, history in zip(rows["labels"], rows[HISTORY], strict=True):
        label = np.asarray(labels, dtype=np.int64)
        bits = np.nan_to_num(_floats(history)).view(np.uint32).astype(np.int64) << 32
        joined.append(np.where(label == IGNORED, IGNORED, bits | label))
    return {"joined": joined}


def split_history(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[NDArray[Any]]]:
    """Undo `join_history`; history losses off the response become NaN."""
    labels, history = [], []
    for row in rows["joined"]:
        joined = np.asarray(row, dtype=np.int64)
        off = joined == IGNORED
        labels.append(np.where(off, IGNORED, joined & 0xFFFFFFFF))
        losses = (joined >> 32).astype(np.uint32).view(np.float32)
        history.append(np.where(off, np.float32("nan"), losses))
    return {"labels": labels, HISTORY: history}
