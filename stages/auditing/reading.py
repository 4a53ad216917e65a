"""Open a dataset to audit: data files, a dataset in memory, or a folder that a stage wrote."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError, first_line
from sstoken.stages import folders, joins, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.auditing import columns
from sstoken.stages.auditing.columns import Columns
from sstoken.stages.auditing.data_files import BATCH, Row, arrow_rows, file_rows, read_files
from sstoken.stages.encoding import sources
from sstoken.stages.exporting import get_target
from sstoken.stages.manifest import Manifest
from sstoken.stages.storage import expanded

_TOKENS, _SCORES = ("encode", "part"), ("score", "critical", "observed")


@dataclass
class OpenedDataset:
    """A dataset that is ready to be read."""

    shown: str
    form: str
    """`conversations`, `tokenised`, or the stage that wrote the folder."""
    rows: Iterator[Row]
    columns: Columns | None
    """None: raw conversations."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that made it, found beside it."""
    scores: Path | None = None
    """The scores folder to audit; `rows` are then those of its tokens."""
    tokens: Path | None = None
    """The folder of tokens that `scores` belong to."""
    max_length: int | None = None
    """Length in tokens at which the rows were cut; None if the folder does not say."""


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
        return _own_folder(path, manifest, tokens)
    name = str(source)
    rows, names = read_files(path, name, split)
    around = path if path.is_dir() else path.parent
    export = _export_around(around)
    if export is not None and export.settings.get("to") == "nemo":
        shifted = True
    opened = _opened(sources.shown(name), rows, names, shifted)
    if export is not None and opened.columns is not None:
        opened.columns = replace(opened.columns, selected=True)
    opened.tokenizer = _tokenizer_near(around)
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


def _own_folder(folder: Path, manifest: Manifest, tokens: Path | None) -> OpenedDataset:
    """Open a finished folder, with the same checks as the stages' own."""
    stage = manifest.stage
    if stage in _SCORES:
        tokens = tokens or _tokens_of(folder)
        opened = _own_folder(tokens, manifests.finished(tokens, "tokens"), None)
        opened.shown, opened.form, opened.scores, opened.tokens = str(folder), stage, folder, tokens
        return opened
    manifests.finished(folder, "dataset")
    if stage == "export":
        return _export(folder, manifest)
    parts = tables.parts(folder)
    names = tables.columns(parts[0]) if parts else []
    found = columns.find(names)
    if found is None:
        raise UsageError(
            f"{folder}: written by {stage}; it holds no dataset; name tokens, scores, a masked dataset or an export"
        )
    if "keep_mask" in names:
        found = replace(found, selected=True)
    limit = tables.read_metadata(parts[0]).get("max_length") if stage in _TOKENS else None
    rows = _part_rows(parts, found.wanted)
    tokenizer = folder / "tokenizer"
    return OpenedDataset(
        str(folder), stage, rows, found, tokenizer if tokenizer.is_dir() else None, max_length=limit
    )


def _part_rows(parts: list[Path], wanted: list[str]) -> Iterator[Row]:
    return file_rows(parts, lambda part: tables.read_batches(part, BATCH, wanted))


def _tokens_of(scores: Path) -> Path:
    """Find the tokens that scores belong to, in a folder beside or above them."""
    near = [p for up in (scores.parent, scores.parent.parent) for p in sorted(up.iterdir()) if p.is_dir()]
    for folder in near:
        try:
            manifest = manifests.read_manifest(folder)
            if manifest is not None and manifest.stage in _TOKENS:
                joins.check_scores(folder, scores)
                return folder
        except SstokenError:
            continue
    raise UsageError(f"{scores}: scores, and their tokens are not near by; name them with --tokens")


def _export(folder: Path, manifest: Manifest) -> OpenedDataset:
    """Open an export as its trainer reads it; its `scores/` tell which tokens the selection was taken from."""
    target = get_target(str(manifest.settings["to"]))
    for file in folders.listed_in(folder) or ():  # its trainer checks none
        folders.check_file(file)
    sidecar = tables.parts(folder / "scores")
    has_response = bool(sidecar) and "response_mask" in tables.columns(sidecar[0])

    def rows() -> Iterator[Row]:
        beside = _part_rows(sidecar, ["example_id", "response_mask"]) if has_response else None
        index = 0
        try:
            for table in target.read(folder):
                for row in table.to_pylist():
                    ids, labels, weights = target.seen(row)
                    values: dict[str, Any] = {"input_ids": ids, "labels": labels}
                    if weights is not None:
                        values["loss_mask"] = weights
                    if beside is not None:
                        values |= next(beside).values
                    yield Row(f"row {index}", index, values)
                    index += 1
        except SstokenError:
            raise
        except Exception as error:  # each loader raises its own types
            raise SstokenError(f"{folder}: {target.name} cannot read it ({first_line(error)})") from error

    there = ("input_ids", "labels", "loss_mask", "example_id", "response_mask")
    response = "response_mask" if has_response else None
    found = Columns("input_ids", "labels", ("loss_mask",), response=response, all=there, selected=True)
    return OpenedDataset(str(folder), "export", rows(), found, _tokenizer_near(folder))


def _export_around(folder: Path) -> Manifest | None:
    """Return the manifest of the export that contains a folder of data files; None if it is not in one."""
    for near in (folder, folder.parent):
        try:
            manifest = manifests.read_manifest(near)
        except SstokenError:
            return None
        if manifest is not None and manifest.stage == "export":
            return manifest
    return None


def _tokenizer_near(folder: Path) -> Path | None:
    """Return the folder of a tokenizer in a folder of data files, or beside it; None if there is none."""
    for near in (folder / "tokenizer", folder.parent / "tokenizer", folder):
        if (near / "tokenizer_config.json").is_file():
            return near
    return None
