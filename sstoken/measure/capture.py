"""Attention importance, captured inside the model's own forward pass.

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
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sstoken.errors import SstokenError, UsageError
from sstoken.measure import cpu_attention
from sstoken.measure.decoder import check_layer
from sstoken.measure.precision import cast_as_autocast
from sstoken.measure.prompt_attention import (
    BLOCK_ELEMENTS,
    Segment,
    attention_scores,
    log_sum_exp_rows,
    prompt_attention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "sstoken"
"""sdpa that also knows soft-capping and sinks: `attn_implementation=IMPLEMENTATION`."""
_SLOT = "_sstoken_capture"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class ForwardStopped(Exception):  # noqa: N818
    """Raised inside a forward pass that was wanted for the attention of one layer alone."""


class AttentionCapture:
    """Captures the attention importance of one decoder layer.

    Works with sdpa, flash attention, and whatever else is registered with transformers' attention interface.

    Example:
        >>> capture = AttentionCapture(model, layer=-1)
        >>> capture.expect(response_mask)
        >>> model(input_ids=input_ids)
        >>> importance = capture.take()
    """

    def __init__(self, model: "PreTrainedModel", layer: int = -1) -> None:
        """Attach to a model.

        Args:
            model: a decoder model that uses transformers' attention interface.
            layer: index of the decoder layer, negative from the end.

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
        self._stop = False
        self._importance: Tensor | None = None

    def expect(
        self, response_mask: Tensor, segments: Sequence[Segment] | None = None, *, stop: bool = False
    ) -> None:
        """Say which positions the next forward pass has to measure.

        Args:
            response_mask: [B, T] bool.
            segments: the sequences of the batch, wherever they stand in it; None: each row is one that starts at
                position 0 (padding, if any, on the right).
            stop: raise `ForwardStopped` as soon as the layer is measured: what comes after is not wanted.
        """
        self._response_mask, self._segments, self._stop = response_mask, segments, stop
        self._importance = None

    def take(self) -> Tensor:
        """The importance measured by the last forward pass, [B, T] fp32, 0 off the response.

        Nothing is measured after this before the next `expect`: the second forward of gradient checkpointing is free.

        Raises:
            SstokenError: the layer did not go through the attention interface.
        """
        importance, self._importance, self._response_mask = self._importance, None, None
        if importance is None:
            raise SstokenError(
                f"{self._name}: the attention of layer {self.layer} cannot be captured: it does not go through "
                "transformers' attention interface (linear attention or a custom model); choose another layer"
            )
        return importance

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
        measure = _by_kernel(query, key, **how) if query.is_cuda and mask is None else prompt_attention
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            self.keep(measure(query, key, self._response_mask, mask, self._segments, **how))

    def keep(self, importance: Tensor) -> None:
        """Called by the attention function with what `measure` would find, [B, T].

        Raises:
            ForwardStopped: `expect` asked for it.
        """
        self._importance = importance
        if self._stop:
            raise ForwardStopped

    @property
    def due(self) -> Tensor | None:
        """The response mask, [B, T], of a measurement that is due."""
        return self._response_mask if self._importance is None else None


def _by_kernel(
    query: Tensor, key: Tensor, *, softcap: float | None, sinks: Tensor | None, window: int | None, **_: Any
) -> Callable[..., Tensor]:
    """A kernel that reads queries and keys once, where it runs and gives right numbers; else `prompt_attention`."""
    from sstoken.measure.cuda.choices import choose_importance

    return choose_importance(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3],
        window=window is not None, softcap=softcap, sinks=sinks is not None,
    ).call  # fmt: skip


def _attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention output [B, T, H, D] where sdpa has no such option (soft-capping, sinks), block by block."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    positions = torch.arange(query.shape[2], device=query.device)
    block = max(1, BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * key.shape[2]))
    outputs = []
    for rows_R in positions.split(block):
        products = query[:, :, rows_R] @ key.transpose(2, 3)
        scores = attention_scores(
            products.to(torch.promote_types(query.dtype, torch.float32)),
            rows_R,
            positions,
            None if mask is None else mask[..., rows_R, : key.shape[2]],
            scaling,
            softcap,
            None,
        )
        weights = (scores - log_sum_exp_rows(scores, sinks)[..., None]).exp()
        outputs.append(weights.to(value.dtype) @ value)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as `IMPLEMENTATION`."""
    query, key, value = cast_as_autocast(query, key, value)
    softcap, sinks = kwargs.pop("softcap", None), kwargs.get("s_aux")
    if softcap is not None or sinks is not None:
        scale = _scale(query, scaling)
        return _attend_by_blocks(query, key, value, attention_mask, scale, softcap, sinks), None
    if (
        attention_mask is None
        and not torch.is_grad_enabled()
        and _plain_on_cpu(module, query, key, value, {"dropout": dropout, **kwargs})
    ):
        return cpu_attention.causal_attention(query, key, value, _scale(query, scaling)), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output, None


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


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
            "scaling": _scale(query, kwargs.get("scaling")),
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
            "window": kwargs.get("sliding_window"),
        }
        # What attention under autocast multiplies. A layer that norms its queries gives them in float32.
        query, key, value = cast_as_autocast(query, key, value)
        response_mask = capture.due
        if response_mask is not None and attention_mask is None and forward in _CPU_FORWARDS:
            capture.check_unmasked()
        learned_mask = isinstance(attention_mask, Tensor) and attention_mask.requires_grad  # Doge's
        if forward in _CPU_FORWARDS and not learned_mask and _plain_on_cpu(module, query, key, value, kwargs):
            if response_mask is not None and attention_mask is None and torch.is_inference_mode_enabled():
                by_blocks = cpu_attention.attend_by_blocks(query, key, value, how["scaling"], response_mask)
                if by_blocks is not None:
                    output, importance = by_blocks
                    capture.keep(importance)
                    return output, None
            # Measured or not: the second forward of gradient checkpointing has to save the same tensors.
            output, how["log_sum_exp"] = cpu_attention.sdpa_kernel(
                query, key, value, attention_mask, how["scaling"]
            )
            if response_mask is not None:
                capture.measure(query, key, attention_mask, **how)
            return output, None
        if response_mask is not None:
            seen = _with_position_bias(attention_mask, kwargs.get("position_bias"), how["window"])
            capture.measure(query, key, seen, **how)
        return forward(module, query, key, value, attention_mask, *args, **kwargs)

    return observed


_CPU_FORWARDS = (attention_forward, sdpa_attention_forward)


def _plain_on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> bool:
    """Whether the layer does on a CPU what sdpa's kernel does: causal, or masked, attention of a batch to itself."""
    is_causal = kwargs.get("is_causal")
    return (
        query.device.type == "cpu"
        and query.shape[2] == key.shape[2]
        and query.shape[3] == value.shape[3]
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and kwargs.get("s_aux") is None
        and kwargs.get("position_bias") is None
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )


def _with_position_bias(mask: Tensor | None, bias: Tensor | None, window: int | None) -> Tensor | None:
    """The mask [B, 1, T, T] with what the model adds to its scores, [B, H, T, T] or with 1 for B or H."""
    if bias is None:
        return mask
    if mask is None:
        positions = torch.arange(bias.shape[-1], device=bias.device)
        behind = positions[:, None] - positions
        mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


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


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
