"""What a stage is: a frozen configuration plus `run(context) -> metrics`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")
R = TypeVar("R")


class _Marker:
    """Says something of a field; stands in its `Annotated[...]`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


SPEED_ONLY = _Marker("SPEED_ONLY")
"""The field changes how fast a stage runs, never what it writes: it is left out of the fingerprint."""
BY_CONTENT = _Marker("BY_CONTENT")
"""The field names a place whose content `Stage.sources` identifies: the name is left out of the fingerprint."""


class Progress(Protocol):
    """A progress bar under way."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done; less where an attempt was in vain."""

    def skip(self, amount: int) -> None:
        """Count units that were done before: they say nothing about the speed."""

    def note(self, text: str) -> None:
        """Show `text` beside the figures."""


ProgressBar = Callable[[str, int | None], AbstractContextManager[Progress]]
"""`bar(unit, total)` opens a progress bar; `total` None: not known beforehand."""


class NoProgress:
    """A `Progress` that shows nothing."""

    def advance(self, amount: int = 1) -> None:
        """See `Progress`."""

    def skip(self, amount: int) -> None:
        """See `Progress`."""

    def note(self, text: str) -> None:
        """See `Progress`."""


@contextmanager
def no_progress_bar(unit: str, total: int | None) -> Iterator[Progress]:
    """A `ProgressBar` for all but one of several processes that do the same work."""
    yield NoProgress()


@dataclass(frozen=True)
class Task(Generic[T]):
    """One piece of a stage's work, independent of the others: usually a shard."""

    output: Path
    """The file that exists once the task is done. It is written last and atomically."""
    size: int
    """In units of the progress bar."""
    work: T
    """What the stage's function is given; it must pickle."""


class Worker(Protocol):
    """Where a task runs."""

    device: str | None
    """The device that is this worker's, such as `cuda:1`. None: whichever the stage names."""

    def advance(self, amount: int) -> None:
        """Count `amount` units of the task as done."""


class Engine(Protocol):
    """Maps a function over tasks: in this process, in several, or on several machines.

    What makes that safe lies in the tasks: each has a name that does not depend on the engine, writes atomically, and
    may be done twice.
    """

    rank: int
    """Which of `world_size` parts of the work is done here."""
    world_size: int

    def map(
        self, function: Callable[[T, Worker], R], tasks: Iterable[Task[T]], progress: Progress
    ) -> Iterator[R]:
        """Yield `function(task.work, worker)` of each task as it is done, in no order; tasks are read lazily.

        `function` must pickle. A task whose worker process dies is done again, at most twice.

        Raises:
            QuarantinedError: names the tasks that failed each time; all others are done.
        """


@dataclass(frozen=True)
class Context:
    """What the runner hands to a stage."""

    inputs: Mapping[str, Path]
    """Finished folders by name (`tokens`, `scores`, ...). Read-only."""
    out: Path
    """The folder under construction. Shards already in it are complete: an interrupted run left them."""
    seed: int
    fingerprint: str
    """Fingerprint of this stage with these settings and inputs, for provenance."""
    engine: Engine
    progress: ProgressBar
    keep: Callable[[], None] = lambda: None
    """Called where a later run could go on from `out`: has its storage keep what is there."""


class Settings(BaseModel):
    """Base of every configuration: its fields are all there are, and do not change."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    def fingerprinted(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        fields = type(self).model_fields.items()
        left_out = {
            name for name, field in fields if any(m in (SPEED_ONLY, BY_CONTENT) for m in field.metadata)
        }
        return self.model_dump(mode="json", exclude=left_out)


class EngineOptions(Settings):
    """What runs a stage's tasks, and on how many processes: the same for every stage, and never what is written."""

    engine: Annotated[str, SPEED_ONLY] = "local"
    """What runs the work: local (processes on this machine), ray (a Ray cluster), or another package's engine."""
    workers: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Processes. Default: 1."""
    ray_address: Annotated[str | None, SPEED_ONLY] = None
    """Engine ray: the cluster's address: auto, HOST:6379 or ray://HOST:10001. Default: RAY_ADDRESS, else a Ray on this
    machine alone."""
    ray_env: Annotated[str | None, SPEED_ONLY] = None
    """Engine ray: a YAML file with Ray's runtime environment, such as `pip` or `env_vars`."""
    every_core: ClassVar[bool] = False
    """Whether the default is a process for every core."""


class Stage(Settings):
    """Base of every stage. Fields are its configuration: the YAML section and the CLI options of its verb."""

    name: ClassVar[str]
    """The stage's file, YAML section and CLI verb."""
    folder: ClassVar[str]
    """The folder it writes in a run."""

    distributed: ClassVar[bool] = False
    """Whether the processes that torchrun starts can run it together."""
    seeded: ClassVar[bool] = False
    """Whether what it writes depends on the seed."""
    follows_sources: ClassVar[bool] = False
    """Whether the same call makes its output anew where only the content of its sources has changed."""

    def check(self) -> None:
        """Refuse, before any work, what can be seen to be wrong without reading the data.

        Raises:
            UsageError: one line; the value received, what is legal, what to do.
        """

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Content identities of what is read from outside the run, for the fingerprint.

        `digest(file)` is the file's sha256, cached while its size and time stand.
        """
        return {}

    def faster(self) -> str:
        """Return, for work that takes long, what would make it faster; "" if nothing is known to."""
        return ""

    def agree(self, run: bool | None) -> bool:
        """Among the processes that run the stage together: the main one's word on whether there is work to do.

        Called by each once, by the main process when the folder is as `run` is to find it.
        """
        return bool(run)

    def run(self, context: Context) -> dict[str, Any]:
        """Do the work; return the metrics that the manifest keeps. `context.out` is the only place written."""
        raise NotImplementedError
