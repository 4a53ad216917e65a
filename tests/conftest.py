"""Set before anything imports torch: tests share their cores with the processes that they start."""

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "SSTOKEN_CACHE" not in os.environ:  # rates and fetched files of tests stay out of the user's cache
    os.environ["SSTOKEN_CACHE"] = tempfile.mkdtemp(prefix="sstoken-tests-")
    atexit.register(shutil.rmtree, os.environ["SSTOKEN_CACHE"], ignore_errors=True)
if find_spec("hypothesis"):
    from hypothesis import HealthCheck, Phase, settings

    # No test fails because the machine is busy.
    settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    # For `make test-mutants`: the same examples for each mutant, and no search for the smallest that fails.
    settings.register_profile(
        "mutants",
        settings.get_profile("no clock"),
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
    )
    settings.load_profile("no clock")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' tests run without a GPU
