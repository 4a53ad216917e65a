"""What is killed: every verb that writes, on a small real job, each in two settings."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sstoken.stages import manifest as manifests
from tests.crash.warm import Outcome, call

Arguments = list[str]


@dataclass(frozen=True)
class Job:
    """A verb with two settings whose outputs differ."""

    name: str
    first: Arguments
    other: Arguments
    weight: int = 1
    """Share of the trials."""
    force: tuple[str, ...] = ("--force",)
    """Options with which it makes finished work of other settings anew."""
    workers: tuple[str, ...] = ()
    """Options with which it starts processes, if it can."""


def build(world: Path) -> dict[str, Job]:
    """Make what the jobs read; the jobs by name."""
    from tests.factories import save_model
    from tests.pipeline.small_run import save_conversations

    world.mkdir()
    in_child(lambda: save_model(world / "base", positions=256))
    data = save_conversations(world / "data.jsonl", 14)
    encode = ["encode", "--data", str(data), "--model", str(world / "base"), "--shard-rows", "5"]
    score = [
        "score",
        "--tokens",
        f"{world}/tokens",
        "--ckpt",
        f"{world}/base",
        "--ckpt",
        f"{world}/history/step-2",
    ]
    anchor = ["anchor", "--tokens", f"{world}/tokens", "--model", f"{world}/base", "--batch-size", "2"]
    anchor += ["--learning-rate", "0.01"]
    select = ["select", "--tokens", f"{world}/tokens", "--scores", f"{world}/scores"]
    select += ["--history", "base", "--current", "step-2"]
    export = ["export", f"{world}/masked", "--to"]
    for arguments in (
        [*encode, "--workers", "1", "--out", f"{world}/tokens"],
        [*anchor, "--max-steps", "2", "--snapshots", "1", "--out", f"{world}/history"],
        [*score, "--out", f"{world}/scores"],
        [*select, "--out", f"{world}/masked"],
        ["publish", f"{world}/masked", "--repo", "me/pulled"],
    ):
        succeeded(call(arguments, world), arguments)
    config = world / "run.yaml"
    config.write_text(
        f"out: out\nencode: {{data: {data}, model: {world}/base, shard_rows: 5, workers: 1}}\n"
        "anchor: {max_steps: 3, snapshots: 2, batch_size: 2, learning_rate: 1.0e-2}\nscore: {batch_tokens: 256}\n"
    )
    run = ["run", str(config)]
    jobs = [
        Job("encode", [*encode, "--workers", "1"], [*encode, "--workers", "1", "--max-length", "24"],
            weight=3, workers=("--workers", "2")),
        Job("anchor", [*anchor, "--max-steps", "4", "--snapshots", "2"],
            [*anchor, "--max-steps", "3", "--snapshots", "1"], weight=2),
        Job("score", [*score, "--signal", "rank"], [*score, "--signal", "entropy"], weight=3,
            workers=("--workers", "2")),
        Job("select", select, [*select, "--rho", "0.3"], weight=3, workers=("--workers", "2")),
        Job("export", [*export, "trl"], [*export, "jsonl"], weight=2),
        Job("pull", ["pull", "me/pulled"], ["pull", "me/pulled"], force=()),
        Job("publish", ["publish", f"{world}/masked"], ["publish", f"{world}/masked", "--include-scores"], force=()),
        Job("run", run, [*run, "--set", "encode.max_length=24", "--set", "select.rho=0.3"], weight=2, force=()),
    ]  # fmt: skip
    return {job.name: job for job in jobs}


def in_child(function: Callable[[], object]) -> None:
    """Compute what uses torch in a process of its own."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def succeeded(outcome: Outcome, arguments: Arguments) -> None:
    """Refuse a command that did not."""
    assert outcome.code == 0, f"{arguments}: {outcome}"


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file by its place; of a manifest, what does not depend on the clock."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.endswith(".lock") or path.name == "digests.json":
            continue
        if path.name == "manifest.json" and (manifest := manifests.read_manifest(path.parent)) is not None:
            metrics = {key: value for key, value in manifest.metrics.items() if key != "seconds"}
            timeless = manifest.model_copy(update={"metrics": metrics})
            found[name] = timeless.model_dump_json(exclude={"seconds", "took", "digest", "files"})
        elif path.suffix == ".parquet" or path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        else:
            found[name] = _without_times(path)
    return found


def _without_times(path: Path) -> str:
    text = path.read_text(errors="surrogateescape")
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return text


def broken(folder: Path) -> list[str]:
    """What a reader of a folder's finished parts would take for whole, and is not."""
    wrong: list[str] = []
    for path in folder.rglob("manifest.json"):
        if (manifest := manifests.read_manifest(path.parent)) is not None and not any(
            part.endswith((".partial", ".tmp", ".replaced")) for part in path.parts
        ):
            wrong += manifests.problems(path.parent, manifest)
    return wrong


def left_over(folder: Path) -> list[str]:
    """What unfinished work alone should hold."""
    names = ("*.partial", "*.tmp", "*.replaced", ".fingerprint", ".job.json", "trainer", ".download")
    return sorted(str(path) for name in names for path in folder.rglob(name))
