"""Two processes train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import PATIENCE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def run(*command):
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read(folder, rank):
    return torch.load(folder / f"rank-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("history", ["scores", "base"])
def test_two_processes_train_as_one(tmp_path, history):
    """8 examples a step: all at once, or two by two on two processes with accumulation."""
    module, one, two = "tests.sstoken.in_loop.distributed", tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run(*PYTHON, module, str(one), "--batch", "8", "--accumulate", "1", "--history", history)
    run(*TORCHRUN, module, str(two), "--batch", "2", "--accumulate", "2", "--history", history)
    alone, first, second = read(one, 0), read(two, 0), read(two, 1)
    assert not first["masks"].keys() & second["masks"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
        assert torch.equal(first["weights"][name], second["weights"][name])
    if history == "base":  # at the first steps REL is zero up to rounding, and with it which tokens are kept
        return
    assert first["masks"] | second["masks"] == alone["masks"]
    for ours, expected in zip(first["logs"], alone["logs"], strict=True):
        for key in ("loss", "selection/kept_share", "selection/rel_kept", "selection/attention_dropped"):
            assert ours.get(key) == pytest.approx(expected.get(key), abs=1e-4), key


def test_sharded_weights_give_the_same_signals_and_gradients():
    assert run(*TORCHRUN, "tests.sstoken.in_loop.sharded").count("equal") == 2
