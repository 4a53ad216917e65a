"""Open a dataset to audit: data files, a dataset in memory, or a folder that a stage wrote."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import manifest as manifests
from sstoken.stages.auditing import columns
from sstoken.stages.auditing.data_files import read_files
from sstoken.stages.auditing.opened import BATCH, OpenedDataset, Row, arrow_rows
from sstoken.stages.auditing.own_folders import export_around, own_folder, tokenizer_near
from sstoken.stages.encoding import sources
from sstoken.stages.storage import expanded


def open_source(
    source: Any, split: str | None = None, *, shifted: bool = False, tokens: Path | None = None
) -> OpenedDataset:
    """Open a dataset by what it is.

    Args:
        source: a path, a pattern, a Hub id; or a dataset, table or list of rows in memory.
        split: split of a Hub dataset or of a saved DatasetDict.
        shifted: whether the trainer expects shifted labels.
        tokens: the folder of tokens that scores belong to; None: look for it beside them.

    Raises:
        UsageError: it does not exist, or is not a dataset.
        SstokenError: files are damaged.
    """
    if not isinstance(source, (str, Path)):
        return _in_memory(source, shifted)
    path = expanded(source)
    if path.is_dir() and (manifest := manifests.read_manifest(path)) is not None:
        return own_folder(path, manifest, tokens)
    name = str(source)
    rows, names = read_files(path, name, split)
    around = path if path.is_dir() else path.parent
    export = export_around(around)
    if export is not None and export.settings.get("to") == "nemo":
        shifted = True
    opened = _opened(sources.shown(name), rows, names, shifted)
    if export is not None and opened.columns is not None:
        opened.columns = replace(opened.columns, selected=True)
    opened.tokenizer = tokenizer_near(around)
    return opened


def _opened(shown: str, rows: Iterator[Row], names: Iterable[str] | None, shifted: bool) -> OpenedDataset:
    first = next(rows, None)
    skipped = []
    while first is not None and first.problem is not None:  # the layout shows in a row that parses
        skipped.append(first)
        first = next(rows, None)
    if first is None and not skipped:
        raise SstokenError(f"{shown}: no rows in it; name data that has some")
    values = first.values if first is not None else {}
    found = columns.find(names if names is not None else values, values)
    if found is not None and shifted:
        found = replace(found, shifted=True)
    rows = chain(skipped, [first] if first is not None else [], rows)
    return OpenedDataset(shown, "conversations" if found is None else "tokenised", rows, found)


def _in_memory(source: Any, shifted: bool) -> OpenedDataset:
    names: list[str] | None = None
    rows: Iterator[Row]
    if isinstance(source, Mapping):
        raise UsageError(f"audit takes one dataset, not {', '.join(map(str, source))}; name one of them")
    if hasattr(source, "to_parquet") and hasattr(source, "iloc"):  # pandas.DataFrame
        import pyarrow as pa

        source = pa.Table.from_pandas(source, preserve_index=False)
    if hasattr(source, "with_format"):  # datasets.Dataset
        names = list(source.column_names or ()) or None
        rows = arrow_rows(source.with_format("arrow").iter(batch_size=BATCH))
    elif hasattr(source, "to_batches"):  # pyarrow.Table
        rows = arrow_rows(source.to_batches(BATCH))
    elif hasattr(source, "iter_slices"):  # polars.DataFrame
        rows = arrow_rows(part.to_arrow() for part in source.iter_slices(BATCH))
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        rows = (
            Row(f"row {i}", i, row) if isinstance(row, Mapping) else Row(f"row {i}", i, {}, "not an object")
            for i, row in enumerate(source)
        )
    else:
        raise UsageError(
            f"audit takes a path, a dataset, a table or a list of rows, not a {type(source).__name__}"
        )
    return _opened(f"{type(source).__name__} in memory", rows, names, shifted)
