"""`audit` on the command line and from Python: folders of a run, exports, files of every kind, exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from sstoken import curate
from sstoken.stages import tables
from sstoken.stages.exporting import TARGETS
from tests.pipeline.worlds import CommandLine, World, cut, list_anew
from tests.stages.auditing import datasets
from tests.stages.auditing.datasets import Row


@pytest.fixture(scope="module")
def masked(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "masked"
    return curate.select(tokens=world.tokens, scores=world.scores, out=out, rho=0.5).folder


@pytest.fixture(scope="module")
def exportable(scored: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that every target can train as they are."""
    tokens, scores = scored
    out = tmp_path_factory.mktemp("audit") / "exportable"
    return curate.select(tokens=tokens, scores=scores, out=out, rho=0.5).folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return datasets.save(datasets.chatml(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sound() -> list[Row]:
    return datasets.sound(datasets.chatml(), 6, 2)


def jsonl(rows: list[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(rows: list[Row]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"])


def test_folders_of_a_run(world: World, masked: Path, cli: CommandLine) -> None:
    facts = json.loads(cli.works("audit", world.tokens, "--json"))["facts"]
    tokens = pl.read_parquet(world.tokens / "part-*.parquet")
    assert facts["rows"] == len(tokens)
    assert facts["trained"] == tokens["response_mask"].explode().sum()
    said = json.loads(cli.works("audit", masked, "--json"))
    assert said["form"] == "select"
    assert said["facts"]["trained"] == pl.read_parquet(masked / "part-*.parquet")["keep_mask"].explode().sum()
    assert all(f["severity"] != "error" for f in said["findings"])
    [base] = [p for p in world.scores.iterdir() if p.name == "base"]
    scores = json.loads(cli.works("audit", base, "--tokens", world.tokens, "--json"))
    assert scores["form"] == "score"
    assert set(scores["facts"]["signals"]) == {"loss"}
    assert "nothing found" in cli.works("audit", world.tokens)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_is_read_back(exportable: Path, tmp_path: Path, target: str, scores: bool) -> None:
    out = tmp_path / "out"
    metrics = curate.export(masked=exportable, to=target, out=out, check=True, scores=scores).metrics
    found = curate.audit(source=out)
    assert found.form == "export"
    assert [f.kind for f in found.findings if f.severity == "error"] == []
    assert (found.facts["examples"], found.facts["tokens"], found.facts["trained"]) == (
        metrics["examples"],
        metrics["tokens"],
        metrics["kept"],
    )
    if target != "llamafactory":  # a saved dataset is opened as a whole
        [first, *_] = sorted((out / "data").iterdir())
        shard = curate.audit(source=str(first))
        kinds = {f.kind for f in shard.findings if f.severity == "error"}
        assert not kinds & {"labels-shifted", "labels-not-inputs", "masks-disagree", "lengths-differ"}
    else:
        assert curate.audit(source=out / "data").facts["trained"] == metrics["kept"]
    data = curate.audit(source=out / "data")
    assert data.facts["trained"] == metrics["kept"]


FORMS: dict[str, Callable[[list[Row], Path], Any]] = {
    "jsonl": lambda rows, path: jsonl(rows, path.with_suffix(".jsonl")),
    "jsonl.gz": lambda rows, path: (
        pl.DataFrame(rows).write_ndjson(path.with_suffix(".jsonl")) or path.with_suffix(".jsonl")
    ),
    "parquet": lambda rows, path: write_parquet(rows, path, pa.int64(), pa.int64()),
    "uint32": lambda rows, path: write_parquet(rows, path, pa.uint32(), pa.int32()),
    "large lists": lambda rows, path: write_parquet(rows, path, pa.int32(), pa.int32(), pa.large_list),
    "row groups": lambda rows, path: write_parquet(rows, path, pa.int32(), pa.int16(), row_group_size=2),
    "arrow file": lambda rows, path: write_arrow(rows, path, pa.ipc.new_file),
    "arrow stream": lambda rows, path: write_arrow(rows, path, pa.ipc.new_stream),
    "saved": lambda rows, path: save(Dataset.from_list(rows), path),
    "folder": lambda rows, path: write_parquet(rows, folder(path) / "train", pa.int32(), pa.int32()).parent,
    "dataset": lambda rows, path: Dataset.from_list(rows),
    "table": lambda rows, path: pa.concat_tables(
        [pa.Table.from_pylist(rows[:2]), pa.Table.from_pylist(rows[2:])]
    ),
    "frame": lambda rows, path: pl.DataFrame(rows),
    "numpy": lambda rows, path: [{n: np.array(v, np.int32) for n, v in row.items()} for row in rows],
    "tuples": lambda rows, path: [{n: tuple(v) for n, v in row.items()} for row in rows],
}


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def write_parquet(
    rows: list[Row], path: Path, ids: pa.DataType, labels: pa.DataType, lists: Any = pa.list_, **options: Any
) -> Path:
    columns = {name: pa.array([row[name] for row in rows], lists(kind)) for name, kind in
               (("input_ids", ids), ("labels", labels))}  # fmt: skip
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"), **options)
    return path.with_suffix(".parquet")


def write_arrow(rows: list[Row], path: Path, writer: Any) -> Path:
    table = pa.Table.from_pylist(rows)
    with writer(path.with_suffix(".arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=4)
    return path.with_suffix(".arrow")


def save(dataset: Dataset | DatasetDict, path: Path) -> Path:
    dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_whatever_holds_the_rows(form: str, sound: list[Row], tokenizer: str, tmp_path: Path) -> None:
    found = curate.audit(source=FORMS[form](sound, tmp_path / "data"), tokenizer=tokenizer)
    assert found.findings == []
    assert found.facts["rows"] == 6
    assert found.facts["trained"] == trained(sound)


def test_masks_of_every_type(sound: list[Row], tokenizer: str, tmp_path: Path) -> None:
    masks = [[int(label != -100) for label in row["labels"]] for row in sound]
    ids = pa.array([row["input_ids"] for row in sound], pa.list_(pa.int32()))
    for kind in (pa.int8(), pa.uint8(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()):
        column = pa.array(
            [[bool(m) if kind == pa.bool_() else m for m in mask] for mask in masks], pa.list_(kind)
        )
        pq.write_table(pa.table({"input_ids": ids, "loss_mask": column}), tmp_path / "data.parquet")
        found = curate.audit(source=tmp_path / "data.parquet", tokenizer=tokenizer)
        assert found.findings == []
        assert found.facts["trained"] == trained(sound)


@pytest.mark.parametrize(
    "name", ["assistant_masks", "assistant_mask", "completion_mask", "loss_weights", "weights"]
)
def test_the_masks_of_trainers(name: str, sound: list[Row], tokenizer: str) -> None:
    rows = [{"input_ids": r["input_ids"], name: [int(label != -100) for label in r["labels"]]} for r in sound]
    found = curate.audit(source=rows, tokenizer=tokenizer)
    assert (found.findings, found.facts["trained"]) == ([], trained(sound))


def test_a_mask_of_torchtune_is_true_where_nothing_is_trained(sound: list[Row], tokenizer: str) -> None:
    rows = [{"tokens": r["input_ids"], "mask": [label == -100 for label in r["labels"]]} for r in sound]
    found = curate.audit(source=rows, tokenizer=tokenizer)
    assert (found.findings, found.facts["trained"]) == ([], trained(sound))


def test_trl_trains_what_both_masks_allow(sound: list[Row], tokenizer: str) -> None:
    rows = [
        {
            "input_ids": r["input_ids"],
            "assistant_masks": [int(label != -100) for label in r["labels"]],
            "completion_mask": [int(i >= len(r["labels"]) // 2) for i in range(len(r["labels"]))],
        }
        for r in sound
    ]
    found = curate.audit(source=rows, tokenizer=tokenizer)
    assert found.facts["trained"] == sum(
        a and c for r in rows for a, c in zip(r["assistant_masks"], r["completion_mask"], strict=True)
    )


def test_packed_rows(sound: list[Row], tokenizer: str) -> None:
    lengths = [len(row["input_ids"]) for row in sound]
    packed: Row = {name: [x for row in sound for x in row[name]] for name in ("input_ids", "labels")}
    positions = [p for n in lengths for p in range(n)]
    for beside in ({"position_ids": positions}, {"seq_lengths": lengths}):
        found = curate.audit(source=[packed | beside], tokenizer=tokenizer)
        assert found.findings == []
        assert found.facts["rows"] == 1
        assert found.facts["examples"] == 6
        assert found.facts["ends"]["end_trained"] == 12


def test_padding_is_not_trained(sound: list[Row], tokenizer: str) -> None:
    pad = datasets.chatml().pad_token_id
    longest = max(len(row["input_ids"]) for row in sound)
    for left in (False, True):
        rows = []
        for row in sound:
            n = longest - len(row["input_ids"])
            values = {"input_ids": pad, "labels": -100, "attention_mask": 0}
            full = row | {"attention_mask": [1] * len(row["input_ids"])}
            rows.append({k: [v] * n + full[k] if left else full[k] + [v] * n for k, v in values.items()})
        found = curate.audit(source=rows, tokenizer=tokenizer)
        assert found.findings == []
        assert found.facts["trained"] == trained(sound)
        assert found.facts["padding"] == sum(longest - len(row["input_ids"]) for row in sound)


def test_labels_that_are_meant_to_be_shifted(sound: list[Row], tokenizer: str) -> None:
    rows = [row | {"labels": [*row["labels"][1:], -100]} for row in sound]
    found = curate.audit(source=rows, tokenizer=tokenizer, shifted_labels=True)
    assert (found.findings, found.facts["trained"]) == ([], trained(sound))
    found = curate.audit(source=sound, tokenizer=tokenizer, shifted_labels=True)
    assert {f.kind: f.rows for f in found.findings} == {"labels-not-shifted": 6}


def test_no_labels(sound: list[Row], tokenizer: str) -> None:
    found = curate.audit(source=[{"input_ids": row["input_ids"]} for row in sound], tokenizer=tokenizer)
    assert {f.kind: f.rows for f in found.findings}["no-labels"] == 6


def test_without_a_tokenizer(sound: list[Row], cli: CommandLine, tmp_path: Path) -> None:
    printed = cli.works("audit", jsonl(sound, tmp_path / "data.jsonl"))
    assert "nothing found" in printed
    assert "no tokenizer is known" in printed


def test_it_fails_where_it_should(sound: list[Row], cli: CommandLine, tokenizer: str, tmp_path: Path) -> None:
    good = jsonl(sound, tmp_path / "good.jsonl")
    rows = [*sound, sound[0] | {"labels": [-100] * len(sound[0]["labels"])}]
    bad = jsonl(rows, tmp_path / "bad.jsonl")
    assert cli("audit", good, "--tokenizer", tokenizer, "--fail-on", "warning").code == 0
    assert cli("audit", bad, "--tokenizer", tokenizer).code == 0
    failed = cli("audit", "--data", bad, "--tokenizer", tokenizer, "--fail-on", "error")
    assert failed.code == 1
    assert "error nothing-trained (1 of 7 rows): rows in which no token is trained" in failed.out
    assert "bad.jsonl line 7" in failed.out
    assert failed.err == ""
    said = json.loads(cli("audit", bad, "--tokenizer", tokenizer, "--fail-on", "error", "--json").out)
    assert said["counts"]["error"] == 1
    finding = said["findings"][0]
    assert set(finding) == {"kind", "severity", "rows", "what", "detail", "example", "remedy"}
    assert finding["example"]["row"] == 6


def test_mistakes_end_in_one_line(cli: CommandLine, world: World, tokenizer: str, tmp_path: Path) -> None:
    assert "nothing was given" in cli.fails(2, "audit")
    assert "both" in cli.fails(2, "audit", "a.jsonl", "--data", "b.jsonl")
    assert "no such file" in cli.fails(2, "audit", tmp_path / "absent.jsonl")
    assert "name the --model" in cli.fails(2, "audit", world.data)
    assert "no data files" in cli.fails(2, "audit", tmp_path)
    assert "name one of the folders in it" in cli.fails(2, "audit", world.tokens.parent)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty" in cli.fails(1, "audit", tmp_path / "empty.jsonl")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and nothing else")
    assert "not a readable parquet" in cli.fails(1, "audit", tmp_path / "data.parquet")
    pq.write_table(
        pa.table({"input_ids": [[1, 2]] * 5000, "labels": [[1, 2]] * 5000}), tmp_path / "cut.parquet"
    )
    cut(tmp_path / "cut.parquet")
    cli.fails(1, "audit", tmp_path / "cut.parquet")
    rows = jsonl([{"input_ids": [1], "labels": [1]}], tmp_path / "rows.jsonl")
    assert "split" in cli.fails(2, "audit", rows, "--split", "test")
    cli.fails(1, "audit", rows, "--tokenizer", world.data.parent)
    with pytest.raises(curate.UsageError, match="not a int"):
        curate.audit(source=3)


def test_scores_that_say_nothing(world: World, tmp_path: Path) -> None:
    """Scores with holes, and a signal that is the same everywhere: a folder whose manifest lists the changed shards."""
    shutil.copytree(world.scores / "base", tmp_path / "base")
    parts = sorted((tmp_path / "base").glob("part-*.parquet"))
    for number, part in enumerate(parts):
        table, about = tables.read_table(part), tables.read_metadata(part)
        values, offsets = tables.flatten(table["loss"])
        values = np.where(np.isnan(values), np.nan, np.float32(2))
        if not number:
            values[np.flatnonzero(~np.isnan(values))[0]] = np.nan
        column = tables.lists(values, offsets, tables.VALUES)
        tables.write_part(part, table.set_column(table.column_names.index("loss"), "loss", column), about)
    list_anew(tmp_path / "base")
    found = curate.audit(source=tmp_path / "base", tokens=world.tokens)
    assert {f.kind: f.rows for f in found.findings} == {"signal-missing": 1, "signal-constant": 24}
