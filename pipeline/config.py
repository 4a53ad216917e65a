"""The run's configuration, read from YAML and validated."""

import difflib
import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from sstoken.errors import UsageError
from sstoken.pipeline.plain_yaml import read_yaml, short
from sstoken.pipeline.sections import (
    KINDS,
    AnchorSection,
    CriticalSection,
    ScoreSection,
    SelectSection,
    swept,
)
from sstoken.stages import storage
from sstoken.stages.encode import Encode
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.stage import Stage, has_to_be
from sstoken.stages.storage import expanded

LARGEST_SEED = 2**32 - 1
"""numpy's limit."""
M = TypeVar("M", bound=BaseModel)
_FOLDERS = {
    "encode": "tokens",
    "anchor": "history",
    "critical": "critical",
    "score": "scores",
    "select": "masked",
}
"""The folder that each section writes; a named step writes a folder of its own name."""
_PATHS = ("data", "model", "chat_template", "checkpoint", "checkpoints")
"""Fields that hold paths of inputs."""
_REPEAT = "repeat"


class RunConfig(BaseModel):
    """A whole run: its sections, or any number of named steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    out: str
    """The run's folder."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of the anchor runs and of the method `random`."""
    engine: str | None = None
    """Engine of every step that does not name its own: local or ray."""
    ray_address: str | None = None
    """Engine ray: the cluster's address."""
    ray_env: str | None = None
    """Engine ray: a YAML file with Ray's runtime environment."""
    encode: Encode | None = None
    anchor: AnchorSection | None = None
    """None: no anchor run; `score.checkpoints` names existing checkpoints."""
    critical: CriticalSection | None = None
    """None: no method reads the signal `critical`."""
    score: ScoreSection = ScoreSection()
    select: SelectSection = SelectSection()
    steps: dict[str, SerializeAsAny[Stage]] = Field(default_factory=dict)
    """Instead of the sections: steps by name, in the order in which they run."""
    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_form(self) -> "RunConfig":
        if bool(self.steps) == bool(self.encode):
            raise ValueError("a run has the section `encode`, or `steps`, and not both")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return storage.address(self.out)

    @property
    def file(self) -> Path | None:
        """The YAML file; None: made in Python."""
        return self._file

    @property
    def named(self) -> dict[str, Stage]:
        """Every step by name, in order; each section is a step of its name.

        If the methods read nothing but the signal `critical`, `score` is a step only if the file has that section.
        """
        if self.steps:
            return self.steps
        scored = "score" in self.model_fields_set or self.select.reads_scores
        sections: dict[str, Stage | None] = {
            "encode": self.encode,
            "anchor": self.anchor,
            "critical": self.critical,
            "score": self.score if scored else None,
            "select": self.select,
        }
        return {name: section for name, section in sections.items() if section is not None}

    def place(self, step: str) -> Path:
        """The folder that a step writes."""
        return self.folder / (step if self.steps else _FOLDERS[step])


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file.

    Args:
        path: the file. Relative paths in it are resolved from its folder, else from the working directory; `out` and
            `overrides` are relative to the working directory.
        overrides: `section.field=value`, the value in YAML.

    Raises:
        UsageError: no such file, not YAML, an unknown key (suggests the nearest legal one), or a value out of range.
    """
    file = expanded(path)
    if not file.is_file():
        raise UsageError(f"{path}: {'is a folder' if file.is_dir() else 'no such file'}; name a YAML file")
    values = read_yaml(file.read_bytes(), str(file))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: empty, or not a mapping; sections are {', '.join(RunConfig.model_fields)}")
    _beside_the_file(values, file.parent)
    for override in overrides:
        _override(values, override)
    for section in _FOLDERS:
        if section in values and values[section] is None:  # an empty section means the defaults
            values[section] = {}
    if "steps" in values:
        values["steps"] = _steps(_repeated(values["steps"], str(path)), str(path))
    else:
        encode = values.get("encode")
        for section, field in (("anchor", "model"), ("critical", "checkpoint")):
            if isinstance(encode, dict) and isinstance(values.get(section), dict) and "model" in encode:
                values[section].setdefault(field, encode["model"])
        if isinstance(values.get("select"), dict):
            values["select"] = swept(values["select"], SelectSection)
        if "out" in values and "encode" not in values and values.keys() <= RunConfig.model_fields.keys():
            raise UsageError(f"{path}: 'encode' is missing; set it")
    config = validated(RunConfig, values, str(path))
    config._file = file
    return config


def _beside_the_file(values: dict[str, Any], folder: Path) -> None:
    """Make relative paths that exist beside the file point there, in every section and step, in place."""
    if folder.resolve() == Path.cwd():
        return

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        if isinstance(value, dict):
            return {key: found(item) for key, item in value.items()}
        if not isinstance(value, str) or "://" in value or expanded(value).is_absolute():
            return value
        if (folder / value).exists():
            return str(folder / value)
        matches = glob.has_magic(value) and glob.glob(value, root_dir=folder)
        return str(Path(glob.escape(str(folder)), value)) if matches else value

    def visit(section: Any) -> None:
        for key, value in section.items() if isinstance(section, dict) else ():
            if key in _PATHS:
                section[key] = found(value)
            else:
                visit(value)

    visit(values)


def _repeated(steps: Any, where: str) -> Any:
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


def _steps(values: Any, where: str) -> dict[str, Stage]:
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{where}: steps is {short(values)}; it has to be a mapping of names to steps")
    found: dict[str, Stage] = {}
    for name, body in values.items():
        place = f"{where}: steps.{name}"
        if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\"):
            raise UsageError(f"{where}: step {short(name)}: the name cannot be a folder's; choose another")
        kind = body.get("stage") if isinstance(body, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise UsageError(f"{place}: stage is {short(kind)}; legal: {', '.join(KINDS)}")
        fields = {key: value for key, value in body.items() if key != "stage"}
        if KINDS[kind] is SelectSection:
            fields = swept(fields, SelectSection)
        found[name] = validated(KINDS[kind], fields, place)
    return found


def validated(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """Build a configuration object from values.

    Raises:
        UsageError: a value is wrong; says in one line which field, what was given and what is legal.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        # Report an unknown key first: it is often the missing one, misspelt.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UsageError(f"{where}: {_explain(model, errors)}") from None


