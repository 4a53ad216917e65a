"""Histories that need their own forward pass: the base under an adapter, a moving average, an earlier snapshot."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError, UsageError
from sstoken.in_loop.settings import SelfModulation

_MOVES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""LoRA initialisations that change the base weights: they subtract the adapter's initial product, or round."""


class BaseHistory:
    """The model with its LoRA adapter disabled. Takes no extra memory."""

    def __init__(self, model: nn.Module) -> None:
        """Take a PEFT model.

        Raises:
            UsageError: it has no adapter, or its adapter's initialisation changed the base weights.
        """
        if not hasattr(model, "disable_adapter"):
            raise UsageError(
                "history 'base' is the model without its adapter, and this model has none; train LoRA (peft), or use "
                "history 'scores', 'ema' or 'snapshot'"
            )
        self._model: Any = model
        configs: Any = model.peft_config
        for config in configs.values():
            start = str(getattr(config, "init_lora_weights", ""))
            if start.startswith(_MOVES_THE_BASE):
                raise UsageError(
                    f"history 'base' is the model without its adapter, and init_lora_weights={start!r} moves part of "
                    "the base into the adapter; use history 'scores', 'ema' or 'snapshot', or another initialisation"
                )

    def follow(self, step: int) -> None:
        """Do nothing: the base does not change."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within this context, the model is the base model."""
        with self._model.disable_adapter():
            yield


class WeightHistory:
    """A moving average or a snapshot of the weights that this run trains."""

    def __init__(self, model: nn.Module, settings: SelfModulation) -> None:
        """Start from the model's current weights.

        Raises:
            UsageError: the weights are sharded over processes.
        """
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        for name, parameter in model.named_parameters():
            if type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
                raise UsageError(
                    f"history {settings.history!r}: parameter {name} is sharded over processes, which averages and "
                    "snapshots do not support; use history 'scores', or 'base' with LoRA"
                )
        self._decay, self._every = settings.decay, settings.every
        self._offload = settings.offload_history
        self._kept = [self._copy(p) for p in self._parameters]

    def follow(self, step: int) -> None:
        """Update from the weights after `step` optimizer steps. Call it after each step."""
        if step == 0 or step % self._every:
            return
        with torch.no_grad():
            for kept, parameter in zip(self._kept, self._parameters, strict=True):
                kept.lerp_(parameter.detach().to(kept), 1 - self._decay)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within this context, the model has the kept weights; afterwards it has its own again, bit for bit."""
        own = [p.data for p in self._parameters]
        try:
            for parameter, kept in zip(self._parameters, self._kept, strict=True):
                parameter.data = kept.to(device=parameter.device, dtype=parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data

    def _copy(self, parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32) if self._decay else parameter.dtype
        device = "cpu" if self._offload else parameter.device
        return parameter.detach().to(device=device, dtype=dtype, copy=True)


History = BaseHistory | WeightHistory


def make_history(model: nn.Module, settings: SelfModulation, step: int) -> History | None:
    """Create the history that the settings name; None if its losses come with the batch or are not needed.

    `step` counts finished optimizer steps; it is not 0 in a resumed run.

    Raises:
        UsageError: the model cannot provide it.
        SstokenError: a resumed run would need weights that no checkpoint holds.
    """
    if settings.history == "scores" or not settings.needs_history:
        return None
    if settings.history == "base":
        return BaseHistory(model)
    if step:
        raise SstokenError(
            f"history {settings.history!r} cannot go on from step {step}: its weights are not part of a checkpoint; "
            "start over, or use history 'scores' or 'base'"
        )
    return WeightHistory(model, settings)


@contextmanager
def as_history(model: nn.Module, history: History) -> Iterator[None]:
    """Within this context, the model is its own history, without dropout and gradients."""
    with evaluating(model), history.installed():
        torch.clear_autocast_cache()
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context, the model has no dropout and no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()  # casts made here come from other weights, or lack gradients
        model.train(training)
