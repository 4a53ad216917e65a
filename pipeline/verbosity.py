"""How much the command line says: `sstoken-curate --quiet VERB`, or `--verbose`."""

from enum import Enum


class Verbosity(Enum):
    """Levels, from least to most."""

    QUIET = "quiet"
    """Errors, notes and warnings, and what was asked for (`show`, `--json`)."""
    NORMAL = "normal"
    VERBOSE = "verbose"
    """Also what libraries say, and the traceback of an error."""


_level = Verbosity.NORMAL


def set_verbosity(level: Verbosity) -> None:
    """Set the level for this process."""
    global _level
    _level = level


def is_quiet() -> bool:
    """Whether only errors, notes and warnings are wanted."""
    return _level is Verbosity.QUIET


def is_verbose() -> bool:
    """Whether tracebacks and libraries' messages are wanted."""
    return _level is Verbosity.VERBOSE
