"""The README.md of a masked dataset: its settings, and the front matter by which `datasets` finds its shards."""

import json
from pathlib import Path
from typing import Any

from sstoken.stages.storage import write_atomic
from sstoken.stages.token_text import markdown


def write_card(folder: Path, provenance: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write `folder/README.md`.

    The folder also holds JSON files; without the front matter `load_dataset(folder)` would load those as the data.
    """
    checkpoints = "\n".join(
        f"| {markdown(role)} | {markdown(facts['name'])} |"
        for role, facts in sorted(provenance["checkpoints"].items())
    )
    params = "\n".join(f"| {markdown(k)} | {markdown(str(v))} |" for k, v in provenance["params"].items())
    settings = f"{params}\n" if params else ""
    for name in ("examples", "budget", "pool", "protect"):
        if name in provenance:
            settings += f"| {name} | {markdown(str(provenance[name]))} |\n"
    front_matter = json.dumps([{"config_name": "default", "data_files": "part-*.parquet"}])
    write_atomic(
        folder / "README.md",
        f"""---
configs: {front_matter}
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
