"""The sections of a run's configuration: one class per kind of step, with the names of the steps that it reads."""

from typing import Any, ClassVar, TypeVar

from pydantic import Field

from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.part import Part
from sstoken.stages.score import ScoreOptions
from sstoken.stages.select import Select
from sstoken.stages.stage import Settings, Stage

S = TypeVar("S", bound=Settings)


class PartSection(Part):
    """A part of the examples of a tokens step."""

    tokens: str | None = None
    """The step whose tokens are taken. None: the only one before."""


class AnchorSection(Anchor):
    """Section `anchor`: what is trained, and on what."""

    tokens: str | None = None
    """The step whose tokens it trains on. None: the only one before."""
    masked: str | None = None
    """Instead: the step whose masked dataset it trains on."""


class ScoreSection(ScoreOptions):
    """Section `score`: which checkpoints, and how."""

    name: ClassVar[str] = "score"

    tokens: str | None = None
    """The step whose tokens are scored. None: the only one before."""
    checkpoints: dict[str, str] | list[str] | None = None
    """Names in the run's history (`step-0`, `last`, or `STEP/last` of the anchor run STEP), folders or Hub ids, or
    `{name: checkpoint}`. None: those that `select` compares."""
    attention_from: str | None = None
    """The one whose attention is measured too; None: the current one. `none`: no attention."""


class SelectSection(Select):
    """Section `select`: the method and what it compares."""

    tokens: str | None = None
    """The step whose tokens are selected from. None: the only one before."""
    scores: str | None = None
    """The step that scored them. None: the only one before."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Which checkpoint plays a role that the method names: `{history: base, current: sft}`."""
    history: str | None = None
    """Short for the role `history`. None: the first of the run's history or of `score.checkpoints`."""
    current: str | None = None
    """Short for the role `current`. None: the last."""
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Settings with several values each; every combination is selected into a folder of its own. `rho: [0.4, 0.6]` is
    short for it."""


class ExportSection(Export):
    """A masked dataset as a trainer takes it."""

    masked: str | None = None
    """The step whose masked dataset is exported. None: the only one before."""


KINDS: dict[str, type[Stage]] = {
    section.name: section
    for section in (Encode, PartSection, AnchorSection, ScoreSection, SelectSection, ExportSection)
}
"""Sections by a step's `stage`."""


def stage_of(section: Settings, stage: type[S], **changed: Any) -> S:
    """Build a stage from a section that has its fields, passing on only those that were given."""
    given = {name: getattr(section, name) for name in stage.model_fields if name in section.model_fields_set}
    return stage(**{**given, **changed})
