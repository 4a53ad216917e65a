"""`export`: every target against the masked dataset, what is refused, what `--check` finds."""

import itertools
import json
from pathlib import Path

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline import api
from sstoken.stages import manifest as manifests
from sstoken.stages import tables
from sstoken.stages.exporting import TARGETS
from sstoken.stages.exporting.rows import prepare
from tests.pipeline.worlds import CommandLine, World, no_trace, snapshot

WEIGHTED = [name for name, target in TARGETS.items() if target.weights]
every_target = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(scope="module")
def masked(scored: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, scores = scored
    out = tmp_path_factory.mktemp("export") / "masked"
    return api.select(tokens=tokens, scores=scores, out=out, rho=0.5).folder


def table(**columns: list[list[float | None]]) -> pa.Table:
    """A shard of the masked dataset from what differs."""
    columns |= {n: [list(map(bool, row)) for row in columns[n]] for n in columns if n.endswith("mask")}
    keep = columns["keep_mask"]
    filled = {
        "example_id": [f"e{i}" for i in range(len(keep))],
        "input_ids": [[10 * i + j for j in range(len(row))] for i, row in enumerate(keep)],
        "response_mask": keep,
        "rel": [[None] * len(row) for row in keep],
        "attention": [[None] * len(row) for row in keep],
        "score": [[None] * len(row) for row in keep],
        **columns,
    }
    filled["labels"] = filled["input_ids"]
    return pa.table([pa.array(filled[f.name], f.type) for f in tables.MASKED], schema=tables.MASKED)


def longest(masked: Path) -> int:
    """Tokens of the longest row."""
    lengths = pl.read_parquet(masked / "part-*.parquet", columns=["input_ids"])["input_ids"].list.len()
    return int(lengths.max())  # type: ignore[arg-type]


def rows(values: np.ndarray, offsets: np.ndarray) -> list[list[float]]:
    return [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def test_rows_without_a_label_are_dropped_and_first_tokens_never_learned() -> None:
    ready = prepare(table(keep_mask=[[1, 0, 1], [1, 0], [0, 0, 0], [0, 1]]), None, False)
    assert ready.rows.example_id.to_pylist() == ["e0", "e3"]
    assert rows(ready.rows.labels, ready.rows.offsets) == [[-100, -100, 2], [-100, 31]]
    assert ready.sidecar["example_id"].to_pylist() == ["e0", "e3"]
    assert ready.counts == {
        "examples": 2,
        "dropped": 2,
        "truncated": 0,
        "tokens": 5,
        "kept": 2,
        "kept_lost": 2,
        "longest": 3,
    }


def test_cut_to_length() -> None:
    ready = prepare(table(keep_mask=[[0, 1, 1, 1], [0, 0, 0, 1], [0, 1]]), 3, False)
    assert rows(ready.rows.ids, ready.rows.offsets) == [[0, 1, 2], [20, 21]]
    assert rows(ready.rows.labels, ready.rows.offsets) == [[-100, 1, 2], [-100, 21]]
    assert ready.sidecar["keep_mask"].to_pylist() == [[False, True, True], [False, True]]
    assert (ready.counts["truncated"], ready.counts["dropped"], ready.counts["kept_lost"]) == (1, 1, 2)


def test_a_row_without_tokens_is_dropped() -> None:
    ready = prepare(table(keep_mask=[[], [0, 1], []], score=[[], [None, 2.0], []]), 5, True)
    assert ready.rows.example_id.to_pylist() == ["e1"]
    assert ready.rows.weights is not None
    assert ready.rows.weights.tolist() == [0, 1]


def test_weights_are_scores_between_lowest_and_highest_of_the_response() -> None:
    score = [[None, 1.0, 3.0, 2.0], [None, 5.0, 5.0, 5.0]]
    keep = [[0, 0, 1, 1], [0, 1, 0, 1]]
    ready = prepare(table(keep_mask=keep, response_mask=[[0, 1, 1, 1]] * 2, score=score), None, True)
    assert ready.rows.weights is not None
    weights = rows(ready.rows.weights, ready.rows.offsets)
    assert weights[0] == pytest.approx([0, 0, 1, 0.5], abs=1e-6)
    assert weights[1] == [0, 1, 0, 1]


def test_the_lowest_score_weighs_more_than_nothing_where_it_is_kept() -> None:
    ready = prepare(table(keep_mask=[[0, 1, 1]], score=[[None, 0.0, 1.0]]), None, True)
    assert ready.rows.weights is not None
    assert ((ready.rows.weights > 0) == ready.rows.kept).all()


@every_target
@pytest.mark.parametrize("cut", [False, True])
def test_checks_out_and_twice_is_once(
    masked: Path, tmp_path: Path, cli: CommandLine, target: str, cut: bool
) -> None:
    command = ["export", masked, "--to", target, "--out", tmp_path / "out", "--check", "--workers", 2]
    command += ["--max-length", longest(masked) - 2] if cut else []
    assert "labels agree" in cli.works(*command)
    before = snapshot(tmp_path / "out")
    assert "finished already" in cli.works(*command)
    assert snapshot(tmp_path / "out") == before
    readme = (tmp_path / "out" / "README.md").read_text()
    assert target in readme
    assert "MODEL" in readme or target == "jsonl"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["to"] == target
    sidecar = pl.read_parquet(tmp_path / "out" / "scores" / "part-*.parquet")
    assert len(sidecar) == json.loads(cli.works(*command, "--json"))["examples"]
    assert set(sidecar.columns) == {"example_id", "keep_mask", "response_mask", "rel", "attention", "score"}


@pytest.mark.parametrize("target", WEIGHTED)
def test_weights_where_they_are_of_use(masked: Path, tmp_path: Path, cli: CommandLine, target: str) -> None:
    out = tmp_path / "out"
    printed = cli.works("export", masked, "--to", target, "--weights", "--out", out, "--check", "--json")
    assert cli.works(
        "export", masked, "--to", target, "--weights", "--no-scores", "--out", tmp_path / "b", "--check"
    )
    weights: list[float] = []
    for batch in TARGETS[target].read(out):
        for row in batch.to_pylist():
            _, labels, found = TARGETS[target].seen(row)
            assert found is not None
            assert [w > 0 for w in found] == [label != -100 for label in labels]
            weights += found
    assert max(weights) == pytest.approx(1)
    assert any(0 < w < 0.99 for w in weights)
    assert sum(w > 0 for w in weights) == json.loads(printed)["kept"]


@pytest.mark.parametrize("target", sorted(set(TARGETS) - set(WEIGHTED)))
def test_weights_are_refused_elsewhere(masked: Path, tmp_path: Path, cli: CommandLine, target: str) -> None:
    line = cli.fails(2, "export", masked, "--to", target, "--weights", "--out", tmp_path / "out")
    assert f"{target} supports no weights" in line
    assert "swift, verl, jsonl" in line
    no_trace(tmp_path / "out")


@pytest.fixture(scope="module")
def weighted(scored: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, scores = scored
    out = tmp_path_factory.mktemp("weighted") / "masked"
    return api.select(tokens=tokens, scores=scores, out=out, method="psft").folder


@every_target
def test_the_weights_of_a_method(weighted: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    if target in WEIGHTED:
        api.export(masked=weighted, to=target, out=out, check=True)
        assert "the method's for each kept token" in (out / "README.md").read_text()
    else:
        with pytest.raises(
            UsageError, match=rf"{target} supports none; export to swift, verl, jsonl, or .*--no-weights"
        ):
            api.export(masked=weighted, to=target, out=out)
    alike = tmp_path / "alike"
    api.export(masked=weighted, to=target, out=alike, weights=False, check=True)
    assert "weights were left out" in (alike / "README.md").read_text()


def test_each_kept_token_carries_the_weight_of_its_method(weighted: Path, tmp_path: Path) -> None:
    api.export(masked=weighted, to="jsonl", out=tmp_path / "out")
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "out/data").iterdir())
        for line in path.read_text().splitlines()
    ]
    masked = pl.read_parquet(weighted / "part-*.parquet")
    found = {row["example_id"]: row["weights"] for row in lines}
    values = []
    for row in masked.iter_rows(named=True):
        if row["example_id"] not in found:
            continue
        for i, keep in enumerate(row["keep_mask"]):
            assert found[row["example_id"]][i] == pytest.approx(row["weight"][i] if keep and i else 0.0)
            values.append(found[row["example_id"]][i])
    assert len(set(values)) > 5


def test_weights_need_scores(world: World, tmp_path: Path, cli: CommandLine) -> None:
    lean = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "lean", lean=True).folder
    line = cli.fails(2, "export", lean, "--to", "jsonl", "--weights", "--out", tmp_path / "out")
    assert "--lean" in line
    assert cli.works("export", lean, "--to", "jsonl", "--out", tmp_path / "plain", "--check")


