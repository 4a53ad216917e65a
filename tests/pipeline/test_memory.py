"""On eight times the data every verb needs the same memory. `pytest -m slow -s` prints the figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sstoken.stages import joins, tables
from sstoken.stages.checkpoints import load_tokenizer, tokenizer_fingerprint
from sstoken.stages.manifest import Manifest, list_files, write_manifest
from tests.factories import VOCABULARY, save_model, save_tokenizer
from tests.pipeline.small_run import environment, save_conversations
from tests.support import PATIENCE

TIMES = 8
TOLERANCE = 1.1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figure"),
]


def peak(verb: str, **arguments: Any) -> float:
    """MiB."""
    script = Path(__file__).with_name("memory.py")
    given = json.dumps(arguments, default=str)
    done = subprocess.run(
        [sys.executable, script, verb, given],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def check_same(what: str, once: float, more: float) -> None:
    print(f"\n{what}: {once:.0f} MiB, {more:.0f} MiB on {TIMES} times the data ({more / once - 1:+.1%})")
    assert more <= TOLERANCE * once


def save_many_tokens(folder: Path, shards: int, *, rows: int, length: int) -> Path:
    """Random tokens, as `encode` leaves them."""
    folder.mkdir(parents=True)
    save_tokenizer(folder / "tokenizer")
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(folder / "tokenizer")))
    random, run = np.random.default_rng(0), f"{shards:016}"
    metadata = {
        "kind": "tokens",
        "tokenizer": {"fingerprint": fingerprint, "vocab_size": VOCABULARY, "name": "tiny"},
        "stats": {},
    }
    for shard in range(shards):
        lengths = random.integers(length // 2, length, rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = random.integers(1, VOCABULARY, offsets[-1]).astype(np.int32)
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        response = place >= np.repeat(lengths // 3, lengths)
        columns = [
            pa.array([f"{shard}-{row}" for row in range(rows)]),
            tables.lists(ids, offsets, tables.IDS),
            tables.lists(response, offsets, tables.MASK),
        ]
        table = pa.Table.from_arrays(columns, schema=tables.TOKENS)
        about = {joins.TOKENS: joins.tokens_fingerprint(table), joins.RUN: run}
        tables.write_part(folder / tables.part_name(shard), table, metadata | about)
    facts: dict[str, Any] = {"settings": {}, "inputs": {}, "sources": {}, "metrics": {}}
    manifest = Manifest(
        stage="encode",
        fingerprint=run,
        seed=0,
        version="0",
        seconds=0,
        files=list_files(folder),
        **facts,
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    save_model(folder / "base", positions=1024)
    save_model(folder / "later", positions=1024)
    return folder


@pytest.fixture(scope="module")
def many(folder: Path) -> dict[int, Path]:
    """Folders of 2 and of 16 million tokens: what a verb would hold of them stands out from its libraries."""
    return {
        times: save_many_tokens(folder / f"tokens-{times}", 4 * times, rows=1000, length=670)
        for times in (1, TIMES)
    }


@pytest.fixture(scope="module")
def scored(folder: Path, many: dict[int, Path]) -> tuple[dict[int, Path], dict[int, float]]:
    """Scores of those tokens, and what making them took."""
    scores = {times: folder / f"scores-{times}" for times in many}
    needed = {
        times: peak(
            "score",
            tokens=tokens,
            checkpoints=[str(folder / "base"), str(folder / "later")],
            out=scores[times],
            backend="idle",
        )
        for times, tokens in many.items()
    }
    return scores, needed


def test_encode(folder: Path) -> None:
    needed = {}
    for times in (1, TIMES):
        data = save_conversations(folder / f"data-{times}.jsonl", 3000 * times, longest=300)
        needed[times] = peak(
            "encode", data=data, model=folder / "base", out=folder / f"encoded-{times}", workers=1
        )
    check_same("encode", needed[1], needed[TIMES])


def test_score_without_a_model(scored: tuple[dict[int, Path], dict[int, float]]) -> None:
    check_same("score, no model", scored[1][1], scored[1][TIMES])


def test_score_with_a_model(folder: Path) -> None:
    needed = {}
    for times in (1, TIMES):
        tokens = save_many_tokens(folder / f"few-{times}", 4 * times, rows=250, length=100)
        needed[times] = peak(
            "score", tokens=tokens, checkpoints=[str(folder / "base")], out=folder / f"few-scores-{times}"
        )
    check_same("score, transformers", needed[1], needed[TIMES])


@pytest.mark.parametrize("scope", ["sample", "global"])
def test_select(
    folder: Path, many: dict[int, Path], scored: tuple[dict[int, Path], dict[int, float]], scope: str
) -> None:
    needed = {
        times: peak(
            "select",
            tokens=tokens,
            scores=scored[0][times],
            out=folder / f"masked-{scope}-{times}",
            scope=scope,
        )
        for times, tokens in many.items()
    }
    check_same(f"select, {scope}", needed[1], needed[TIMES])


@pytest.mark.parametrize("how", ["read", "show"])
def test_reading_the_masked_dataset(
    folder: Path, many: dict[int, Path], scored: tuple[dict[int, Path], dict[int, float]], how: str
) -> None:
    needed = {}
    for times, tokens in many.items():
        masked = folder / f"masked-sample-{times}"
        if not masked.exists():
            peak("select", tokens=tokens, scores=scored[0][times], out=masked)
        if how == "show":
            needed[times] = peak("show", masked=masked, row=4 * times * 1000 - 1)
        else:
            needed[times] = peak("read", data_files=str(masked / "part-*.parquet"))
    check_same(f"masked, {how}", needed[1], needed[TIMES])


def test_publish(
    folder: Path, many: dict[int, Path], scored: tuple[dict[int, Path], dict[int, float]]
) -> None:
    needed = {}
    for times, tokens in many.items():
        masked = folder / f"masked-sample-{times}"
        if not masked.exists():
            peak("select", tokens=tokens, scores=scored[0][times], out=masked)
        needed[times] = peak("publish", masked=masked, repo="user/name", dry_run=True, include_scores=True)
    check_same("publish", needed[1], needed[TIMES])
