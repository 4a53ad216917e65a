"""Scores belong to the tokens that they were measured from, and to no others."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstoken.errors import SstokenError
from sstoken.pipeline import api
from sstoken.stages import joins, tables
from sstoken.stages.training.score_column import with_history
from tests.pipeline.worlds import CommandLine, World, list_anew

Row = tuple[str, list[tuple[int, bool]]]
rows = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=4),
    ),
    max_size=4,
)


def table(rows: list[Row]) -> pa.Table:
    ids = [[i for i, _ in tokens] for _, tokens in rows]
    masks = [[m for _, m in tokens] for _, tokens in rows]
    return pa.table([[name for name, _ in rows], ids, masks], schema=tables.TOKENS)


@given(rows, rows)
def test_a_fingerprint_stands_for_the_content(first: list[Row], second: list[Row]) -> None:
    same = joins.tokens_fingerprint(table(first)) == joins.tokens_fingerprint(table(second))
    assert same == (first == second)


@given(rows, st.integers(0, 4), st.integers(0, 4))
def test_a_fingerprint_does_not_depend_on_how_the_table_lies_in_memory(
    rows: list[Row], start: int, length: int
) -> None:
    whole = table(rows)
    part = whole.slice(start, length)
    assert joins.tokens_fingerprint(part) == joins.tokens_fingerprint(table(rows[start : start + length]))
    pieces = pa.concat_tables([whole.slice(0, start), whole.slice(start)])
    assert joins.tokens_fingerprint(pieces) == joins.tokens_fingerprint(whole)


@pytest.fixture(scope="module")
def other(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and scores of the same ids and lengths, and of other text."""
    folder = tmp_path_factory.mktemp("other")
    text = world.data.read_text()
    assert "w9" in text
    (folder / "data.jsonl").write_text(text.replace("w9", "w8"))
    api.encode(
        data=str(folder / "data.jsonl"),
        model=str(world.base),
        out=folder / "tokens",
        shard_rows=10,
        workers=1,
    )
    api.score(
        tokens=folder / "tokens", checkpoints=[str(world.base), str(world.later)], out=folder / "scores"
    )
    for ours, theirs in zip(tables.parts(world.tokens), tables.parts(folder / "tokens"), strict=True):
        ours, theirs = tables.read_table(ours), tables.read_table(theirs)
        assert ours["example_id"].equals(theirs["example_id"])
        assert list(map(len, tables.rows(ours["input_ids"]))) == list(
            map(len, tables.rows(theirs["input_ids"]))
        )
    return folder


