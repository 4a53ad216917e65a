"""Commands that were killed, or whose disk failed, anywhere, end with the bytes of those that were not."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import PATIENCE, ROOT


def campaign(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.crash.campaign", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.slow
def test_nothing_is_lost_at_200_points() -> None:
    done = campaign("--trials", "200")
    counts = json.loads(done.stdout)
    print(done.stdout)
    assert (counts["failures"], counts["trials"], done.returncode) == (0, 200, 0), done.stderr
    assert counts["points"] > 100
    assert min(counts["kills at points"], counts["kills at random times"], counts["disk faults"]) > 20
    assert len(counts["by job"]) == 8


@pytest.mark.slow
def test_a_storage_that_writes_in_place_is_found_out() -> None:
    """The trials can fail."""
    done = campaign("--trials", "24", "--careless")
    assert done.returncode == 1
    assert json.loads(done.stdout)["failures"] > 0
