"""How much the command line prints: `sstoken-curate --quiet VERB`, or `--verbose`."""

from enum import Enum


class Verbosity(Enum):
    """Levels, from least to most."""

    QUIET = "quiet"
    """Errors, notes and warnings, and requested output (`show`, `--json`)."""
    NORMAL = "normal"
    VERBOSE = "verbose"
    """Also the messages of libraries, and tracebacks of errors."""


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
