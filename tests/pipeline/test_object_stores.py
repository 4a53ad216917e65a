"""Every stage reads from and writes to S3 as it does on a disk; what fails or races there leaves nothing half-done."""

import hashlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

import sstoken
from sstoken.errors import SstokenError
from sstoken.pipeline import locks, output_folder, ranks
from sstoken.pipeline.verbs import stages as api
from sstoken.pipeline.verbs.looking import verify
from sstoken.stages import faults, storage, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.object_store import ObjectStore
from sstoken.stages.training import resumable
from tests import documented
from tests.object_stores import BUCKET, SECRET, needs_s3
from tests.pipeline.small_run import environment, save_config
from tests.pipeline.worlds import SHARD_ROWS, CommandLine, World
from tests.support import PATIENCE, slow_but

pytestmark = [needs_s3, pytest.mark.usefixtures("s3")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    return f"s3://{BUCKET}/{hashlib.md5(request.node.name.encode()).hexdigest()[:8]}"


def content(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder but its manifest, whose times differ."""
    root = storage.address(folder)
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in storage.of(root).list(root)
        if file.name != "manifest.json"
    }


def encode(world: World, out: str | Path, **more: Any) -> Any:
    call = {"data": str(world.data), "model": str(world.base), "shard_rows": SHARD_ROWS, "workers": 1}
    return api.encode(**call | {"out": out} | more)


def commands(world: World, root: str) -> list[tuple[object, ...]]:
    """All stages, each reading what the one before wrote below `root`."""
    tokens, scores, masked = f"{root}/tokens", f"{root}/scores", f"{root}/masked"
    base, later = world.base, f"later={world.later}"
    return [
        (
            "encode",
            "--data",
            world.data,
            "--model",
            base,
            "--shard-rows",
            10,
            "--workers",
            1,
            "--out",
            tokens,
        ),
        ("score", "--tokens", tokens, "--ckpt", base, "--ckpt", later, "--out", scores),
        ("select", "--tokens", tokens, "--scores", scores, "--out", masked),
        ("export", masked, "--to", "trl", "--out", f"{root}/export", "--check"),
        ("verify", root),
        ("show", masked, "--row", 2),
    ]


@pytest.mark.slow
def test_every_stage_writes_the_bytes_that_it_writes_on_a_disk(
    world: World, run: CommandLine, place: str, tmp_path: Path
) -> None:
    api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked")
    api.export(masked=tmp_path / "masked", to="trl", out=tmp_path / "export")
    said = [run(*command) for command in commands(world, place)]
    assert [outcome.code for outcome in said] == [0] * len(said), said
    assert "5 finished folders checked, 0 problems" in said[-2].out
    assert "all " in said[-3].out.splitlines()[-1], "read back as the trainer would"
    for name, folder in {
        "tokens": world.tokens,
        "scores/base": world.scores / "base",
        "scores/later": world.scores / "later",
        "masked": tmp_path / "masked",
        "export": tmp_path / "export",
    }.items():
        assert content(f"{place}/{name}") == content(folder)
        here, there = (
            manifests.finished(storage.address(root), name) for root in (folder, f"{place}/{name}")
        )
        assert here.files == there.files
    assert said[-1].out == run.works("show", tmp_path / "masked", "--row", 2)
    assert "finished already" in run.works(*commands(world, place)[0])
    assert not [outcome for outcome in said if SECRET in outcome.out + outcome.err]
    everything = storage.address(place).files()
    assert not [file for file in everything if SECRET.encode() in file.read_bytes()]
    assert not [file for file in everything if ".partial" in str(file) or file.name.startswith(".")]


@pytest.mark.slow
def test_the_page_runs_as_printed(world: World, run: CommandLine, place: str) -> None:
    """docs/storage.md, on a server here."""
    store = fsspec.filesystem("s3", use_listings_cache=False)
    store.put(str(world.data), f"{place}/raw/rows.jsonl")
    store.put(str(world.base), f"{place}/base", recursive=True)
    store.put(str(world.later), f"{place}/later", recursive=True)
    lines = [
        piece.text for piece in documented.pieces("storage.md") if piece.text.startswith("sstoken-curate ")
    ]
    assert len(lines) >= 6
    for line in lines:
        run.works(*shlex.split(line.replace("s3://bucket", place))[1:])


def test_data_and_checkpoints_are_read_from_there(
    world: World, run: CommandLine, place: str, tmp_path: Path
) -> None:
    store = fsspec.filesystem("s3", use_listings_cache=False)
    store.put(str(world.data), f"{place}/data/data.jsonl")
    store.put(str(world.base), f"{place}/base", recursive=True)
    store.put(str(world.later), f"{place}/later", recursive=True)
    encode(world, tmp_path / "tokens", data=f"{place}/data/*.jsonl", model=f"{place}/base")
    for ours, theirs in zip(tables.parts(tmp_path / "tokens"), tables.parts(world.tokens), strict=True):
        assert tables.read_table(ours).equals(tables.read_table(theirs))
    run.works(
        "score", "--tokens", tmp_path / "tokens", "--ckpt", f"{place}/base", "--ckpt", f"{place}/later",
        "--out", tmp_path / "scores",
    )  # fmt: skip
    for name in ("base", "later"):
        for part in tables.parts(tmp_path / "scores" / name):
            assert tables.read_table(part).equals(tables.read_table(world.scores / name / part.name))
    assert manifests.finished(tmp_path / "scores/base", "scores").sources == (
        manifests.finished(world.scores / "base", "scores").sources
    )


def test_work_in_the_store_is_not_done_again(
    world: World, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "EIO:rename:6+")  # a mark, the tokenizer's files, two shards
    faults.plan.cache_clear()
    with pytest.raises((OSError, SstokenError)):
        encode(world, f"{place}/tokens")
    monkeypatch.delenv(faults.VARIABLE)
    faults.plan.cache_clear()
    root = storage.address(f"{place}/tokens")
    assert not root.exists(), "nothing half-done is to be seen"
    there = {file.name for file in storage.address(f"{place}/tokens.partial").glob("part-*.parquet")}
    assert 0 < len(there) < 3
    put: list[str] = []
    upload = ObjectStore._upload
    monkeypatch.setattr(
        ObjectStore, "_upload", lambda self, local, file: (put.append(file.name), upload(self, local, file))
    )
    monkeypatch.setenv("SSTOKEN_CACHE", str(tmp_path / "another-machine"))
    encode(world, root)
    assert {name for name in put if name.startswith("part-")} == {
        f"part-0000{i}.parquet" for i in range(3)
    } - there
    assert content(root) == content(world.tokens)


@pytest.mark.parametrize(
    "moment",
    slow_but(("while publishing",), ("before the manifest", "before publishing", "while publishing")),
)
def test_of_two_that_commit_one_wins_and_the_other_says_so(
    moment: str, world: World, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_NO_LEASE", ("s3",))  # as if each took the other for dead
    where, name = {
        "before the manifest": (manifests, "list_files"),
        "before publishing": (output_folder, "_publish"),
        "while publishing": (ObjectStore, "_replace"),
    }[moment]
    ours = getattr(where, name)
    outcomes: list[Any] = []

    def theirs(*arguments: Any) -> Any:
        monkeypatch.setattr(where, name, ours)
        with monkeypatch.context() as patch:
            patch.setenv("SSTOKEN_CACHE", str(tmp_path / "another-machine"))
            outcomes.append(encode(world, f"{place}/tokens"))
        return ours(*arguments)

    monkeypatch.setattr(where, name, theirs)
    if moment == "while publishing":  # the other one finishes just what this one began
        encode(world, f"{place}/tokens")
    else:
        with pytest.raises(SstokenError, match="another run finished it first"):
            encode(world, f"{place}/tokens")
    assert len(outcomes) == 1
    assert content(f"{place}/tokens") == content(world.tokens)
    assert verify(f"{place}/tokens")[1] == []
    assert not storage.address(f"{place}/tokens.partial").exists()
    assert encode(world, f"{place}/tokens").skipped


def test_ranks_share_a_folder(world: World, place: str) -> None:
    for rank in (1, 0):
        encode(world, f"{place}/tokens", rank=rank, world_size=2)
    ranks.commit(storage.address(f"{place}/tokens"))
    assert content(f"{place}/tokens") == content(world.tokens)


def test_finished_work_is_replaced_when_asked(world: World, run: CommandLine, place: str) -> None:
    encode(world, f"{place}/tokens")
    more = [*commands(world, place)[0], "--limit", 10]
    assert "holds finished work of other settings" in run.fails(2, *more)
    assert content(f"{place}/tokens") == content(world.tokens)
    run.works(*more, "--force")
    assert len(tables.parts(storage.address(f"{place}/tokens"))) == 1
    assert verify(f"{place}/tokens")[1] == []


def test_a_damaged_or_foreign_object_is_named(world: World, run: CommandLine, place: str) -> None:
    encode(world, f"{place}/tokens")
    shard = storage.address(f"{place}/tokens/part-00001.parquet")
    whole = bytearray(shard.read_bytes())
    whole[100] ^= 1
    fsspec.filesystem("s3").pipe_file(str(shard), bytes(whole))
    fsspec.filesystem("s3").pipe_file(f"{place}/tokens/part-00007.parquet", b"stray")
    out = run("verify", f"{place}/tokens").out
    assert f"{shard}: content changed" in out
    assert "part-00007.parquet: not in" in out
    arguments = ("--ckpt", world.base, "--out", f"{place}/scores")
    assert f"{shard}: damaged" in run.fails(1, "score", "--tokens", f"{place}/tokens", *arguments)


@pytest.mark.parametrize(
    ("out", "environment_", "said"),
    [
        ("s3://no-such-bucket/tokens", {}, "no such bucket"),
        (f"s3://{BUCKET}", {}, "name the output folder itself"),
        (f"s3://key:{SECRET}@{BUCKET}/tokens", {}, "the address contains credentials"),
        (f"s3://{BUCKET}/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no usable credentials"),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the store does not answer"),
        ("nowhere://bucket/x", {}, "unknown kind of storage"),
    ],
)
def test_what_cannot_be_reached_is_one_line(
    out: str,
    environment_: dict[str, str],
    said: str,
    world: World,
    run: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()
    for name, value in environment_.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    outcome = run("encode", "--data", world.data, "--model", world.base, "--out", out)
    kind.clear_instance_cache()
    (line,) = outcome.err.strip().splitlines()
    assert outcome.code in (1, 2)
    assert said in line
    assert SECRET not in line


def test_what_wants_a_local_disk_says_so(world: World, run: CommandLine, place: str) -> None:
    for command in (
        ("report", world.tokens, "--space", f"{place}/space"),
        ("demo", "--out", f"{place}/demo"),
    ):
        assert "has to be on a local disk" in run.fails(2, *command)


@pytest.mark.slow
def test_pictures_pages_and_what_is_published_may_lie_there(
    world: World, run: CommandLine, place: str, tmp_path: Path
) -> None:
    root = f"{place}/a b/ünï/x=1"  # what other programs put into keys
    api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked")
    run.works("select", "--tokens", world.tokens, "--scores", world.scores, "--out", f"{root}/masked/")
    for command, name in (
        (("show", "masked", "--row", 2, "--svg"), "row.svg"),
        (("report", "masked", "--out"), "report.html"),
        (("plot", "rho", "masked", "--out"), "rho.svg"),
    ):
        for folder in (str(tmp_path), root):
            filled = [f"{folder}/masked" if part == "masked" else part for part in command]
            run.works(*filled, f"{folder}/{name}")
        here, there = (tmp_path / name).read_bytes(), storage.address(f"{root}/{name}").read_bytes()
        assert there == here or (name == "report.html" and there.endswith(b"</html>")), "a page says its run"
    opened = sstoken.load(f"{root}/masked")
    assert opened.to_polars().equals(sstoken.load(tmp_path / "masked").to_polars())
    assert "</span>" in opened.row(2)._repr_html_()
    said = [
        run.works("publish", f"{folder}/masked", "--repo", "me/x", "--dry-run") for folder in (tmp_path, root)
    ]
    assert said[0].replace(str(tmp_path), root) == said[1]
    assert content(f"{root}/masked.publish") == content(tmp_path / "masked.publish")


@pytest.mark.slow
def test_a_kill_at_any_point_costs_nothing(world: World, place: str) -> None:
    out = f"{place}/tokens"
    command = [str(argument) for argument in commands(world, place)[0]]
    online = environment()
    del online["HF_HUB_OFFLINE"]
    kills = 0
    # fresh work, then in the place of finished work
    for seed, more in enumerate(([], ["--force", "--limit", "14"], ["--force"])):
        crashes = [sys.executable, "-m", "tests.pipeline.store_crashes", str(seed), out, *command, *more]
        done = subprocess.run(crashes, env=online, timeout=PATIENCE, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        kills += int(done.stdout.split()[-1])
        assert not storage.address(f"{out}.partial").exists()
        assert verify(out)[1] == []
    print(f"{kills} kills, 0 failures")
    assert kills > 5
    assert content(out) == content(world.tokens)


@pytest.mark.slow
def test_training_goes_on_from_the_store(
    world: World, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"tokens": world.tokens, "model": str(world.base), "max_steps": 6, "snapshots": 3, "batch_size": 2}
    api.anchor(**call, out=tmp_path / "history")
    keep = ObjectStore.keep_work
    kept: list[str] = []

    def stopped(self: ObjectStore, scratch: Path, folder: Any) -> None:
        keep(self, scratch, folder)
        kept.append(str(folder))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "keep_work", stopped)
        with pytest.raises(KeyboardInterrupt):
            api.anchor(**call, out=f"{place}/history")
    assert kept == [f"{place}/history.partial"]
    assert not storage.address(f"{place}/history").exists()
    assert list(storage.address(f"{place}/history.partial").rglob("whole.json"))
    monkeypatch.setenv("SSTOKEN_CACHE", str(tmp_path / "another-machine"))
    said: list[int] = []
    train = resumable.last_complete
    monkeypatch.setattr(
        resumable,
        "last_complete",
        lambda folder: (found := train(folder)) and (said.append(int(found.name.split("-")[1])), found)[1],
    )
    api.anchor(**call, out=f"{place}/history")
    assert said == [2], "it went on at its first snapshot"
    assert verify(f"{place}/history")[1] == []
    here, there = content(tmp_path / "history"), content(f"{place}/history")
    weights = [name for name in here if name.endswith(".safetensors")]
    assert len(weights) >= 3
    assert here.keys() == there.keys()
    assert [name for name in weights if here[name] != there[name]] == []


@pytest.mark.slow
def test_a_whole_run_stands_in_the_store(run: CommandLine, place: str, tmp_path: Path) -> None:
    config = save_config(tmp_path, tmp_path / "inputs", examples=24, shard_rows=8, steps=4)
    for out in (place, str(tmp_path / "here")):
        run.works("run", config, "--set", f"out={out}")
        assert run("verify", out).out.endswith(" 0 problems\n")
        assert run.works("run", config, "--set", f"out={out}").count("finished already") == 5
    for folder in ("tokens", "scores/step-0", "scores/step-4", "masked"):
        here = tables.parts(tmp_path / "here" / folder)
        there = tables.parts(storage.address(f"{place}/{folder}"))
        assert [tables.read_table(p) for p in here] == [tables.read_table(p) for p in there]
    assert "finished" in run.works("plan", config, "--set", f"out={place}")


def test_scripts_for_a_run_in_the_store_are_written_to_the_disk(
    run: CommandLine, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = save_config(tmp_path, tmp_path / "inputs", examples=4, shard_rows=2, steps=2)
    monkeypatch.chdir(tmp_path)
    said = run.works("run", config, "--set", f"out={place}/my run", "--dry-run", "--ranks", 2)
    assert said.splitlines()[-1] == "nothing was run; submit with: bash 'my run.slurm/submit.sh'"
    commit = (tmp_path / "my run.slurm" / "1-encode-commit.sbatch").read_text()
    assert f"sstoken-curate commit '{place}/my run/tokens'" in commit
    assert not storage.of(storage.address(place)).list(storage.address(place))


def test_a_file_that_moved_is_fetched_at_its_new_place(place: str) -> None:
    root = storage.address(place)
    storage.write_atomic(root / "before" / "file", "content")
    assert (storage.local(root) / "before" / "file").read_text() == "content"
    storage.write_atomic(root / "after" / "file", "content")
    storage.of(root).delete(root / "before")
    local = storage.local(root)
    assert (local / "after" / "file").read_text() == "content"
    assert not (local / "before").exists()
    assert storage.local(root / "after" / "file").read_text() == "content"
