"""T-SHIRT's choice of examples against the authors' recorded statistics, and composed with a method of tokens."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from sstoken.errors import NothingLeftError, SstokenError
from sstoken.stages import joins, tables
from sstoken.stages.scores_file import write_scores
from sstoken.stages.select import Select
from sstoken.stages.selecting.examples import ExampleChoice, choose_examples, judge
from sstoken.stages.selecting.shard import Shard
from tests.factories import save_tokenizer
from tests.stages.context import make_context
from tests.support import SHARED

GOLDEN = SHARED / "golden/tshirt.json"


def write(folder: Path, rows: list[dict[str, list[float]]]) -> dict[str, Path]:
    """Tokens and scores of examples: lists over the response, of some signals from its second token."""
    inputs = {name: folder / name for name in ("tokens", "current")}
    for place in inputs.values():
        place.mkdir(parents=True)
    save_tokenizer(inputs["tokens"] / "tokenizer")
    names = [f"e{i}" for i in range(len(rows))]
    lengths = [len(row["loss"]) for row in rows]
    ids = [[1, *([2] * n)] for n in lengths]
    masks = [[False, *([True] * n)] for n in lengths]
    table = pa.table([names, ids, masks], schema=tables.TOKENS)
    said = {joins.TOKENS: joins.tokens_fingerprint(table)}
    about = {"kind": "tokens", "tokenizer": {"fingerprint": "f", "name": "t"}, "stats": {}, **said}
    tables.write_part(inputs["tokens"] / tables.part_name(0), table, about)
    signals = {key: np.concatenate([row[key] for row in rows]).astype(np.float32) for key in rows[0]}
    offsets = np.cumsum([0, *(n + 1 for n in lengths)]).astype(np.int32)
    response = np.concatenate(masks)
    about = {"checkpoint": "c", "layer": -1, "dtype": "float32", **said}
    write_scores(inputs["current"] / tables.part_name(0), names, offsets, response, signals, about)
    return inputs


def shard_of(inputs: dict[str, Path], choice: ExampleChoice) -> tuple[Shard, tuple[str, ...]]:
    scores = {"current": inputs["current"]}
    needed = choice.inputs(scores)
    return Shard(0, inputs["tokens"] / tables.part_name(0), scores, needed, "sample", 0), needed


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared")
def test_the_authors_statistics_and_choice(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    rows = []
    for row in golden["rows"]:
        pmi = row["pmi"]
        # losses of which the recorded differences and the recorded ratio come out
        shift = math.log(row["ifd"]) * (len(pmi) + 1) - sum(pmi) * (len(pmi) + 1) / len(pmi)
        alone = [3.0] * len(pmi)
        loss = [3.0 + shift, *(a + d for a, d in zip(alone, pmi, strict=True))]
        loss[0] = (math.log(row["ifd"]) + 3.0) * (len(pmi) + 1) - sum(loss[1:])
        noisy = {f"pmi_noisy@{k + 1}": draw for k, draw in enumerate(row["pmi_noisy"])}
        rows.append({"loss": loss, "loss_unconditional": alone, **noisy})
    choice = ExampleChoice(keep=golden["k"], draws=4, ratio=golden["ratio"])
    shard, needed = shard_of(write(tmp_path, rows), choice)
    found = judge(shard, needed, golden["threshold"])
    for name, values in (("ifd", found.ifd), ("avg_sifd", found.mean), ("std_sifd", found.std)):
        np.testing.assert_allclose(values, [row[name] for row in golden["rows"]], atol=1e-5)
    [chosen] = choose_examples(choice, [shard], needed)
    names = [row["example_id"] for row, c in zip(golden["rows"], chosen, strict=True) if c]
    assert sorted(names) == sorted(golden["selected"])


def simple(random: np.random.Generator, help_by: float) -> dict[str, list[float]]:
    alone = random.uniform(1, 3, 5)
    return {"loss": [1.0, *(alone - help_by)], "loss_unconditional": alone.tolist()}


def test_examples_first_then_tokens(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    helps = [0.1, 0.9, -3.0, 0.5, 0.2, 0.8]
    inputs = write(tmp_path / "in", [simple(random, h) for h in helps])
    stage = Select(method="loss", rho=0.5, scope="global", examples={"keep": 0.5})
    metrics = stage.run(make_context(tmp_path / "out", inputs))
    masked = pl.read_parquet(tmp_path / "out/part-*.parquet")
    assert masked["example_id"].to_list() == ["e0", "e3", "e4"]  # of the highest ratio below 1, without noise
    assert metrics["examples"] == 3
    assert metrics["passed_over"] == 3
    assert metrics["left_out"] == 0
    assert metrics["response_tokens"] == 18
    assert metrics["kept"] == 9


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    inputs = write(tmp_path / "in", [simple(random, -3.0) for _ in range(3)])
    with pytest.raises(NothingLeftError, match="none of 3 examples has an IFD below 1"):
        Select(method="full", examples={}).run(make_context(tmp_path / "out", inputs))
    with pytest.raises(SstokenError, match=r"needs current\.pmi_noisy@1, which was not measured"):
        Select(method="full", examples={"draws": 1}).run(make_context(tmp_path / "out2", inputs))
