"""The attention function that models are loaded with: sdpa, extended by soft-capping and sinks.

Shapes: B batch, H heads, T positions, D head size, R rows of a block.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sstoken.measure.precision import cast_as_autocast
from sstoken.measure.prompt_attention import BLOCK_ELEMENTS, attention_scores, log_sum_exp_rows

IMPLEMENTATION = "sstoken"
"""Its name, for `attn_implementation`."""


def _attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention output [B, T, H, D] with soft-capping or sinks, which sdpa lacks, in blocks of rows."""
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
        scale = scale_of(query, scaling)
        return _attend_by_blocks(query, key, value, attention_mask, scale, softcap, sinks), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output, None


def scale_of(query: Tensor, scaling: float | None) -> float:
    """The factor of the attention scores: as given, or one over the root of the head size."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


CPU_FORWARDS = (attention_forward, sdpa_attention_forward)


def plain_on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> bool:
    """Whether sdpa's CPU kernel can compute the layer: causal or masked self-attention of a batch."""
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


def sdpa_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Call sdpa's CPU kernel for the attention output [B, T, H, D] and the log-sum-exp [B, H, T], which sdpa drops.

    `mask` is in sdpa's format; None: causal.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        mask = mask.to(query.dtype)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None, attn_mask=mask, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), log_sum_exp


def with_position_bias(mask: Tensor | None, bias: Tensor | None, window: int | None) -> Tensor | None:
    """Combine the mask [B, 1, T, T] with the bias that the model adds to its scores, [B or 1, H or 1, T, T]."""
    if bias is None:
        return mask
    if mask is None:
        positions = torch.arange(bias.shape[-1], device=bias.device)
        behind = positions[:, None] - positions
        mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
