"""Base models in memory: one per process, on which adapters are swapped."""

import gc
from typing import Any

import torch

from sstoken.errors import UsageError
from sstoken.stages.backends import Latest
from sstoken.stages.backends.adapters import Adapter
from sstoken.stages.checkpoints import stamp
from sstoken.stages.hub_models import first_line
from sstoken.stages.loading import load_model


class SharedBase:
    """A base model in memory, on which adapters are swapped: after any of them it is bit-equal to itself."""

    def __init__(self, ref: str, dtype: str, device: str, trust_remote_code: bool) -> None:
        self._place = (ref, dtype, device, trust_remote_code)
        self.model: Any = None
        self.unused: list[str] = []
        """Names of weights in its files that it makes no use of."""
        self._adapted: Any = None
        """peft's model, where an adapter is on."""
        self._adapter: tuple[Any, ...] | None = None
        """The stamp of the adapter that is on: another one may stand in the same folder by now."""
        self._load()

    def use(self, adapter: str | None) -> None:
        """Put the adapter of that folder on the base in place of the last one; None: the bare base.

        Raises:
            SstokenError: the adapter does not load, or is of a kind that is not supported.
        """
        wanted = stamp(adapter) if adapter is not None else None
        if self.model is not None and wanted == self._adapter:
            return
        new = None if adapter is None else Adapter(adapter)
        if self.model is None or self._adapter is not None:
            self._take_off()
        if new is not None:
            whole, self.model = self.model, None  # whatever goes wrong, the base is loaded again
            self._adapted = new.put_on(whole)
            self.model = whole
            self._leaves_base = new.leaves_base
        self._adapter = wanted

    def _take_off(self) -> None:
        """Back to the bare base: from disk where the adapter, or one that failed, may have changed a tensor."""
        if self.model is not None and self._leaves_base:
            self._adapted.unload()
            self._adapted = self._adapter = None
            if _layout(self.model) == self._base:
                return
        self.model = self._adapted = self._adapter = None  # before loading: two need not fit into memory
        gc.collect()
        self._load()

    def _load(self) -> None:
        ref, dtype, device, trust_remote_code = self._place
        self.model, self.unused = load_model(
            ref,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
        self.model.to(device).eval().requires_grad_(False)
        self._base = _layout(self.model)
        self._leaves_base = True


def _layout(model: Any) -> dict[str, tuple[Any, ...]]:
    """Which tensors a model consists of, and where they lie."""
    return {k: (v.data_ptr(), v.shape, v.dtype) for k, v in model.state_dict().items()}


@Latest
def shared_base(
    ref: str, dtype: str, device: str, trust_remote_code: bool, stamp: tuple[Any, ...]
) -> SharedBase:
    """One base model per process; `stamp` tells when its files have changed."""
    return SharedBase(ref, dtype, device, trust_remote_code)


def pick_device(device: str) -> str:
    """`auto` as the best device that is there.

    Raises:
        UsageError: there is no such device here.
    """
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(
                f"device {device!r} cannot be used here ({first_line(error)}); legal: cpu, cuda, cuda:1, mps, auto"
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
