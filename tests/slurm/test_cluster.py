"""What `run --dry-run` writes, on a real SLURM of one node."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.small_run import PIPELINE, environment, save_config, save_conversations, written
from tests.support import PATIENCE

needed = ("slurmctld", "slurmd", "sbatch", "munged")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(map(shutil.which, needed)) or os.geteuid() != 0,
        reason="needs SLURM and root: make test-slurm",
    ),
]
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MinJobAge=3000
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=60 State=UP
"""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which `sbatch` and `sstoken-curate` work."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    command = folder / "bin" / "sstoken-curate"
    command.write_text(f'#!/bin/sh\nexec {" ".join(PIPELINE)} "$@"\n')
    command.chmod(0o755)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, ports=ports, folder=folder))
    env = environment() | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "SSTOKEN_GPU": "",
    }
    started = []
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        Path("/run/munge").mkdir(mode=0o755, exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        started.append(subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground"]))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}
    started += [subprocess.Popen([name, "-D"], **quiet) for name in ("slurmctld", "slurmd")]  # type: ignore[call-overload]
    try:
        wait_for(lambda: "idle" in ask(env, "sinfo", "-h", "-o", "%t"))
        yield env
        ask(env, "scancel", "--user=root")
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(PATIENCE)


def ask(env: dict[str, str], *command: str, cwd: Path | None = None) -> str:
    """Return what a command of SLURM prints."""
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout


def works(env: dict[str, str], cwd: Path, *command: str) -> str:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_scripts_do_the_run(slurm: dict[str, str], tmp_path: Path) -> None:
    for name in ("one", "slurm"):
        save_config(tmp_path / name, tmp_path / "inputs", examples=12, shard_rows=2, steps=4)
    there = tmp_path / "slurm"
    works(slurm, there, "sstoken-curate", "run", "run.yaml", "--dry-run", "--ranks", "3")
    works(slurm, there, "bash", "run.slurm/submit.sh", "--mem=0")
    works(slurm, tmp_path / "one", "sstoken-curate", "run", "run.yaml")
    wait_for(lambda: not ask(slurm, "squeue", "-h"))
    assert written(there / "run") == written(tmp_path / "one" / "run")
    assert (there / "run" / "masked" / "manifest.json").exists()


def test_a_task_that_is_stopped_is_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    save_config(tmp_path, inputs, examples=12, shard_rows=2, steps=4)
    save_conversations(inputs / "data.jsonl", 2000)
    works(slurm, tmp_path, "sstoken-curate", "run", "run.yaml", "--dry-run", "--ranks", "2")
    submit = ("sbatch", "--parsable", "--mem=0")
    ranks = works(slurm, tmp_path, *submit, "run.slurm/1-encode.sbatch").strip()
    after = f"--dependency=afterok:{ranks}"
    commit = works(slurm, tmp_path, *submit, after, "run.slurm/1-encode-commit.sbatch").strip()
    partial = tmp_path / "run" / "tokens.partial"
    wait_for(lambda: len(list(partial.glob("part-*.parquet"))) > 5)
    works(slurm, tmp_path, "scancel", "--batch", "--signal=TERM", f"{ranks}_0")

    def is_queued_again() -> bool:
        return "Restarts=1" in ask(slurm, "scontrol", "show", "job", f"{ranks}_0")

    wait_for(is_queued_again)
    assert not (partial / "completions" / "00000-of-00002").exists()
    assert "Dependency" in ask(slurm, "squeue", "-h", "-j", commit, "-o", "%r"), "its commit waits"
    there = {path: path.stat().st_ino for path in partial.glob("part-*.parquet")}
    wait_for(lambda: "COMPLETED" in ask(slurm, "scontrol", "show", "job", commit))
    shards = tmp_path / "run" / "tokens"
    assert len(list(shards.glob("part-*.parquet"))) == 1000
    assert all((shards / path.name).stat().st_ino == inode for path, inode in there.items())
    assert "rank 0 of 2 done" in (tmp_path / f"slurm-sstoken-encode-{ranks}_0.log").read_text()
