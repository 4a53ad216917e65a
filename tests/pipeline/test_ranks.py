"""Ranks share a stage's work: seven of them, one killed and run again, write what a single run writes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch

from sstoken import stages
from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline import ranks, verbs
from sstoken.pipeline.job import Result
from sstoken.pipeline.locks import one_run_at_a_time
from sstoken.pipeline.verbs import stages as api
from sstoken.stages import tables
from sstoken.stages.sharded import ShardedStage
from tests.pipeline.small_run import environment, leftovers, save_conversations
from tests.pipeline.worlds import CommandLine, World
from tests.ray import slow
from tests.support import PATIENCE, ROOT

WORLD_SIZE = 7


def calls(
    world: World, out: Path, tokens: Path, scores: Path, masked: Path
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every verb that ranks can share, each with what it needs beside rank and place."""
    yield (
        api.encode,
        {"data": str(world.data), "model": str(world.base), "shard_rows": 2, "out": out / "tokens"},
    )
    yield (
        api.score,
        {"tokens": tokens, "checkpoints": [str(world.base), f"later={world.later}"], "out": out / "scores"},
    )
    yield api.select, {"tokens": tokens, "scores": scores, "out": out / "masked"}
    yield api.export, {"masked": masked, "to": "llamafactory", "out": out / "export"}


