"""Generation through the inference backends: a position's candidates, and greedy continuations.

Another package's backend that can do this names its `Generator` in a class attribute, `generator = "module:class"`;
the others refuse.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module

from sstoken.errors import UsageError
from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.stages.backends import (
    BackendOptions,
    backend_class,
    check_backend,
    resolve_backend,
)
from sstoken.stages.checkpoints import check_content

GENERATORS = {
    "hf": "sstoken.stages.backends.hf_generation:HFGenerator",
    "vllm": "sstoken.stages.backends.vllm_generation:VllmGenerator",
}
"""Our backends' generators: name to `module:class`, as `BACKENDS`."""


class Generator(ABC):
    """One checkpoint, ready to generate. It is let go by dropping it."""

    @abstractmethod
    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint.

        Raises:
            SstokenError: it cannot be loaded, or cannot generate.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the model can embed."""

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Longest sequence in tokens, what is generated counted; None: no limit known."""

    @property
    def remark(self) -> str:
        """How it generates here, for the user; empty: nothing was chosen."""
        return ""

    @abstractmethod
    def candidates(
        self, sequences: Sequence[IdArray], positions: Sequence[IdArray], count: int
    ) -> list[IdArray]:
        """The likeliest tokens at some positions of each sequence, given what precedes them.

        Args:
            sequences: token ids, [T] each.
            positions: [P] each; a position is at least 1.
            count: how many candidates.

        Returns:
            [P, count] for each sequence, likeliest first; of equally likely ones the lower id.
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
            sequences: token ids, [T] each; what branches of one share is computed once.
            branches: where to go on from.
            stop: ids that end a continuation, none of which it keeps; a branch whose own token is one is at its end.
            max_new_tokens: at which a continuation is cut; at the model's longest sequence too.
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
    """Build the generator of the backend of that name.

    Raises:
        UsageError: see `check_generator`.
        SstokenError: see `Generator.__init__`.
    """
    check_generator(name, options)
    check_content(options.checkpoint)
    module, _, attribute = _generator_class(resolve_backend(name, options)).partition(":")
    kind: type[Generator] = getattr(import_module(module), attribute)
    return kind(options)


def _generator_class(name: str) -> str:
    """Its `module:class`."""
    found: str | None = GENERATORS.get(name) or getattr(backend_class(name), "generator", None)
    if found is None:
        legal = " or ".join(GENERATORS)
        raise UsageError(f"backend {name!r} scores and cannot generate; use --backend {legal}")
    return found
