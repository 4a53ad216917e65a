"""The method that docs/methods.md adds from a package of its own, on the command line."""

import math
from pathlib import Path

import numpy as np
import polars as pl

from sstoken import curate
from tests.pipeline.worlds import World
from tests.sstoken.test_third_party import VERB, blocks, install, run


def test_the_example_selects_by_the_command_line(world: World, tmp_path: Path) -> None:
    install(tmp_path, blocks("python")[0], blocks("toml")[0])
    scores, out = tmp_path / "scores", tmp_path / "masked"
    curate.score(
        tokens=world.tokens, checkpoints=[f"base={world.base}"], signals=["loss", "entropy"], out=scores
    )
    command = ["select", "--tokens", str(world.tokens), "--scores", str(scores), "--out", str(out)]
    done = run(tmp_path, VERB.format([*command, "--method", "surprise", "--param", "rho=0.4"]))
    assert done.returncode == 0, done.stderr
    assert "current is base" in done.stdout
    masked = pl.read_parquet(out / "part-*.parquet")
    measured = pl.read_parquet(scores / "base" / "part-*.parquet")
    for row, signals in zip(masked.iter_rows(named=True), measured.iter_rows(named=True), strict=True):
        response = np.array(row["response_mask"])
        surprise = np.array(signals["loss"], float)[response] - np.array(signals["entropy"], float)[response]
        kept = np.zeros(surprise.size, bool)
        kept[np.argsort(-surprise, kind="stable")[: math.ceil(0.4 * surprise.size)]] = True
        assert np.array(row["keep_mask"])[response].tolist() == kept.tolist()
