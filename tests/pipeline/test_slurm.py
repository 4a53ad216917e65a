"""`run --dry-run`: its configuration is the same run, and its scripts do it on a stand-in for SLURM."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline import api
from sstoken.pipeline.config import load_config
from sstoken.pipeline.plan import promised_steps
from sstoken.pipeline.slurm import resolved, write_scripts
from tests.pipeline.small_run import PIPELINE, environment, save_config, save_conversations, written
from tests.pipeline.worlds import CommandLine, make_world
from tests.support import PATIENCE, ROOT

RANKS = 3
SBATCH = """#!/usr/bin/env bash
# Runs the tasks of a job at once, one after the other; a job that another failed for is not run.
set -u
number=$(( $(cat jobs 2>/dev/null || echo 0) + 1 )); echo "$number" > jobs
script=${!#}
echo "$*" >> submitted
for option in "$@"; do case $option in --dependency=afterok:*)
  [ "$(cat "ended-${option##*:}")" = 0 ] || { echo 1 > "ended-$number"; echo "$number"; exit; }
esac; done
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script"); status=0
export SLURM_JOB_ID=$number SLURM_ARRAY_JOB_ID=$number
for SLURM_ARRAY_TASK_ID in $(seq 0 "${last:-0}"); do
  export SLURM_ARRAY_TASK_ID; bash "$script" >> log 2>&1 || status=1
done
echo "$status" > "ended-$number"
echo "$number"
"""


def install(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def with_commands(folder: Path) -> dict[str, str]:
    """An environment whose PATH has `sstoken-curate`, and the stand-ins for what SLURM has."""
    install(folder, "sstoken-curate", f'#!/bin/sh\nexec {" ".join(PIPELINE)} "$@"\n')
    install(folder, "sbatch", SBATCH)
    install(folder, "scontrol", '#!/bin/sh\necho "$@" >> requeued\n')
    return environment() | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_scripts_do_the_run(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    one = save_config(tmp_path / "one", inputs, examples=12, shard_rows=2, steps=4)
    there = tmp_path / "slurm"
    config = save_config(there, inputs, examples=12, shard_rows=2, steps=4)
    env = with_commands(tmp_path / "bin")
    for folder, command in (
        (one.parent, [*PIPELINE, "run", one.name]),
        (there, [*PIPELINE, "run", config.name, "--dry-run", "--ranks", str(RANKS)]),
        (there, ["bash", "run.slurm/submit.sh", "--account=a"]),
    ):
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    submitted = (there / "submitted").read_text().splitlines()
    log = (there / "log").read_text()
    assert len(submitted) == 7, "encode, score and select have a commit each"
    assert all("--account=a" in line for line in submitted)
    assert all(f"--dependency=afterok:{i}" in line for i, line in enumerate(submitted[1:], 1))
    assert ["--gres=gpu:1" in line for line in submitted] == [False, False, True, True, False, False, False]
    assert {(there / f"ended-{i + 1}").read_text() for i in range(7)} == {"0\n"}, log
    assert written(there / "run") == written(one.parent / "run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs bash and SIGTERM")
def test_a_task_that_is_stopped_is_queued_again(tmp_path: Path) -> None:
    world = make_world()
    save_conversations(tmp_path / "data.jsonl", 600)
    (tmp_path / "c.yaml").write_text(
        f"out: run\nencode: {{data: data.jsonl, model: {world.base}, shard_rows: 2, workers: 1}}\n"
        "score: {checkpoints: [a, b]}\n".replace("[a, b]", f"[{world.base}, {world.later}]")
    )
    env = with_commands(tmp_path / "bin") | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(
        [*PIPELINE, "run", "c.yaml", "--dry-run", "--ranks", "2"], cwd=tmp_path, env=env, timeout=PATIENCE
    )
    assert done.returncode == 0
    job = subprocess.Popen(["bash", "run.slurm/1-encode.sbatch"], cwd=tmp_path, env=env)
    partial = tmp_path / "run" / "tokens.partial"
    while len(list(partial.glob("part-*.parquet"))) < 2:
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7_1\n"
    assert len(list(partial.glob("part-*.parquet"))) < 150
    assert not list((partial / "completions").glob("*"))


def test_the_resolved_configuration_is_the_same_run(tmp_path: Path) -> None:
    for text in (
        "out: r\nencode: {data: d, model: m}\nscore: {checkpoints: [user/a, user/b]}\n",
        "out: r\nseed: 3\nengine: ray\nencode: {data: d, model: m}\nanchor: {epochs: 1}\nselect: {rho: [0.4, 0.6]}\n",
        (ROOT / "docs" / "runs.md").read_text().split("```yaml\n")[2].partition("```")[0],
        (ROOT / "configs" / "self-evolving.yaml").read_text(),
    ):
        (tmp_path / "c.yaml").write_text(text)
        config = load_config(tmp_path / "c.yaml")
        (tmp_path / "resolved.yaml").write_text(resolved(config))
        again = load_config(tmp_path / "resolved.yaml")
        assert again.model_dump() == config.model_dump()
        names = [(step.name, step.job and step.job.stage.model_fields_set) for step in promised_steps(config)]
        assert names == [
            (step.name, step.job and step.job.stage.model_fields_set) for step in promised_steps(again)
        ]


def test_the_examples_are_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_scripts(load_config(ROOT / "configs" / "demo.yaml"), Path("configs/slurm"), 4)
    there = ROOT / "configs" / "slurm"
    assert {path.name for path in files} == {path.name for path in there.iterdir()}
    for file in files:
        assert file.read_text() == (there / file.name).read_text(), f"write {file.name} anew"
        assert (file.stat().st_mode & stat.S_IXUSR) == ((there / file.name).stat().st_mode & stat.S_IXUSR)
        if file.suffix in (".sh", ".sbatch"):
            assert subprocess.run([shutil.which("bash") or "bash", "-n", file], check=False).returncode == 0


def test_one_step_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world()
    config = tmp_path / "c.yaml"
    config.write_text(
        f"out: {tmp_path / 'run'}\nencode: {{data: {world.data}, model: {world.base}, shard_rows: 5, workers: 1}}\n"
        f"score: {{checkpoints: {{base: {world.base}, later: {world.later}}}}}\n"
    )
    with pytest.raises(UsageError, match="ranks share one step: name it with --only"):
        api.run(config, world_size=2)
    with pytest.raises(UsageError, match="give one of them"):
        api.run(config, only="score", until="select")
    with pytest.raises(SstokenError, match=r"score: needs encode, which is not finished \(not run yet\)"):
        api.run(config, only="score")
    for rank in (1, 0):
        api.run(config, only="encode", rank=rank, world_size=2)
    with pytest.raises(SstokenError, match="needs encode, which is not finished"):
        api.run(config, only="score")
    api.commit(tmp_path / "run" / "tokens")
    with pytest.raises(SstokenError, match="needs score/base, which is not finished"):
        api.run(config, only="select")
    assert set(api.run(config, only="score")) == {"score/base", "score/later"}
    assert CommandLine(capsys).works("run", config).count("finished already") == 3
