"""Prompt attention, captured inside the model's own forward pass.

Models call their attention functions through transformers' attention interface. The function that a model uses is
registered again, wrapped in an observer: in the chosen layer, it also sums each response token's attention to the
prompt. A layer's full attention weights are never held.

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
from sstoken.measure.precision import cast_as_autocast
from sstoken.measure.prompt_attention import Segment, prompt_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLOT = "_sstoken_capture"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def check_layer(layer: int, num_layers: int) -> None:
    """Refuse a decoder layer that the model does not have; negative numbers count from the end.

    Raises:
        UsageError: no such layer; gives the legal range.
    """
    if not -num_layers <= layer < num_layers:
        raise UsageError(
            f"layer {layer}: the model has {num_layers} layers; legal is {-num_layers} to {num_layers - 1}"
        )


class ForwardStopped(Exception):  # noqa: N818
    """Raised inside a forward pass once the attention that it was run for is measured."""


class AttentionCapture:
    """Captures the prompt attention of one decoder layer.

    Works with sdpa, flash attention, and any function registered with transformers' attention interface.

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
            kernels: on CUDA, measure with the Triton kernel if a trial shows it accurate.

        Raises:
            UsageError: no such layer, or the model's attention implementation cannot be observed.
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
        """Announce which positions the next forward pass measures.

        Args:
            response_mask: [B, T] bool.
            segments: the sequences of the batch; None: each row is one, from position 0, padded on the right if at
                all.
            stop: raise `ForwardStopped` once the layer is measured, to skip the rest of the forward pass.
            rows: [B, T] bool, the positions whose attention is measured; None: the response tokens.
        """
        self._response_mask, self._segments, self._stop = response_mask, segments, stop
        self._rows = rows
        self._attention = None

    def take(self) -> Tensor:
        """Return the prompt attention measured by the last forward pass, [B, T] fp32, 0 off the response.

        Nothing is measured again before the next `expect`, so gradient checkpointing's second forward costs nothing.

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
        """Check a batch that sdpa gets no mask for: each sequence must start at position 0 of its row.

        Raises:
            SstokenError: a sequence starts later, so it would attend to what precedes it.
        """
        for row, start, _ in self._segments or ():
            if start:
                raise SstokenError(
                    f"row {row} of the batch has a sequence that starts at position {start}, but attention has no mask "
                    "and would reach what precedes it; call the model with use_cache=False, and with the "
                    "position_ids or the attention_mask of the batch; an architecture that ignores position_ids cannot "
                    "be packed, pad its sequences on the right"
                )

    @torch.compiler.disable
    def measure(self, query: Tensor, key: Tensor, mask: Any, **how: Any) -> None:
        """Measure one call of the chosen layer's attention function; raise `ForwardStopped` if `expect` asked to."""
        assert self._response_mask is not None
        if mask is not None and not isinstance(mask, Tensor):  # flex attention's mask repeats the segments
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
        """The response mask [B, T] of the pending measurement; None if there is none."""
        return self._response_mask if self._attention is None else None


def _by_kernel(
    query: Tensor, key: Tensor, *, softcap: float | None, sinks: Tensor | None, window: int | None, **_: Any
) -> Callable[..., Tensor]:
    """The Triton kernel, which reads queries and keys once, if a trial shows it accurate; else `prompt_attention`."""
    from sstoken.measure.cuda.choices import choose_prompt_attention

    return choose_prompt_attention(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3],
        window=window is not None, softcap=softcap, sinks=sinks is not None,
    ).call  # fmt: skip


def _observed(forward: AttentionFunction) -> AttentionFunction:
    """Wrap an attention function so that it also measures, if a capture is attached and waiting."""

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
        # Autocast multiplies in this dtype, but a layer that norms its queries passes them in float32.
        query, key, value = cast_as_autocast(query, key, value)
        response_mask = capture.due
        if response_mask is not None and attention_mask is None and forward in CPU_FORWARDS:
            capture.check_unmasked()
        learned_mask = isinstance(attention_mask, Tensor) and attention_mask.requires_grad  # Doge's
        if forward in CPU_FORWARDS and not learned_mask and plain_on_cpu(module, query, key, value, kwargs):
            # Also if not measured: gradient checkpointing's second forward must save the same tensors.
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
    """Record the modules that call `implementation` within this context, in the order of their calls.

    Raises:
        UsageError: it is not registered with transformers' attention interface.
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
    """Wrap a registered attention function in the observer, once.

    Raises:
        UsageError: it is not registered with the interface.
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
