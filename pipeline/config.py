"""The run's configuration: YAML, validated at the edge."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sstoken.errors import UsageError
from sstoken.pipeline.plain_yaml import read_yaml, short
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.score import ScoreOptions
from sstoken.stages.select import Select

LARGEST_SEED = 2**32 - 1
"""The largest that numpy takes."""
M = TypeVar("M", bound=BaseModel)


class ScoreSection(ScoreOptions):
    """Section `score`: which checkpoints, and how."""

    checkpoints: dict[str, str] | list[str] | None = None
    """Names in the run's history (`step-0`, `last`), folders or Hub ids, or `{name: folder}`.
    None: those that `select` compares."""
    attention_from: str | None = None
    """The one whose attention is measured too; None: the current one. `none`: no attention."""


class SelectSection(Select):
    """Section `select`: the method and what it compares."""

    history: str | None = None
    """Name of the history checkpoint; None: the first of the run's history or of `score.checkpoints`."""
    current: str | None = None
    """Name of the current checkpoint; None: the last."""


class RunConfig(BaseModel):
    """A whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    out: str
    """The run's folder."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Of the anchor run, and of the method `random`."""
    encode: Encode
    anchor: Anchor | None = None
    """None: no anchor run; `score.checkpoints` names checkpoints that are there already."""
    score: ScoreSection = ScoreSection()
    select: SelectSection = SelectSection()

    @property
    def folder(self) -> Path:
        """Where the run stands."""
        return Path(self.out).expanduser()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file.

    Args:
        path: the file. Relative paths in it are relative to the working directory.
        overrides: `section.field=value`, the value in YAML.

    Raises:
        UsageError: not there, not YAML, an unknown key (the nearest legal one is suggested), a value out of range.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"{path}: {'is a folder' if file.is_dir() else 'no such file'}; name a YAML file")
    values = read_yaml(file.read_bytes(), str(file))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: empty, or not a mapping; sections are {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        _override(values, override)
    for section in ("encode", "anchor", "score", "select"):
        if section in values and values[section] is None:  # nothing under it asks for the defaults
            values[section] = {}
    encode, anchor = values.get("encode"), values.get("anchor")
    if isinstance(encode, dict) and isinstance(anchor, dict) and "model" in encode:
        anchor.setdefault("model", encode["model"])
    return validated(RunConfig, values, str(path))


def validated(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """Build a configuration object, or say in one line what is wrong with the values.

    Raises:
        UsageError: names the field, the value, what is legal.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{where}: {_explain(model, first)}") from None


def _explain(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    # pydantic names the branch of a union in the location, such as `dict[str,str]`
    location = [str(part) for part in error["loc"] if "[" not in str(part)]
    name = short(".".join(location))[1:-1]
    if error["type"] == "extra_forbidden":
        legal = list(_owner(model, location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], legal, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(legal)}"
        return f"unknown key {name!r}; {hint}"
    if error["type"] == "missing":
        return f"{name!r} is missing; set it"
    if error["type"] == "model_type":
        legal = list(_owner(model, location).model_fields)
        return f"{name} is {short(error['input'])}; it has to be a section with the fields {', '.join(legal)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{name} is {short(error['input'])}; {message[:1].lower()}{message[1:]}"


def _owner(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The configuration class at that place."""
    for part in location:
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)),
            model,
        )
    return model


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UsageError(f"--set {override!r}: legal is section.field=value, such as select.rho=0.4")
    *sections, field = key.split(".")
    target = values
    for section in sections:
        child = target.get(section)
        if child is None:
            child = target[section] = {}
        if not isinstance(child, dict):
            raise UsageError(f"--set {override!r}: {section!r} has no fields")
        target = child
    target[field] = read_yaml(text, f"--set {short(override)}")
