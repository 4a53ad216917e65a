"""How fast `export` streams, beside the script one would write instead: `datasets.map`, then `to_parquet`.

Both make TRL's columns of the same masked dataset, in processes of their own, in turns; figures are medians of
three rounds, and the ratio is that of their rates.
MB are those of the Arrow data read (10^6 bytes).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rounds import ROUNDS
from sstoken.labels import labels_from_mask
from sstoken.pipeline import api
from sstoken.stages import tables
from tests.factories import save_tokenizer

ROWS_PER_SHARD = 5000


def save_masked(folder: Path, shards: int) -> tuple[Path, float]:
    """A masked dataset of random tokens, 300 a row, half of them the response; and its megabytes in Arrow."""
    from sstoken.stages.manifest import Manifest, list_files, write_manifest

    folder.mkdir()
    random, megabytes = np.random.default_rng(0), 0.0
    for part in range(shards):
        lengths = random.integers(200, 401, ROWS_PER_SHARD)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = (random.zipf(1.2, offsets[-1]) % 32000).astype(np.int32)
        position = np.arange(ids.size) - np.repeat(offsets[:-1], lengths)
        response = position >= np.repeat(lengths // 2, lengths)
        keep = response & (random.random(ids.size) < 0.6)
        values = np.where(response, random.random(ids.size), np.nan).astype(np.float32)
        score = tables.lists(values, offsets, tables.VALUES)
        columns = {
            "example_id": pa.array([f"{part}-{i}" for i in range(ROWS_PER_SHARD)]),
            "input_ids": tables.lists(ids, offsets, tables.IDS),
            "labels": tables.lists(labels_from_mask(ids, keep), offsets, tables.IDS),
            "keep_mask": tables.lists(keep, offsets, tables.MASK),
            "response_mask": tables.lists(response, offsets, tables.MASK),
            "rel": score,
            "attention": score,
            "score": score,
        }
        table = pa.table([columns[name] for name in tables.MASKED.names], schema=tables.MASKED)
        megabytes += table.nbytes / 1e6
        tables.write_part(folder / tables.part_name(part), table, {"kind": "masked", "fingerprint": "0"})
    save_tokenizer(folder / "tokenizer")
    facts = {
        "settings": {},
        "seed": 0,
        "inputs": {},
        "sources": {},
        "version": "0",
        "seconds": 0,
        "metrics": {},
    }
    write_manifest(folder, Manifest(stage="select", fingerprint="0", files=list_files(folder), **facts))
    return folder, megabytes


def ours(masked: str, out: str) -> None:
    """One process, the sidecar too."""
    api.export(masked=masked, to="trl", out=out)


def without_sidecar(masked: str, out: str) -> None:
    """One process, what the other side writes."""
    api.export(masked=masked, to="trl", out=out, scores=False)


def by_datasets(masked: str, out: str) -> None:
    """What one would write by hand; without a sidecar."""
    from datasets import load_dataset

    def columns(row: dict[str, list[int]]) -> dict[str, list[int]]:
        labels = [-100, *row["labels"][1:]]
        return {"labels": labels, "assistant_masks": [int(label != -100) for label in labels]}

    rows = load_dataset(masked, split="train", data_files="part-*.parquet", cache_dir=f"{out}-cache")
    rows = rows.select_columns(["input_ids", "labels"]).map(columns)
    rows.filter(lambda row: any(row["assistant_masks"])).to_parquet(out)


def measure(side: str, masked: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a side in a process of its own, without what imports take."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, masked, out], capture_output=True, text=True, check=True
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    """Print both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10,000 rows and not 100,000")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side, masked, out = given.side
        import datasets  # noqa: F401

        start = time.perf_counter()
        {"ours": ours, "bare": without_sidecar, "datasets": by_datasets}[side](masked, out)
        seconds = time.perf_counter() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
        return
    shards = 2 if given.quick else 20
    with TemporaryDirectory() as folder:
        masked, megabytes = save_masked(Path(folder) / "masked", shards)
        few, _ = save_masked(Path(folder) / "few", 2)
        sides = {"few": ("ours", few), "ours": ("ours", masked), "bare": ("bare", masked)}
        sides["datasets"] = ("datasets", masked)
        rounds = [
            {name: measure(*side, Path(folder) / f"{name}-{number}.out") for name, side in sides.items()}
            for number in range(ROUNDS)
        ]
    (_, small_peak), (seconds, peak), (bare_seconds, _), (other_seconds, other_peak) = (
        [statistics.median(values) for values in zip(*(r[name] for r in rounds), strict=True)]
        for name in sides
    )
    found = {
        "rows": shards * ROWS_PER_SHARD,
        "arrow_mb": round(megabytes),
        "mb_per_second": round(megabytes / seconds, 1),
        "mb_per_second_without_sidecar": round(megabytes / bare_seconds, 1),
        "datasets_mb_per_second": round(megabytes / other_seconds, 1),
        "ratio": round(other_seconds / bare_seconds, 2),
        "peak_mb": round(peak),
        "peak_mb_of_10000_rows": round(small_peak),
        "datasets_peak_mb": round(other_peak),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