def written(folder: Path) -> dict[str, bytes]:
    """All that a folder holds but its manifest, whose times differ."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.slow  # 35 calls
def test_seven_ranks_write_what_one_run_writes(world: World, tmp_path: Path) -> None:
    one, seven = tmp_path / "one", tmp_path / "seven"
    for run, given in calls(world, one, one / "tokens", one / "scores", one / "masked"):
        run(**given)
    # From the single run's inputs, so that the paths in the provenance are the same.
    for run, given in calls(world, seven, one / "tokens", one / "scores", one / "masked"):
        for rank in reversed(range(WORLD_SIZE)):
            run(**given, rank=rank, world_size=WORLD_SIZE)
        assert not any(path.name == "manifest.json" for path in given["out"].rglob("*"))
        committed = api.commit(given["out"])
        assert not any(result.skipped for result in committed.values())
        assert all(result.skipped for result in api.commit(given["out"]).values())
        skipped: Result = run(**given)
        assert skipped.skipped, "a single run takes the ranks' work as its own"
    assert written(seven) == written(one)
    metrics = [json.loads((run / "tokens/manifest.json").read_text())["metrics"] for run in (one, seven)]
    assert metrics[0] == metrics[1]
    assert not leftovers(seven)
    assert not list(seven.rglob("*rank-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encode", "score", "select", "export"])
def test_a_rank_that_was_killed_is_run_again(kind: str, world: World, tmp_path: Path) -> None:
    data, killed = save_conversations(tmp_path / "data.jsonl", 42, longest=8), 3
    given = {"data": str(data), "model": str(world.base), "shard_rows": 2}
    tokens = api.encode(**given, out=tmp_path / "tokens", workers=1).folder
    scores = tmp_path / "scores"
    checkpoints = [str(world.base), f"later={world.later}"]
    api.score(tokens=tokens, checkpoints=checkpoints, out=scores)
    masked = api.select(tokens=tokens, scores=scores, out=tmp_path / "masked", method="rel").folder
    inputs: dict[str, Path | str]
    settings: dict[str, Any]
    inputs, settings = {
        "encode": ({}, given | {"workers": 1}),
        "score": ({"tokens": str(tokens)}, {"checkpoint": str(world.base), "device": "cpu"}),
        "select": (
            {"tokens": str(tokens), "history": str(scores / "base"), "current": str(scores / "later")},
            {"method": "rel"},
        ),
        "export": ({"masked": str(masked)}, {"to": "trl"}),
    }[kind]
    one, seven = tmp_path / "one" / kind, tmp_path / "seven" / kind
    for folder in (one.parent, seven.parent):
        folder.mkdir()
    rank = {"rank": killed, "world_size": WORLD_SIZE}
    command = [sys.executable, "-m", "tests.ray.slow", kind, json.dumps(inputs), str(seven)]
    process = subprocess.Popen([*command, json.dumps(settings | rank)], env=environment(), cwd=ROOT)
    log = seven.parent / slow.LOG

    def begun() -> list[str]:
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    while len(begun()) < 2:  # its first shard is done, the second under way
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    *done, under_way = begun()
    missing = 21 // WORLD_SIZE - len(done)
    seconds, slow.SECONDS = slow.SECONDS, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that was killed: more change the last bits
    try:
        for other in set(range(WORLD_SIZE)) - {killed}:
            slow.run(kind, inputs, seven, **settings, rank=other, world_size=WORLD_SIZE)
        with pytest.raises(
            SstokenError,
            match=rf"{missing} of 21 shards are missing or damaged: .*\(rank {killed} of {WORLD_SIZE}\)",
        ):
            api.commit(seven)
        slow.run(kind, inputs, seven, **settings, **rank)
        slow.run(kind, inputs, one, **settings)
    finally:
        slow.SECONDS = seconds
        torch.set_num_threads(threads)
    assert Counter(begun()) == Counter([*{*begun()}, under_way]), "no finished shard is made twice"
    assert len({*begun()}) == 21
    api.commit(seven)
    assert written(seven) == written(one)
    assert not list(seven.rglob("*rank-*"))


def test_work_begun_by_a_single_run_is_finished_by_ranks(world: World, tmp_path: Path) -> None:
    given = {"tokens": world.tokens, "scores": world.scores}
    api.select(**given, out=tmp_path / "one")
    api.select(**given, out=tmp_path / "two", rank=1, world_size=2)
    assert not api.select(**given, out=tmp_path / "two").skipped
    assert written(tmp_path / "two") == written(tmp_path / "one")


def test_what_a_rank_refuses(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked = tmp_path / "masked[1]"  # a name that a pattern would read otherwise
    given = {"tokens": world.tokens, "scores": world.scores, "out": masked}
    with pytest.raises(UsageError, match="rank is 2 and world_size is 2; legal is 0 to 1"):
        api.select(**given, rank=2, world_size=2)
    with pytest.raises(UsageError, match="no rank has worked on it"):
        api.commit(masked)
    with one_run_at_a_time(masked, "rank-00000-of-00002"):
        with pytest.raises(SstokenError, match="another run is writing rank-00000-of-00002"):
            api.select(**given, rank=0, world_size=2)
        api.select(**given, rank=1, world_size=2)
        with pytest.raises(SstokenError, match="rank-00000-of-00002 is at work with other settings"):
            api.select(**given, rank=1, world_size=2, rho=0.3)
        with pytest.raises(SstokenError, match="rank-00000-of-00002 is still at work"):
            api.commit(masked)
        with pytest.raises(SstokenError, match="rank-00000-of-00002 is writing it"):
            api.select(**given)
    cli = CommandLine(capsys)
    out = ("--tokens", world.tokens, "--scores", world.scores, "--out", masked)
    assert "rank 0 of 2 done" in cli.works("select", *out, "--rank", 0, "--world-size", 2)
    assert "select/masked[1]: done" in cli.works("commit", masked)
    assert tables.parts(masked)


def test_a_commit_sees_that_inputs_changed(world: World, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(world.data.read_bytes())
    api.encode(data=str(data), model=str(world.base), out=tmp_path / "tokens", rank=0, world_size=1)
    for rank in (0, 1):
        api.encode(data=str(data), model=str(world.base), out=tmp_path / "other", rank=rank, world_size=2)
    os.utime(data)
    data.write_bytes(world.data.read_bytes() * 2)
    with pytest.raises(SstokenError, match="settings or inputs have changed since the ranks began"):
        api.commit(tmp_path / "other")


def test_a_shard_damaged_before_the_commit_is_made_again(world: World, tmp_path: Path) -> None:
    given = {"tokens": world.tokens, "scores": world.scores, "out": tmp_path / "masked", "world_size": 2}
    for rank in range(2):
        api.select(**given, rank=rank)
    shard = tmp_path / "masked.partial/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        SstokenError, match=r"1 of 3 shards are missing or damaged: part-00001.*\(rank 1 of 2\)"
    ):
        api.commit(tmp_path / "masked")
    api.select(**given, rank=1)
    api.commit(tmp_path / "masked")
    assert len(tables.parts(tmp_path / "masked")) == 3


def test_commit_is_a_verb() -> None:
    assert "commit" in verbs.verbs()


def test_whatever_ranks_can_share_can_be_committed() -> None:
    for module in iter_modules(stages.__path__):
        import_module(f"{stages.__name__}.{module.name}")
    waiting, shared = [ShardedStage], set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith(f"{stages.__name__}.") and hasattr(kind, "name"):
            assert ranks._stage(kind.name) is kind
            shared.add(kind.name)
    assert {"encode", "score", "critical", "part", "select", "export"} <= shared


def test_ranks_score_a_signal_that_is_not_the_loss(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = CommandLine(capfd)
    command = (
        "score",
        "--tokens",
        world.tokens,
        "--ckpt",
        world.base,
        "--signal",
        "entropy",
        "--out",
        tmp_path / "s",
    )
    for rank in (0, 1):
        assert run(*command, "--rank", rank, "--world-size", 2).code == 0
    done = run("commit", tmp_path / "s" / "base")
    assert done.code == 0
    assert "mean entropy" in done.out
    assert "mean loss" not in done.out