def test_scores_of_another_text_with_the_same_ids_and_lengths(
    world: World, other: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out, named = tmp_path / "masked", (str(world.tokens), str(other / "scores"))
    for method in ("sstoken", "loss", "attention"):
        command = ("select", "--tokens", world.tokens, "--scores", other / "scores", "--out", out)
        line = cli.fails(1, *command, "--method", method)
        assert all(name in line for name in (*named, "other tokens", "score these tokens again")), line
        assert not out.exists()
        assert not out.with_name("masked.partial").exists()
    for name in ("base", "later"):
        with pytest.raises(SstokenError, match="scores of other tokens"):
            with_history(world.tokens, other / "scores" / name)
    cli.works("select", "--tokens", other / "tokens", "--scores", other / "scores", "--out", out)


def test_one_of_several_scores_is_of_other_tokens(world: World, other: Path, tmp_path: Path) -> None:
    shutil.copytree(world.scores / "base", tmp_path / "scores/base")
    shutil.copytree(other / "scores/later", tmp_path / "scores/later")
    with pytest.raises(SstokenError, match=r"scores/later: scores of other tokens"):
        api.select(tokens=world.tokens, scores=tmp_path / "scores", out=tmp_path / "masked")


def test_a_manifest_or_shards_from_elsewhere(world: World, other: Path, tmp_path: Path) -> None:
    for what in ("manifest.json", "part-00000.parquet", "part-*.parquet"):
        scores = tmp_path / what / "scores"
        shutil.copytree(world.scores, scores)
        for path in (other / "scores/base").glob(what):
            shutil.copy(path, scores / "base" / path.name)
        with pytest.raises(SstokenError, match=r"base.*(another run|bytes|scores of other tokens)"):
            api.select(tokens=world.tokens, scores=scores, out=tmp_path / what / "masked")


def test_a_shard_of_another_checkpoints_scores_is_no_history(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.scores / "base", tmp_path / "base")
    shutil.copy(world.scores / "later/part-00001.parquet", tmp_path / "base")
    with pytest.raises(SstokenError, match=r"part-00001.parquet: was written by another run"):
        with_history(world.tokens, tmp_path / "base")


def test_shards_and_their_manifest_from_elsewhere(world: World, other: Path, tmp_path: Path) -> None:
    """As a whole, they are another folder's."""
    scores = tmp_path / "scores"
    shutil.copytree(world.scores, scores)
    for path in (other / "scores/base").iterdir():
        shutil.copy(path, scores / "base" / path.name)
    with pytest.raises(SstokenError, match="scores of other tokens"):
        api.select(tokens=world.tokens, scores=scores, out=tmp_path / "masked")


def test_tokens_edited_by_hand(world: World, tmp_path: Path) -> None:
    """Even where their shard says that they are what they were, and their manifest too."""
    tokens = tmp_path / "tokens"
    shutil.copytree(world.tokens, tokens)
    shard = tables.parts(tokens)[1]
    held = tables.read_table(shard)
    turned = pa.array([row[::-1].tolist() for row in tables.rows(held["input_ids"])], tables.IDS)
    tables.write_part(shard, held.set_column(1, "input_ids", turned), tables.read_metadata(shard))
    list_anew(tokens)
    said = r"part-00001.parquet: its tokens were changed after `encode` wrote them"
    for method in ("sstoken", "random"):
        with pytest.raises(SstokenError, match=said):
            api.select(tokens=tokens, scores=world.scores, out=tmp_path / "masked", method=method)
    with pytest.raises(SstokenError, match=said):
        with_history(tokens, world.scores / "base")
    with pytest.raises(SstokenError, match=said):
        api.score(tokens=tokens, checkpoints=[str(world.base)], out=tmp_path / "scores")


@pytest.mark.parametrize("key", [joins.TOKENS, joins.RUN])
@pytest.mark.parametrize("of", ["tokens", "scores/base"])
def test_shards_that_do_not_say_where_they_are_from(key: str, of: str, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.tokens, tmp_path / "tokens")
    shutil.copytree(world.scores, tmp_path / "scores")
    folder = tmp_path / of
    for path in tables.parts(folder):
        about = {k: v for k, v in tables.read_metadata(path).items() if k != key}
        tables.write_part(path, tables.read_table(path), about)
    list_anew(folder)
    with pytest.raises(SstokenError, match=r"part-00000.parquet: does not say which .* again"):
        api.select(tokens=tmp_path / "tokens", scores=tmp_path / "scores", out=tmp_path / "masked")


def test_folders_that_were_copied_or_moved_still_match(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.tokens, tmp_path / "elsewhere/t")
    shutil.copytree(world.scores, tmp_path / "s")
    (tmp_path / "s/later").rename(tmp_path / "s/step-9")
    api.select(tokens=tmp_path / "elsewhere/t", scores=tmp_path / "s", out=tmp_path / "masked")
    assert len(with_history(tmp_path / "elsewhere/t", tmp_path / "s/base")) == 24


def test_the_same_tokens_encoded_anew_match(world: World, tmp_path: Path) -> None:
    """Other settings and another place, and the same tokens."""
    shutil.copy(world.data, tmp_path / "data.jsonl")
    shutil.copytree(world.base, tmp_path / "model")
    encode = {
        "data": str(tmp_path / "data.jsonl"),
        "model": str(tmp_path / "model"),
        "shard_rows": 10,
        "workers": 1,
    }
    api.encode(out=tmp_path / "tokens", limit=24, **encode)
    result = api.select(tokens=tmp_path / "tokens", scores=world.scores, out=tmp_path / "masked")
    shard = tables.read_metadata(tables.parts(result.folder)[0])
    assert shard[joins.TOKENS] == joins.folder_fingerprint(world.tokens)


def test_what_a_masked_dataset_is_made_into_is_of_one_run(world: World, tmp_path: Path) -> None:
    for rho in (0.5, 0.6):
        api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / f"{rho}", rho=rho)
    shard = tmp_path / "0.5/part-00001.parquet"
    shutil.copy(tmp_path / "0.6/part-00001.parquet", shard)
    list_anew(tmp_path / "0.5")
    with pytest.raises(SstokenError, match=r"part-00001.parquet: was written by another run"):
        api.export(masked=tmp_path / "0.5", to="trl", out=tmp_path / "export")
    with pytest.raises(SstokenError, match=r"part-00001.parquet: was written by another run"):
        api.publish(masked=tmp_path / "0.5", repo="me/it", dry_run=True)


def test_a_checkpoint_trained_on_other_tokens_is_noted(
    world: World, other: Path, cli: CommandLine, tmp_path: Path
) -> None:
    api.anchor(tokens=world.tokens, model=str(world.base), out=tmp_path / "history", max_steps=1, snapshots=1)
    step = tmp_path / "history/step-1"
    assert "other tokens" not in cli.works(
        "score", "--tokens", world.tokens, "--ckpt", step, "--out", tmp_path / "a"
    )
    said = cli.works("score", "--tokens", other / "tokens", "--ckpt", step, "--out", tmp_path / "b")
    assert "was trained on other tokens than these" in said
    assert '"trained_on_other_tokens": true' in (tmp_path / "b/step-1/manifest.json").read_text()