def _explain(model: type[BaseModel], errors: Sequence[Mapping[str, Any]]) -> str:
    """Explain the first error, and those of the same union that got as far into the value."""
    # For a union, pydantic adds the branch to the location, such as `dict[str,str]`.
    before = tuple(takewhile(lambda part: "[" not in str(part), errors[0]["loc"]))
    branches = [e for e in errors if e["loc"][: len(before)] == before]
    deepest = max(len(e["loc"]) for e in branches)
    error, *others = [e for e in branches if len(e["loc"]) == deepest]
    location = [str(part) for part in error["loc"] if "[" not in str(part)]
    if error["type"] == "extra_forbidden":  # a key can be any text
        location = [*location[: len(error["loc"]) - 1], str(error["loc"][-1])]
    name = short(".".join(location))[1:-1]
    if error["type"] == "extra_forbidden":
        legal = _fields(_owner(model, location[:-1]))
        near = difflib.get_close_matches(location[-1], legal, n=1)
        inside = [s for s in _FOLDERS if len(location) == 1 and name in _fields(_owner(model, [s]))]
        if near:
            return f"unknown key {name!r}; did you mean {near[0]!r}?"
        if inside and model is RunConfig:
            return f"unknown key {name!r}; did you mean {' or '.join(repr(f'{s}.{name}') for s in inside)}?"
        return f"unknown key {name!r}; legal: {', '.join(legal)}"
    if error["type"] == "missing":
        return f"{name!r} is missing; set it"
    if error["type"] == "model_type":
        legal = _fields(_owner(model, location))
        return f"{name} is {short(error['input'])}; it has to be a section with the fields {', '.join(legal)}"
    if not location:
        return str(error["msg"]).removeprefix("Value error, ")
    legal = [has_to_be(error), *(has_to_be(other).removeprefix("it has to be ") for other in others)]
    return f"{name} is {short(error['input'])}; {', or '.join(dict.fromkeys(legal))}"


def _fields(model: type[BaseModel]) -> list[str]:
    """The fields of a section; those that only say where it runs come last."""
    return sorted(model.model_fields, key=lambda name: name in ShardedStage.model_fields)


def _owner(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The configuration class at a location."""
    for part in location:
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return model


def _override(values: dict[str, Any], override: str) -> None:
    """Set one field. (OmegaConf's dotlist would bring interpolation and another YAML reader with it.)"""
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
