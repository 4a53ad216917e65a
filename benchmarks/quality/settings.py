"""A study, as its YAML file describes it."""

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

STUDIES = Path(__file__).parent / "studies"


class Strict(BaseModel):
    """A model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Seed(Strict):
    """What is drawn: given apart, so that the sources of variance can be told apart."""

    data: int
    """Of the training questions."""
    noise: int
    """Of the noise planted in their answers."""
    order: int
    """Of the batches."""
    draw: int | None = None
    """Of LoRA's first weights and of the mask of `random`; None: the same number as `order`."""

    @property
    def drawn(self) -> int:
        """The number that `draw` stands for."""
        return self.order if self.draw is None else self.draw

    @property
    def key(self) -> str:
        """For file names."""
        draw = "" if self.draw is None else f"-r{self.draw}"
        return f"d{self.data}-n{self.noise}-o{self.order}{draw}"


class Lesson(Strict):
    """What the base is taught first, on clean answers of the study's data: a base that knows such answers."""

    num_train: int
    """Answers, each seen once; of a seed that no training set has."""
    batch_size: int = 16
    learning_rate: float = 2e-3

    @property
    def key(self) -> str:
        """For folder names."""
        return f"{self.num_train}-{self.batch_size}-{self.learning_rate:g}"


class MethodRun(Strict):
    """One way to select."""

    method: str
    """One of `scores.SCORES`, or `base` (no training), `full`, `random`, `noise` (drops exactly what was planted),
    `worst`."""
    rho: float = Field(default=0.6, gt=0, le=1)
    """The share of response tokens kept."""
    scope: Literal["sample", "global"] = "sample"
    """The share of each answer, or of all together."""
    protect: bool = False
    """Keep the tokens that end a turn, whatever their score."""
    protocol: Literal["equal-steps", "equal-tokens"] = "equal-steps"
    """As many steps as `full`, or as many kept tokens."""
    published: Literal["offline", "in-loop"] | None = None
    """The method of `sstoken.methods` with that name, by its own parameters, scope, policy and weights: from a mask or
    weights made before training, or selecting inside each step. None: a score of this benchmark."""

    @model_validator(mode="after")
    def _no_settings_of_its_own(self) -> Self:
        extra = self.model_fields_set - {"method", "published"}
        if self.published and extra:
            raise ValueError(f"a published method has its own {', '.join(sorted(extra))}")
        return self

    @property
    def key(self) -> str:
        """The row's name in tables and files."""
        if self.published:
            return f"{'published' if self.published == 'offline' else 'in-loop'} {self.method}"
        if self.method in ("base", "full"):
            return self.method
        scope = "" if self.scope == "sample" else " global"
        protect = " protected" if self.protect else ""
        tokens = " equal tokens" if self.protocol == "equal-tokens" else ""
        share = "" if self.method == "noise" else f" {self.rho:g}"
        return f"{self.method}{share}{scope}{protect}{tokens}"


class Study(Strict):
    """What is trained on what, and how it is judged."""

    name: str
    about: str
    base: Literal["smollm2", "small"]
    upper_layers: int | None = None
    """Train LoRA in so many of the last layers; None trains all weights."""
    lesson: Lesson | None = None
    """None: the base as it is."""
    data: Literal["gsm8k", "families"]
    num_train: int
    noise_rate: float = Field(ge=0, le=1)
    """The probability of each kind of noise in each answer; 0 is clean data."""
    phrases: Literal["tune", "held"] | None = None
    """Of which half the planted stock phrases are; None: of both."""
    batch_size: int = 8
    epochs: int = 1
    learning_rate: float = 1e-3
    num_held_out: int = 0
    """Clean held-out answers whose loss is measured."""
    num_greedy: int = 0
    """Held-out questions that are answered greedily."""
    max_new_tokens: int = 80
    num_forgetting: int = 0
    """Roleplay answers, and texts without the chat template, whose loss is measured."""
    max_length: int = 512
    methods: tuple[MethodRun, ...] = ()
    """None: nothing is trained; the base model's signals alone are measured, and how they find the noise."""
    seeds: tuple[Seed, ...]
    variance: tuple[Seed, ...] = ()
    """More seeds, each of which differs from the first of `seeds` in one source alone."""
    variance_methods: tuple[MethodRun, ...] = (MethodRun(method="full"),)
    """What is trained with those."""
    checkpoints: tuple[int, ...] = ()
    """Steps of `full` after which the loss of the training answers is measured: other histories for REL."""
    layers: bool = False
    """Measure the base's prompt attention in every layer."""

    def varied(self, seed: Seed) -> list[MethodRun]:
        """What is trained with one of `variance`: a draw matters to `random` alone where all weights are trained."""
        if seed.drawn == self.seeds[0].drawn or self.upper_layers is not None:
            return list(self.variance_methods)
        return [m for m in self.variance_methods if m.method in ("full", "random")]


def read_study(name: str) -> Study:
    """The study of a name in `studies/`, or of a path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
