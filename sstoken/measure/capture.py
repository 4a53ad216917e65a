"""Prompt attention, captured inside the model's own forward pass.

A model's attention functions are reached through transformers' attention interface. The function that a model
uses is registered there again with an observer around it: in the chosen layer it also sums, for each response
token, the attention that it pays to the prompt. No layer's weights are ever held as a whole.

Shapes: B batch, H heads, K key-value heads, T positions, D head size, R rows and C columns of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sstoken.errors import SstokenError, UsageError
from sstoken.measure.attention_function import (
    CPU_FORWARDS,
    IMPLEMENTATION,
    plain_on_cpu,
    scale_of,
    sdpa_kernel,
    with_position_bias,
)
from sstoken.measure.decoder import check_layer
from sstoken.measure.precision import cast_as_autocast
from sstoken.measure.prompt_attention import Segment, prompt_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLOT = "_sstoken_capture"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class ForwardStopped(Exception):  # noqa: N818
    """Raised inside a forward pass that was wanted for the attention of one layer alone."""


class AttentionCapture:
    """Captures the prompt attention of one decoder layer.

    Works with sdpa, flash attention, and whatever else is registered with transformers' attention interface.

    Example:
        >>> capture = AttentionCapture(model, layer=-1)
        >>> capture.expect(response_mask)
        >>> model(input_ids=input_ids)
        >>> attention = capture.take()
    """

    def __init__(self, model: "PreTrainedModel", layer: int = -1, *, kernels: bool = False) -> None:
        """Attach to a model.

        Args:
            model: a decoder model that uses transformers' attention interface.
            layer: index of the decoder layer, negative from the end.
            kernels: on CUDA, measure with the Triton kernel where it gives right numbers in a trial.

        Raises:
            UsageError: there is no such layer, or the model's attention implementation cannot be observed.
        """
        config: Any = model.config.get_text_config()
        num_layers = config.num_hidden_layers
        check_layer(layer, num_layers)
        _observe(config._attn_implementation)
        self.layer, self._name = layer % num_layers, type(model).__name__
        self._modules = [m for m in model.modules() if getattr(m, "layer_idx", None) == self.layer]
        for module in self._modules:
            setattr(module, _SLOT, self)
        self._response_mask: Tensor | None = None
        self._segments: Sequence[Segment] | None = None
        self._stop, self._kernels = False, kernels
        self._rows: Tensor | None = None
        self._attention: Tensor | None = None

    def expect(
        self,
        response_mask: Tensor,
        segments: Sequence[Segment] | None = None,
        *,
        stop: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        """Say which positions the next forward pass has to measure.

        Args:
            response_mask: [B, T] bool.
            segments: the sequences of the batch, wherever they stand in it; None: each row is one that starts at
                position 0 (padding, if any, on the right).
            stop: raise `ForwardStopped` as soon as the layer is measured: what comes after is not wanted.
            rows: [B, T] bool, the positions whose attention is measured; None: the response tokens.
        """
        self._response_mask, self._segments, self._stop = response_mask, segments, stop
        self._rows = rows
        self._attention = None

    def take(self) -> Tensor:
        """The prompt attention measured by the last forward pass, [B, T] fp32, 0 off the response.

        Nothing is measured after this before the next `expect`: the second forward of gradient checkpointing is free.

        Raises:
            SstokenError: the layer did not go through the attention interface.
        """
        attention, self._attention, self._response_mask = self._attention, None, None
        if attention is None:
            raise SstokenError(
                f"{self._name}: the attention of layer {self.layer} cannot be captured: it does not go through "
                "transformers' attention interface (linear attention or a custom model); choose another layer"
            )
        return attention

    def detach(self) -> None:
        """Leave the model as it was."""
        for module in self._modules:
            delattr(module, _SLOT)

    def check_unmasked(self) -> None:
        """Called where sdpa is given no mask: each sequence must stand in a row of its own, from position 0 on.

        Raises:
            SstokenError: one does not, so that it would attend to what stands before it.
        """
        for row, start, _ in self._segments or ():
            if start:
                raise SstokenError(
                    f"row {row} of the batch has a sequence that starts at position {start}, but attention has no mask "
                    "and would look at what stands before; call the model with use_cache=False, and with the "
                    "position_ids or the attention_mask of the batch; an architecture that ignores position_ids cannot "
                    "be packed, pad its sequences on the right"
                )

    @torch.compiler.disable
    def measure(self, query: Tensor, key: Tensor, mask: Any, **how: Any) -> None:
        """Called by the attention function of the chosen layer.

        Raises:
            ForwardStopped: `expect` asked for it.
        """
        assert self._response_mask is not None
        if mask is not None and not isinstance(mask, Tensor):  # flex attention's says what segments say
            mask = None
        measure = prompt_attention
        if self._rows is not None:
            how["rows"] = self._rows
        elif self._kernels and query.is_cuda and mask is None:
            measure = _by_kernel(query, key, **how)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            self._attention = measure(query, key, self._response_mask, mask, self._segments, **how)
        if self._stop:
            raise ForwardStopped

    @property
    def due(self) -> Tensor | None:
        """The response mask, [B, T], of a measurement that is due."""
        return self._response_mask if self._attention is None else None


def _by_kernel(
    query: Tensor, key: Tensor, *, softcap: float | None, sinks: Tensor | None, window: int | None, **_: Any
) -> Callable[..., Tensor]:
    """A kernel that reads queries and keys once, where it runs and gives right numbers; else `prompt_attention`."""
    from sstoken.measure.cuda.choices import choose_prompt_attention

    return choose_prompt_attention(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3],
        window=window is not None, softcap=softcap, sinks=sinks is not None,
    ).call  # fmt: skip


def _observed(forward: AttentionFunction) -> AttentionFunction:
    """The attention function with the capture around it, where one is attached and waiting."""

    @wraps(forward)
    def observed(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if _calls is not None:
            _calls.append(module)
        capture: AttentionCapture | None = getattr(module, _SLOT, None)
        if capture is None:
            return forward(module, query, key, value, attention_mask, *args, **kwargs)
        how: dict[str, Any] = {
            "scaling": scale_of(query, kwargs.get("scaling")),
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
            "window": kwargs.get("sliding_window"),
        }
        # What attention under autocast multiplies. A layer that norms its queries gives them in float32.
        query, key, value = cast_as_autocast(query, key, value)
        response_mask = capture.due
        if response_mask is not None and attention_mask is None and forward in CPU_FORWARDS:
            capture.check_unmasked()
        learned_mask = isinstance(attention_mask, Tensor) and attention_mask.requires_grad  # Doge's
        if forward in CPU_FORWARDS and not learned_mask and plain_on_cpu(module, query, key, value, kwargs):
            # Measured or not: the second forward of gradient checkpointing has to save the same tensors.
            output, how["log_sum_exp"] = sdpa_kernel(query, key, value, attention_mask, how["scaling"])
            if response_mask is not None:
                capture.measure(query, key, attention_mask, **how)
            return output, None
        if response_mask is not None:
            seen = with_position_bias(attention_mask, kwargs.get("position_bias"), how["window"])
            capture.measure(query, key, seen, **how)
        return forward(module, query, key, value, attention_mask, *args, **kwargs)

    return observed


_calls: list[nn.Module] | None = None


@contextmanager
def attention_calls(implementation: str = IMPLEMENTATION) -> Iterator[list[nn.Module]]:
    """The modules whose attention goes through `implementation` within this context, in the order of their calls.

    Raises:
        UsageError: it is not one that is called through transformers' attention interface.
    """
    global _calls
    _observe(implementation)
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None


_OBSERVED: set[str] = set()


def _observe(implementation: str) -> None:
    """Put the observer around a registered attention function, once.

    Raises:
        UsageError: it is not one that is called through the interface.
    """
    if implementation in _OBSERVED:
        return
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise UsageError(
            f"attn_implementation={implementation!r}: its attention cannot be captured; load the model with "
            f"attn_implementation={IMPLEMENTATION!r}, 'sdpa' or 'flash_attention_2'"
        )
    AttentionInterface.register(implementation, _observed(ALL_ATTENTION_FUNCTIONS[implementation]))
    _OBSERVED.add(implementation)
