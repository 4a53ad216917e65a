"""Token-level data selection for LLM fine-tuning: the method itself. No input or output happens here."""

from sstoken.errors import SstokenError, UsageError
from sstoken.version import __version__

__all__ = ["SstokenError", "UsageError", "__version__"]
