"""How much the command line prints: `sstoken-curate --quiet VERB`, or `--verbose`."""

_level = "normal"
"""`quiet`: errors, notes, warnings and requested output (`show`, `--json`). `verbose`: also libraries' messages, and
tracebacks of errors."""


def set_verbosity(level: str) -> None:
    """Set the level for this process: `quiet`, `normal` or `verbose`."""
    global _level
    _level = level


def is_quiet() -> bool:
    """Whether only errors, notes and warnings are wanted."""
    return _level == "quiet"


def is_verbose() -> bool:
    """Whether tracebacks and libraries' messages are wanted."""
    return _level == "verbose"
