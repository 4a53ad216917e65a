"""Command-line options made from a stage's fields, so that both are documented in one place."""

import types
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON on standard output.")


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line; goes into its `Annotated[...]`."""

    flag: str | None = None
    """Replaces the flag made from the field's name; a boolean with its own flag has no `--no-` form."""
    value: str | None = None
    """Name of the value in the help."""
    argument: bool = False
    """Whether it is a positional argument."""
    shown: bool = True
    """Whether the command line has it."""


def stage_options(stage: type[BaseModel], *, sweep: Collection[str] = ()) -> Callable[[F], F]:
    """Add an option for each field of `stage`, its own fields before inherited ones; an omitted option is None.

    The fields' descriptions become the help. Fields in `sweep` may be given several times, which makes a list.
    """

    def decorate(command: F) -> F:
        own = set(stage.__annotations__)
        fields = sorted(stage.model_fields.items(), key=lambda item: item[0] not in own)
        for name, field in reversed(fields):
            kind, metadata = _unwrapped(field)
            asked = next((m for m in metadata if isinstance(m, Option)), Option())
            if asked.argument:
                argument = click.argument(
                    field.alias or name, metavar=asked.value, required=field.is_required()
                )
                command = argument(command)
            elif asked.shown:
                option = _option(field.alias or name, field, kind, _bounds(metadata), asked, name in sweep)
                command = option(command)
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Keep the options that the user gave; for the others, the stage's defaults apply."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


_COMPLETED = {
    "method": ("sstoken.methods:METHODS", "sstoken.methods.presets:PRESETS"),
    "to": ("sstoken.stages.exporting:TARGETS",),
    "signals": ("sstoken.signals:SIGNALS",),
}
"""Registries whose names the shell completes, by field; imported on use."""


def _completion(name: str) -> dict[str, Any]:
    """click's setting for completing a field's values in the shell; empty for most fields."""
    if name not in _COMPLETED:
        return {}

    def matching(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
        places = (place.partition(":") for place in _COMPLETED[name])
        registries = (getattr(import_module(module), registry) for module, _, registry in places)
        return [value for registry in registries for value in registry if value.startswith(begun)]

    return {"shell_complete": matching}


def _option(
    name: str, field: FieldInfo, kind: Any, bounds: list[str], asked: Option, sweep: bool
) -> Callable[[F], F]:
    flag = asked.flag or "--" + name.replace("_", "-")
    about = " ".join((field.description or "").split()).replace("None: ", "Default: ")
    if kind is bool and asked.flag is not None:
        return click.option(flag, name, is_flag=True, default=None, help=about)
    facts = [*_default(flag, field), *bounds]
    settings: dict[str, Any] = {"help": about + (f"  [{'; '.join(facts)}]" if facts else "")} | (
        {"required": True} if field.is_required() else {"default": None}
    )
    settings |= _completion(name)
    if asked.value is not None:
        settings["metavar"] = asked.value
    if sweep and get_origin(kind) is not dict:
        settings |= {"multiple": True, "callback": _one_or_several}
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **settings)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(list(get_args(kind))), **settings)
    if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        settings |= {
            "multiple": True,
            "metavar": "NAME=VALUE",
            "callback": pairs_or_lists if sweep else pairs,
        }
        singular = flag.removesuffix("s")
        return click.option(singular, name, **settings)
    if get_origin(kind) in (tuple, Sequence):  # the option is repeated, once per value
        each = get_args(kind)[0]
        if get_origin(each) is Literal:
            settings["type"] = click.Choice(list(get_args(each)))
        settings |= {"multiple": True, "callback": lambda _context, _option, values: values or None}
        return click.option(flag.removesuffix("s"), name, **settings)
    if bounds:  # shown here but checked by the stage, so that the error is the same from YAML and Python
        settings["metavar"] = f"{click.types.convert_type(kind).name} range".upper()
    return click.option(flag, name, type=_NUMBERS.get(kind, kind), **settings)


class _Number(click.ParamType):
    """A number; the error for a wrong one shows how to write it."""

    def __init__(self, kind: type[int] | type[float], name: str, example: str) -> None:
        self._kind, self.name, self._example = kind, name, example

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            return self._kind(value)
        except ValueError:
            self.fail(f"{value!r} is no {self._example}", param, context)


_NUMBERS = {
    int: _Number(int, "integer", "whole number, such as 8"),
    float: _Number(float, "float", "number; write it with a point, such as 0.6"),
}


class OnceEach(click.Command):
    """A command that refuses an option given twice; click would silently take the last one."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """See `click.Command`."""
        options, _, order = self.make_parser(context).parse_args(list(arguments))
        for parameter in order:
            twice = order.count(parameter) > 1 and not parameter.multiple and parameter.nargs == 1
            if twice and isinstance(parameter, click.Option) and not parameter.is_flag:
                flag = parameter.opts[0]
                raise click.UsageError(
                    f"{flag} is given {order.count(parameter)} times; give it once", context
                )
        return super().parse_args(context, arguments)


def _default(flag: str, field: FieldInfo) -> list[str]:
    """The default, for the help; nothing if it is None (the description explains that) or empty."""
    default = field.default
    if isinstance(default, bool):
        return [f"default: {'' if default else 'no-'}{flag[2:]}"]
    return [] if default in (PydanticUndefined, None, "", (), {}) else [f"default: {default}"]


def _unwrapped(field: FieldInfo) -> tuple[Any, list[Any]]:
    """The field's type without `| None` and `Annotated`, and what its `Annotated` holds."""
    annotation, metadata = field.annotation, list(field.metadata)
    while True:
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
        elif get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += [bound for m in more for bound in (m.metadata if isinstance(m, FieldInfo) else [m])]
        else:
            return annotation, metadata


def _bounds(metadata: Iterable[Any]) -> list[str]:
    """The bounds among a field's metadata, such as `x>=1`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = {name: getattr(m, name) for m in metadata for name in signs if getattr(m, name, None) is not None}
    return [f"x{signs[name]}{found[name]}" for name in signs if name in found]


def pairs(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    """Turn NAME=VALUE options into a mapping, each name once; None if there are none."""
    found = pairs_or_lists(context, option, values) or {}
    for name, content in found.items():
        if isinstance(content, list):
            raise click.BadParameter(f"{name!r} is given {len(content)} times; give it once")
    return {name: str(content) for name, content in found.items()} or None


def pairs_or_lists(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, str | list[str]] | None:
    """Like `pairs`, but a name given several times gets a list of its values."""
    found: dict[str, list[str]] = {}
    for value in values:
        name, separator, content = value.partition("=")
        if not separator:
            raise click.BadParameter(f"{value!r}: legal is NAME=VALUE")
        found.setdefault(name, []).append(content)
    return {name: several if len(several) > 1 else several[0] for name, several in found.items()} or None


def _one_or_several(context: click.Context, option: click.Parameter, values: tuple[Any, ...]) -> Any:
    return list(values) if len(values) > 1 else (values[0] if values else None)
