"""Attention over packed sequences by torch's flex_attention.

Shapes: N tokens of all sequences together, H heads, K key-value heads, D head size, S sequences.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens of a block of the mask."""


def with_sinks(output: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> Tensor:
    """Turn the output [N, H, D] of a softmax without sinks, with log_sum_exp [H, N], into that with sinks."""
    share_HN = torch.sigmoid(log_sum_exp.float() - sinks.float()[:, None])
    return (output.float() * share_HN.T[..., None]).to(output.dtype)


@cache
def compiled_flex() -> Any:
    """torch's flex_attention, compiled for any length."""
    return torch.compile(flex_attention, dynamic=True)


def flex(
    attend: Any, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor,
    scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """`varlen_attention` by flex_attention; `attend` is that function, compiled or not."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output, log_sum_exp = attend(
        *(states.transpose(0, 1)[None] for states in (query, key, value)),
        score_mod=None if softcap is None else cap,
        block_mask=block_mask(offsets, query.shape[0], window),
        scale=scaling, enable_gqa=key.shape[1] != query.shape[1], return_lse=True,
    )  # fmt: skip
    output = output[0].transpose(0, 1)
    return output if sinks is None else with_sinks(output, log_sum_exp[0], sinks)


@lru_cache(maxsize=4)
def block_mask(offsets: Tensor, num_tokens: int, window: int | None) -> BlockMask:
    """Build flex_attention's mask for packed sequences from blocks of tokens by blocks of tokens.

    The layers of a forward pass share it: they share the tensor `offsets`, which must not change afterwards.
    """
    device = offsets.device
    positions = torch.arange(num_tokens, device=device)
    starts_N = offsets[torch.searchsorted(offsets[1:], positions, right=True)]
    reach = num_tokens if window is None else window

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column >= starts_N[row]) & (column > row - reach)

    firsts = torch.arange(0, num_tokens, BLOCK, device=device)
    lasts = (firsts + BLOCK - 1).clamp(max=num_tokens - 1)
    lowest = torch.maximum(starts_N[firsts], firsts - reach + 1) // BLOCK
    count = firsts // BLOCK - lowest + 1
    columns = firsts[None] // BLOCK
    whole = (columns < firsts[:, None] // BLOCK) & (firsts >= starts_N[lasts][:, None])
    whole &= (firsts > (lasts - reach)[:, None]) & (firsts + BLOCK <= num_tokens)[:, None]
    touched = (columns >= lowest[:, None]) & (columns < (lowest + count)[:, None])

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Number and indices of the blocks set in each row, as flex_attention takes them."""
        indices = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], indices.int()[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(touched & ~whole), *ordered(touched & whole), BLOCK_SIZE=BLOCK, mask_mod=visible,
        seq_lengths=(num_tokens, num_tokens),
    )  # fmt: skip
