"""A run that was killed, anywhere, goes on where it stopped and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from sstoken.pipeline import api
from sstoken.pipeline.config import load_config
from sstoken.pipeline.job import Result
from sstoken.stages.manifest import read_manifest
from sstoken.stages.storage import UNFINISHED
from tests.factories import save_tokenizer
from tests.pipeline.small_run import (
    PIPELINE,
    environment,
    leftovers,
    save_config,
    save_conversations,
    written,
)
from tests.pipeline.worlds import make_world
from tests.support import PATIENCE

STAGES = ("encode", "anchor", "score", "select")


def finish(config: Path) -> Path:
    """Run to the end in the configuration's folder; the run's folder."""
    done = subprocess.run(
        [*PIPELINE, "run", config.name],
        cwd=config.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return config.parent / "run"


def at_work(run: Path, stage: str) -> list[Path]:
    """What the stage has finished and would lose by starting over, once that is enough to kill it."""
    if stage == "anchor":
        found = [p.parent.name for p in run.glob("history.partial/trainer/*/whole.json")]
        whole = [int(name.rpartition("-")[2]) for name in found if not name.endswith(UNFINISHED)]
        weights = {p: p.parent.name for p in run.glob("history.partial/step-*/model.safetensors")}
        steps = {p: int(name.split("-")[1]) for p, name in weights.items() if not name.endswith(UNFINISHED)}
        return [p for p, step in steps.items() if step <= max(whole, default=0)]
    pattern = {"encode": "tokens.partial", "score": "scores/*.partial", "select": "masked.partial"}[stage]
    shards = sorted(run.glob(f"{pattern}/part-*.parquet"))
    return shards if len(shards) >= 2 else []


def kill_in(config: Path, stage: str) -> dict[Path, int]:
    """Run until the stage is in the middle of its work, then SIGKILL; the inodes of what it had finished."""
    run = config.parent / "run"
    process = subprocess.Popen(
        [*PIPELINE, "run", config.name],
        cwd=config.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE
    while not (found := at_work(run, stage)):
        assert process.poll() is None, f"ended before it was seen to {stage}"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert leftovers(run), f"{stage} was over when it was killed"
    return {path: path.stat().st_ino for path in found}


def final_place(path: Path) -> Path:
    """Where a file of an unfinished stage stands in the end."""
    return Path(*(part.removesuffix(".partial") for part in path.parts))


def check_same(killed: Path, whole: Path) -> None:
    expected, got = written(whole), written(killed)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == []
    assert leftovers(killed) == []
    checked, wrong = api.verify(killed)
    assert wrong == []
    assert {path.relative_to(killed).parts[0] for path in checked} == {
        "tokens",
        "history",
        "scores",
        "masked",
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    return finish(save_config(folder / "whole", folder, examples=90, shard_rows=3, steps=8))


def killed_config(whole: Path, name: str) -> Path:
    inputs = whole.parents[1]
    return save_config(inputs / name, inputs, examples=90, shard_rows=3, steps=8)


@pytest.mark.slow
def test_killed_in_every_stage(whole: Path) -> None:
    config = killed_config(whole, "each")
    finished: dict[Path, int] = {}
    for stage in STAGES:
        finished |= kill_in(config, stage)
    run = finish(config)
    check_same(run, whole)
    assert {path: final_place(path).stat().st_ino for path in finished} == finished


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again_in_one_stage(whole: Path, stage: str) -> None:
    config = killed_config(whole, stage)
    finished: dict[Path, int] = {}
    for _ in range(3):
        finished |= kill_in(config, stage)
    run = finish(config)
    check_same(run, whole)
    assert {path: final_place(path).stat().st_ino for path in finished} == finished


def crash(folder: Path, seed: int | str, *overrides: str) -> int:
    """Run with kills at random changes until it ends by itself; the number of kills."""
    script = Path(__file__).with_name("crashing.py")
    done = subprocess.run(
        [sys.executable, script, "run.yaml", "run", str(seed), *overrides],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["rising", 0, 1])
def test_killed_anywhere(tmp_path: Path, seed: int | str) -> None:
    """Also while the results of other settings are replaced."""
    for name in ("whole", "killed"):
        save_config(tmp_path / name, tmp_path, examples=9, shard_rows=4, steps=3)
    other = ("encode.max_length=24", "select.rho=0.3", "anchor.snapshots=2")
    kills = 0
    for overrides in ((), other):
        assert crash(tmp_path / "whole", "never", *overrides) == 0
        kills += crash(tmp_path / "killed", seed, *overrides)
        check_same(tmp_path / "killed/run", tmp_path / "whole/run")
    assert kills >= 4


class Encoder:
    """`encode` with so many rows a shard, into a folder whose states between renames are made by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.out, self.partial, self.replaced = (
            self.folder / f"tokens{suffix}" for suffix in ("", ".partial", ".replaced")
        )
        self._data = save_conversations(folder / "data.jsonl", 12)
        with open(self._data, "a") as file:
            file.write("{broken\n")
        save_tokenizer(folder / "base")
        self._model = str(folder / "base")

    def __call__(self, shard_rows: int, out: Path | None = None) -> Result:
        return api.encode(
            data=str(self._data),
            model=self._model,
            out=out or self.out,
            shard_rows=shard_rows,
            on_bad_row="skip",
            workers=1,
        )

    def unfinish(self) -> None:
        """As if killed before the manifest."""
        fingerprint = json.loads((self.out / "manifest.json").read_text())["fingerprint"]
        self.out.rename(self.partial)
        (self.partial / "manifest.json").unlink()
        (self.partial / ".fingerprint").write_text(fingerprint)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("part-*")}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def encode(tmp_path: Path) -> Encoder:
    return Encoder(tmp_path)


