"""Turns a verb into a Python function and a command with the same arguments, documented once.

A verb that runs a stage is a class with the stage's fields, its own fields and `do`; `verb` makes both from it. Any
other verb is a function, whose docstring also gives the help of the options listed in `command`.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ParamSpec, Protocol, TypeVar, cast

import click
from pydantic import Field

from sstoken.errors import UsageError
from sstoken.pipeline.cli_options import OnceEach, Option, given, json_option, stage_options
from sstoken.pipeline.config import LARGEST_SEED, validated
from sstoken.pipeline.disk import check_not_inside
from sstoken.pipeline.job import Result
from sstoken.pipeline.printing import print_result
from sstoken.pipeline.saying import say
from sstoken.stages import storage
from sstoken.stages.stage import Settings

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])

COMMANDS: dict[str, click.Command] = {}
"""Commands by verb, from the files imported so far."""

Place = str | Path
"""A folder as a caller names it."""
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Internal = Option(shown=False)
"""Marks a field for Python callers only; the command line has no option for it."""


class Output(Settings):
    """What every verb that writes a folder takes."""

    out: Place
    """Output folder, or a link to one; unfinished work is kept beside it in OUT.partial."""
    force: Annotated[bool, Option(flag="--force")] = False
    """Run again even if it is finished."""


class Does(Protocol[R_co]):
    """A call with its arguments checked."""

    def do(self) -> R_co:
        """Do the work."""


def verb(
    call: Callable[P, Does[R]], show: Callable[..., None] | None = None, *, sweep: Collection[str] = ()
) -> Callable[P, R]:
    """Make the function that takes the fields of `call` by name, checks them and does the work; register its command.

    Args:
        call: a class named `<Verb>Call`, whose docstring is the verb's help.
        show: `show(values, as_json)` calls the verb and prints; None: print the result's summary.
        sweep: options that may be given several times; `show` then gets a list.
    """
    function = api_only(call)
    fields = cast(type[Settings], call)
    name = function.__name__

    def on_command_line(as_json: bool, **values: Any) -> None:
        if show is not None:
            show(given(values), as_json)
        else:
            print_finished(name, cast(Result, cast(Any, function)(**given(values))), as_json)

    command_of = click.command(name, OnceEach, help=_help(call.__doc__))
    COMMANDS[name] = command_of(stage_options(fields, sweep=sweep)(json_option(on_command_line)))
    return function


def api_only(call: Callable[P, Does[R]]) -> Callable[P, R]:
    """Like `verb`, without a command."""
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
    """Make the decorated function the command of a verb: it takes the options, calls `function` and prints.

    An option without help gets the text of its name under "Args:" in the docstring of `function`.
    """

    def decorate(body: F) -> F:
        name, decorated = function.__name__, body
        for option in reversed(options):
            decorated = option(decorated)
        COMMANDS[name] = made = click.command(name, OnceEach, help=_help(function.__doc__))(decorated)
        texts = _argument_texts(function.__doc__)
        for option in made.params:
            if isinstance(option, click.Option) and not option.help:
                option.help = texts.get(str(option.name))
        return body

    return decorate


def _argument_texts(docstring: str | None) -> dict[str, str]:
    """The texts under "Args:", by argument, as sentences."""
    section = inspect.cleandoc(docstring or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    return {
        name: text[0].upper() + " ".join(text.split())[1:].replace("None: ", "default: ")
        for name, text in entries
    }


_FORMATS = frozenset((".gif", ".html", ".jpeg", ".jpg", ".md", ".pdf", ".png", ".svg", ".webp"))
"""Extensions of pictures and pages."""
place = storage.address
"""The path without its tilde, or the URL, that a caller names."""


def file_to_write(path: Place, suffix: str = "") -> Path:
    """Like `place`, for a file that a verb writes; refuse a folder, and a file in a finished folder.

    `suffix`, such as `.svg`, is the extension of what is written; that of another format is refused.
    """
    found = place(path)
    if found.is_dir():
        raise UsageError(f"{path}: is a folder; name the file to write")
    if suffix and found.suffix.lower() in _FORMATS - {suffix}:
        raise UsageError(
            f"{path}: what is written is {suffix[1:].upper()}; name a file that ends in {suffix}"
        )
    check_not_inside(found)
    return found


@contextmanager
def written_locally(file: Path) -> Iterator[Path]:
    """Yield a local path for another library to write: `file` itself, or a scratch file that is uploaded at the end."""
    found: PurePath = file
    if isinstance(found, Path):
        yield file
        return
    with TemporaryDirectory(prefix="sstoken-") as folder:
        scratch = Path(folder) / file.name
        yield scratch
        storage.of(file).take(scratch, file)


def named_places(given: Iterable[Place]) -> dict[str, Path]:
    """Return folders by name, each given as `FOLDER` or `NAME=FOLDER`; refuse two of one name."""
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
    """Like `place`, for paths that other libraries read or write; refuse a remote one."""
    found: PurePath = place(path)
    if not isinstance(found, Path):
        raise UsageError(f"{path}: has to be on a local disk here; copy it to one, or name another place")
    return found


def echo_results(results: Mapping[str, Result]) -> None:
    """Print the results of several steps as JSON."""
    facts = {
        name: {"folder": str(result.folder), "skipped": result.skipped, "metrics": result.metrics}
        for name, result in results.items()
    }
    say(json.dumps(facts))


def print_finished(name: str, result: Result, as_json: bool) -> None:
    """Print a step's summary, as text or as JSON."""
    if as_json:
        say(json.dumps({"folder": str(result.folder), "skipped": result.skipped, **result.metrics}))
    else:
        print_result(name, result)


def _help(docstring: str | None) -> str:
    """The docstring without its sections for Python callers; click leaves the example's lines as they are."""
    text = re.split(r"\n\n(?:Args|Returns|Raises):", inspect.cleandoc(docstring or ""))[0]
    return text.replace("\n\nExample:\n", "\n\n\b\nExample:\n")


def _arguments(fields: type[Settings]) -> str:
    lines = ["Args:"]
    for name, field in fields.model_fields.items():
        lines.append(f"    {field.alias or name}: {' '.join((field.description or '').split())}")
    return "\n".join(lines)
