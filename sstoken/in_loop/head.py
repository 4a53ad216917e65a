"""The loss of each response token, measured from the states that predict it: in float32, without gradients.

Shapes: B rows, T positions, N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.layout import Layout
from sstoken.measure.precision import as_given, cast_as_autocast
from sstoken.measure.token_loss import (
    OutputHead,
    measure_logits,
    measure_token_losses,
    output_embedding,
    scale_candidates,
)

ROWS_PER_CALL = 1024
"""Logits alive at once where the output embedding is a module of its own making."""
_ROWS_VERIFIED = 8
_TOLERANCE, _TOLERANCE_OF_HALF = 5e-3, 5e-2
"""Of logits, relative and absolute; products in float32 may be rounded to TF32."""


def unwrapped(model: Any) -> Any:
    """The model inside what distributes it."""
    return getattr(model, "module", model)


class HeadLosses:
    """Measures losses as the model's output head would give them, unrounded."""

    def __init__(self, model: nn.Module) -> None:
        """Take a causal language model, not wrapped.

        Raises:
            SstokenError: it has no output embedding.
        """
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._name = type(model).__name__
        self._head = output_embedding(model)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._candidates = list(dict.fromkeys(scale_candidates(model, config)))
        self._scale: float | None = None

    @torch.no_grad()
    def measure(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The losses [N] of `targets` [N], fp32, from the states [N, D] that predict them.

        Called within the forward pass: states and weights are rounded once, to what autocast would multiply there;
        products and sums are not.
        """
        if type(self._head) is nn.Linear:
            head = self._linear(hidden, self._scale_now)
            return measure_token_losses(hidden.to(head.weight.dtype), targets, head)
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        for rows, ids in zip(hidden.split(ROWS_PER_CALL), targets.split(ROWS_PER_CALL), strict=True):
            losses.append(_cross_entropy(self._logits(rows, self._scale_now), ids))
        return torch.cat(losses)

    @torch.no_grad()
    def verify(self, hidden: Tensor, logits: Tensor, rounded: bool) -> None:
        """Find how the model scales its logits [N, V] of states [N, D], once; `rounded`: to half precision.

        Raises:
            SstokenError: in no known way.
        """
        if self._scale is not None or logits.shape[0] == 0:
            return
        hidden, logits = hidden[:_ROWS_VERIFIED], logits[:_ROWS_VERIFIED].float()
        tolerance = _TOLERANCE_OF_HALF if rounded else _TOLERANCE
        for scale in self._candidates:
            # Weights that are NaN give NaN either way.
            if torch.allclose(
                self._logits(hidden, scale).float(), logits, rtol=tolerance, atol=tolerance, equal_nan=True
            ):
                self._scale = scale
                return
        raise SstokenError(
            f"{self._name}: its logits are not a scaled or soft-capped product with its output embedding; this "
            "architecture is not supported"
        )

    @property
    def _scale_now(self) -> float:
        """Until it is verified: what the configuration names, if anything."""
        return self._candidates[-1] if self._scale is None else self._scale

    def _linear(self, hidden: Tensor, scale: float) -> OutputHead:
        module: Any = self._head
        (weight,) = cast_as_autocast(module.weight)
        bias = None if module.bias is None else module.bias.to(weight.dtype)
        return OutputHead(weight, bias, scale, self._softcap)

    def _logits(self, hidden: Tensor, scale: float) -> Tensor:
        """[N, V] float32."""
        if type(self._head) is nn.Linear:
            head = self._linear(hidden, scale)
            return measure_logits(hidden.to(head.weight.dtype), head)
        # An adapter, or quantized weights: the module alone knows its product.
        logits = self._head.forward(hidden).float() * scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


@as_given
def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")


@contextmanager
def states_to_head(
    model: nn.Module, layout: Layout, choose: Callable[[Tensor], Tensor]
) -> Iterator[list[bool]]:
    """Within this context the output embedding gets, of the states that predict response tokens, those chosen.

    Args:
        model: a causal language model, wrapped for several processes or not.
        layout: of the batch that it will be called with.
        choose: from the states [N, D] to the rows that go on, [K, D].

    Yields:
        A list that is not empty once the output embedding was reached; logits are [1, K, V].
    """
    used: list[bool] = []

    @torch.compiler.disable
    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD = args[0]
        if hidden_BTD.shape[:2] != layout.response_mask.shape:
            raise SstokenError(
                f"the output embedding sees {tuple(hidden_BTD.shape[:2])} positions, the batch has "
                f"{tuple(layout.response_mask.shape)}; models that add or drop positions (prompt tuning) cannot select"
            )
        used.append(True)
        return (choose(hidden_BTD.flatten(0, 1)[layout.positions - 1])[None], *args[1:])

    handle = output_embedding(unwrapped(model)).register_forward_pre_hook(gather)
    try:
        yield used
    finally:
        handle.remove()


@contextmanager
def last_states(model: nn.Module, layout: Layout, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within this context `take` is called, in the forward pass, with the states [N, D] that predict response tokens.

    For a forward pass that does not reach the output embedding as a module.
    """
    inner = unwrapped(model)
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()

    @torch.compiler.disable
    def keep(module: nn.Module, args: Any, outputs: Any) -> None:
        take(outputs[0].detach().flatten(0, 1)[layout.positions - 1])

    handle = inner.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def rounds(hidden: Tensor) -> bool:
    """Whether products of these states are rounded to less than float32; asked within the forward pass."""
    return torch.finfo(hidden.dtype).bits < 32 or torch.is_autocast_enabled(hidden.device.type)