@pytest.mark.parametrize(("given", "hint"), [("trll", "did you mean 'trl'?"), ("keras", "legal: trl, ")])
def test_an_unknown_target(masked: Path, tmp_path: Path, cli: CommandLine, given: str, hint: str) -> None:
    line = cli.fails(2, "export", masked, "--to", given, "--out", tmp_path / "out")
    assert hint in line
    assert all(name in line for name in TARGETS)


def test_other_folders_are_refused(world: World, tmp_path: Path, cli: CommandLine) -> None:
    assert "'select'" in cli.fails(2, "export", world.tokens, "--to", "trl", "--out", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    masked = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked").folder
    assert "not written by sstoken" in cli.fails(
        2, "export", masked, "--to", "trl", "--out", tmp_path / "mine"
    )
    assert "nothing to export" not in cli.works("export", masked, "--to", "trl", "--out", tmp_path / "out")
    other = cli.fails(2, "export", masked, "--to", "axolotl", "--out", tmp_path / "out")
    assert "holds finished work of other settings" in other


def test_nothing_left_within_a_length(masked: Path, tmp_path: Path, cli: CommandLine) -> None:
    line = cli.fails(1, "export", masked, "--to", "trl", "--max-length", 2, "--out", tmp_path / "out")
    assert "within 2 tokens" in line
    no_trace(tmp_path / "out")


def alter(path: Path) -> None:
    """Change one label of one row, and nothing of the file's form."""
    if path.suffix == ".jsonl":
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        row = lines[1] if "labels" in lines[1] else lines[1]["messages"][0]["content"]
        name = "labels" if "labels" in row else "loss_scale"
        row[name][-1] = 7 if name == "labels" else 1 - row[name][-1]
        path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        return
    arrow = path.suffix == ".arrow"
    columns = (pa.ipc.open_stream(path).read_all() if arrow else pq.read_table(path)).to_pydict()
    schema = pa.ipc.open_stream(path).schema if arrow else pq.read_schema(path)
    name = "labels" if "labels" in columns else "loss_mask"
    if "seq_start_id" in columns:  # the second row is in the first pack
        place = columns["seq_start_id"][0][1]
        columns[name][0][place] = 1 - columns[name][0][place]
    else:
        row = columns[name][1]
        row[0 if len(row) < 2 else -2] = 1 - row[-2] if name == "loss_mask" else 7
    altered = pa.table(columns, schema=schema)
    if arrow:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(altered)
    else:
        pq.write_table(altered, path)


@every_target
def test_check_finds_one_wrong_label(masked: Path, tmp_path: Path, cli: CommandLine, target: str) -> None:
    """Even where the manifest was made to fit the altered shard."""
    out = tmp_path / "out"
    api.export(masked=masked, to=target, out=out)
    shard = sorted((out / "data").glob("*-00000*"))[0]
    alter(shard)
    manifest = manifests.read_manifest(out)
    assert manifest is not None
    manifests.write_manifest(out, manifest.model_copy(update={"files": manifests.list_files(out)}))
    line = cli.fails(1, "export", masked, "--to", target, "--out", out, "--check")
    assert "row 1 " in line
    assert "by the masked dataset" in line


def test_packs_hold_whole_rows_in_order_and_masks_are_about_what_is_predicted(tmp_path: Path) -> None:
    lengths = [4000, 96, 2, 5000, 10]
    keep = [[j % 3 == 1 for j in range(n)] for n in lengths]
    ready = prepare(table(keep_mask=keep), None, False)
    TARGETS["megatron-bridge"].write(tmp_path / "part-00000.parquet", ready.rows)
    packs = pq.read_table(tmp_path / "part-00000.parquet").to_pylist()
    assert [pack["seq_start_id"] for pack in packs] == [[0, 4000], [0], [0], [0]]
    assert [len(pack["input_ids"]) for pack in packs] == [4096, 2, 5000, 10]
    for pack in packs:
        bounds = [*pack["seq_start_id"], len(pack["input_ids"])]
        assert len(pack["loss_mask"]) == bounds[-1]
        for a, b in itertools.pairwise(bounds):
            assert pack["loss_mask"][a:b] == [*(int(j % 3 == 1) for j in range(1, b - a)), 0]


def test_what_megatron_bridge_never_trains_is_found_by_check(
    world: World, tmp_path: Path, cli: CommandLine
) -> None:
    """Without a template of its own, the tiny tokenizer writes EOS for the header before an answer."""
    made = api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked", rho=1.0)
    line = cli.fails(
        1, "export", made.folder, "--to", "megatron-bridge", "--out", tmp_path / "out", "--check"
    )
    assert "follows the tokenizer's EOS, and megatron-bridge never trains on what EOS predicts" in line


def test_check_finds_damage(masked: Path, tmp_path: Path) -> None:
    out = api.export(masked=masked, to="trl", out=tmp_path / "out").folder
    shard = out / "data" / "part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[20] ^= 255
    shard.write_bytes(content)
    with pytest.raises(SstokenError, match="content changed"):
        api.export(masked=masked, to="trl", out=out, check=True)


def test_trl_reads_the_folder_as_a_whole(masked: Path, tmp_path: Path) -> None:
    """The README's front matter keeps the sidecar out."""
    out = api.export(masked=masked, to="trl", out=tmp_path / "out").folder
    found = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.column_names == ["input_ids", "labels", "assistant_masks"]
    for path in (out / "data").glob("*.parquet"):
        assert not pq.read_schema(path).metadata


def test_the_tokenizer_comes_along(masked: Path, tmp_path: Path) -> None:
    out = api.export(masked=masked, to="axolotl", out=tmp_path / "out", scores=False).folder
    assert (out / "tokenizer" / "tokenizer.json").is_file()
    assert not (out / "scores").exists()


def test_a_length_below_two_is_refused(masked: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_length is 1"):
        api.export(masked=masked, to="trl", out=tmp_path / "out", max_length=1)
