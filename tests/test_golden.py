"""From a JSONL file to the masked dataset, the numbers are those of the authors' published code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline import api

SHARED = Path(__file__).parents[2] / "shared"
CHOICES = [(0.5, 0.6), (0.3, 0.4), (1, 0.5), (0, 0.8)]
"""(gamma, rho), as in the names of the golden columns."""

pytestmark = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="no golden values here")


@pytest.fixture(scope="module")
def golden() -> pl.DataFrame:
    return pl.read_parquet(SHARED / "golden/tokens.parquet")


@pytest.fixture(scope="module")
def run(golden: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens/, scores/base and scores/sft."""
    folder = tmp_path_factory.mktemp("golden")
    with open(folder / "data.jsonl", "w") as file:
        for row in golden.iter_rows(named=True):
            record = {"example_id": row["example_id"], "messages": json.loads(row["messages"])}
            file.write(json.dumps(record) + "\n")
    models = SHARED / "models"
    api.encode(
        data=str(folder / "data.jsonl"),
        model=str(models / "base"),
        out=folder / "tokens",
        shard_rows=20,
        max_length=512,
        workers=1,
    )
    api.score(
        tokens=folder / "tokens",
        checkpoints=[str(models / "base"), str(models / "sft")],
        out=folder / "scores",
        device="cpu",
    )
    return folder


def column(folder: Path, name: str, nothing: float | None = None) -> list[np.ndarray[Any, Any]]:
    """The lists of a column over all shards, in the order of the rows; null as `nothing`."""
    lists = pl.read_parquet(folder / "part-*.parquet")[name]
    return [np.array(row.fill_null(nothing) if nothing is not None else row) for row in lists]


def test_tokens_are_equal(golden: pl.DataFrame, run: Path) -> None:
    tokens = pl.read_parquet(run / "tokens/part-*.parquet")
    for name in ("example_id", "input_ids", "response_mask"):
        assert tokens[name].to_list() == golden[name].to_list(), name


@pytest.mark.parametrize(
    ("checkpoint", "measured", "expected"),
    [
        ("base", "loss", "loss_history"),
        ("sft", "loss", "loss_current"),
        ("sft", "attention", "attention"),
    ],
)
def test_signals_are_close(
    golden: pl.DataFrame, run: Path, checkpoint: str, measured: str, expected: str
) -> None:
    masks = [np.array(row) for row in golden["response_mask"]]
    found = column(run / "scores" / checkpoint, measured, np.nan)
    wanted = [np.array(row) for row in golden[expected]]
    assert len(found) == len(wanted)
    worst = max(float(np.abs(f[m] - w[m]).max()) for f, w, m in zip(found, wanted, masks, strict=True))
    print(f"{expected}: largest difference {worst:.2g} over {sum(m.sum() for m in masks)} tokens")
    assert worst < 1e-4
    assert all(np.isnan(f[~m]).all() for f, m in zip(found, masks, strict=True))


@pytest.mark.parametrize(("gamma", "rho"), CHOICES)
def test_keep_masks_are_equal(
    golden: pl.DataFrame, run: Path, gamma: float, rho: float, tmp_path: Path
) -> None:
    out = tmp_path / "masked"
    api.select(tokens=run / "tokens", scores=run / "scores", out=out, gamma=gamma, rho=rho)
    masked = pl.read_parquet(out / "part-*.parquet")
    assert masked["example_id"].to_list() == golden["example_id"].to_list()
    assert masked["keep_mask"].to_list() == golden[f"keep_gamma{gamma:g}_rho{rho:g}"].to_list()
