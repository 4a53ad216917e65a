"""The Ray engine on two nodes: the local engine's bytes, whatever is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from sstoken.errors import QuarantinedError, UsageError
from sstoken.pipeline import api
from sstoken.stages import tables
from tests.pipeline.small_run import PIPELINE, environment, save_conversations
from tests.pipeline.worlds import World
from tests.ray import slow
from tests.ray.conftest import patiently
from tests.support import PATIENCE, ROOT

pytestmark = pytest.mark.ray
SHARDS = 40


@pytest.fixture(scope="module")
def tokens(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty shards."""
    folder = tmp_path_factory.mktemp("data")
    data = save_conversations(folder / "data.jsonl", 2 * SHARDS, longest=8)
    out = folder / "tokens"
    return api.encode(data=str(data), model=str(world.base), out=out, shard_rows=2, workers=1).folder


@pytest.fixture(scope="module")
def scored(world: World, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the local engine writes, file by file."""
    out = tmp_path_factory.mktemp("local") / "base"
    slow_score = slow.SECONDS
    slow.SECONDS = 0
    slow.score(tokens, world.base, out)
    slow.SECONDS = slow_score
    return shards(out)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def all_files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def when(condition: Callable[[], bool], act: Callable[[], Any]) -> threading.Thread:
    """Act once the condition holds, while the caller does something else."""

    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def made(out: Path) -> list[Path]:
    """The file of each shard that is done; of `export`, its record."""
    partial = out.with_name(out.name + ".partial")
    return sorted([*partial.glob("part-*.parquet"), *partial.rglob("part-*.json")])


def begun(out: Path) -> list[list[str]]:
    """Each attempt: the shard and the process."""
    log = out.parent / slow.LOG
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_every_stage_writes_what_the_local_engine_writes(
    cluster: Any, world: World, tokens: Path, tmp_path: Path
) -> None:
    data = str(tokens.parent / "data.jsonl")
    written = []
    for engine in ({"engine": "local", "workers": 1}, {"engine": "ray", "ray_address": cluster.address}):
        out = tmp_path / engine["engine"]
        api.encode(data=data, model=str(world.base), out=out / "tokens", shard_rows=2, **engine)
        checkpoints = [str(world.base), str(world.later)]
        api.score(tokens=tokens, checkpoints=checkpoints, out=out / "scores", device="cpu", **engine)
        # From the same folders, so that the paths in the provenance are the same.
        scores = tmp_path / "local" / "scores"
        api.select(tokens=tokens, scores=scores, out=out / "masked", **engine)
        api.export(masked=tmp_path / "local" / "masked", to="trl", out=out / "export", **engine)
        written.append(all_files(out))
    assert len(tables.parts(tmp_path / "ray" / "scores" / "base")) == SHARDS
    assert written[0] == written[1]


def test_a_task_whose_process_is_killed_is_done_again(
    cluster: Any, world: World, tokens: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "base"

    def is_at_work() -> bool:
        done = {path.name for path in made(out)}
        return len(done) >= 5 and begun(out)[-1][0] not in done

    thread = when(is_at_work, lambda: os.kill(int(begun(out)[-1][1]), signal.SIGKILL))
    slow.score(tokens, world.base, out, engine="ray", ray_address=cluster.address)
    thread.join(PATIENCE)
    assert shards(out) == scored
    names = [name for name, _ in begun(out)]
    assert len(set(names)) == SHARDS < len(names) <= SHARDS + 2, (
        "what was killed was done again, and only that"
    )


def test_a_poisoned_shard_is_named_and_all_others_are_done(
    cluster: Any, world: World, tokens: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    out, name = tmp_path / "base", "part-00007.parquet"
    (tmp_path / slow.POISON).write_text(name)
    with pytest.raises(QuarantinedError, match=rf"{name} \(its worker process died\)"):
        slow.score(tokens, world.base, out, engine="ray", ray_address=cluster.address)
    assert {path.name for path in made(out)} == {*scored} - {name}
    assert [shard for shard, _ in begun(out)].count(name) == 3
    (tmp_path / slow.POISON).unlink()
    before = len(begun(out))
    slow.score(tokens, world.base, out, engine="ray", ray_address=cluster.address)
    assert [shard for shard, _ in begun(out)[before:]] == [name], "the next run makes what is missing alone"
    assert shards(out) == scored


def start(kind: str, inputs: dict[str, Path], out: Path, **settings: Any) -> subprocess.Popen[bytes]:
    """Run a stage slowly in a process of its own."""
    given = json.dumps({name: str(folder) for name, folder in inputs.items()})
    command = [sys.executable, "-m", "tests.ray.slow", kind, given, str(out), json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, env=environment())


def kill_when(driver: subprocess.Popen[bytes], out: Path, done: int) -> None:
    """Kill the driver when so many shards are there; wait until none of its workers is at work."""
    while len(made(out)) < done:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait(PATIENCE)
    # They are ended by Ray, or end by themselves; what one of them still writes is the same bytes.
    workers = {int(pid) for _, pid in begun(out)} - {os.getpid()}
    while any(psutil.pid_exists(pid) for pid in workers):
        time.sleep(0.1)


def test_a_run_moves_from_one_machine_to_ray_and_to_ranks(
    cluster: Any, world: World, tokens: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed at each place: what is there is not made again, and what was made each time adds up."""
    out = tmp_path / "base"
    given = {"checkpoint": str(world.base), "attention": True, "device": "cpu"}
    there: dict[str, int] = {}
    at_work = 0
    for settings, done, workers in (
        ({"workers": 2}, 8, 2),
        ({"engine": "ray", "ray_address": cluster.address}, 16, 2),
        ({"rank": 0, "world_size": 2}, 20, 1),
    ):
        before = len(begun(out))
        kill_when(start("score", {"tokens": tokens}, out, **given, **settings), out, done)
        names = [name for name, _ in begun(out)[before:]]
        assert not {*names} & {*there}, "nothing is scored twice"
        there = {path.name: path.stat().st_ino for path in made(out)} | there
        at_work += workers
    for rank in (0, 1):
        slow.score(tokens, world.base, out, rank=rank, world_size=2)
    assert {path.name: path.stat().st_ino for path in made(out)}.items() >= there.items()
    api.commit(out)
    assert shards(out) == scored
    assert len(begun(out)) <= SHARDS + at_work, "only what was under way at a kill is begun again"


@pytest.mark.parametrize("kind", ["encode", "score", "select", "export"])
def test_a_process_a_node_and_the_driver_are_killed(
    kind: str, cluster: Any, world: World, tokens: Path, tmp_path: Path
) -> None:
    data = {"data": str(tokens.parent / "data.jsonl"), "model": str(world.base), "shard_rows": 2}
    masked = made_masked(world, tokens)
    scores = {"history": masked.parent / "scores" / "base", "current": masked.parent / "scores" / "later"}
    inputs, settings = {
        "encode": ({}, data),
        "score": ({"tokens": tokens}, {"checkpoint": str(world.base), "device": "cpu"}),
        "select": ({"tokens": tokens, **scores}, {"method": "rel"}),
        "export": ({"masked": masked}, {"to": "trl"}),
    }[kind]
    on_ray = settings | {"engine": "ray", "ray_address": cluster.address}
    out, local = tmp_path / "ray" / kind, tmp_path / "local" / kind
    for folder in (out.parent, local.parent):
        folder.mkdir()
    driver = start(kind, inputs, out, **on_ray)

    def is_at_work() -> bool:
        return len(made(out)) >= 4 and begun(out)[-1][0] not in {path.name for path in made(out)}

    def kill_process() -> None:
        with suppress(ProcessLookupError):
            os.kill(int(begun(out)[-1][1]), signal.SIGKILL)

    lost = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    when(is_at_work, kill_process).join(PATIENCE)
    when(lambda: len(made(out)) >= 10, lambda: cluster.remove_node(lost, allow_graceful=False)).join(PATIENCE)
    kill_when(driver, out, 15)
    patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 << 20))
    there = {path.name: path.stat().st_ino for path in made(out)}
    before = len(begun(out))
    names = {path.name for path in made(out)}
    poison = next(name for i in range(SHARDS) if (name := f"part-{i:05d}{made(out)[0].suffix}") not in names)
    (out.parent / slow.POISON).write_text(poison)
    with pytest.raises(QuarantinedError, match=rf"{poison} \(its worker process died\)") as caught:
        slow.run(kind, inputs, out, **on_ray)
    assert len(caught.value.failed) == 1
    again = [name for name, _ in begun(out)[before:]]
    assert not {*again} & {*there}
    assert sorted({*again} | {*there}) == sorted(f"part-{i:05d}{Path(poison).suffix}" for i in range(SHARDS))
    assert again.count(poison) == 3
    before = len(begun(out))
    (out.parent / slow.POISON).unlink()
    slow.run(kind, inputs, out, **on_ray)
    assert [name for name, _ in begun(out)[before:]] == [poison]
    seconds, slow.SECONDS = slow.SECONDS, 0
    slow.run(kind, inputs, local, **settings)
    slow.SECONDS = seconds
    assert all_files(out) == all_files(local)


