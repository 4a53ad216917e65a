"""History signals from dataset columns such as `history_loss`: checked before training, then carried into batches.

A column is named `ROLE_SIGNAL`. It holds one list per example, as long as `input_ids`; null or NaN off the response.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sstoken.errors import SstokenError, UsageError
from sstoken.labels import IGNORED_LABEL
from sstoken.signals import get_signal, is_signal

HISTORY = "history_loss"
"""The usual column: the history's loss, in nats."""
_ROWS_AT_ONCE = 1000


class CarryHistory:
    """Wraps a data collator and adds history columns to its batches: [B, T] float32, 0 off the response."""

    def __init__(
        self, collator: Callable[..., Mapping[str, Any]], columns: Sequence[str] = (HISTORY,)
    ) -> None:
        """Wrap any data collator that pads, flattens or packs, and keeps the order of tokens."""
        self._collator, self._columns = collator, tuple(columns)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate the examples and put each history value at its token's new position.

        Raises:
            UsageError: an example's history values are missing, too few, or NaN on the response.
            SstokenError: the collator drops tokens or changes their order.
        """
        for feature in features:
            _check_example(feature, self._columns, _named(feature))
        plain = [{k: v for k, v in feature.items() if k not in self._columns} for feature in features]
        batch = dict(self._collator(plain))
        ids = np.concatenate([np.asarray(feature["input_ids"]) for feature in features])
        flat_ids = batch["input_ids"].reshape(-1)
        if batch.get("attention_mask") is not None:
            places = batch["attention_mask"].reshape(-1).nonzero()[:, 0]
        else:
            places = torch.arange(min(ids.size, flat_ids.numel()))
        if places.numel() != ids.size or not np.array_equal(flat_ids[places].numpy(), ids):
            raise SstokenError(
                f"{type(self._collator).__name__} turns {ids.size} tokens into {places.numel()}, or reorders them: "
                "history losses cannot follow; use a data collator that only pads"
            )
        for column in self._columns:
            values = np.concatenate([_floats(feature[column]) for feature in features])
            carried = torch.zeros(flat_ids.numel())
            values = values if _lacks_first(column) else np.nan_to_num(values)
            carried[places] = torch.from_numpy(values)
            batch[column] = carried.view(batch["input_ids"].shape)
        return batch


def check_columns(dataset: Any, wanted: Sequence[str] = (HISTORY,)) -> None:
    """Refuse a dataset whose history columns are missing, misaligned or not finite.

    Checks every example, except in a streamed dataset, which `CarryHistory` checks batch by batch.

    Raises:
        UsageError: names the first bad example.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        for needed in ("input_ids", "labels", *wanted):
            if needed not in columns:
                raise UsageError(
                    f"the training dataset has no column {needed!r}, it has {', '.join(columns)}; history 'scores' "
                    f"needs input_ids, labels and {', '.join(wanted)}, as "
                    "sstoken.stages.training.score_column.with_history makes them; 'base' (LoRA), 'ema' and 'snapshot' "
                    "need no column"
                )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return
    for index, example in enumerate(_examples(dataset, wanted)):
        _check_example(example, wanted, f"training example {example.get('example_id', index)}")


