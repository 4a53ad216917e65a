"""Printing for the command line: how much (`--quiet`, `--verbose`), and control characters escaped."""

import click

from sstoken.stages.token_text import visible

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


def say(text: str = "", *, err: bool = False) -> None:
    """Print text, control and bidirectional characters as escapes; `err`: to standard error."""
    click.echo(printable(text), err=err)


def printable(text: str) -> str:
    """The text as `say` prints it."""
    return visible(text, newline="\n")
