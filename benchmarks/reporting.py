"""`report` over millions of tokens: seconds, peak memory and the size of the page.

The tokens are GSM8K's with a part of the answers' exchanged at random, so that they hardly repeat; the signals are
random. A page takes as long with measured ones.

    python benchmarks/reporting.py [--quick] [--json] [--tokens N] [--data FILE --model FOLDER]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.commands import run
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
    add_options(parser)
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both benchmarks of many tokens."""
    parser.add_argument("--quick", action="store_true", help="300,000 tokens")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="default: 10,000,000")
    parser.add_argument("--data", default=str(SHARED / "data/gsm8k/train.jsonl"))
    parser.add_argument("--model", default=str(SHARED / "models/base"), help="whose tokenizer encodes")


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
            response = tables.flatten(table["response_mask"])[0].astype(bool)
            other = (random.random(ids.size) < EXCHANGED) & (ids > 20) & response
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
    """Seconds and peak MiB of `sstoken-curate report`, and what it says."""
    measured = run("report", str(folder / "masked"), "--out", str(folder / "page.html"), "--json")
    facts = json.loads(measured.lines[0])
    return {
        **measured.figures(),
        "signals": len(facts["signals"]),
        "bytes": facts["bytes"],
        "shown": facts["shown"],
    }


if __name__ == "__main__":
    main()
