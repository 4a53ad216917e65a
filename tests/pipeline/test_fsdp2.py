"""Snapshots that FSDP2 saved in pieces: refused with the command that merges them, and scored once they are merged."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sstoken.errors import SstokenError
from sstoken.pipeline import api
from tests.pipeline.small_run import environment
from tests.pipeline.worlds import make_world
from tests.support import PATIENCE, ROOT, TWO_PROCESSES


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo")
def test_what_two_processes_trained_is_scored(tmp_path: Path) -> None:
    world, out = make_world(), tmp_path / "checkpoint-2"
    out.mkdir()
    command = [*TWO_PROCESSES, ROOT / "tests" / "pipeline" / "fsdp2.py", world.base, out]
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copy(world.base / "config.json", out)
    given = {"tokens": world.tokens, "attention_from": "none", "device": "cpu"}
    with pytest.raises(SstokenError, match="merge them: accelerate merge-weights") as refused:
        api.score(**given, checkpoints=[str(out)], out=tmp_path / "refused")
    said = re.search(r"accelerate (merge-weights \S+ \S+)", str(refused.value))
    assert said is not None
    merge = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(said[1])]
    done = subprocess.run(merge, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(out / "pytorch_model_fsdp_0")
    merged, whole = load_file(out / "model.safetensors"), torch.load(out / "whole.pt")
    assert all(torch.equal(weight, whole[name]) for name, weight in merged.items())
    before = load_file(world.base / "model.safetensors")
    assert not torch.equal(merged["model.norm.weight"], before["model.norm.weight"])
    (out / "whole.pt").unlink()
    scored = api.score(**given, checkpoints=[f"history={world.base}", f"current={out}"], out=tmp_path / "s")
    losses = {name: metrics["mean_loss"] for name, metrics in scored.metrics.items()}
    assert losses["history"] != losses["current"]
