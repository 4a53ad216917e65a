"""The Python API: every verb of the command line as a function.

    from sstoken import curate

    curate.score(tokens="runs/tokens", checkpoints=["runs/base", "runs/sft"], out="runs/scores")

Functions take the same settings as the verbs' options and the YAML's sections, by name. They raise `UsageError` for a
wrong request and `SstokenError` for failed work, each with a one-line message. A call whose output is finished returns
at once. Each verb is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sstoken.pipeline.verbs import index

if TYPE_CHECKING:
    from sstoken.errors import SstokenError as SstokenError
    from sstoken.errors import UsageError as UsageError
    from sstoken.pipeline.config import RunConfig as RunConfig
    from sstoken.pipeline.config import load_config as load_config
    from sstoken.pipeline.verbs.auditing import *
    from sstoken.pipeline.verbs.configuring import *
    from sstoken.pipeline.verbs.hub import *
    from sstoken.pipeline.verbs.looking import *
    from sstoken.pipeline.verbs.planning import *
    from sstoken.pipeline.verbs.reporting import *
    from sstoken.pipeline.verbs.runs import *
    from sstoken.pipeline.verbs.stages import *
    from sstoken.pipeline.verbs.trajectory import *

_OTHERS = {
    "RunConfig": "sstoken.pipeline.config",
    "SstokenError": "sstoken.errors",
    "UsageError": "sstoken.errors",
    "load_config": "sstoken.pipeline.config",
}

if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted({*index(), *_OTHERS})

    def __getattr__(name: str) -> Any:
        if name in _OTHERS:
            return getattr(import_module(_OTHERS[name]), name)
        if name not in index():
            raise AttributeError(f"module 'sstoken.curate' has no attribute {name!r}")
        return getattr(import_module(index()[name].module), name)

    def __dir__() -> list[str]:
        return __all__
