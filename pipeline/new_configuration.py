"""`init`: writes a commented configuration for a model and a dataset, after a look at both."""

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sstoken.errors import UsageError
from sstoken.pipeline.job import Job
from sstoken.pipeline.runner import execute
from sstoken.pipeline.schema import SCHEMA_FILE
from sstoken.stages.encode import Encode
from sstoken.stages.machine import multiplies_bfloat16
from sstoken.stages.manifest import Digests
from sstoken.stages.storage import expanded, write_atomic
from sstoken.stages.token_text import visible

ROWS = 200
"""Rows to look at."""


def look(data: str, model: str) -> dict[str, Any]:
    """Encode the first rows as `encode` would, and return its metrics; raises like `encode`."""
    stage = Encode(data=data, model=model, limit=ROWS, on_bad_row="skip", workers=1)
    with tempfile.TemporaryDirectory(prefix="sstoken-init-") as folder:
        return execute(Job(stage, {}, Path(folder) / "tokens", seed=0), Digests()).metrics


def configuration(data: str, model: str, out: str, found: dict[str, Any]) -> str:
    """Return the YAML text: the required settings, what was found, and the settings that people change first."""
    read, length = found["read_as"], found["length"]
    columns = ", ".join(name if name == role else f"{name} ({role})" for role, name in read["columns"])
    seen = [
        f"{found['rows']:,} rows were looked at: {found['examples']:,} examples of the layout {read['layout']} "
        f"(columns {columns})",
        f"their length in tokens: median {length['p50']}, 99 % within {length['p99']}, longest {length['max']}; "
        f"{found['response_share']:.0%} of the tokens are responses",
    ]
    if found["truncated"]:
        seen.append(
            f"{found['truncated']:,} are longer than what the model declares and would be cut: max_length"
        )
    if read["template"] == "plain":
        seen.append(
            "the tokenizer has no chat template: a plain one is used, unless chat_template names another"
        )
    if read["template_adds"]:
        seen.append(f"the chat template adds: {read['template_adds']!r}")
    for reason, count in sorted(found["bad_rows"].items()):
        seen.append(f"{count:,} cannot be used ({reason}): repair them, or on_bad_row: skip")
    if found["unused"]:
        seen.append(f"columns that are not part of the conversation: {', '.join(sorted(found['unused']))}")
    fast = multiplies_bfloat16()
    dtype = "bfloat16" if fast else "float32"
    why = "this processor multiplies it natively; float32 is exact" if fast else "bfloat16 is faster on a GPU"
    remarks = "\n".join(f"  # {visible(line, newline=' ')}" for line in seen)
    skipping = (
        "\n  on_bad_row: stop              # or skip: count such rows and list them"
        if found["bad_rows"]
        else ""
    )
    return f"""\
# yaml-language-server: $schema={SCHEMA_FILE}
# Written by `sstoken-curate init`. `sstoken-curate plan` with this file says what would run, `run` runs it.
out: {_scalar(out)}
encode:
{remarks}
  data: {_scalar(data)}
  model: {_scalar(model)}{skipping}
  # max_length: {length["max"]}               # longer examples keep their start
# anchor:                       # fine-tunes the model and keeps checkpoints: what sstoken and other methods compare;
#   epochs: 1                   # without checkpoints: under score, the first and the last of them are compared
#   learning_rate: 1.0e-5
#   batch_size: 8
#   snapshots: 4
#   lora_rank: 16               # adapters alone: less memory, small checkpoints, a higher learning rate
score:
  checkpoints: {{base: {_scalar(model)}}}
  attention_from: none          # recommended reads no attention; leave this out for sstoken
  dtype: {dtype:<24}# {why}
select:
  method: recommended           # finds noise, without training; `sstoken-curate methods` lists the others
  rho: 0.7                      # share of the response tokens kept; a list of values makes several datasets
  # protect: [end_of_turn]      # kept whatever their score, so that the model learns to stop (recommended does)
"""


def write(file: Path, text: str, schema: str) -> None:
    """Write the configuration, and the schema beside it; refuse a file that cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
        write_atomic(file.parent / SCHEMA_FILE, schema)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); name another with --file") from error


def from_folder(given: str, folder: Path) -> str:
    """Make an existing relative path relative to the YAML's folder; leave everything else unchanged."""
    place = expanded(given)
    if "://" in given or place.is_absolute() or not place.exists():
        return given
    return os.path.relpath(place, folder)


def _scalar(value: str) -> str:
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).removesuffix("\n...\n").strip()
