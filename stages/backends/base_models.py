"""Base models in memory: one per process, whose adapters are swapped."""

import gc
from typing import Any

import torch

from sstoken.errors import UsageError, first_line
from sstoken.stages.backends import BackendOptions, Latest
from sstoken.stages.backends.adapters import Adapter
from sstoken.stages.checkpoints import adapter_base, stamp
from sstoken.stages.loading import load_model


class SharedBase:
    """A base model in memory whose adapters are swapped; taking one off restores every bit of the base."""

    def __init__(self, ref: str, dtype: str, device: str, trust_remote_code: bool) -> None:
        self._place = (ref, dtype, device, trust_remote_code)
        self.model: Any = None
        self.unused: list[str] = []
        """Names of weights in its files that it does not use."""
        self._adapted: Any = None
        """peft's model, if an adapter is loaded."""
        self._adapter: tuple[Any, ...] | None = None
        """Stamp of the loaded adapter: its folder may hold another one by now."""
        self._load()

    def use(self, adapter: str | None) -> None:
        """Load an adapter onto the base in place of the last one; None: the bare base.

        Raises:
            SstokenError: the adapter does not load, or its kind is not supported.
        """
        wanted = stamp(adapter) if adapter is not None else None
        if self.model is not None and wanted == self._adapter:
            return
        new = None if adapter is None else Adapter(adapter)
        if self.model is None or self._adapter is not None:
            self._take_off()
        if new is not None:
            base, self.model = self.model, None  # if this fails, the base is loaded again
            self._adapted = new.put_on(base)
            self.model = base
            self._leaves_base = new.leaves_base
        self._adapter = wanted

    def _take_off(self) -> None:
        """Return to the bare base; load it again if the adapter, or one that failed, may have changed a tensor."""
        if self.model is not None and self._leaves_base:
            self._adapted.unload()
            self._adapted = self._adapter = None
            if _layout(self.model) == self._base:
                return
        self.model = self._adapted = self._adapter = None
        gc.collect()  # before loading, since two need not fit into memory
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
    """Return the address, shape and dtype of each tensor of a model, by name."""
    return {k: (v.data_ptr(), v.shape, v.dtype) for k, v in model.state_dict().items()}


shared_base = Latest(SharedBase)
"""This process's base model."""


def loaded(options: BackendOptions, device: str) -> SharedBase:
    """Return this process's base model with the adapter loaded, if the checkpoint is one."""
    base = adapter_base(options.checkpoint)
    full = base or options.checkpoint
    shared = shared_base(stamp(full), full, options.dtype, device, options.trust_remote_code)
    shared.use(options.checkpoint if base else None)
    return shared


def pick_device(device: str) -> str:
    """Return the device to use; `auto` is cuda, mps or cpu, the first that is available.

    Raises:
        UsageError: the device is not available.
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
