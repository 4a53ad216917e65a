"""`provenance.json`: a published masked dataset's description of itself, against which `pull` checks it.

It reveals nothing about the machine that made the dataset: a path is reduced to its last part, and a name with a
slash is kept complete only if it is a Hub repository.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from sstoken.errors import SstokenError
from sstoken.stages import folders
from sstoken.stages import manifest as manifests
from sstoken.stages.encoding.sources import shown
from sstoken.stages.hub_models import split_revision
from sstoken.stages.manifest import FileEntry, Manifest

PROVENANCE, CARD, REPORT = "provenance.json", "README.md", "report.html"
SHARDS, TOKENIZER = "data", "tokenizer"
"""Folders of a published repository."""
SIGNALS = ("rel", "attention", "score")
"""Columns published only on request: they are large, and no trainer needs them."""


class _Facts(BaseModel):
    """What every masked dataset records about its making; extra keys are allowed."""

    model_config = ConfigDict(extra="allow")

    method: str
    params: dict[str, Any] | None = None
    """The method's parameters; older datasets have `rho` and `gamma` alone."""
    rho: float | None
    gamma: float | None
    scope: str
    checkpoints: dict[str, dict[str, str]]
    tokenizer: dict[str, str | int]
    version: str
    fingerprint: str


class Provenance(BaseModel):
    """What is published beside the shards."""

    model_config = ConfigDict(extra="forbid")

    masked: dict[str, Any]
    """The metadata that each shard also holds: method, params, checkpoints, tokenizer, run fingerprint."""
    metrics: dict[str, Any]
    """The summary of `select`."""
    origin: dict[str, Any]
    """Content identities of the data, the tokenizer and the checkpoints, if known."""
    files: list[FileEntry]
    """Every other published file."""

    @field_validator("masked")
    @classmethod
    def _complete(cls, facts: dict[str, Any]) -> dict[str, Any]:
        _Facts.model_validate(facts)
        return facts


def read_provenance(path: Path) -> Provenance:
    """Parse the provenance in a file; a SstokenError if it is none."""
    try:
        return Provenance.model_validate_json(path.read_bytes())
    except (ValidationError, RecursionError) as error:
        raise SstokenError(
            f"{path}: not the provenance of a masked dataset; publish the dataset again"
        ) from error


def find_origin(masked: Path, manifest: Manifest) -> dict[str, Any]:
    """Return content identities of what a masked folder was made from.

    They come from the provenance the folder was pulled with, or else from the manifests of its inputs, if these are
    still in the run's folder. JSON-ready, without local paths; empty if nothing is known.

    Raises:
        SstokenError: a manifest in the run's folder is damaged.
    """
    if (masked / PROVENANCE).is_file():
        return read_provenance(masked / PROVENANCE).origin
    run = masked.absolute().parent
    near: dict[str, Manifest] = {}
    for pattern in ("*", "*/*"):
        for path in sorted(run.glob(f"{pattern}/{manifests.MANIFEST}")):
            if folders.is_finished(path.parent) and (found := manifests.read_manifest(path.parent)):
                near[found.fingerprint] = found
    inputs = {role: near[key] for role, key in manifest.inputs.items() if key in near}
    origin: dict[str, Any] = {}
    if "tokens" in inputs:
        tokens = inputs.pop("tokens")
        origin = {key: tokens.sources[key] for key in ("data", "tokenizer") if key in tokens.sources}
        origin["name"] = _last_part(shown(str(tokens.settings.get("data", ""))))
    if inputs:
        origin["checkpoints"] = {role: m.sources.get("checkpoint") for role, m in sorted(inputs.items())}
    return origin


def hub_names(origin: Any) -> set[str]:
    """Return the Hub repositories named by `find_origin`."""
    if not isinstance(origin, Mapping):
        return set()
    named = {origin["hub"]} if isinstance(origin.get("hub"), str) else set()
    return named.union(*(hub_names(value) for value in origin.values()))


def public(value: Any, hub: Collection[str]) -> Any:
    """Return `value` with every possible path reduced to its last part, except the names in `hub`."""
    if isinstance(value, Mapping):
        return {key: public(item, hub) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item, hub) for item in value]
    if isinstance(value, str) and split_revision(value)[0] not in hub:
        return _last_part(value)
    return value


def _last_part(text: str) -> str:
    return PurePosixPath(re.sub(r"[\\]", "/", text)).name if re.search(r"[/\\]", text) else text


def as_json(provenance: Provenance) -> str:
    """Serialize a provenance deterministically."""
    return json.dumps(provenance.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
