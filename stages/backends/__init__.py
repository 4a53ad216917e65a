"""Inference backends: token sequences in, signals out.

To add one, subclass `Backend` in a file here and enter it in `BACKENDS`, or declare it in your own package as an
entry point of the group `sstoken.backends` (`name = "module:class"`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from sstoken.errors import UsageError
from sstoken.signals import ATTENTION, LOSS, Signal, get_signals
from sstoken.stages.checkpoints import check_content
from sstoken.stages.stage import Settings, has_to_be

P = ParamSpec("P")
R = TypeVar("R")
Measured = dict[str, NDArray[np.float32] | NDArray[np.int32]]
"""An example's signals by name: one value for each response token, in order; with `Signal.from_second`, none for the
first response token."""
Setting = str | int | float | bool | None


@dataclass(frozen=True)
class BackendOptions:
    """How a backend runs a checkpoint. Hashable, as the key under which a process caches its backend."""

    checkpoint: str
    signals: tuple[str, ...]
    """What to measure, by name (`sstoken.signals`)."""
    layer: int | None
    """Decoder layer of the signal `attention`; negative counts from the last; None: the last with softmax attention."""
    dtype: str
    """`float32`, `bfloat16`, or `auto` for the checkpoint's own."""
    device: str
    """`cpu`, `cuda`, ..., or `auto`."""
    batch_tokens: int | None
    """Most positions in a batch; None: the backend's own choice, within the free memory."""
    trust_remote_code: bool
    settings: tuple[tuple[str, Setting], ...] = ()
    """The backend's own settings, name and value; `read_settings` checks them."""
    log_folder: Path | None = None
    """Folder for the engine's log, `<backend>.log`; None: no log."""
    references: tuple[tuple[str, str], ...] = ()
    """Checkpoints that signals such as `kl@NAME` compare with: name, and folder or Hub id."""

    @property
    def attention_signals(self) -> list[Signal]:
        """The signals that need attention weights."""
        return [s for s in get_signals(self.signals) if s.needs == "attention"]

    def layer_of(self, signal: Signal) -> int | None:
        """Return the decoder layer of an attention signal: the one it names, else `layer`."""
        return self.layer if signal.layer is None else signal.layer


class LoadedModel(ABC):
    """One loaded checkpoint. Dropping the last reference frees its memory."""

    @abstractmethod
    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint.

        Raises:
            SstokenError: it cannot be loaded, or its architecture is not supported.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the model can embed."""

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Longest sequence in tokens, including generated ones; None: no limit known."""

    @property
    def remark(self) -> str:
        """How it computes, for the user; "" if there was nothing to choose."""
        return ""

    @property
    def dtype(self) -> str:
        """Dtype of the weights, which is recorded with the results; empty: the one that was asked for."""
        return ""


class Backend(LoadedModel):
    """A checkpoint that measures signals."""

    signals: ClassVar[frozenset[str]] = frozenset({LOSS, ATTENTION})
    """Names, without arguments, of the signals that it measures."""
    settings: ClassVar[type[Settings]] = Settings
    """Its own settings (`backend_options`); those marked SPEED_ONLY are not part of the fingerprint."""
    several_workers: ClassVar[bool] = True
    """Whether several processes may each hold one; False if it spreads over all devices itself."""

    @classmethod
    def refusal(cls, options: BackendOptions) -> str | None:
        """Return why it cannot measure a checkpoint and what can, in one line; None if it probably can.

        Checks what is installed and the checkpoint's configuration, but loads no weights.
        """
        return None

    @classmethod
    def preferred(cls, options: BackendOptions) -> bool:
        """Return whether `auto` means this backend."""
        return False

    @property
    def attention_layers(self) -> dict[str, int]:
        """The decoder layer, from 0, of each attention signal that it measures, if known."""
        return {}

    @abstractmethod
    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Measured]]:
        """Yield `(index, signals)` for every sequence, in any order.

        Args:
            sequences: token ids, [T] each.
            response_masks: [T] each; token 0 is never a response token, since nothing predicts it.
        """


