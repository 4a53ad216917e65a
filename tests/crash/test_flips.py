"""No bit of a file that a verb reads changes its result in silence."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import PATIENCE, ROOT


@pytest.mark.slow
def test_no_flip_is_silent() -> None:
    command = [sys.executable, "-m", "tests.crash.flips", "--places", "60"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    counts = json.loads(done.stdout)
    print(done.stdout)
    assert (counts["silent"], counts["places"], done.returncode) == (0, 60, 0), done.stderr
    assert counts["by end"]["refused"] > 10
