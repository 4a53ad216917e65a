"""The README.md of a masked dataset: its settings, and the front matter by which `datasets` finds its shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sstoken.stages.storage import write_atomic
from sstoken.stages.token_text import markdown


def decisive_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters and options that decided a mask, from a shard's metadata (older: rho and gamma only)."""
    params = facts["params"] if "params" in facts else {name: facts.get(name) for name in ("rho", "gamma")}
    found = {**params, **{name: facts.get(name) for name in ("examples", "budget", "pool", "protect")}}
    if found["budget"] is not None:  # it replaces the share
        found.pop("rho", None)
    return {name: value for name, value in found.items() if value not in (None, [])}


def dataset_configs(data_files: str, identity: str) -> str:
    """Return the front matter that tells `load_dataset(folder)` which files are the data.

    One line of JSON, which is YAML, so that huggingface_hub's `DatasetCardData` need not be loaded.

    `datasets` caches a local folder by its name and this entry, not by its files: `identity` must change with the
    content, or it would return the rows of an earlier folder of the same name.
    """
    entry = {"config_name": "default", "data_files": data_files, "description": identity}
    return f"configs: {json.dumps([entry])}"


def write_card(
    folder: Path, provenance: dict[str, Any], summary: dict[str, Any], *, identity: str | None = None
) -> None:
    """Write `folder/README.md`, with `identity` (default: the run's fingerprint) for `dataset_configs`.

    Without the front matter, `load_dataset(folder)` would load the folder's JSON files as the data.
    """
    checkpoints = "\n".join(
        f"| {markdown(role)} | {markdown(facts['name'])} |"
        for role, facts in sorted(provenance["checkpoints"].items())
    )
    settings = "".join(
        f"| {markdown(name)} | {markdown(str(value))} |\n"
        for name, value in decisive_settings(provenance).items()
    )
    front_matter = dataset_configs("part-*.parquet", identity or provenance["fingerprint"])
    write_atomic(
        folder / "README.md",
        f"""---
{front_matter}
tags: [token-masked, sstoken]
---
# Token-masked dataset

{summary["examples"]:,} examples; {summary["kept"]:,} of {summary["response_tokens"]:,} response tokens kept
({summary["kept_share"]:.1%}). `labels` is -100 where a token is not trained on; any SFT trainer takes
`input_ids` and `labels` as they are.

| setting | value |
|---|---|
| method | {markdown(provenance["method"])} |
{settings}| scope | {markdown(provenance["scope"])} |
{checkpoints}
| tokenizer fingerprint | {markdown(provenance["tokenizer"]["fingerprint"])} |
| sstoken | {markdown(provenance["version"])} |
| run fingerprint | {markdown(provenance["fingerprint"])} |
""",
    )