@pytest.mark.parametrize("fingerprint_left", [False, True])
def test_manifest_written_but_not_renamed(encode: Encoder, fingerprint_left: bool) -> None:
    encode(4)
    before = inodes(encode.out)
    encode.out.rename(encode.partial)
    if fingerprint_left:
        fingerprint = json.loads((encode.partial / "manifest.json").read_text())["fingerprint"]
        (encode.partial / ".fingerprint").write_text(fingerprint)
    assert encode(4).skipped
    assert inodes(encode.out) == before
    assert leftovers(encode.folder) == []
    assert api.verify(encode.out)[1] == []


@pytest.mark.parametrize("old_one_moved", [False, True])
def test_new_result_whole_and_old_one_still_there(encode: Encoder, old_one_moved: bool) -> None:
    encode(4, encode.folder / "elsewhere")
    encode(8, encode.replaced if old_one_moved else encode.out)
    (encode.folder / "elsewhere").rename(encode.partial)
    new = inodes(encode.partial)
    assert encode(4).skipped
    assert inodes(encode.out) == new
    assert leftovers(encode.folder) == []


def test_new_result_in_place_and_old_one_half_removed(encode: Encoder) -> None:
    encode(8, encode.replaced)
    (encode.replaced / "manifest.json").unlink()
    encode(4, encode.folder / "elsewhere").folder.rename(encode.out)
    assert encode(4).skipped
    assert leftovers(encode.folder) == []


def test_settings_changed_back_when_only_the_renames_were_missing(encode: Encoder) -> None:
    encode(4, encode.replaced)
    old = inodes(encode.replaced)
    encode(8, encode.partial)
    assert encode(4).skipped
    assert inodes(encode.out) == old
    assert leftovers(encode.folder) == []


def test_killed_while_the_run_was_claimed(tmp_path: Path) -> None:
    config = load_config(save_config(tmp_path, tmp_path, examples=4, shard_rows=4, steps=1))
    config = config.model_copy(update={"out": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json.tmp").write_text('{"data"')
    assert not api.run(config, until="encode")["encode"].skipped
    assert leftovers(tmp_path) == []


def test_killed_while_the_tokenizer_was_saved(encode: Encoder) -> None:
    encode(4)
    whole = contents(encode.out)
    encode.unfinish()
    (encode.partial / "tokenizer").rename(encode.partial / "tokenizer.0123abcd.tmp")
    assert not encode(4).skipped
    assert contents(encode.out) == whole


def test_work_half_removed_is_not_gone_on_from(encode: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(4)
    whole = contents(encode.out)
    encode.unfinish()

    def killed(folder: Path, **_: object) -> None:
        next((folder / "bad_rows").iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(8)  # other settings: what they find there is of no use to them
    encode(4)
    assert contents(encode.out) == whole
    assert leftovers(encode.folder) == []


def test_a_list_of_bad_rows_that_was_damaged_before_the_run_went_on_is_made_again(tmp_path: Path) -> None:
    world = make_world()
    rows = [{"question": "w1", "answer": "w2"}, {"question": "w1", "answer": 3}] * 4
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode = partial(api.encode, data=str(tmp_path / "data.jsonl"), model=str(world.base), out=tmp_path / "tokens",
                     shard_rows=3, on_bad_row="skip", workers=1)  # fmt: skip
    encode()
    manifest = read_manifest(tmp_path / "tokens")
    assert manifest is not None
    whole = {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("part-*")}
    assert len(whole) == 6
    for damaged in ("bad_rows/part-00001.jsonl", None):
        (tmp_path / "tokens").rename(tmp_path / "tokens.partial")
        (tmp_path / "tokens.partial/manifest.json").unlink()
        (tmp_path / "tokens.partial/.fingerprint").write_text(manifest.fingerprint)
        lines = tmp_path / "tokens.partial/bad_rows/part-00002.jsonl"
        if damaged:
            lines = tmp_path / "tokens.partial" / damaged
            lines.write_bytes(lines.read_bytes().replace(b"row", b"rov"))
        else:
            lines.unlink()
        encode()
        assert {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("part-*")} == whole


def test_a_shard_damaged_before_the_run_went_on_is_made_again(encode: Encoder) -> None:
    """No manifest lists it yet; the same bytes come out."""
    encode(4)
    whole = contents(encode.out)
    name = "part-00001.parquet"
    for place in sorted(random.Random(0).sample(range(len(whole[name])), 40)):
        encode.unfinish()
        damaged = bytearray(whole[name])
        damaged[place] ^= 1
        (encode.partial / name).write_bytes(damaged)
        encode(4)
        assert (encode.out / name).read_bytes() == whole[name], place
        assert api.verify(encode.out)[1] == []
