"""Base models in memory: one per process, on which LoRA adapters are swapped."""

from typing import Any

import torch

from sstoken.attention import IMPLEMENTATION
from sstoken.errors import SstokenError, UsageError
from stages.backends import Latest
from stages.checkpoints import first_line, load_model, local_folder, stamp

_ADAPTER = "current"


class SharedBase:
    """A base model in memory, on which LoRA adapters are swapped."""

    def __init__(self, ref: str, dtype: str, device: str, trust_remote_code: bool) -> None:
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        self.model = load_model(
            ref, dtype=torch_dtype, attention=IMPLEMENTATION, trust_remote_code=trust_remote_code
        )
        self.model.to(device).eval().requires_grad_(False)
        self._adapter: tuple[Any, ...] | None = None
        """The stamp of the adapter that is on: another one may stand in the same folder by now."""

    def use(self, adapter: str | None) -> None:
        """Put the adapter of that folder on the base in place of the last one; None: the bare base."""
        wanted = stamp(adapter) if adapter is not None else None
        if wanted == self._adapter:
            return
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise SstokenError(f"{adapter}: LoRA adapters need peft; pip install 'sstoken[lora]'") from error
        if self._adapter is not None:
            self.model.delete_adapter(_ADAPTER)
        self._adapter = None
        if adapter is not None:
            _load_adapter(self.model, adapter)
            self.model.eval()
        self._adapter = wanted


def _load_adapter(model: Any, adapter: str) -> None:
    try:
        report = model.load_adapter(str(local_folder(adapter) or adapter), adapter_name=_ADAPTER)
        model.set_adapter(_ADAPTER)
    except Exception as error:  # peft, transformers and safetensors raise many kinds
        raise SstokenError(f"{adapter}: the adapter does not load ({first_line(error)})") from error
    missing = getattr(report, "missing_keys", ())
    if missing:  # transformers would go on with an adapter that does nothing
        raise SstokenError(
            f"{adapter}: {len(missing)} of the adapter's weights are missing (first: {min(missing)}); it belongs to "
            "another base model, or has to be copied again"
        )


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
