"""Measures the signals of response tokens from the model's last hidden states, in float32 and without gradients.

Shapes: B rows, T positions, N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.measure.distribution import measure_distribution
from sstoken.measure.divergence import measure_divergence
from sstoken.measure.precision import cast_as_autocast
from sstoken.measure.token_loss import (
    ComputedLogits,
    OutputHead,
    measure_logits,
    output_embedding,
    scale_candidates,
)

ROWS_PER_CALL = 1024
"""Rows of logits held at once if the output embedding is not a plain `nn.Linear`."""
_ROWS_VERIFIED = 8
_TOLERANCE, _TOLERANCE_OF_HALF = 5e-3, 5e-2
"""Relative and absolute tolerance of logits; float32 products may be rounded to TF32."""


def unwrapped(model: Any) -> Any:
    """Return the model inside a wrapper such as DistributedDataParallel."""
    return getattr(model, "module", model)


class MeasuredStates(NamedTuple):
    """The last hidden states of N response tokens, and the output head at that time."""

    hidden: Tensor
    """[N, D], the states that predict the tokens."""
    own: Tensor
    """[N, D], the states at the tokens' own positions; empty if no signal needs them."""
    head: OutputHead | None
    """None if the output embedding is no plain `nn.Linear`, so that only the module can apply it."""


class HeadSignals:
    """Measures the signals of the model's distributions, before logits are rounded to half precision."""

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
        self._scale, self._verified = (
            self._candidates[-1],
            False,
        )  # the one that the configuration names, or 1

    @torch.no_grad()
    def states(self, hidden: Tensor, tokens: ResponseTokens, names: Sequence[str]) -> MeasuredStates:
        """Pick the states from which the named signals are measured. Call it within the forward pass.

        States [B * T, D] and weights are rounded once, to the dtype in which autocast multiplies there.
        """
        head = self._linear(self._scale) if type(self._head) is nn.Linear else None
        hidden = hidden if head is None else hidden.to(head.weight.dtype)
        own = hidden[tokens.positions] if any(map(_at_token, names)) else hidden[:0]
        return MeasuredStates(hidden[tokens.positions - 1], own, head)

    @torch.no_grad()
    def measure(
        self,
        states: MeasuredStates,
        targets: Tensor,
        names: Sequence[str],
        reference: MeasuredStates | None = None,
    ) -> dict[str, Tensor]:
        """Measure signals of N response tokens, [N] each; products and sums are float32.

        Args:
            states: from `states`.
            targets: [N], the tokens' ids.
            names: the signals.
            reference: the history's states, for `kl` and other signals that compare distributions.
        """
        plain = [name for name in names if "@" not in name and not _at_token(name)]
        found = self._distribution(states.hidden, targets, states.head, plain)
        if "entropy_at" in names:
            found["entropy_at"] = self._distribution(states.own, targets, states.head, ["entropy"])["entropy"]
        compared = [name for name in names if "@" in name]
        return found | (self._compare(states, reference, compared) if compared else {})

    def _compare(
        self, states: MeasuredStates, reference: MeasuredStates | None, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Measure signals that compare distributions with the history's."""
        if reference is None or reference.head is None or states.head is None:
            raise SstokenError(
                f"{names[0]}: the output embedding of {self._name} is not a plain linear layer (an adapter, or "
                "quantized weights), so distributions cannot be compared with the history's; remove it from the "
                "adapter's target modules"
            )
        found: dict[str, Tensor] = {}
        for own in {_at_token(name) for name in names}:
            this, other = (side.own if own else side.hidden for side in (states, reference))
            both = measure_divergence(this, states.head, other, reference.head)
            found |= {name: both[name.startswith("reverse")] for name in names if _at_token(name) == own}
        return found

    def _distribution(
        self, hidden: Tensor, targets: Tensor, head: OutputHead | None, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Measure signals of the distributions that follow from states [N, D]."""
        if head is not None:
            return measure_distribution(hidden, targets, head, names)
        parts = []
        for rows, ids in zip(hidden.split(ROWS_PER_CALL), targets.split(ROWS_PER_CALL), strict=True):
            logits = self._logits(rows, self._scale)
            entries = torch.arange(logits.shape[1], device=logits.device)
            parts.append(measure_distribution(logits, ids, ComputedLogits(entries), names))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    @torch.no_grad()
    def verify(self, hidden: Tensor, logits: Tensor, rounded: bool) -> None:
        """Find the factor by which the model scales its logits, once.

        Args:
            hidden: [N, D], states.
            logits: [N, V], the model's own logits of these states.
            rounded: whether they were rounded to half precision.

        Raises:
            SstokenError: no known factor reproduces them.
        """
        if self._verified or logits.shape[0] == 0:
            return
        hidden, logits = hidden[:_ROWS_VERIFIED], logits[:_ROWS_VERIFIED].float()
        tolerance = _TOLERANCE_OF_HALF if rounded else _TOLERANCE
        for scale in self._candidates:
            # Weights that are NaN give NaN either way.
            if torch.allclose(
                self._logits(hidden, scale).float(), logits, rtol=tolerance, atol=tolerance, equal_nan=True
            ):
                self._scale, self._verified = scale, True
                return
        raise SstokenError(
            f"{self._name}: its logits are not a scaled or soft-capped product with its output embedding; this "
            "architecture is not supported"
        )

    def _linear(self, scale: float) -> OutputHead:
        module: Any = self._head
        (weight,) = cast_as_autocast(module.weight.detach())  # read anew: histories swap the data
        bias = None if module.bias is None else module.bias.to(weight.dtype)
        return OutputHead(weight, bias, scale, self._softcap)

    def _logits(self, hidden: Tensor, scale: float) -> Tensor:
        """[N, V] float32."""
        if type(self._head) is nn.Linear:
            head = self._linear(scale)
            return measure_logits(hidden.to(head.weight.dtype), head)
        # With an adapter or quantized weights, only the module can compute its product.
        logits = self._head.forward(hidden).float() * scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


@contextmanager
def states_to_head(
    model: nn.Module, tokens: ResponseTokens, choose: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within this context, the output embedding gets only the states that `choose` returns; logits are [1, K, V].

    `choose` gets the states [B * T, D] whenever the output embedding is called, and returns the rows [K, D].
    """

    @torch.compiler.disable
    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD = args[0]
        if hidden_BTD.shape[:2] != tokens.response_mask.shape:
            raise SstokenError(
                f"the output embedding sees {tuple(hidden_BTD.shape[:2])} positions, the batch has "
                f"{tuple(tokens.response_mask.shape)}; models that add or drop positions (prompt tuning) cannot select"
            )
        return (choose(hidden_BTD.flatten(0, 1))[None], *args[1:])

    handle = output_embedding(unwrapped(model)).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def last_states(model: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within this context, the forward pass calls `take` with the last states [B * T, D].

    For forward passes that bypass the output embedding's module.
    """
    inner = unwrapped(model)
    if hasattr(inner, "get_base_model"):  # peft
        inner = inner.get_base_model()

    @torch.compiler.disable
    def keep(module: nn.Module, args: Any, outputs: Any) -> None:
        take(outputs[0].detach().flatten(0, 1))

    handle = inner.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def rounds(hidden: Tensor) -> bool:
    """Whether products of these states are rounded below float32. Call it within the forward pass."""
    return torch.finfo(hidden.dtype).bits < 32 or torch.is_autocast_enabled(hidden.device.type)


def _at_token(name: str) -> bool:
    """Whether a signal belongs to the distribution at the token's own position, which predicts the next token."""
    return name.partition("@")[0].endswith("_at")
