"""Generation through the inference backends: candidates for a position, and greedy continuations.

Another package's backend that can generate names its `Generator` in a class attribute, `generator = "module:class"`.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pkgutil import resolve_name

from sstoken.errors import UsageError
from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.stages.backends import BackendOptions, LoadedModel, backend_class, check_backend, resolve_backend
from sstoken.stages.checkpoints import check_content

GENERATORS = {
    "hf": "sstoken.stages.backends.hf:HFGenerator",
    "vllm": "sstoken.stages.backends.vllm:VllmGenerator",
}
"""`module:class` of our backends' generators, by name."""


class Generator(LoadedModel):
    """A checkpoint that generates."""

    @abstractmethod
    def candidates(
        self, sequences: Sequence[IdArray], positions: Sequence[IdArray], count: int
    ) -> list[IdArray]:
        """Return the likeliest tokens at some positions of each sequence, given the tokens before them.

        Args:
            sequences: token ids, [T] each.
            positions: [P] each; a position is at least 1.
            count: how many candidates.

        Returns:
            [P, count] for each sequence, likeliest first; ties go to the lower id.
        """

    @abstractmethod
    def continue_greedily(
        self,
        sequences: Sequence[IdArray],
        branches: Sequence[Branch],
        stop: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[tuple[int, Continuation]]:
        """Yield `(index, continuation)` for every branch, in any order.

        Args:
            sequences: token ids, [T] each; a prefix that branches share is computed once.
            branches: where to continue from.
            stop: ids that end a continuation and are not part of it; a branch that begins with one is complete.
            max_new_tokens: longest continuation; it is also cut at the model's longest sequence.
        """


def check_generator(name: str, options: BackendOptions, workers: int = 1) -> None:
    """Refuse, before any work, a backend that cannot generate, or not from this checkpoint.

    Raises:
        UsageError: names the backends that can.
    """
    name = resolve_backend(name, options)
    _generator_class(name)
    check_backend(name, options, workers)


def make_generator(name: str, options: BackendOptions) -> Generator:
    """Build a backend's generator.

    Raises:
        UsageError: see `check_generator`.
        SstokenError: see `Generator.__init__`.
    """
    check_generator(name, options)
    check_content(options.checkpoint)
    kind: type[Generator] = resolve_name(_generator_class(resolve_backend(name, options)))
    return kind(options)


def _generator_class(name: str) -> str:
    """Return the `module:class` of a backend's generator."""
    found: str | None = GENERATORS.get(name) or getattr(backend_class(name), "generator", None)
    if found is None:
        legal = " or ".join(GENERATORS)
        raise UsageError(f"backend {name!r} scores and cannot generate; use --backend {legal}")
    return found
