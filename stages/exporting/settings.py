"""Write a user's trainer configuration, changed to train on a finished export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sstoken.errors import UsageError
from sstoken.stages import manifest as manifests
from sstoken.stages.exporting import TARGETS
from sstoken.stages.exporting.base import Facts, Target
from sstoken.stages.exporting.into import rewritten, write_into

_NOTHING = Facts(examples=0, longest=0, fingerprint="", weights=False, shards=[])


def check_into(path: Path, target: Target) -> None:
    """Refuse, before any work, a configuration that cannot be changed.

    Raises:
        UsageError: the trainer is not configured by YAML, or the file is not a YAML mapping.
    """
    if target.settings(_NOTHING, path) is None:
        able = ", ".join(
            name for name, other in TARGETS.items() if other.settings(_NOTHING, path) is not None
        )
        raise UsageError(
            f"--into: {target.name} is not configured by a YAML file alone; legal: {able} (the README.md of the export "
            "says how to train)"
        )
    rewritten(path, {})


def write_settings(
    path: Path, target: Target, export: Path, metrics: Mapping[str, Any], *, force: bool
) -> tuple[Path, list[str]]:
    """Write the configuration for a finished export beside the user's own; see `write_into`."""
    fingerprint = manifests.finished(export, "export").fingerprint
    facts = Facts(metrics["examples"], metrics["longest"], fingerprint, weights=False, shards=[])
    changes = target.settings(facts, export.resolve())
    assert changes is not None, "checked before any work"
    return write_into(path, changes, force=force)
