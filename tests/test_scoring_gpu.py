"""The GPU benchmark goes through all of its code on a CPU, and says so where it has nothing to measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "scoring_gpu.py"


def run(*arguments):
    done = subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    assert run("--quick", "--json") == ["no CUDA device here: nothing to measure"]


@pytest.mark.slow
def test_it_runs_on_a_cpu():
    figures = json.loads(run("--device", "cpu", "--model", "tiny", "--json")[-1])
    facts = figures["tiny 96"]
    assert facts["tokens_per_second"] > 0
    assert 0 < facts["share_of_limit"] < 1
    assert facts["ratio_to_plain"] > 0
    assert facts["parts"]["products"] > 0
    assert sum(facts["parts"].values()) == pytest.approx(1, abs=0.1)
    assert facts["plain"]["packed"] == "yes"
    assert facts["plain"]["batch"] == 8
