"""How a verb becomes a function with a real signature and a command with the same fields.

A verb that runs a stage is a class: the stage's fields and its own, each documented once, and `do`. What else the
command line does is a function, and `command` beside it.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePath
from typing import Annotated, Any, ParamSpec, Protocol, TypeVar, cast

import click
from pydantic import Field

from sstoken.errors import UsageError
from sstoken.pipeline.cli_options import Option, given, json_option, stage_options
from sstoken.pipeline.config import LARGEST_SEED, validated
from sstoken.pipeline.job import Result
from sstoken.pipeline.printing import print_result
from sstoken.stages import storage
from sstoken.stages.stage import Settings

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])

COMMANDS: dict[str, click.Command] = {}
"""By verb, of the files of this folder that were imported."""

Place = str | Path
"""A folder as a caller names it."""
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Internal = Option(shown=False)
"""The field is for Python callers; the command line has no option for it."""
Out = Annotated[Place, Option(value="TEXT")]


class Does(Protocol[R_co]):
    """A call with its arguments checked."""

    def do(self) -> R_co:
        """Do the work."""


def verb(
    call: Callable[P, Does[R]], show: Callable[..., None] | None = None, *, sweep: Collection[str] = ()
) -> Callable[P, R]:
    """The function that takes the fields of `call` by name, checks them and does the work; and its command.

    Args:
        call: a class called `<Verb>Call` whose docstring is the verb's help.
        show: `show(values, as_json)` calls and prints; by default, the result's summary is printed.
        sweep: fields that the command line takes several times; `show` gets a list then.
    """
    function = api_only(call)
    fields = cast(type[Settings], call)
    name = function.__name__

    def on_command_line(as_json: bool, **values: Any) -> None:
        if show is not None:
            show(given(values), as_json)
        else:
            print_finished(name, cast(Result, cast(Any, function)(**given(values))), as_json)

    command_of = click.command(name, help=_help(call.__doc__))
    COMMANDS[name] = command_of(stage_options(fields, sweep=sweep)(json_option(on_command_line)))
    return function


def api_only(call: Callable[P, Does[R]]) -> Callable[P, R]:
    """As `verb`, without a command."""
    fields = cast(type[Settings], call)
    name = fields.__name__.removesuffix("Call").lower()

    def function(**values: Any) -> Any:
        plain = {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in values.items()
        }
        return cast(Does[Any], validated(fields, plain, name)).do()

    function.__name__ = function.__qualname__ = name
    function.__module__ = "sstoken.curate"
    function.__doc__ = f"{inspect.cleandoc(fields.__doc__ or '')}\n\n{_arguments(fields)}"
    given_back = inspect.signature(vars(fields)["do"]).return_annotation
    vars(function)["__signature__"] = inspect.signature(fields).replace(return_annotation=given_back)
    return cast(Callable[P, R], function)


def command(function: Callable[..., Any], *options: Callable[[F], F]) -> Callable[[F], F]:
    """Make what is decorated the command of a verb: it takes the options, calls `function` and prints."""

    def decorate(body: F) -> F:
        name, decorated = function.__name__, body
        for option in reversed(options):
            decorated = option(decorated)
        COMMANDS[name] = click.command(name, help=_help(function.__doc__))(decorated)
        return body

    return decorate


def place(path: Place) -> Path:
    """The address: a path without its tilde, or a URL."""
    return storage.address(path)


def named_places(given: Iterable[Place]) -> dict[str, Path]:
    """Folders by name: `NAME=FOLDER`, or a folder under its own name.

    Raises:
        UsageError: two have the same name.
    """
    named: dict[str, Path] = {}
    for each in map(str, given):
        name, separator, folder = each.partition("=")
        if not separator or "/" in name or Path(each).is_dir():
            name, folder = Path(each).name or each, each
        if name in named:
            raise UsageError(f"two masked datasets are called {name!r}; name one of them: NAME={folder}")
        named[name] = place(folder)
    return named


def local_place(path: Place) -> Path:
    """The same, of what other libraries read or write.

    Raises:
        UsageError: it is remote.
    """
    found: PurePath = place(path)
    if not isinstance(found, Path):
        raise UsageError(f"{path}: has to be on a local disk here; copy it to one, or name another place")
    return found


def print_finished(name: str, result: Result, as_json: bool) -> None:
    """A step's summary, for people or for programs."""
    if as_json:
        click.echo(json.dumps({"folder": str(result.folder), "skipped": result.skipped, **result.metrics}))
    else:
        print_result(name, result)


def _help(docstring: str | None) -> str:
    """The docstring without what only a Python caller reads; click keeps the lines of the example as they are."""
    text = re.split(r"\n\n(?:Args|Returns|Raises):", inspect.cleandoc(docstring or ""))[0]
    return text.replace("\n\nExample:\n", "\n\n\b\nExample:\n")


def _arguments(fields: type[Settings]) -> str:
    lines = ["Args:"]
    for name, field in fields.model_fields.items():
        lines.append(f"    {field.alias or name}: {' '.join((field.description or '').split())}")
    return "\n".join(lines)
