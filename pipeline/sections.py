"""The sections of a run's configuration: one class per kind of step, with the names of the steps that it reads."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field

from sstoken.methods import Input, Method, get_method
from sstoken.methods.presets import method_name
from sstoken.signals import get_signal
from sstoken.stages.anchor import Anchor
from sstoken.stages.critical import Critical
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.part import Part
from sstoken.stages.score import ScoreOptions
from sstoken.stages.select import Select
from sstoken.stages.stage import BY_CONTENT, Settings, Stage

S = TypeVar("S", bound=Settings)
TOKENS, SCORES, MASKED = ("encode", "part"), ("score",), ("select",)
"""The stages that write tokens, scores and masked datasets, of those that a run can have."""


class ReadsSteps:
    """A section whose fields name the steps that its stage reads; the plan needs to know nothing else of it."""

    runs: ClassVar[type[Stage]]
    reads: ClassVar[dict[str, tuple[str, ...]]]
    """The stages that can write an input, by the field that names the step."""


class PartSection(ReadsSteps, Part):
    """A part of the examples of a tokens step."""

    runs: ClassVar[type[Stage]] = Part
    reads: ClassVar[dict[str, tuple[str, ...]]] = {"tokens": TOKENS}

    tokens: str | None = None
    """The step whose tokens to take. None: the only earlier one."""


class AnchorSection(Anchor):
    """Section `anchor`: what is trained, and on what."""

    tokens: str | None = None
    """The step on whose tokens to train. None: the only earlier one."""
    masked: str | None = None
    """The step on whose masked dataset to train, instead of `tokens`."""


class CriticalSection(Critical):
    """Section `critical`: which checkpoint generates, and how answers are checked."""

    tokens: str | None = None
    """The step whose tokens are tried. None: the only earlier one."""
    checkpoint: Annotated[str, BY_CONTENT]
    """A name in the run's history (`last`, or `STEP/last` of the anchor run STEP), a folder or a Hub id."""


class ScoreSection(ScoreOptions):
    """Section `score`: which checkpoints, and how."""

    name: ClassVar[str] = "score"

    tokens: str | None = None
    """The step whose tokens to score. None: the only earlier one."""
    checkpoints: dict[str, str] | list[str] | None = None
    """Names in the run's history (`step-0`, `last`, or `STEP/last` of the anchor run STEP), folders or Hub ids, or
    `{name: checkpoint}`. None: those that `select` compares."""
    attention_from: str | None = None
    """The checkpoint whose attention is measured, too. None: the current one. `none`: no attention."""


class SelectSection(Select):
    """Section `select`: the method and what it compares."""

    tokens: str | None = None
    """The step whose tokens to select from. None: the only earlier one."""
    scores: str | None = None
    """The step that scored them. None: the only earlier one."""
    critical: str | None = None
    """The step that measured the signal `critical`, for methods that read it. None: the only earlier one."""
    roles: dict[str, str] = Field(default_factory=dict)
    """The checkpoint in each role of the method: `{history: base, current: sft}`."""
    history: str | None = None
    """Short for the role `history`. None: the first of the run's history or of `score.checkpoints`."""
    current: str | None = None
    """Short for the role `current`. None: the last."""
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Settings with several values; every combination is written into a folder of its own. `rho: [0.4, 0.6]` is short
    for it."""

    def methods(self) -> Iterator[Method]:
        """Yield the method, or each method of a sweep."""
        for choice in combinations({"method": self.sweep.get("method", [self.method])}):
            yield get_method(method_name(str(choice["method"])))

    @property
    def reads_critical(self) -> bool:
        """Whether a method reads the signal `critical`."""
        return any(_is_generated(name) for method in self.methods() for name in method.inputs)

    @property
    def reads_scores(self) -> bool:
        """Whether it reads a `score` step: false only if its methods read nothing but the signal `critical`."""
        if self.scores is not None or self.examples is not None:
            return True
        return not all(m.inputs and all(map(_is_generated, m.inputs)) for m in self.methods())


def _is_generated(name: str) -> bool:
    return get_signal(Input(name).signal).needs == "generation"


class ExportSection(ReadsSteps, Export):
    """A masked dataset in a trainer's format."""

    runs: ClassVar[type[Stage]] = Export
    reads: ClassVar[dict[str, tuple[str, ...]]] = {"masked": MASKED}

    masked: str | None = None
    """The step whose masked dataset to export. None: the only earlier one."""


KINDS: dict[str, type[Stage]] = {
    section.name: section
    for section in (
        Encode,
        PartSection,
        AnchorSection,
        CriticalSection,
        ScoreSection,
        SelectSection,
        ExportSection,
    )
}
"""Sections by a step's `stage`."""


def stage_of(section: Settings, stage: type[S], **changed: Any) -> S:
    """Build a stage from a section that has its fields, passing on only those that were given."""
    given = {name: getattr(section, name) for name in stage.model_fields if name in section.model_fields_set}
    return stage(**{**given, **changed})


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
