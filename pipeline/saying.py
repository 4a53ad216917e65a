"""Print lines that may hold names and texts of the data: nothing in them drives the terminal."""

import click

from sstoken.stages.token_text import visible


def say(text: str = "", *, err: bool = False) -> None:
    """Print text, with control characters and those that turn text around as escapes; `err`: on standard error."""
    click.echo(printable(text), err=err)


def printable(text: str) -> str:
    """The text as `say` prints it."""
    return visible(text, newline="\n")