@cache
def made_masked(world: World, tokens: Path) -> Path:
    """A masked folder of forty shards, and `scores` beside it."""
    folder = tokens.parent
    checkpoints = [str(world.base), f"later={world.later}"]
    api.score(tokens=tokens, checkpoints=checkpoints, out=folder / "scores", device="cpu")
    return api.select(tokens=tokens, scores=folder / "scores", out=folder / "masked", method="rel").folder


def test_the_tasks_of_a_lost_node_are_done_elsewhere(
    cluster: Any, world: World, tokens: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "base"
    lost = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    thread = when(lambda: len(made(out)) >= 5, lambda: cluster.remove_node(lost, allow_graceful=False))
    slow.score(tokens, world.base, out, engine="ray", ray_address=cluster.address)
    thread.join(PATIENCE)
    assert len(cluster.list_all_nodes()) == 1
    assert shards(out) == scored
    patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 << 20))


@pytest.mark.parametrize("name", ["README.md", "docs/scale.md"])
def test_the_page_works_as_printed(
    name: str, cluster: Any, world: World, tokens: Path, tmp_path: Path
) -> None:
    """But for starting Ray: two nodes are there already."""
    section = (ROOT / name).read_text().partition("## Outgrow your machine")[2]
    (block, *_) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    assert len(block.splitlines()) <= 10
    (line,) = (line for line in block.splitlines() if line.startswith("sstoken-curate"))
    assert "ray_address=auto" in line
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(world.base, tmp_path / "runs" / "demo" / "base")
    shutil.copy(tokens.parent / "data.jsonl", tmp_path / "runs" / "demo" / "data.jsonl")
    done = subprocess.run(
        [*PIPELINE, *line.split()[1:], "--set", "anchor.max_steps=2"],
        cwd=tmp_path,
        env=environment() | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "select: done, in runs/demo-run/masked" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_the_engine_refuses(cluster: Any, world: World, tokens: Path, tmp_path: Path) -> None:
    given = {"tokens": tokens, "checkpoints": [str(world.base)], "out": tmp_path / "scores", "engine": "ray"}
    with pytest.raises(UsageError, match="device is 'cuda:0,cuda:1'; Ray gives each task a GPU of its own"):
        api.score(**given, device="cuda:0,cuda:1")
    with pytest.raises(UsageError, match="device is 'cuda', and no node of the Ray cluster has a GPU"):
        api.score(**given, device="cuda", ray_address=cluster.address)
    code = (
        "from sstoken.pipeline.cli import main; import sys; main(['select', '--tokens', sys.argv[1], '--scores', "
        "sys.argv[2], '--out', sys.argv[3], '--engine', 'ray', *sys.argv[4:]])"
    )
    for options, line in (
        (["--ray-address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--ray-env", "none.yaml"], "cannot be read"),
    ):
        arguments = [world.tokens, world.scores, tmp_path / "masked", *options]
        ended = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert ended.returncode == 2, ended.stderr
        assert line in ended.stderr
        assert "Traceback" not in ended.stderr
