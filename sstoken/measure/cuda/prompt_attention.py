"""Prompt attention of packed sequences on a GPU: one pass over queries and keys, no weights in memory.

Shapes: N tokens of all sequences together, H heads, Hkv key heads, D head size, S sequences.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def packed_prompt_attention(
    query: Tensor,
    key: Tensor,
    response_mask: Tensor,
    offsets: Tensor,
    max_length: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return each response token's attention mass on the prompt before it, mean over heads (paper, equation 5).

    The prompt of token i is all positions of its sequence before i that are not response tokens. Products are
    accumulated in fp32; for fp32 inputs they are computed in full fp32.

    Args:
        query: [N, H, D], after rotary embedding; any strides.
        key: [N, Hkv, D]; H is a multiple of Hkv.
        response_mask: [N] bool.
        offsets: [S + 1] int32, where each sequence starts, and N.
        max_length: of the longest sequence.
        scaling: factor of the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [H], logits that take part in the softmax but attend to nothing.
        window: how many tokens a token attends to, itself included; None: all before it.

    Returns:
        [N] fp32 in [0, 1], 0 off the response.

    Raises:
        ImportError: Triton is not installed.
    """
    triton, kernel = _compiled()
    num_tokens, num_heads, head_size = query.shape
    per_head_HN = torch.zeros(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    # A block of keys has to fit the shared memory of any GPU.
    block = 64 if head_size * query.element_size() <= 256 else 32
    grid = (triton.cdiv(max_length, block), offsets.numel() - 1, num_heads)
    with torch.cuda.device_of(query):
        kernel[grid](
            query, key, response_mask, offsets, per_head_HN if sinks is None else sinks, per_head_HN,
            num_tokens, num_heads // key.shape[1], head_size,
            float(scaling), float(softcap or 1.0), window or 0,
            *query.stride(), *key.stride(), response_mask.stride(0),
            HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, HAS_WINDOW=window is not None,
            BLOCK_M=block, BLOCK_N=block, BLOCK_D=max(16, triton.next_power_of_2(head_size)),
        )  # fmt: skip
    return per_head_HN.mean(0)


@cache
def _compiled() -> tuple[Any, Any]:
    """Import Triton and decorate the kernel, here so that this module can be imported without Triton."""
    import triton
    import triton.language as tl

    def mass_of_block(  # type: ignore[no-untyped-def]
        query, key, response_mask, offsets, sinks, out,
        num_tokens, group_size, head_size, scaling, softcap, window,
        query_stride_n, query_stride_h, query_stride_d, key_stride_n, key_stride_h, key_stride_d, mask_stride,
        HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One block of rows of one sequence and head; rows and columns count from the sequence's start."""
        segment, head = tl.program_id(1), tl.program_id(2)
        start = tl.load(offsets + segment).to(tl.int64)
        length = (tl.load(offsets + segment + 1) - start).to(tl.int32)
        first = tl.program_id(0) * BLOCK_M
        rows = first + tl.arange(0, BLOCK_M)
        sizes = tl.arange(0, BLOCK_D)
        asked = tl.load(response_mask + (start + rows) * mask_stride, mask=rows < length, other=0) != 0
        if tl.sum(asked.to(tl.int32), 0) > 0:
            q = tl.load(
                query + (start + rows)[:, None] * query_stride_n + head * query_stride_h
                + sizes[None, :] * query_stride_d,
                mask=(rows < length)[:, None] & (sizes < head_size)[None, :], other=0.0,
            )  # fmt: skip
            key_head = key + (head // group_size) * key_stride_h
            highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            if HAS_SINKS:
                highest = tl.full([BLOCK_M], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32)
            total = tl.full([BLOCK_M], 1.0 if HAS_SINKS else 0.0, tl.float32)
            prompt_total = tl.zeros([BLOCK_M], tl.float32)
            lowest = 0
            if HAS_WINDOW:
                lowest = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
            for column in range(lowest, tl.minimum(first + BLOCK_M, length), BLOCK_N):
                columns = column + tl.arange(0, BLOCK_N)
                k = tl.load(
                    key_head + (start + columns)[None, :] * key_stride_n + sizes[:, None] * key_stride_d,
                    mask=(columns < length)[None, :] & (sizes < head_size)[:, None], other=0.0,
                )  # fmt: skip
                scores = tl.dot(q, k, input_precision="ieee") * scaling
                if HAS_SOFTCAP:
                    scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
                seen = columns[None, :] <= rows[:, None]
                if HAS_WINDOW:
                    seen = seen & (columns[None, :] > rows[:, None] - window)
                scores = tl.where(seen, scores, float("-inf"))
                higher = tl.maximum(highest, tl.max(scores, 1))
                # A row may have seen nothing yet: -inf - -inf would be NaN.
                base = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp(scores - base[:, None])
                shrink = tl.exp(highest - base)
                answer = tl.load(
                    response_mask + (start + columns) * mask_stride, mask=columns < length, other=1
                )
                on_prompt = tl.where((answer == 0)[None, :], weights, 0.0)
                total = total * shrink + tl.sum(weights, 1)
                prompt_total = prompt_total * shrink + tl.sum(on_prompt, 1)
                highest = higher
            tl.store(
                out + head.to(tl.int64) * num_tokens + start + rows,
                prompt_total / total,
                mask=asked & (rows < length),
            )

    return triton, triton.jit(mass_of_block)
