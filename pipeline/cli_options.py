"""Command-line options made from the fields of a stage: one place documents both."""

import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON on standard output.")
force_option = click.option("--force", is_flag=True, help="Run again though it is finished.")
out_option = click.option(
    "--out",
    required=True,
    help="Output folder, or a link to one; unfinished work stands beside it in OUT.partial.",
)


def stage_options(stage: type[BaseModel], *, skip: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Add an option for each field of `stage`. The command gets the values given, and only those."""

    def decorate(command: F) -> F:
        for name, field in reversed(stage.model_fields.items()):
            if name not in skip:
                command = _option(name, field)(command)
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given: the others keep the stage's defaults."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    kind, bounds = _plain_type(field.annotation, field.metadata)
    flag = "--" + name.replace("_", "-")
    about = " ".join((field.description or "").split()).replace("None: ", "Default: ")
    facts = [*_default(flag, field), *bounds]
    settings: dict[str, Any] = {"help": about + (f"  [{'; '.join(facts)}]" if facts else "")} | (
        {"required": True} if field.is_required() else {"default": None}
    )
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **settings)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(list(get_args(kind))), **settings)
    if get_origin(kind) is dict:
        settings |= {"multiple": True, "metavar": "NAME=VALUE", "callback": pairs}
        singular = flag.removesuffix("s")
        return click.option(singular, name, **settings)
    if get_origin(kind) is tuple:  # tuple[X, ...]: given once for each
        each = get_args(kind)[0]
        if get_origin(each) is Literal:
            settings["type"] = click.Choice(list(get_args(each)))
        settings |= {"multiple": True, "callback": lambda _context, _option, values: values or None}
        return click.option(flag.removesuffix("s"), name, **settings)
    if (
        bounds
    ):  # shown here, checked by the stage: a value out of range gets the same line from YAML and Python
        settings["metavar"] = f"{click.types.convert_type(kind).name} range".upper()
    return click.option(flag, name, type=kind, **settings)


def _default(flag: str, field: FieldInfo) -> list[str]:
    """The default for the help; none where it is None (the description says what that means) or empty."""
    default = field.default
    if isinstance(default, bool):
        return [f"default: {'' if default else 'no-'}{flag[2:]}"]
    empty = (
        default is None
        or default is PydanticUndefined
        or (isinstance(default, (dict, tuple, str)) and not default)
    )
    return [] if empty else [f"default: {default}"]


def _plain_type(annotation: Any, metadata: Iterable[Any]) -> tuple[Any, list[str]]:
    """The type without `| None` and `Annotated`, and its bounds: `x>=1`."""
    metadata = list(metadata)
    while True:
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
        elif get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += [bound for m in more for bound in (m.metadata if isinstance(m, FieldInfo) else [m])]
        else:
            break
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = {name: getattr(m, name) for m in metadata for name in signs if getattr(m, name, None) is not None}
    return annotation, [f"x{signs[name]}{found[name]}" for name in signs if name in found]


def pairs(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    """Options given as NAME=VALUE, as a mapping; None where there is none.

    Raises:
        click.BadParameter: one without `=`.
    """
    pairs = {}
    for value in values:
        name, separator, content = value.partition("=")
        if not separator:
            raise click.BadParameter(f"{value!r}: legal is NAME=VALUE")
        pairs[name] = content
    return pairs or None