def _examples(dataset: Any, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield all examples; a Hugging Face dataset is read in blocks, and only the columns that matter."""
    if not hasattr(dataset, "with_format") or dataset.format["type"] == "custom":
        yield from (dataset[i] for i in range(len(dataset)))
        return
    names = [n for n in ("example_id", "input_ids", "labels", *wanted) if n in dataset.column_names]
    for block in dataset.select_columns(names).with_format("numpy").iter(_ROWS_AT_ONCE):
        for row in range(len(block["input_ids"])):
            yield {name: values[row] for name, values in block.items()}


def _named(example: Mapping[str, Any]) -> str:
    name = example.get("example_id")
    if name is not None:
        return f"training example {name!r}"
    return f"the training example that starts with the tokens {np.asarray(example['input_ids'])[:8].tolist()}"


def _check_example(example: Mapping[str, Any], wanted: Sequence[str], name: str) -> None:
    num_tokens = len(example["input_ids"])
    labels = example.get("labels")
    response = np.ones(num_tokens, bool) if labels is None else np.asarray(labels) != IGNORED_LABEL
    response[:1] = False  # predicted from nothing
    for column in wanted:
        if example.get(column) is None:
            raise UsageError(
                f"{name} has no {column}; score the history checkpoint, or use another history than 'scores'"
            )
        values, what = _floats(example[column]), "losses" if column == HISTORY else f"values of {column}"
        if values.size != num_tokens:
            raise UsageError(
                f"{name}: {values.size} history {what} for {num_tokens} tokens; use the scores of these very tokens"
            )
        wrong = response & ~np.isfinite(values)
        if _lacks_first(column):
            wrong[np.flatnonzero(response)[:1]] = False
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            raise UsageError(
                f"{name}: {column} is {values[place]} at token {place}, which is a response token; score again"
            )


def _lacks_first(column: str) -> bool:
    """Whether a column's signal has no value at an example's first response token."""
    name = column.partition("_")[2]
    return is_signal(name) and get_signal(name).from_second


def _floats(values: Any) -> NDArray[np.float32]:
    """Return the values as an array; None becomes NaN."""
    return np.asarray(values.cpu() if torch.is_tensor(values) else values, dtype=np.float32)


def prepare_with_columns(prepare: Callable[[Any], Any], dataset: Any, columns: Sequence[str]) -> Any:
    """Carry history columns through `prepare`, TRL's truncation and packing of the training dataset.

    TRL cuts and packs `input_ids` and `labels` and drops all other columns. So the values travel in the upper 32 bits
    of the labels, one column per preparation.

    Raises:
        SstokenError: the preparation is random, so columns would end up at other tokens.
    """
    from accelerate import PartialState

    prepared: Any = None
    for column in columns:
        others = ["labels", *columns]
        with PartialState().main_process_first():  # the other processes read its cache
            joined = dataset.map(
                _join, batched=True, remove_columns=others, fn_kwargs={"column": column}
            ).rename_column("joined", "labels")
        rows = prepare(joined).rename_column("labels", "joined")
        with PartialState().main_process_first():
            rows = rows.map(_split, batched=True, remove_columns=["joined"], fn_kwargs={"column": column})
        if prepared is None:
            prepared = rows
            continue
        if any(prepared[i]["input_ids"] != rows[i]["input_ids"] for i in (0, len(rows) - 1)):
            raise SstokenError(
                "the dataset is prepared in a different order each time, and several history columns cannot follow; "
                "shuffle it before you pass it to the trainer"
            )
        prepared = prepared.add_column(column, rows.data.column(column).combine_chunks())
    return prepared


def _join(rows: Mapping[str, Sequence[Any]], column: str) -> dict[str, list[NDArray[np.int64]]]:
    """Store each history value in the upper 32 bits of its label; -100 stays -100."""
    joined = []
    for labels, values in zip(rows["labels"], rows[column], strict=True):
        label = np.asarray(labels, dtype=np.int64)
        bits = _floats(values).view(np.uint32).astype(np.int64) << 32
        joined.append(np.where(label == IGNORED_LABEL, IGNORED_LABEL, bits | label))
    return {"joined": joined}


def _split(rows: Mapping[str, Sequence[Any]], column: str) -> dict[str, list[NDArray[Any]]]:
    """Undo `_join`; history values off the response become NaN."""
    labels, history = [], []
    for row in rows["joined"]:
        joined = np.asarray(row, dtype=np.int64)
        off = joined == IGNORED_LABEL
        labels.append(np.where(off, IGNORED_LABEL, joined & 0xFFFFFFFF))
        values = (joined >> 32).astype(np.uint32).view(np.float32)
        history.append(np.where(off, np.float32("nan"), values))
    return {"labels": labels, column: history}
