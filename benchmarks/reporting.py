"""`report` over millions of tokens: seconds, peak memory and the size of the page.

The tokens are GSM8K's with a part of them exchanged at random, so that they hardly repeat; the signals are random. A
page takes as long with measured ones.

    python benchmarks/reporting.py [--quick] [--json] [--tokens N] [--data FILE --model FOLDER]
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.rounds import middle
from sstoken import curate
from sstoken.stages import joins, tables
from sstoken.stages.folders import copy_folder
from sstoken.stages.manifest import Manifest, list_files, write_manifest
from sstoken.stages.scores_file import write_scores

SHARED = Path(__file__).parents[2] / "shared"
SHARD_ROWS = 1000
EXCHANGED = 0.2
CHECKPOINTS = ("base", "step-100", "step-200")


def main() -> None:
    """Parse the options; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="300,000 tokens")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="default: 10,000,000")
    parser.add_argument("--data", default=str(SHARED / "data/gsm8k/train.jsonl"))
    parser.add_argument("--model", default=str(SHARED / "models/base"), help="whose tokenizer encodes")
    options = parser.parse_args()
    wanted = 300_000 if options.quick else options.tokens
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        limit = 1500 if options.quick else None
        curate.encode(data=options.data, model=options.model, out=folder / "gsm8k", limit=limit)
        number = write_folders(folder, wanted)
        figures = middle(lambda: measure(folder))
    figures["tokens"] = number
    print(
        f"{number:,} tokens, {figures['signals']} signals: {figures['seconds']:.1f} s "
        f"({figures['cpu_seconds']:.1f} s of computing), peak "
        f"{figures['peak_mib']:.0f} MiB, a page of {figures['bytes'] / 1e6:.2f} MB with {figures['shown']} examples"
    )
    if options.json:
        print(json.dumps(figures))


def write_folders(folder: Path, wanted: int) -> int:
    """Write `masked` and three folders of scores with at least `wanted` tokens. Return how many there are."""
    random = np.random.default_rng(0)
    number = 0
    masked = folder / "masked"
    masked.mkdir()
    facts = tables.read_metadata(tables.parts(folder / "gsm8k")[0])
    about = {
        "kind": "masked", "method": "sstoken", "params": {"rho": 0.6, "gamma": 0.5}, "rho": 0.6, "gamma": 0.5,
        "scope": "sample", "layer": -1, "checkpoints": {}, "tokenizer": facts["tokenizer"], "version": "0",
        "fingerprint": "benchmark",
    }  # fmt: skip
    for index, table in enumerate(tokens(folder / "gsm8k", wanted, random)):
        name = tables.part_name(index)
        response, offsets = tables.flatten(table["response_mask"])
        response = response.astype(bool)
        values = random.random((8, int(response.sum()))).astype(np.float32)
        keep = response.copy()
        keep[response] = values[0] > 0.4
        fingerprint = joins.tokens_fingerprint(table)
        for i, checkpoint in enumerate(CHECKPOINTS):
            signals = {"loss": values[1 + i] * 8, "entropy": values[4 + i] * 4}
            metadata = {
                "checkpoint": checkpoint,
                "dtype": "float32",
                joins.RUN: "benchmark",
                joins.TOKENS: fingerprint,
            }
            (folder / "scores" / checkpoint).mkdir(parents=True, exist_ok=True)
            path = folder / "scores" / checkpoint / name
            write_scores(path, table["example_id"].to_pylist(), offsets, response, signals, metadata)
        ids = tables.flatten(table["input_ids"])[0]
        columns: dict[str, Any] = {name: table[name] for name in ("example_id", "input_ids", "response_mask")}
        columns["labels"] = tables.lists(np.where(keep, ids, -100), offsets, tables.IDS)
        columns["keep_mask"] = tables.lists(keep, offsets, tables.MASK)
        for i, column in enumerate(("score", "rel", "attention")):
            full = np.full(response.size, np.nan, np.float32)
            full[response] = values[[0, 7, 6][i]]
            columns[column] = tables.lists(full, offsets, tables.VALUES)
        masked_table = pa.table([columns[n] for n in tables.MASKED.names], schema=tables.MASKED)
        tables.write_part(masked / name, masked_table, {})
        number += ids.size
    whole = joins.folder_fingerprint(folder / "scores" / CHECKPOINTS[0])
    for path in sorted(masked.glob("part-*.parquet")):
        tables.write_part(path, tables.read_table(path), {**about, joins.TOKENS: whole})
    copy_folder(folder / "gsm8k" / "tokenizer", masked / "tokenizer")
    for finished, stage in ((masked, "select"), *((folder / "scores" / c, "score") for c in CHECKPOINTS)):
        no_facts: dict[str, Any] = {"settings": {}, "inputs": {}, "sources": {}, "metrics": {}}
        write_manifest(
            finished,
            Manifest(
                stage=stage, fingerprint="benchmark", seed=0, version="0", seconds=0, files=list_files(finished),
                **no_facts,
            ),
        )  # fmt: skip
    return number


def tokens(folder: Path, wanted: int, random: np.random.Generator) -> Iterator[pa.Table]:
    """Yield shards of tokens, those of `folder` again and again, each time with others exchanged."""
    number, row = 0, 0
    while number < wanted:
        for part in tables.parts(folder):
            table = tables.read_table(part)
            ids, offsets = tables.flatten(table["input_ids"])
            ids = ids.copy()
            other = (random.random(ids.size) < EXCHANGED) & (ids > 20)
            ids[other] = random.integers(20, 4096, int(other.sum()))
            names = [f"e{row + i}" for i in range(len(table))]
            row += len(table)
            number += ids.size
            yield pa.table(
                [pa.array(names), tables.lists(ids, offsets, tables.IDS), table["response_mask"]],
                names=["example_id", "input_ids", "response_mask"],
            )
            if number >= wanted:
                return


def measure(folder: Path) -> dict[str, Any]:
    """Seconds and peak MiB of `sstoken-curate report` as a process of its own, and what it says."""
    arguments = ["report", str(folder / "masked"), "--out", str(folder / "page.html"), "--json"]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", _COMMAND, *arguments], capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"report failed: {done.stderr}")
    facts = json.loads(done.stdout.splitlines()[0])
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)[-1]) / 1024
    found = {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak, "signals": len(facts["signals"])}
    return {**found, "bytes": facts["bytes"], "shown": facts["shown"]}


_COMMAND = """
import sys
from sstoken.pipeline.cli import main
try:
    main(sys.argv[1:])
finally:
    print(open("/proc/self/status").read())
"""
"""A process's own peak: what `wait4` says of a child begins with its parent's."""


if __name__ == "__main__":
    main()
