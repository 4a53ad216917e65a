"""Measures each response token's loss from the state that predicts it: in float32, without gradients.

Shapes: B rows, T positions, N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.measure.precision import as_given, cast_as_autocast
from sstoken.measure.token_loss import (
    OutputHead,
    measure_logits,
    measure_token_losses,
    output_embedding,
    scale_candidates,
)

ROWS_PER_CALL = 1024
"""Rows of logits alive at once if the output embedding is not a plain `nn.Linear`."""
_ROWS_VERIFIED = 8
_TOLERANCE, _TOLERANCE_OF_HALF = 5e-3, 5e-2
"""Relative and absolute tolerance of logits; float32 products may be rounded to TF32."""


def unwrapped(model: Any) -> Any:
    """Return the model inside a wrapper such as DistributedDataParallel."""
    return getattr(model, "module", model)


class HeadLosses:
    """Measures the losses that the model's output head gives, before rounding to half precision."""

    def __init__(self, model: nn.Module) -> None:
        """Read the output head of an unwrapped causal language model.

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
        """Return the losses [N] float32 of `targets` [N], predicted by the states [N, D].

        Call it within the forward pass: states and weights are rounded once, to the dtype that autocast multiplies
        in there; products and sums are float32.
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
        """Find the factor by which the model scales its logits [N, V] of states [N, D]. Does so once.

        Args:
            hidden: [N, D].
            logits: [N, V], the model's own.
            rounded: whether they were rounded to half precision.

        Raises:
            SstokenError: no known factor reproduces them.
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
        """The verified factor; before that, the one that the configuration names, or 1."""
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
        # With an adapter or quantized weights, only the module can compute its product.
        logits = self._head.forward(hidden).float() * scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


@as_given
def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none")


@contextmanager
def states_to_head(
    model: nn.Module, tokens: ResponseTokens, choose: Callable[[Tensor], Tensor]
) -> Iterator[list[bool]]:
    """Within this context the output embedding receives only the states that `choose` returns.

    Args:
        model: a causal language model, wrapped for several processes or not.
        tokens: the response tokens of the batch.
        choose: gets the states [N, D] that predict response tokens, returns the rows [K, D] to compute logits of.

    Yields:
        A list with an entry for each time the output embedding was reached; logits are [1, K, V].
    """
    used: list[bool] = []

    @torch.compiler.disable
    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD = args[0]
        if hidden_BTD.shape[:2] != tokens.response_mask.shape:
            raise SstokenError(
                f"the output embedding sees {tuple(hidden_BTD.shape[:2])} positions, the batch has "
                f"{tuple(tokens.response_mask.shape)}; models that add or drop positions (prompt tuning) cannot select"
            )
        used.append(True)
        return (choose(hidden_BTD.flatten(0, 1)[tokens.positions - 1])[None], *args[1:])

    handle = output_embedding(unwrapped(model)).register_forward_pre_hook(gather)
    try:
        yield used
    finally:
        handle.remove()


@contextmanager
def last_states(model: nn.Module, tokens: ResponseTokens, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within this context the forward pass calls `take` with the states [N, D] that predict response tokens.

    For a forward pass that bypasses the output embedding's module.
    """
    inner = unwrapped(model)
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()

    @torch.compiler.disable
    def keep(module: nn.Module, args: Any, outputs: Any) -> None:
        take(outputs[0].detach().flatten(0, 1)[tokens.positions - 1])

    handle = inner.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def rounds(hidden: Tensor) -> bool:
    """Return whether products of these states are rounded below float32. Call it within the forward pass."""
    return torch.finfo(hidden.dtype).bits < 32 or torch.is_autocast_enabled(hidden.device.type)
