"""Token-level data selection for LLM fine-tuning: the method itself. No input or output happens here.

The in-loop trainers (`SelfModulatedTrainer`, ...) and the pipeline's Python API (`curate`) are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError, UsageError
from sstoken.version import __version__

if TYPE_CHECKING:
    from sstoken import curate
    from sstoken.in_loop.history_columns import CarryHistory
    from sstoken.in_loop.loss import self_modulated_loss, token_loss
    from sstoken.in_loop.response_tokens import find_segments
    from sstoken.in_loop.settings import Schedule, SelfModulation
    from sstoken.in_loop.sft import SelfModulatedSFTTrainer
    from sstoken.in_loop.trainer import SelfModulatedMixin, SelfModulatedTrainer
    from sstoken.measure.capture import AttentionCapture
    from sstoken.stages.report.loaded import load

__all__ = [
    "AttentionCapture",
    "CarryHistory",
    "Schedule",
    "SelfModulatedMixin",
    "SelfModulatedSFTTrainer",
    "SelfModulatedTrainer",
    "SelfModulation",
    "SstokenError",
    "UsageError",
    "__version__",
    "curate",
    "find_segments",
    "load",
    "self_modulated_loss",
    "token_loss",
]

_LAZY = {
    "AttentionCapture": "sstoken.measure.capture",
    "CarryHistory": "sstoken.in_loop.history_columns",
    "Schedule": "sstoken.in_loop.settings",
    "SelfModulatedMixin": "sstoken.in_loop.trainer",
    "SelfModulatedSFTTrainer": "sstoken.in_loop.sft",
    "SelfModulatedTrainer": "sstoken.in_loop.trainer",
    "SelfModulation": "sstoken.in_loop.settings",
    "find_segments": "sstoken.in_loop.response_tokens",
    "load": "sstoken.stages.report.loaded",
    "self_modulated_loss": "sstoken.in_loop.loss",
    "token_loss": "sstoken.in_loop.loss",
}


def __getattr__(name: str) -> Any:
    if name == "curate":
        return import_module("sstoken.curate")
    if name not in _LAZY:
        raise AttributeError(f"module 'sstoken' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
