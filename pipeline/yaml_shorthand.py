"""Shorthand in a configuration's YAML: paths beside the file, repeated steps, settings with several values."""

import glob
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from sstoken.errors import UsageError
from sstoken.pipeline.plain_yaml import short
from sstoken.stages.storage import expanded

_PATHS = ("data", "model", "chat_template", "checkpoint", "checkpoints")
"""Fields that hold paths of inputs."""
_REPEAT = "repeat"


def beside_the_file(values: dict[str, Any], folder: Path) -> None:
    """Resolve relative paths that exist from the file's folder, in every section and step, in place."""
    if folder.resolve() == Path.cwd():
        return

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        if isinstance(value, dict):
            return {key: found(item) for key, item in value.items()}
        if not isinstance(value, str) or "://" in value or expanded(value).is_absolute():
            return value
        place = str(folder / value)
        return place if Path(place).exists() or (glob.has_magic(value) and glob.glob(place)) else value

    def visit(section: Any) -> None:
        for key, value in section.items() if isinstance(section, dict) else ():
            if key in _PATHS:
                section[key] = found(value)
            else:
                visit(value)

    visit(values)


def repeated(steps: Any, where: str) -> Any:
    """Expand `repeat: {VARIABLE: [values], steps: {...}}` into its steps, once for each value.

    `{VARIABLE}`, `{VARIABLE-1}` and `{VARIABLE+1}` are replaced in names and texts.

    Raises:
        UsageError: it is not one list of integers and a mapping of steps, or two steps get the same name.
    """
    if not isinstance(steps, dict) or _REPEAT not in steps:
        return steps
    written: dict[Any, Any] = {}
    for name, body in steps.items():
        if name != _REPEAT:
            written[name] = body
            continue
        variables = [key for key in body if key != "steps"] if isinstance(body, dict) else []
        numbers = body[variables[0]] if len(variables) == 1 else None
        inner = body.get("steps") if isinstance(body, dict) else None
        if (
            not isinstance(numbers, list)
            or not all(type(n) is int for n in numbers)
            or not isinstance(inner, dict)
        ):
            raise UsageError(
                f"{where}: steps.{_REPEAT} is {short(body)}; legal is one variable with a list of whole numbers, and "
                f"steps, such as {_REPEAT}: {{t: [1, 2], steps: ...}}"
            )
        for number in numbers:
            for inner_name, inner_body in inner.items():
                key = _filled(inner_name, variables[0], number)
                if key in written:
                    raise UsageError(
                        f"{where}: step {short(key)} appears twice; write {{{variables[0]}}} into its name"
                    )
                written[key] = _filled(inner_body, variables[0], number)
    return written


def _filled(value: Any, variable: str, number: int) -> Any:
    if isinstance(value, dict):
        return {_filled(k, variable, number): _filled(v, variable, number) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(item, variable, number) for item in value]
    if not isinstance(value, str):
        return value
    pattern = re.compile(rf"\{{{re.escape(variable)}([+-]\d+)?\}}")

    def result(match: re.Match[str]) -> str:
        return str(number + int(match[1] or 0))

    if whole := pattern.fullmatch(value):
        return int(result(whole))
    return pattern.sub(result, value)


def swept(fields: Mapping[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Move settings that have a list instead of one value to `sweep`; those of `params` become `params.NAME`."""
    kept: dict[str, Any] = dict(fields)
    several: dict[str, list[Any]] = {}
    for name, value in fields.items():
        if name == "params" and isinstance(value, dict):
            several |= {f"params.{key}": item for key, item in value.items() if isinstance(item, list)}
            kept[name] = {key: item for key, item in value.items() if not isinstance(item, list)}
        elif isinstance(value, list) and name in section.model_fields and not _takes_lists(section, name):
            several[name] = kept.pop(name)
    if several:
        own = kept.get("sweep", {})
        kept["sweep"] = {**own, **several} if isinstance(own, dict) else own
    return kept


def combinations(sweep: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value per setting; a single empty choice if there are no settings."""
    return [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]


def label(choice: Mapping[str, Any]) -> str:
    """The suffix of a sweep's folder, such as `rho-0.4-gamma-0.5`."""
    parts = (f"{name.removeprefix('params.')}-{value}" for name, value in choice.items())
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


def chosen(fields: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    """Set a selection's fields to the values of one combination."""
    found = dict(fields)
    for name, value in choice.items():
        group, dot, key = name.partition(".")
        found[group] = {**found.get(group, {}), key: value} if dot else value
    return found


def _takes_lists(section: type[BaseModel], name: str) -> bool:
    annotation = section.model_fields[name].annotation
    return any(get_origin(kind) in (list, tuple) for kind in (annotation, *get_args(annotation)))
