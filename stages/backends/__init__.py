"""Inference backends: token sequences in, signals out.

To add one: subclass `Backend` in a file here and enter it in `BACKENDS`. Nothing else changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class BackendOptions:
    """How a backend runs a checkpoint. Hashable: a process keeps the backend it has built."""

    checkpoint: str
    attention: bool
    """Measure attention importance beside the loss."""
    layer: int
    dtype: str
    """`float32`, `bfloat16`, or `auto` for the checkpoint's own."""
    device: str
    """`cpu`, `cuda`, ..., or `auto`."""
    batch_tokens: int
    trust_remote_code: bool


@dataclass(frozen=True)
class TokenSignals:
    """The signals of one sequence of T tokens."""

    loss: FloatArray
    """[T], nats; NaN off the response."""
    attention: FloatArray | None
    """[T], in [0, 1]; NaN off the response. None where not asked for."""


class Backend(ABC):
    """One checkpoint, ready to measure."""

    @abstractmethod
    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint.

        Raises:
            SstokenError: it cannot be loaded, or its architecture cannot be measured.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the model can embed."""

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Longest sequence in tokens; None: no limit known."""

    @abstractmethod
    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, TokenSignals]]:
        """Yield `(index, signals)` for every sequence, in any order.

        Args:
            sequences: token ids, [T] each.
            response_masks: [T] each; token 0 is never a response token, as nothing predicts it.
        """


class Latest(Generic[P, R]):
    """A cache of one: what a function last gave, forgotten before the next is made, so that two need not fit."""

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function
        self.held: dict[Any, R] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's value; its arguments must be hashable."""
        key = (args, tuple(sorted(kwargs.items())))
        if key not in self.held:
            self.held.clear()
            self.held[key] = self._function(*args, **kwargs)
        return self.held[key]


BACKENDS = {"hf": "stages.backends.hf:HFBackend"}
"""Name to `module:class`; the module is imported only when the backend is used."""


def resolve_backend(name: str) -> str:
    """`auto` as the backend that it stands for: transformers.

    Raises:
        UsageError: there is none of that name; lists those there are.
    """
    name = "hf" if name == "auto" else name
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known; legal: auto, {', '.join(BACKENDS)}")
    return name


def make_backend(name: str, options: BackendOptions) -> Backend:
    """Build the backend of that name.

    Raises:
        UsageError: see `resolve_backend`.
        SstokenError: see `Backend.__init__`.
    """
    module, _, attribute = BACKENDS[resolve_backend(name)].partition(":")
    backend: type[Backend] = getattr(import_module(module), attribute)
    return backend(options)
