"""The numbers are those of the authors' published code, and of plain eager attention.

`golden/masks.parquet` holds signals of real answers, as the authors' code measured them, with the masks that it gave;
`golden/signals.parquet` the signals of seeded random models by a plain reference (`golden/signals.py`). From a JSONL
file to the masks with trained models: where `../shared` holds those.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sstoken.pipeline import api
from sstoken.stages import joins, tables
from sstoken.stages.score import Score
from sstoken.stages.scores_file import write_scores
from sstoken.stages.select import Select
from tests.factories import save_tokenizer
from tests.golden import signals
from tests.stages.context import make_context
from tests.support import SHARED

CHOICES = [(0.5, 0.6), (0.3, 0.4), (1, 0.5), (0, 0.8)]
"""(gamma, rho), as in the names of the golden columns."""

MASKS = Path(__file__).with_name("golden") / "masks.parquet"

with_trained_models = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="needs ../shared")


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


@with_trained_models
def test_tokens_are_equal(golden: pl.DataFrame, run: Path) -> None:
    tokens = pl.read_parquet(run / "tokens/part-*.parquet")
    for name in ("example_id", "input_ids", "response_mask"):
        assert tokens[name].to_list() == golden[name].to_list(), name


@with_trained_models
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


@with_trained_models
@pytest.mark.parametrize(("gamma", "rho"), CHOICES)
def test_keep_masks_are_equal(
    golden: pl.DataFrame, run: Path, gamma: float, rho: float, tmp_path: Path
) -> None:
    out = tmp_path / "masked"
    api.select(tokens=run / "tokens", scores=run / "scores", out=out, gamma=gamma, rho=rho)
    masked = pl.read_parquet(out / "part-*.parquet")
    assert masked["example_id"].to_list() == golden["example_id"].to_list()
    assert masked["keep_mask"].to_list() == golden[f"keep_gamma{gamma:g}_rho{rho:g}"].to_list()


NAMES = {
    "base": {},
    "sft": {
        "kl@base": "kl_sft_base",
        "reverse_kl@base": "kl_base_sft",
        "kl_at@base": "kl_at_sft_base",
        "entropy_at": "entropy_at_sft",
        "attention": "attention__sft",
    },
}
"""Our signals and the golden columns, beside those of `SINGLE`, by checkpoint."""
SINGLE = {"ties": "num_ties", "loss_unconditional": "loss_uncond"} | {
    name: name
    for name in (
        "loss", "entropy", "entropy_top20", "rank", "mass_above", "max_prob", "sum_p2", "expected_rank"
    )
}  # fmt: skip


@with_trained_models
def test_all_signals_from_disk_to_disk(tmp_path: Path) -> None:
    """From the conversations to columns, with the golden signals of 32 real examples."""
    golden = pl.read_parquet(SHARED / "golden/methods/signals.parquet")
    with open(tmp_path / "data.jsonl", "w") as file:
        for row in golden.iter_rows(named=True):
            record = {"example_id": row["example_id"], "messages": json.loads(row["messages"])}
            file.write(json.dumps(record) + "\n")
    models = SHARED / "models"
    api.encode(
        data=str(tmp_path / "data.jsonl"), model=str(models / "base"), out=tmp_path / "tokens", max_length=512
    )
    api.score(
        tokens=tmp_path / "tokens",
        checkpoints=[str(models / "base"), str(models / "sft")],
        out=tmp_path / "scores",
        signals=(*SINGLE, "kl@base", "reverse_kl@base", "kl_at@base", "entropy_at"),
        device="cpu",
    )
    for checkpoint, own in NAMES.items():
        wanted = {name: f"{golden_name}__{checkpoint}" for name, golden_name in SINGLE.items()} | own
        for name, expected in wanted.items():
            found = np.concatenate(column(tmp_path / "scores" / checkpoint, name, np.nan)).astype(float)
            values = golden[expected].explode().cast(pl.Float64).fill_null(np.nan).to_numpy()
            measured = np.isfinite(values)
            assert np.array_equal(np.isfinite(found), measured), name
            apart = np.abs(found - values)[measured]
            if name in ("rank", "ties"):  # two logits can be the same on one processor and not on another
                assert (apart != 0).sum() <= 10, (name, (apart != 0).sum())
                assert apart.max() <= 1, name
            else:
                most = 1e-4 if name == "expected_rank" else 2e-5  # from buckets
                assert (apart / np.maximum(1, np.abs(values[measured]))).max() < most, (name, apart.max())


def write_folders(golden: pl.DataFrame, folder: Path) -> dict[str, Path]:
    """Tokens and scores as `encode` and `score` write them, from golden signals; the first shard is longer."""
    inputs = {role: folder / role for role in ("tokens", "history", "current", "attention")}
    for place in inputs.values():
        place.mkdir()
    save_tokenizer(inputs["tokens"] / "tokenizer")
    for part, rows in enumerate((golden[:40], golden[40:])):
        table = rows.select("example_id", "input_ids", "response_mask").to_arrow().cast(tables.TOKENS)
        said = {joins.TOKENS: joins.tokens_fingerprint(table)}
        about = {
            "kind": "tokens",
            "tokenizer": {"fingerprint": "golden", "name": "golden"},
            "stats": {},
            **said,
        }
        tables.write_part(inputs["tokens"] / tables.part_name(part), table, about)
        offsets = tables.flatten(table["input_ids"])[1]
        response = tables.flatten(table["response_mask"])[0].astype(bool)
        loss = {role: np.concatenate(rows[f"loss_{role}"].to_list()) for role in ("history", "current")}
        attention = np.concatenate(rows["attention"].to_list())
        for role in ("history", "current", "attention"):
            measured = {"loss": loss.get(role, loss["current"])}
            if role == "attention":
                measured["attention"] = attention
            write_scores(
                inputs[role] / tables.part_name(part),
                table["example_id"].to_pylist(),
                offsets,
                response,
                {name: values[response].astype(np.float32) for name, values in measured.items()},
                {"checkpoint": role, "layer": -1, "dtype": "float32", **said},
            )
    return inputs


@pytest.mark.parametrize(("gamma", "rho"), CHOICES)
def test_masks_of_the_authors_code(gamma: float, rho: float, tmp_path: Path) -> None:
    """Token by token, over 64 real answers."""
    golden = pl.read_parquet(MASKS).with_columns(
        input_ids=pl.col("response_mask").list.eval(pl.int_range(pl.len(), dtype=pl.Int32))
    )
    inputs = write_folders(golden, tmp_path)
    context = make_context(tmp_path / "masked", inputs)
    Select(gamma=gamma, rho=rho).run(context)
    masked = pl.read_parquet(tmp_path / "masked/part-*.parquet")
    wanted = golden[f"keep_gamma{gamma:g}_rho{rho:g}"].to_list()
    assert sum(map(sum, wanted)) > 1000
    assert masked["example_id"].to_list() == golden["example_id"].to_list()
    assert masked["keep_mask"].to_list() == wanted


@pytest.mark.parametrize("architecture", signals.MODELS)
def test_signals_of_random_models(architecture: str, tmp_path: Path) -> None:
    """By `score`, batched and in float32, against values that were computed once, one token after the other."""
    golden = pl.read_parquet(signals.FILE).filter(pl.col("architecture") == architecture)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    save_tokenizer(tokens / "tokenizer")
    table = golden.select("example_id", "input_ids", "response_mask").to_arrow().cast(tables.TOKENS)
    about = {"kind": "tokens", "tokenizer": {"fingerprint": "golden", "name": "golden"}}
    tables.write_part(tokens / tables.part_name(0), table, about)
    response = np.concatenate(golden["response_mask"].to_list())
    assert response.sum() > 300
    for role in signals.SEEDS:
        signals.make_model(architecture, role).save_pretrained(tmp_path / role)
    references = {"history": str(tmp_path / "history")}
    for stage, wanted in (
        (Score(checkpoint=references["history"], device="cpu"), {"loss": "loss_history"}),
        (
            Score(
                checkpoint=str(tmp_path / "current"),
                signals=signals.SIGNALS,
                references=references,
                device="cpu",
            ),
            {name: name for name in signals.SIGNALS},
        ),
    ):
        out = tmp_path / f"scores-{Path(stage.checkpoint).name}"
        stage.run(make_context(out, {"tokens": tokens}))
        for name, expected in wanted.items():
            values = np.concatenate(golden[expected].to_list())
            found = np.concatenate(column(out, name, np.nan))
            assert np.array_equal(np.isnan(found), np.isnan(values)), name
            measured = ~np.isnan(values)
            assert measured.sum() > 250
            apart = np.abs(found - values)[measured] / np.maximum(1, np.abs(values[measured]))
            assert apart.max() < (1e-4 if name == "expected_rank" else 1e-5), (name, apart.max())


def test_the_committed_signals_are_those_of_the_reference() -> None:
    committed, anew = pl.read_parquet(signals.FILE), signals.make_table()
    exact = ["architecture", "example_id", "input_ids", "response_mask"]
    assert committed.select(exact).equals(anew.select(exact))
    for name in ("loss_history", *signals.SIGNALS):
        found, wanted = (np.concatenate(t[name].to_list()) for t in (anew, committed))
        np.testing.assert_allclose(found, wanted, atol=1e-9)