class Latest(Generic[P, R]):
    """Make an object, or return the last one if it was made from the same arguments and files.

    The last one is dropped before the next is made: two models need not fit into memory.
    """

    def __init__(self, make: Callable[P, R]) -> None:
        self._make = make
        self.held: dict[Any, R] = {}

    def __call__(self, stamp: tuple[Any, ...], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the object; `stamp` changes with the files that it is made from, and arguments must be hashable."""
        key = (stamp, args, tuple(sorted(kwargs.items())))
        if key not in self.held:
            self.held.clear()
            self.held[key] = self._make(*args, **kwargs)
        return self.held[key]


BACKENDS = {
    "hf": "sstoken.stages.backends.hf:HFBackend",
    "vllm": "sstoken.stages.backends.vllm:VllmBackend",
    "vllm-server": "sstoken.stages.backends.vllm_server:VllmServerBackend",
}
"""`module:class` by name: a module is imported only when its backend is used."""
DEFAULT = "hf"
ENTRY_POINTS = "sstoken.backends"
"""Entry point group in which other packages declare theirs."""


def known_backends() -> dict[str, str]:
    """Return `module:class` by name for our backends and other packages', which cannot replace ours."""
    return {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)} | BACKENDS


def resolve_backend(name: str, options: BackendOptions) -> str:
    """Return the name of the backend that runs; `auto` is vllm on a GPU if it supports the checkpoint, else hf.

    Raises:
        UsageError: there is no such backend; lists those there are.
    """
    if name == "auto":
        if find_spec("vllm") is None:  # first, since importing the module is slow
            return DEFAULT
        return "vllm" if backend_class("vllm").preferred(options) else DEFAULT
    if name in BACKENDS:  # first, since finding others reads the metadata of every installed package
        return name
    if name not in (known := known_backends()):
        raise UsageError(f"backend {name!r} is not known; legal: auto, {', '.join(known)}")
    return name


def backend_class(name: str) -> type[Backend]:
    """Import and return the class of a known backend."""
    backend: type[Backend] = resolve_name(BACKENDS.get(name) or known_backends()[name])
    return backend


def read_settings(name: str, options: BackendOptions) -> Settings:
    """Return the settings of a backend, validated by its own class.

    Raises:
        UsageError: it has no such setting, or a value is out of range.
    """
    kind = backend_class(name).settings
    try:
        return kind.model_validate(dict(options.settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0]
        if first["type"] == "extra_forbidden":
            legal = ", ".join(kind.model_fields) or "none"
            raise UsageError(f"backend_options: {name} has no option {key!r}; legal: {legal}") from None
        raise UsageError(f"backend_options: {key} is {first['input']!r}; {has_to_be(first)}") from None


def check_backend(name: str, options: BackendOptions, workers: int = 1) -> None:
    """Refuse, before any work, what the backend cannot do.

    Raises:
        UsageError: the backend or a setting is unknown, or the backend does not support the signals, the number of
            workers or the checkpoint.
    """
    if made := [s.name for s in get_signals(options.signals) if s.needs == "generation"]:
        raise UsageError(
            f"score does not measure {made[0]}, which needs generation; run sstoken-curate {made[0]}"
        )
    name = resolve_backend(name, options)
    if name == DEFAULT and not options.settings:
        return  # it never refuses without loading, and its module imports torch
    read_settings(name, options)
    backend = backend_class(name)
    if left := [s.name for s in get_signals(options.signals) if s.base not in backend.signals]:
        raise UsageError(
            f"{name} does not measure {', '.join(left)}; it measures {', '.join(sorted(backend.signals))}; use "
            f"--backend {DEFAULT}"
        )
    if workers > 1 and not backend.several_workers:
        raise UsageError(f"workers is {workers}; {name} spreads over the devices itself, legal is 1")
    reason = backend.refusal(options)
    if reason is not None:
        raise UsageError(f"{options.checkpoint}: {reason}")


def deciding_settings(name: str, options: BackendOptions) -> dict[str, Any]:
    """Return the backend's own settings that are not the default and decide what is measured."""
    if not options.settings:
        return {}
    settings = read_settings(name, options)
    chosen = settings.model_dump(exclude_defaults=True)
    return {key: value for key, value in settings.fingerprinted().items() if key in chosen}


def make_backend(name: str, options: BackendOptions) -> Backend:
    """Build a backend.

    Raises:
        UsageError: see `check_backend`.
        SstokenError: see `Backend.__init__`.
    """
    check_backend(name, options)
    check_content(options.checkpoint)
    return backend_class(resolve_backend(name, options))(options)
