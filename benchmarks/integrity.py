"""What it costs a normal run that nothing rots or is half-written: `encode`, `score` and `select`, with and without.

Without: no digest of a file, no checksum of a page, no fingerprint of tokens, no flush to the disk; only this file can
ask for that. Both sides run in this process, in turns; figures are medians, and the cost is the ratio of their CPU
seconds (of their seconds, too, where the machine does nothing else). Where it is busy, the ratio says little; the
share of the CPU seconds that pass within the checks still does. The model is small, so weights and tokens are
much to check for what there is to compute: larger ones cost less.

    python benchmarks/integrity.py [--quick] [--json] [--rows N] [--rounds N] [--data FILE --model FOLDER]
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq

from benchmarks.rounds import at_least
from sstoken import curate
from sstoken.stages import checkpoints, folders, joins, loading, storage, tables
from sstoken.stages.manifest import Manifest, list_files, write_manifest
from sstoken.stages.scores_file import write_scores

SHARED = Path(__file__).parents[2] / "shared"
_NO_DIGEST = "0" * 64
_FEWER = 40
"""`score` takes so many times as long for a row as the others."""


@contextmanager
def nothing_checked() -> Iterator[None]:
    """Replace what computes digests, checksums and fingerprints, and what flushes, by nothing."""
    writer, file = pq.ParquetWriter, pq.ParquetFile

    def write(*arguments: Any, write_page_checksum: bool = False, **options: Any) -> Any:
        return writer(*arguments, **options)

    def read(*arguments: Any, page_checksum_verification: bool = False, **options: Any) -> Any:
        return file(*arguments, **options)

    def said(part: Path, table: Any) -> str:
        return str(tables.read_metadata(part)[joins.TOKENS])

    replaced: list[tuple[Any, str, Any]] = [
        (folders, "read_file", Path.read_bytes),
        (folders, "check_file", lambda path: None),
        (folders, "hash_file", lambda path: _NO_DIGEST),
        (checkpoints, "check_content", lambda ref: None),
        (loading, "check_content", lambda ref: None),
        (storage.LocalDisk, "digest", lambda self, path: (path.stat().st_size, _NO_DIGEST)),
        (joins, "tokens_fingerprint", lambda table: "0"),
        (joins, "measured_fingerprint", said),
        (os, "fsync", lambda number: None),
        (pq, "ParquetWriter", write),
        (pq, "ParquetFile", read),
    ]
    with ExitStack() as patches:
        for place, name, function in replaced:
            patches.enter_context(mock.patch.object(place, name, function))
        yield


class _Counted:
    """CPU seconds that the outermost calls of some functions took."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            self._inside, start = True, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self._inside = False
                self.seconds += time.thread_time() - start

        return counted


@contextmanager
def as_always(counted: _Counted) -> Iterator[None]:
    """Check as always, and count what that takes; but for the checksums of pages, inside of Arrow."""
    functions = [
        (folders, "check_digest"), (folders, "hash_file"), (folders, "check_file"), (checkpoints, "check_content"),
        (loading, "check_content"), (storage.LocalDisk, "digest"), (joins, "tokens_fingerprint"),
        (joins, "measured_fingerprint"), (os, "fsync"), (tables, "_digest"), (folders.hashlib, "sha256"),
    ]  # fmt: skip
    with ExitStack() as patches:
        for place, name in functions:
            patches.enter_context(mock.patch.object(place, name, counted(getattr(place, name))))
        yield


def save_scores(tokens: Path, folder: Path) -> None:
    """Random losses and attention of each response token, as `score` writes them."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(len(folder.name))
    for part in tables.parts(tokens):
        table = tables.read_table(part)
        response, offsets = tables.flatten(table["response_mask"])
        response = response.astype(np.bool_)
        signals = {name: chance.random(int(response.sum()), np.float32) for name in ("loss", "attention")}
        about = {
            joins.TOKENS: joins.tokens_fingerprint(table),
            joins.RUN: "benchmark",
            "checkpoint": folder.name,
        }
        ids = table["example_id"].to_pylist()
        write_scores(
            folder / part.name, ids, offsets, response, signals, {**about, "layer": None, "dtype": "float32"}
        )
    facts: dict[str, Any] = {"settings": {}, "inputs": {}, "sources": {}, "metrics": {}}
    files = list_files(folder)
    write_manifest(
        folder,
        Manifest(
            stage="score", fingerprint="benchmark", seed=0, version="0", seconds=0, files=files, **facts
        ),
    )


def stages(folder: Path, data: str, model: str, rows: int) -> dict[str, Callable[[Path], object]]:
    """Each stage as a function of its output folder; what they read is made, with all checks."""
    tokens, few, scores = folder / "tokens", folder / "few", folder / "scores"
    curate.encode(data=data, model=model, out=tokens, limit=rows, workers=1)
    curate.encode(data=data, model=model, out=few, limit=max(8, rows // _FEWER), workers=1)
    for name in ("first", "second"):
        save_scores(tokens, scores / name)
    return {
        "encode": lambda out: curate.encode(data=data, model=model, out=out, limit=rows, workers=1),
        "score": lambda out: curate.score(tokens=few, checkpoints=[model], out=out),
        "select": lambda out: curate.select(
            tokens=tokens, scores=scores, history="first", current="second", out=out, workers=1
        ),
    }


def measure(run: Callable[[Path], object], out: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds, of a run into a new folder."""
    folders._remembered.cache_clear()  # weights are hashed once a process
    start, cpu = time.perf_counter(), time.process_time()
    run(out)
    took = time.perf_counter() - start, time.process_time() - cpu
    shutil.rmtree(out)
    return took


def main() -> None:
    """Parse the options; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="400 rows, 3 rounds")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data", default=str(SHARED / "data/gsm8k/train.jsonl"))
    parser.add_argument("--model", default=str(SHARED / "models/base"))
    asked = parser.parse_args()
    rows, rounds = (400, 3) if asked.quick else (asked.rows, at_least(asked.rounds))
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, run in stages(folder, asked.data, asked.model, rows).items():
            counted = _Counted()
            taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for number in range(-1, rounds):  # the first one warms up
                for checked in (True, False) if number % 2 else (False, True):
                    with as_always(counted) if checked else nothing_checked():
                        took = measure(run, folder / "out")
                    if number < 0:
                        counted.seconds = 0.0
                    else:
                        taken[checked].append(took)
            (seconds, cpu), (seconds_without, cpu_without) = (
                [statistics.median(each[i] for each in taken[checked]) for i in (0, 1)]
                for checked in (True, False)
            )
            figures[name] = {
                "cpu_seconds": round(cpu, 4),
                "cpu_seconds_without": round(cpu_without, 4),
                "cost": round(cpu / cpu_without - 1, 4),
                "share": round(counted.seconds / sum(each[1] for each in taken[True]), 4),
                "seconds": round(seconds, 4),
                "seconds_without": round(seconds_without, 4),
                "cost_of_seconds": round(seconds / seconds_without - 1, 4),
            }
            cost, waited, share = (figures[name][key] for key in ("cost", "cost_of_seconds", "share"))
            print(
                f"{name}: {cpu:.3f} s of computing, {cpu_without:.3f} s without: {cost:+.1%} ({waited:+.1%} of the "
                f"seconds); {share:.1%} of the computing is in the checks",
                flush=True,
            )
    if asked.json:
        print(json.dumps({"rows": rows, "rounds": rounds, "stages": figures}))


if __name__ == "__main__":
    main()
