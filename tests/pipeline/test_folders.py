"""Output folders that are links, or on disks that take no files; unfinished work that other settings left."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sstoken.pipeline import api
from sstoken.pipeline.locks import one_run_at_a_time
from sstoken.stages.checkpoints import load_tokenizer
from tests.pipeline.small_run import PIPELINE, environment, save_config
from tests.pipeline.worlds import CommandLine, World, make_world
from tests.support import PATIENCE, messages, slow_but


@pytest.fixture
def world() -> World:
    return make_world()


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A disk of its own, in memory, where this user may mount one."""
    place.mkdir(parents=True, exist_ok=True)
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", *options, str(place)], capture_output=True).returncode
    ):
        pytest.skip("may not mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_an_output_folder_that_is_a_link_is_made_anew_again_and_again(world: World, tmp_path: Path) -> None:
    """The link stays, its target is replaced, and all work is done on the target's disk."""
    large, link = tmp_path / "large/masked", tmp_path / "run/masked"
    large.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(large, target_is_directory=True)
    for _ in range(3):
        result = api.select(tokens=world.tokens, scores=world.scores, out=link, force=True)
        assert not result.skipped
        assert result.folder == link
        assert link.is_symlink()
        assert [p.name for p in link.parent.iterdir()] == ["masked"]
        assert (large / "manifest.json").is_file()
        assert {p.name for p in large.parent.iterdir()} == {"masked", ".masked.lock"}
        assert api.verify(link)[1] == []
    assert api.select(tokens=world.tokens, scores=world.scores, out=link).skipped


def test_a_link_to_a_folder_that_is_not_there_yet(world: World, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "later/masked")
    api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "link")
    assert (tmp_path / "later/masked/manifest.json").is_file()


def test_a_finished_folder_on_a_read_only_disk_is_finished(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's too, with its digests forgotten; to make it again is refused."""
    config = save_config(tmp_path, tmp_path, examples=4, shard_rows=4, steps=1)
    api.run(str(config), overrides=[f"out={tmp_path}/run"])
    select = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "run/own")
    cli = CommandLine(capsys)
    cli.works(*select)
    (tmp_path / "run/digests.json").unlink()
    with mounted(tmp_path / "run", "--bind", str(tmp_path / "run")):
        read_only = ["mount", "-o", "remount,bind,ro", str(tmp_path / "run")]
        if subprocess.run(read_only, capture_output=True).returncode:
            pytest.skip("may not mount a disk read-only")
        assert "finished already" in cli.works(*select)
        results = api.run(str(config), overrides=[f"out={tmp_path}/run"])
        assert all(result.skipped for result in results.values())
        assert "cannot be written to" in cli.fails(1, *select, "--force")


@pytest.mark.slow
def test_plan_names_unfinished_work_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings B finished, A killed in `anchor`, B again."""
    config = save_config(tmp_path, tmp_path, examples=8, shard_rows=4, steps=2)
    other = ["--set", "anchor.max_steps=100000", "--set", "anchor.snapshots=50000"]
    b = [*PIPELINE, "run", config.name]
    subprocess.run(b, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=PATIENCE)
    run = tmp_path / "run"
    killed = subprocess.Popen(
        [*b, *other], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not list(run.glob("history.partial/step-*")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(PATIENCE)
    cli = CommandLine(capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        planned = {step["step"]: step for step in json.loads(cli.works("plan", config, "--json"))}
        told = ("folder", "state", "superseded", "changed")
        assert [planned["anchor"][name] for name in told] == [
            "run/history",
            "finished",
            "run/history.partial",
            [],
        ]
        assert "run/history.partial: unfinished work of other settings" in cli("plan", config).err
        assert all(result.skipped for result in api.run(str(config)).values())
        shutil.rmtree(run / "history.partial")
        assert not any(step["superseded"] for step in json.loads(cli.works("plan", config, "--json")))


def test_verify_follows_links(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step on a larger disk is checked, too; a link in a circle ends."""
    run, large = tmp_path / "run", tmp_path / "large"
    run.mkdir()
    shutil.copytree(world.tokens, large)
    (run / "tokens").symlink_to(large)
    (large / "again").symlink_to(run)
    (run / "nowhere").symlink_to(run / "nowhere")
    cli = CommandLine(capsys)
    assert "1 finished folders checked, 0 problems" in cli.works("verify", run)
    part = large / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    shutil.copy(part, large / "stray.parquet")
    outcome = cli("verify", run)
    assert outcome.code == 1
    assert "tokens/part-00000.parquet: content changed" in outcome.out
    assert "tokens/stray.parquet: not in" in outcome.out


