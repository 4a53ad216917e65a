"""Token-level data selection for LLM fine-tuning: the method itself. No input or output happens here.

The in-loop trainers (`SelfModulatedTrainer`, ...) and the pipeline's Python API (`curate`) are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError as SstokenError
from sstoken.errors import UsageError as UsageError
from sstoken.version import __version__ as __version__

if TYPE_CHECKING:
    from sstoken import curate as curate
    from sstoken.in_loop.history_columns import CarryHistory as CarryHistory
    from sstoken.in_loop.loss import self_modulated_loss as self_modulated_loss
    from sstoken.in_loop.loss import token_loss as token_loss
    from sstoken.in_loop.response_tokens import find_segments as find_segments
    from sstoken.in_loop.settings import Schedule as Schedule
    from sstoken.in_loop.settings import SelfModulation as SelfModulation
    from sstoken.in_loop.sft import SelfModulatedSFTTrainer as SelfModulatedSFTTrainer
    from sstoken.in_loop.trainer import SelfModulatedMixin as SelfModulatedMixin
    from sstoken.in_loop.trainer import SelfModulatedTrainer as SelfModulatedTrainer
    from sstoken.measure.capture import AttentionCapture as AttentionCapture
    from sstoken.stages.report.loaded import load as load

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

if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted([*_LAZY, "SstokenError", "UsageError", "__version__", "curate"])


def __getattr__(name: str) -> Any:
    if name == "curate":
        return import_module("sstoken.curate")
    if name not in _LAZY:
        raise AttributeError(f"module 'sstoken' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
