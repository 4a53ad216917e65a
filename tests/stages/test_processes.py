"""How a process ends: as usual if it is alone; at once if it is one of several."""

import os
import subprocess
import sys

import pytest

from tests.support import PATIENCE

PROGRAM = """
import atexit
from sstoken.stages.processes import end_process
atexit.register(print, "freed")
print("written")
end_process(3)
"""


@pytest.mark.parametrize(("processes", "out"), [("1", "written\nfreed\n"), ("2", "written\n")])
def test_what_was_written_is_kept_and_only_the_only_process_frees(processes, out):
    environment = os.environ | {"WORLD_SIZE": processes}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (3, out)