@pytest.mark.parametrize(
    "name", ["circle", "circle/inside", "~nobody-of-this-name/x", "a\0b", "\ud800", "x" * 5000]
)
def test_an_output_folder_that_cannot_be(
    name: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    outcome = CommandLine(capsys)("select", "--tokens", world.tokens, "--scores", world.scores, "--out", name)
    (line,) = messages(outcome.err)
    assert outcome.code in (1, 2)
    assert len(line) < 1200


def test_what_a_killed_forced_run_left_is_said(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the verb that finds its work finished, and not while a run is at it."""
    select = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "out")
    cli = CommandLine(capsys)
    cli.works(*select)
    shutil.copytree(tmp_path / "out", tmp_path / "out.partial")
    (tmp_path / "out.partial/manifest.json").unlink()
    (tmp_path / "out.partial/.fingerprint").write_bytes(b"\xff")
    assert "out.partial: unfinished work" in cli(*select).err
    with one_run_at_a_time(tmp_path / "out"):
        outcome = cli(*select)
        assert (outcome.code, outcome.err) == (0, "")
    cli.works(*select, "--force")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("workers", slow_but((1,), (1, 2)))
def test_nothing_is_left_where_every_row_is_refused(
    workers: int, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of no rows are nothing to go on from."""
    special = load_tokenizer(str(world.base)).eos_token
    rows = [{"prompt": f"w{i} w1", "completion": f"w2 {special} w3"} for i in range(5)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode = ("encode", "--data", data, "--model", world.base, "--on-bad-row", "skip", "--shard-rows", 2)
    out = tmp_path / "out/tokens"
    line = CommandLine(capsys).fails(1, *encode, "--workers", workers, "--out", out)
    assert "no example left of 5 rows" in line
    assert "the first is row 0 of data:" in line
    assert "partial" not in line
    assert [path.name for path in out.parent.iterdir()] == [".tokens.lock"]


@pytest.mark.parametrize("kilobytes", slow_but((40, 300), (40, 120, 300, 1000)))
@pytest.mark.parametrize("verb", ["encode", "anchor", "score", "select"])
def test_a_full_disk_is_named_and_the_work_goes_on_when_there_is_room(
    verb: str, kilobytes: int, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it fills up: in a shard, a tokenizer's file, weights."""
    cli = CommandLine(capsys)
    data = tmp_path / "data.jsonl"
    data.write_text(world.data.read_text() * 20)
    commands: dict[str, tuple[object, ...]] = {
        "encode": ("encode", "--data", data, "--model", world.base, "--shard-rows", 10, "--workers", 1),
        "anchor": ("anchor", "--tokens", world.tokens, "--model", world.base, "--max-steps", 3),
        "score": ("score", "--tokens", world.tokens, "--ckpt", world.base, "--ckpt", world.later),
        "select": ("select", "--tokens", world.tokens, "--scores", world.scores),
    }
    disk = tmp_path / "disk"
    command = (*commands[verb], "--out", disk / "out")
    with mounted(disk, "-t", "tmpfs", "-o", f"size={kilobytes}k", "none"):
        outcome = cli(*command)
        if outcome.code:
            (line,) = messages(outcome.err)
            assert "Traceback" not in outcome.err
            assert f"no space left on the disk at {disk} (" in line, line
            assert " free of " in line
            assert line.startswith(f"error: {disk}/out"), line
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            cli.works(*command)
        assert api.verify(disk)[1] == []
        cli.works(*commands[verb], "--out", tmp_path / "elsewhere/out")
        for part in (tmp_path / "elsewhere").rglob("part-*.parquet"):
            assert part.read_bytes() == (disk / part.relative_to(tmp_path / "elsewhere")).read_bytes()


@pytest.mark.parametrize("verb", ["init", "demo"])
def test_a_full_disk_is_named_where_no_stage_works(
    verb: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    command = {
        "init": ("init", "--data", world.data, "--model", world.base, "--file", disk / "run.yaml"),
        "demo": ("demo", "--out", disk / "demo"),
    }[verb]
    with mounted(disk, "-t", "tmpfs", "-o", "size=4k", "none"):
        (disk / "other").write_bytes(bytes(4096))
        line = CommandLine(capsys).fails(1, *command)
    assert line.startswith(f"error: {disk}/"), line
    assert f"no space left on the disk at {disk} (0 bytes free of 4,096 bytes)" in line
