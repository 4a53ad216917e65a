"""A byte changed in anything that a stage reads stops it, with the file named; what no manifest lists is not read."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline import api
from sstoken.stages import tables
from sstoken.stages.manifest import read_manifest
from sstoken.stages.report.show import read_examples
from sstoken.stages.training.history_index import read_history
from sstoken.stages.training.score_column import with_history
from tests.pipeline.worlds import CommandLine, World, list_anew, make_world

PLACES = 6
"""Bytes flipped in each file; the first and last ones among them."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that stages exchange: tokens, history, scores/<checkpoint>, masked."""
    world, folder = make_world(), tmp_path_factory.mktemp("integrity")
    shutil.copytree(world.tokens, folder / "tokens")
    shutil.copytree(world.scores, folder / "scores")
    api.anchor(
        tokens=folder / "tokens", model=str(world.base), out=folder / "history", max_steps=2, snapshots=2
    )
    api.select(tokens=folder / "tokens", scores=folder / "scores", out=folder / "masked")
    api.export(masked=folder / "masked", to="jsonl", out=folder / "export")
    return folder


@contextmanager
def flipped(path: Path, place: int) -> Iterator[None]:
    """The file with one bit of a byte changed."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1 << (place % 7)
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(whole)


def places(path: Path) -> list[int]:
    """Some bytes of a file, the same each time."""
    size = path.stat().st_size
    chosen = random.Random(path.name).sample(range(size), min(size, PLACES - 2))
    return sorted({0, size - 1, *chosen})


def listed(folder: Path) -> list[Path]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return [folder / "manifest.json", *(folder / entry.path for entry in manifest.files)]


def metrics(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.metrics


def shards_and_tokenizer(folder: Path) -> list[Path]:
    used = ("part-*.parquet", "data/*", "scores/*", "tokenizer/*", "manifest.json")
    return [p for p in listed(folder) if any(p.relative_to(folder).match(pattern) for pattern in used)]


READERS: dict[str, tuple[tuple[str, ...], Callable[[World, Path, Path], object]]] = {
    "score": (
        ("tokens",),
        lambda w, run, out: api.score(tokens=run / "tokens", checkpoints=[str(w.base)], out=out),
    ),
    "anchor": (
        ("tokens",),
        lambda w, run, out: api.anchor(tokens=run / "tokens", model=str(w.base), out=out, max_steps=1),
    ),
    "select": (
        ("tokens", "scores/base", "scores/later"),
        lambda w, run, out: api.select(tokens=run / "tokens", scores=run / "scores", out=out),
    ),
    "export": (("masked",), lambda w, run, out: api.export(masked=run / "masked", to="trl", out=out)),
    "publish": (
        ("masked",),
        lambda w, run, out: api.publish(masked=run / "masked", repo="me/it", dry_run=True),
    ),
    "audit": (("export",), lambda w, run, out: api.audit(data=str(run / "export"))),
    "report": (
        ("masked", "scores/base"),
        lambda w, run, out: api.report([run / "masked"], out=out.with_suffix(".html")),
    ),
}


@pytest.mark.parametrize("stage", READERS)
def test_a_byte_changed_in_an_input_is_never_silent(stage: str, run: Path, tmp_path: Path) -> None:
    world, (inputs, read) = make_world(), READERS[stage]
    tried = 0
    for folder in inputs:
        for path in shards_and_tokenizer(run / folder):
            if stage == "score" and path.parent.name == "tokenizer":
                continue  # read only where the checkpoint's own is another one
            for place in places(path):
                with flipped(path, place), pytest.raises(SstokenError) as caught:
                    read(world, run, tmp_path / f"out-{tried}")
                assert not isinstance(caught.value, UsageError)
                assert str(path) in str(caught.value), (path, place, caught.value)
                assert "\n" not in str(caught.value)
                tried += 1
    assert tried > PLACES * len(inputs)


def test_a_damaged_tokenizer_decides_nothing(run: Path, tmp_path: Path) -> None:
    file = run / "tokens/tokenizer/tokenizer.json"
    select = partial(api.select, tokens=run / "tokens", scores=run / "scores", out=tmp_path / "out")
    for place in places(file):
        with flipped(file, place), pytest.raises(SstokenError, match=r"tokenizer\.json"):
            select(pool="word", protect=("end_of_turn",))
        assert not list(tmp_path.rglob("part-*"))  # the next run would go on from them


def test_a_damaged_manifest_in_the_run_is_not_left_out_of_a_publication(run: Path) -> None:
    file = run / "scores/base/manifest.json"
    with flipped(file, 40), pytest.raises(SstokenError, match=r"scores/base/manifest\.json"):
        api.publish(masked=run / "masked", repo="me/it", dry_run=True)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_value_that_is_not_finite_is_used(value: float, run: Path, tmp_path: Path) -> None:
    """Where it got past `score`, and the manifest lists it."""
    shutil.copytree(run, tmp_path / "run")
    copy = tmp_path / "run"
    _put(copy / "scores/base", "loss", value)
    with pytest.raises(SstokenError, match=r"part-00000\.parquet: column 'loss' h"):
        api.select(tokens=copy / "tokens", scores=copy / "scores", out=tmp_path / "out")
    if value != value:  # the report shows it as not measured
        return
    with pytest.raises(SstokenError, match=r"part-00000\.parquet: column 'loss' holds an infinite value"):
        api.report([copy / "masked"], out=tmp_path / "report.html")
    _put(copy / "masked", "score", value)
    with pytest.raises(SstokenError, match="weight of a kept token is infinite or not a number"):
        api.export(masked=copy / "masked", to="verl", weights=True, out=tmp_path / "weighted")
    assert api.publish(masked=copy / "masked", repo="me/it", include_scores=True, dry_run=True).folder


def _put(folder: Path, column: str, value: float) -> None:
    """Write a value over the first one in a finished folder, and list the shard anew."""
    shard = tables.parts(folder)[0]
    held = tables.read_table(shard)
    values, offsets = tables.flatten(held[column])
    values = values.copy()
    values[np.flatnonzero(np.isfinite(values))[0]] = value
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.float32(), mask=np.isnan(values)))
    place = held.column_names.index(column)
    tables.write_part(shard, held.set_column(place, column, lists), tables.read_metadata(shard))
    list_anew(folder)


def test_shown_rows_and_rows_for_training_are_checked(run: Path) -> None:
    readers = {
        run / "masked": lambda: read_examples(run / "masked", 0, 1000),
        run / "scores/base": lambda: with_history(run / "tokens", run / "scores/base"),
    }
    for folder, read in readers.items():
        for path in tables.parts(folder):
            for place in places(path):
                with flipped(path, place), pytest.raises(SstokenError, match=path.name):
                    read()


def test_a_damaged_snapshot_is_not_scored(run: Path, tmp_path: Path) -> None:
    world = make_world()
    for path in listed(run / "history"):
        if path.parent.name != "step-1":
            continue
        for place in places(path):
            with flipped(path, place), pytest.raises(SstokenError) as caught:
                api.score(tokens=run / "tokens", checkpoints=[str(path.parent)], out=tmp_path / "out")
            assert str(path) in str(caught.value)
    index = run / "history/history.json"
    for place in places(index):
        with flipped(index, place), pytest.raises(SstokenError, match=r"history\.json"):
            read_history(run / "history")
    assert not list(tmp_path.rglob("*.parquet"))
    api.score(tokens=run / "tokens", checkpoints=[str(run / "history/step-1")], out=tmp_path / "out")
    assert world.base.is_dir()


def test_exchanged_snapshots_are_not_scored(run: Path, tmp_path: Path) -> None:
    history = tmp_path / "history"
    shutil.copytree(run / "history", history)
    first, second = (history / f"step-{n}" for n in (1, 2))
    first.rename(history / "other")
    second.rename(first)
    (history / "other").rename(second)
    for step in (first, second):
        with pytest.raises(SstokenError, match=rf"{step}/.*damaged"):
            api.score(tokens=run / "tokens", checkpoints=[str(step)], out=tmp_path / "scores")


@pytest.mark.parametrize("name", ["part-00012.parquet", "part-backup.parquet"])
@pytest.mark.parametrize("folder", ["tokens", "scores/base", "masked"])
def test_a_stray_copy_of_a_shard_is_not_read(
    folder: str, name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `verify` names it."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("history"))
    copy = tmp_path / "run"
    cli = CommandLine(capsys)
    cli.works("verify", copy)
    shutil.copy(copy / folder / "part-00000.parquet", copy / folder / name)
    stray = copy / folder / name
    examples = api.select(tokens=copy / "tokens", scores=copy / "scores", out=tmp_path / "m").metrics
    assert examples == metrics(run / "masked")
    exported = api.export(masked=copy / "masked", to="jsonl", out=tmp_path / "export").metrics
    assert exported["examples"] == examples["examples"]
    base = str(make_world().base)
    scored = api.score(tokens=copy / "tokens", checkpoints=[base], out=tmp_path / "scores")
    assert metrics(scored.folder / "base")["examples"] == metrics(run / "tokens")["examples"]
    outcome = cli("verify", copy)
    assert outcome.code == 1
    assert str(stray) in outcome.err + outcome.out
    with pytest.raises(SstokenError, match=f"{name}.*does not list it"):
        tables.read_table(stray)


def test_no_byte_of_a_manifest_can_change(run: Path) -> None:
    """A bit of each of its bytes."""
    path = run / "tokens/manifest.json"
    for place in range(path.stat().st_size):
        with flipped(path, place), pytest.raises(SstokenError, match="damaged manifest"):
            read_manifest(run / "tokens")
