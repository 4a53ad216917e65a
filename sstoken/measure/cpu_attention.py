"""Causal attention on a CPU for sequences of some hundred tokens: products of all heads, a block of rows at a time.

sdpa's kernel works head by head on tiles of 32 or 64 rows, which are too small to multiply well. Exponentials are
taken of the scores as they are, without looking for each row's largest first; sums that come out too large or too
small say where that does not do, and sdpa's kernel takes over.

Shapes: B batch, H heads, K key-value heads, T positions, D head size, R rows of a block, C columns up to its last row.
"""

from itertools import pairwise

import torch
from torch import Tensor

_LENGTHS = range(80, 1025)
"""Below, calls cost more than they save; above, sdpa's tiles are large and the cache does not hold a block."""
_ROWS = 96
_HEADS_PER_THREAD = 4
"""Fewer do not keep the threads busy: sdpa's kernel spreads batch and rows over them, too."""
_SUMS = (1e-30, 1e30)
"""Of exponentials: between them nothing was lost in fp32."""


def attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    response_mask: Tensor | None = None,
    measured: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attention output and, on the way, attention importance of sequences that start at position 0 of their row.

    Args:
        query: [B, H, T, D], after rotary embedding.
        key: [B, K, T, D]; K divides H.
        value: [B, K, T, D].
        scaling: factor of the scores.
        response_mask: [B, T] bool, where importance is wanted; its prompt are the positions before that are False.
        measured: [B, T] bool, the positions whose importance is wanted; None: those of the response.

    Returns:
        Output [B, T, H, D], and importance [B, T], 0 where it is not wanted. None in place of both: sdpa does better,
        or the scores are too large for this.
    """
    batch, heads, length, size = query.shape
    if (
        query.dtype not in (torch.float32, torch.float64)
        or length not in _LENGTHS
        or heads < _HEADS_PER_THREAD * torch.get_num_threads()
    ):
        return None
    if key.shape[1] != heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], 1) for states in (key, value))
    output = query.new_empty(batch, length, heads, size)
    importance = query.new_zeros(batch, length)
    blocks = max(1, round(length / _ROWS))
    bounds = [length * i // blocks for i in range(blocks + 1)]
    memory = query.new_empty(heads * -(-length // blocks) * length)
    ones_T, sums_BHT = query.new_ones(length), query.new_empty(batch, heads, length)
    for b in range(batch):
        prompt_T = None if response_mask is None else (~response_mask[b]).to(query.dtype)
        for first, last in pairwise(bounds):
            rows = slice(first, last)
            weights_HRC = memory[: heads * (last - first) * last].view(heads, last - first, last)
            keys_HDC = key[b, :, :last].transpose(1, 2)
            torch.baddbmm(weights_HRC, query[b, :, rows], keys_HDC, beta=0, alpha=scaling, out=weights_HRC)
            weights_HRC.exp_()[:, :, rows].tril_()
            sums_HR = (weights_HRC.flatten(0, 1) @ ones_T[:last]).view(heads, -1)  # half the time of sum()
            sums_BHT[b, :, rows] = sums_HR
            attended_HRD = torch.bmm(weights_HRC, value[b, :, :last])
            torch.div(attended_HRD, sums_HR[..., None], out=output[b, rows].transpose(0, 1))
            if prompt_T is not None:
                importance[b, rows] = (weights_HRC @ prompt_T[:last] / sums_HR).mean(0)
    smallest, largest = sums_BHT.aminmax()
    if not (smallest > _SUMS[0] and largest < _SUMS[1]):
        return None
    if response_mask is not None:
        importance *= response_mask if measured is None else measured
    return output, importance


@torch.library.custom_op("sstoken::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention output [B, T, H, D], by blocks or by sdpa's kernel; torch.compile need not look inside."""
    # torch.compile cannot ask for the mode where this is called. Without it, a training step may follow.
    by_blocks = attend_by_blocks(query, key, value, scaling) if torch.is_inference_mode_enabled() else None
    return sdpa_kernel(query, key, value, None, scaling)[0] if by_blocks is None else by_blocks[0]


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])


def sdpa_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """sdpa's CPU kernel: attention output [B, T, H, D] and, what sdpa drops, the scores' log-sum-exp [B, H, T].

    Args:
        query: [B, H, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        mask: as sdpa takes it; None: causal.
        scaling: factor of the scores.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        mask = mask.to(query.dtype)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None, attn_mask=mask, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), log_sum_exp
