"""The base class of stages: a frozen configuration with `run(context) -> metrics`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
R = TypeVar("R")

SPEED_ONLY = "SPEED_ONLY"
"""In a field's `Annotated[...]`: it changes how fast a stage runs, not what it writes; no part of the fingerprint."""
BY_CONTENT = "BY_CONTENT"
"""In a field's `Annotated[...]`: it names a file or folder whose content (`Stage.sources`) is part of the fingerprint,
unlike its name."""


class Progress:
    """An open progress bar; this base class shows nothing."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done; negative takes a failed attempt back."""

    def skip(self, amount: int) -> None:
        """Count units done by an earlier run, without counting them towards the speed."""

    def note(self, text: str) -> None:
        """Show `text` beside the figures."""


ProgressBar = Callable[[str, int | None], AbstractContextManager[Progress]]
"""`bar(unit, total)` opens a progress bar; `total` is None if it is not known."""


@contextmanager
def no_progress_bar(unit: str, total: int | None) -> Iterator[Progress]:
    """A `ProgressBar` that shows nothing."""
    yield Progress()


@dataclass(frozen=True)
class Task(Generic[T]):
    """One independent piece of a stage's work, usually a shard."""

    output: Path
    """The file that exists once the task is done. It is written last and atomically."""
    size: int
    """In units of the progress bar."""
    work: T
    """Argument of the stage's function; must pickle."""


class Worker(Protocol):
    """The process that runs a task."""

    device: str | None
    """This worker's device, such as `cuda:1`. None: the stage's own setting."""

    def advance(self, amount: int) -> None:
        """Count `amount` units of the task as done."""


class Engine(Protocol):
    """Maps a function over tasks: in this process, in several, or on several machines.

    That is safe because a task's output does not depend on the engine, is written atomically, and may be written twice.
    """

    rank: int
    """Which of `world_size` parts of the work to do here."""
    world_size: int

    def map(
        self, function: Callable[[T, Worker], R], tasks: Iterable[Task[T]], progress: Progress
    ) -> Iterator[R]:
        """Yield `function(task.work, worker)` for each task, in any order; reads `tasks` lazily.

        `function` must pickle. A task whose worker process dies is done again, at most twice.

        Raises:
            QuarantinedError: names the tasks whose every attempt failed; all others are done.
        """


@dataclass(frozen=True)
class Context:
    """What the runner passes to a stage."""

    inputs: Mapping[str, Path]
    """Finished folders by name (`tokens`, `scores`, ...). Read-only."""
    out: Path
    """The partial folder. Shards in it are complete: an interrupted run left them."""
    seed: int
    fingerprint: str
    """Fingerprint of this stage's settings and inputs, for provenance."""
    engine: Engine
    progress: ProgressBar
    unchanged: Callable[[], None] = lambda: None
    """Raises `ChangedError` if what is read has changed since the work began. Only `reads_once` stages call it."""
    keep: Callable[[], None] = lambda: None
    """Call it when `out` is in a state to resume from: its storage saves what is there."""


class Settings(BaseModel):
    """Base of every configuration: frozen, and strict about unknown fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    def fingerprinted(self) -> dict[str, Any]:
        """Return the fields that decide what is written, ready for JSON."""
        fields = type(self).model_fields.items()
        left_out = {
            name for name, field in fields if any(m in (SPEED_ONLY, BY_CONTENT) for m in field.metadata)
        }
        return self.model_dump(mode="json", exclude=left_out)


_BOUNDS = {
    "greater_than_equal": "legal is {ge} or more",
    "greater_than": "legal is more than {gt}",
    "less_than_equal": "legal is {le} or less",
    "less_than": "legal is less than {lt}",
}
_KINDS = {
    "int": "it has to be a whole number",
    "float": "it has to be a number, such as 0.5",
    "finite_number": "it has to be a finite number",
    "bool": "it has to be true or false",
    "string": "it has to be text",
    "tuple": "it has to be a list, such as [a, b]",
    "list": "it has to be a list, such as [a, b]",
    "dict": "it has to be a mapping of names to values, such as {a: b}",
}


def has_to_be(error: Mapping[str, Any]) -> str:
    """Return what an error of pydantic's asks for, such as `legal is 1 or more`."""
    kind = str(error["type"])
    if kind in _BOUNDS:
        return _BOUNDS[kind].format_map(error["ctx"])
    told = _KINDS.get(kind) or _KINDS.get(kind.partition("_")[0])
    message = str(error["msg"]).removeprefix("Value error, ")
    return told or message[:1].lower() + message[1:]


class EngineOptions(Settings):
    """What runs a stage's tasks, and in how many processes. Never changes what is written."""

    engine: Annotated[str, SPEED_ONLY] = "local"
    """What runs the tasks: local (processes on this machine), ray (a Ray cluster), or another package's engine."""
    workers: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Processes. Default: 1."""
    ray_address: Annotated[str | None, SPEED_ONLY] = None
    """For engine ray, the cluster's address: auto, HOST:6379 or ray://HOST:10001. Default: RAY_ADDRESS, else a new
    Ray on this machine only."""
    ray_env: Annotated[str | None, SPEED_ONLY] = None
    """For engine ray, a YAML file with its runtime environment, such as `pip` or `env_vars`."""
    every_core: ClassVar[bool] = False
    """Whether `workers` defaults to one process per core."""


class Stage(Settings):
    """Base of every stage. Its fields are its YAML section and the CLI options of its verb."""

    name: ClassVar[str]
    """YAML section and CLI verb."""
    folder: ClassVar[str]
    """Name of its folder in a run."""

    distributed: ClassVar[bool] = False
    """Whether several processes, started by torchrun, can run it together."""
    seeded: ClassVar[bool] = False
    """Whether what it writes depends on the seed."""
    reads_once: ClassVar[bool] = False
    """Whether it reads inputs and sources only before its work starts; other stages read them until they end."""
    follows_sources: ClassVar[bool] = False
    """Whether to make the output again if only the content of its sources has changed."""

    def check(self) -> None:
        """Refuse, before any work, settings that are wrong whatever the data.

        Raises:
            UsageError: one line with the value received, what is legal, and what to do.
        """

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Return what identifies the content that is read from outside the run, for the fingerprint.

        `digest(file)` returns the file's SHA-256, cached until its size or times change.
        """
        return {}

    def faster(self) -> str:
        """Return what would make a long run faster; "" if nothing is known."""
        return ""

    def agree(self, run: bool | None) -> bool:
        """Return the main process's decision whether to run, in each process that runs the stage together.

        Every process calls it once, the main process after it has prepared the folder for `run`.
        """
        return bool(run)

    def run(self, context: Context) -> dict[str, Any]:
        """Do the work, writing only to `context.out`; return the metrics for the manifest."""
        raise NotImplementedError
