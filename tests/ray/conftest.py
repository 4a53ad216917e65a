"""A cluster of two nodes on this machine, with real Ray processes."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from tests.pipeline.worlds import World, make_world

os.environ["OMP_NUM_THREADS"] = "1"  # as Ray has it for a task of one core; more would change the last bits
torch.set_num_threads(1)

PATIENT = {
    "RAY_worker_niceness": "0",  # at 15, a busy machine would hardly let them run
    "RAY_health_check_timeout_ms": str(100 * 1000),  # a node that is gone refuses at once
}
"""Settings of Ray for a machine that is busy with something else."""


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node; again where it took longer than the 30 s that Ray allows."""
    for _ in range(20):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise AssertionError("no node starts")


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One core a node; the driver connects to the first."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    from ray.cluster_utils import Cluster

    folder = Path(mkdtemp(prefix="r", dir="/tmp"))  # a socket's path has to be short
    os.environ["RAY_TMPDIR"] = str(folder)
    os.environ.update(PATIENT)
    small = {"num_cpus": 1, "object_store_memory": 100 << 20}
    head = {**small, "include_dashboard": False}
    made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    patiently(lambda: made.add_node(**small))
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
