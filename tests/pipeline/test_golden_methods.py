"""Every golden column from disk to disk by the command line alone: `encode`, `score --signal`, `select --method`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sstoken.methods import get_method
from tests.pipeline.worlds import CommandLine
from tests.support import SHARED, needs_shared
from tests.test_golden_methods import COLUMNS, GOLDEN, NAMES, PAIRS, flat, golden_columns, matching

pytestmark = [
    pytest.mark.slow,
    needs_shared,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared"),
]
OVER_VOCABULARY = ("entropy", "expected_rank", "kl", "reverse_kl")
"""Sums over the vocabulary, by the beginning of their names: within 1e-4."""
COUNTS = ("rank", "ties")
FLOAT_TIES = 4
"""Tokens at most whose rank or ties differ: in float32 another order of sums parts logits that were equal by chance."""


def named(column: str) -> tuple[str, str]:
    """The checkpoint and the signal of a golden column of signals."""
    if column in PAIRS.values():
        return "sft", next(name for name, golden in PAIRS.items() if golden == column)
    name, _, checkpoint = column.rpartition("__")
    return checkpoint, NAMES.get(name, name)


def golden_signals() -> list[str]:
    if not GOLDEN.is_dir():
        return []
    columns = pl.scan_parquet(GOLDEN / "signals.parquet").collect_schema().names()
    return [c for c in columns if "__" in c or c in PAIRS.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokens and scores that the command line made of the golden examples' text."""
    place = tmp_path_factory.mktemp("disk-to-disk")
    rows = pl.read_parquet(GOLDEN / "signals.parquet", columns=["example_id", "messages"]).to_dicts()
    lines = [json.dumps({"example_id": r["example_id"], "messages": json.loads(r["messages"])}) for r in rows]
    (place / "data.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        models = SHARED / "models"
        run(
            "encode",
            "--data",
            "data.jsonl",
            "--model",
            models / "base",
            "--shard-rows",
            13,
            "--out",
            "tokens",
        )
        signals = sorted({named(column)[1] for column in golden_signals()})
        asked = [word for signal in signals for word in ("--signal", signal)]
        checkpoints = [word for name in ("base", "sft") for word in ("--ckpt", f"{name}={models / name}")]
        run("score", "--tokens", "tokens", *checkpoints, *asked, "--out", "scores")
        yield place


def run(*arguments: object) -> None:
    """The command line in this process."""
    from sstoken.pipeline import cli

    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 0


@pytest.mark.parametrize("column", golden_signals())
def test_signals(column: str, folder: Path) -> None:
    checkpoint, signal = named(column)
    scores = pl.read_parquet(folder / "scores" / checkpoint / "part-*.parquet")
    golden = pl.read_parquet(GOLDEN / "signals.parquet")
    assert scores["example_id"].to_list() == golden["example_id"].to_list()
    found, wanted = flat(scores[signal]), flat(golden[column])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    found, wanted = found[~np.isnan(found)], wanted[~np.isnan(wanted)]
    if signal in COUNTS:
        assert np.count_nonzero(found != wanted) <= FLOAT_TIES
        np.testing.assert_allclose(found, wanted, atol=1, rtol=0)
    else:
        absolute = 1e-4 if signal.startswith(OVER_VOCABULARY) else 1e-5
        # Losses above 20 nats: the golden values themselves are up to 1.1e-5 from the model in float64.
        np.testing.assert_allclose(found, wanted, atol=absolute, rtol=1e-4 if absolute > 1e-5 else 5e-7)


@pytest.mark.parametrize("column", golden_columns())
def test_methods(column: str, folder: Path, cli: CommandLine, tmp_path: Path) -> None:
    entry, checkpoint = matching(column)
    name, params, where = COLUMNS[entry]
    players = {"history": checkpoint or "base", "current": checkpoint or "sft"}
    roles = [word for role in get_method(name).roles for word in ("--role", f"{role}={players[role]}")]
    options: list[Any] = []
    for parameter, value in params.items():
        options += ["--scope", value] if parameter == "scope" else ["--param", f"{parameter}={value}"]
    cli.works(
        *(
            "select",
            "--tokens",
            folder / "tokens",
            "--scores",
            folder / "scores",
            "--out",
            tmp_path / "masked",
        ),
        *("--method", name, *roles, *options),
    )
    masked = pl.read_parquet(tmp_path / "masked/part-*.parquet")
    golden = pl.read_parquet(GOLDEN / "methods.parquet")
    response = flat(masked["response_mask"]) > 0
    np.testing.assert_array_equal(
        response, flat(pl.read_parquet(GOLDEN / "signals.parquet")["response_mask"])
    )
    wanted = flat(golden[column])[response]
    found = flat(masked[where if where != "dropped" else "keep_mask"])[response]
    if where == "dropped":
        found = 1 - found
    if where in ("keep_mask", "dropped"):
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)
