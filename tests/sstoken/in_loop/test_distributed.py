"""Two processes train as one does."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.sstoken.in_loop.test_every_method import runs
from tests.support import PATIENCE, ROOT, TWO_PROCESSES

pytestmark = pytest.mark.slow
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*TWO_PROCESSES, "-m"]


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


@pytest.mark.parametrize(
    ("history", "precision"),
    [
        ("scores", "float32"),
        ("base", "float32"),
        ("scores", "bfloat16 autocast"),
        ("ema", "bfloat16 autocast"),
        ("snapshot", "bfloat16 weights"),
    ],
)
def test_two_processes_train_as_one(tmp_path, history, precision):
    """8 examples a step: all at once, or two by two on two processes with accumulation."""
    module, one, two = "tests.sstoken.in_loop.distributed", tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    given = ["--history", history, "--precision", precision]
    run(*PYTHON, module, str(one), "--batch", "8", "--accumulate", "1", *given)
    run(*TORCHRUN, module, str(two), "--batch", "2", "--accumulate", "2", *given)
    alone, first, second = read(one, 0), read(two, 0), read(two, 1)
    assert not first["masks"].keys() & second["masks"].keys()
    together = first["masks"] | second["masks"]
    assert together.keys() == alone["masks"].keys()
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
    if precision != "float32":  # rounding depends on the shapes of batches, and adds up over steps
        agree = [np.array(mask) == together[key] for key, mask in alone["masks"].items() if key[0] == 0]
        assert np.concatenate(agree).mean() > 0.95
        assert first["logs"][0]["loss"] == pytest.approx(alone["logs"][0]["loss"], abs=0.03)
        return
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-5, rtol=0, msg=name)
    if history == "base":  # at the first steps REL is zero up to rounding, and with it which tokens are kept
        return
    assert together == alone["masks"]
    for ours, expected in zip(first["logs"], alone["logs"], strict=True):
        for key in ("loss", "selection/kept_share", "selection/rel_kept", "selection/attention_dropped"):
            assert ours.get(key) == pytest.approx(expected.get(key), abs=1e-4), key


def test_every_method_decides_in_two_processes_as_in_one(tmp_path):
    """The same small batches: four by one process, two by each of two. Drawing at random follows the process."""
    module, one, two = "tests.sstoken.in_loop.distributed_methods", tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run(*PYTHON, module, str(one), "--accumulate", "4")
    run(*TORCHRUN, module, str(two), "--accumulate", "2")
    alone, first, second = read(one, 0), read(two, 0), read(two, 1)
    assert not first["decided"].keys() & second["decided"].keys()
    together = first["decided"] | second["decided"]
    assert together.keys() == alone["decided"].keys()
    methods = {key[0] for key in together}
    assert methods == {*runs("scores")}
    for key, (keep, weight) in alone["decided"].items():
        if key[0] == "random":
            continue
        assert together[key][0] == keep, key
        assert (together[key][1] is None) == (weight is None)
        if weight is not None:
            np.testing.assert_allclose(together[key][1], weight, atol=1e-5, rtol=1e-4, err_msg=str(key))
    for method in methods - {"random"}:
        for name, weight in alone["weights"][method].items():
            assert torch.equal(first["weights"][method][name], second["weights"][method][name])
            torch.testing.assert_close(
                first["weights"][method][name], weight, atol=1e-5, rtol=0, msg=f"{method} {name}"
            )


def test_sharded_weights_give_the_same_signals_and_gradients():
    assert run(*TORCHRUN, "tests.sstoken.in_loop.sharded").count("equal") == 2
