"""A run of all stages in seconds: a tiny model, random conversations, many shards."""

import json
import os
import random
import sys
from pathlib import Path

from tests.factories import VOCABULARY, save_model
from tests.support import ROOT

PIPELINE = [sys.executable, "-m", "sstoken.pipeline"]


def save_conversations(path: Path, examples: int, longest: int = 20, seed: int = 0) -> Path:
    """Conversations of random words as JSON lines; every fifth has two turns."""
    words = random.Random(seed)

    def text() -> str:
        return " ".join(f"w{words.randrange(1, VOCABULARY)}" for _ in range(words.randint(3, longest)))

    with open(path, "w") as file:
        for i in range(examples):
            turns = [
                {"role": role, "content": text()} for role in ("user", "assistant") * (2 if i % 5 == 0 else 1)
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def save_config(folder: Path, inputs: Path, *, examples: int, shard_rows: int, steps: int) -> Path:
    """A configuration whose `out` is relative, so that runs in two working directories can be compared.

    A path is part of the provenance: with absolute ones no two runs would write the same bytes.
    """
    if not (inputs / "base").exists():
        save_model(inputs / "base", positions=256)
        save_conversations(inputs / "data.jsonl", examples)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(
        f"""
out: run
encode: {{data: {inputs}/data.jsonl, model: {inputs}/base, shard_rows: {shard_rows}, workers: 1}}
anchor: {{max_steps: {steps}, snapshots: 4, batch_size: 2, learning_rate: 1.0e-2, ema_decay: 0.9}}
score: {{batch_tokens: 256}}
"""
    )
    return path


def environment() -> dict[str, str]:
    """For child processes: one thread, and our packages from this tree."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def written(run: Path) -> dict[str, bytes]:
    """Every Parquet file and every weight of a run, by its place."""
    files = [*run.rglob("*.parquet"), *run.rglob("*.safetensors")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def leftovers(run: Path) -> list[str]:
    """What only an unfinished run should hold."""
    names = ("*.partial", "*.tmp", "*.replaced", ".fingerprint", "trainer", ".sstoken-*")
    return [str(path) for name in names for path in run.rglob(name)]
