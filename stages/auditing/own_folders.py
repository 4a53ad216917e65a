"""Open finished folders that a stage wrote."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, UsageError, first_line
from sstoken.stages import folders, joins, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.auditing import columns
from sstoken.stages.auditing.columns import Columns
from sstoken.stages.auditing.opened import BATCH, OpenedDataset, Row, file_rows
from sstoken.stages.exporting import get_target
from sstoken.stages.manifest import Manifest

_LEGAL = "it holds no dataset; name tokens, scores, a masked dataset or an export"
_TOKENS, _SCORES = ("encode", "part"), ("score", "critical", "observed")


def own_folder(folder: Path, manifest: Manifest, tokens: Path | None) -> OpenedDataset:
    """Open a finished folder, with the same checks as the stages' own."""
    stage = manifest.stage
    if stage in _SCORES:
        tokens = tokens or _tokens_of(folder)
        opened = own_folder(tokens, manifests.finished(tokens, "tokens"), None)
        opened.shown, opened.form, opened.scores, opened.tokens = str(folder), stage, folder, tokens
        return opened
    manifests.finished(folder, "dataset")
    if stage == "export":
        return _export(folder, manifest)
    parts = tables.parts(folder)
    if not parts:
        raise UsageError(f"{folder}: written by {stage}; {_LEGAL}")
    names = tables.columns(parts[0])
    found = columns.find(names)
    if found is None:
        raise UsageError(f"{folder}: written by {stage}; {_LEGAL}")
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

    def rows() -> Iterator[Row]:
        beside = _part_rows(sidecar, ["example_id", "response_mask"]) if _has_response(sidecar) else None
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
    response = "response_mask" if _has_response(sidecar) else None
    found = Columns("input_ids", "labels", ("loss_mask",), response=response, all=there, selected=True)
    return OpenedDataset(str(folder), "export", rows(), found, tokenizer_near(folder))


def _has_response(sidecar: list[Path]) -> bool:
    return bool(sidecar) and "response_mask" in tables.columns(sidecar[0])


def export_around(folder: Path) -> Manifest | None:
    """Return the manifest of the export that contains a folder of data files; None if it is not in one."""
    for near in (folder, folder.parent):
        try:
            manifest = manifests.read_manifest(near)
        except SstokenError:
            return None
        if manifest is not None and manifest.stage == "export":
            return manifest
    return None


def tokenizer_near(folder: Path) -> Path | None:
    """Return the folder of a tokenizer in a folder of data files, or beside it; None if there is none."""
    for near in (folder / "tokenizer", folder.parent / "tokenizer", folder):
        if (near / "tokenizer_config.json").is_file():
            return near
    return None
