"""Causal attention over packed sequences, without padding and without a mask of tokens by tokens.

There are several implementations; the first that gives right numbers on this machine is used.

Shapes: N tokens of all sequences together, H heads, K key-value heads, D head size, S sequences, R rows and C columns
of a block.
"""

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.measure.cuda.agreement import Choice, Function, first_that_agrees
from sstoken.measure.cuda.flex import compiled_flex, flex, with_sinks
from sstoken.measure.prompt_attention import BLOCK_ELEMENTS, attention_scores, log_sum_exp_rows


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    max_length: int,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each token to the tokens of its sequence up to itself, by what `choose_varlen` chose.

    Args:
        query: [N, H, D], after rotary embedding; any strides with D innermost.
        key: [N, K, D]; H is a multiple of K.
        value: [N, K, D].
        offsets: [S + 1] int32, where each sequence starts, and N.
        max_length: of the longest sequence.
        scaling: factor of the scores.
        window: how many tokens a token attends to, itself included; None: all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [H], logits that take part in the softmax but attend to nothing.

    Returns:
        [N, H, D].
    """
    choice = choose_varlen(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2],
        window=window is not None, softcap=softcap, sinks=sinks is not None,
    )  # fmt: skip
    return choice.call(
        query, key, value, offsets, max_length,
        scaling=scaling, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip


@lru_cache(maxsize=32)
def choose_varlen(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    window: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
) -> Choice:
    """Choose the fastest implementation that works here for such a layer, once a process.

    Its name is "flash-attn-3", "flash-attn", "torch varlen", "flex" or "loop".
    """
    return choose_among(
        CANDIDATES, device, dtype, num_heads, num_kv_heads, head_size,
        window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip


@torch.no_grad()
def choose_among(
    candidates: Mapping[str, Function],
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    window: bool,
    softcap: float | None,
    sinks: bool,
) -> Choice:
    """`choose_varlen` among these candidates."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    lengths = [1, 37, 130, 5]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    states = [random(sum(lengths), heads, head_size) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    how = {
        "scaling": head_size**-0.5,
        "window": 9 if window else None,
        "softcap": softcap,
        "sinks": random(num_heads) if sinks else None,
    }
    return first_that_agrees(candidates, ("loop", loop), [((*states, offsets, max(lengths)), how)])


def loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    max_length: int,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`varlen_attention` with one sdpa call a sequence: runs anywhere, and is the reference for the others."""
    output = torch.empty_like(query)
    for start, stop in pairwise(offsets.tolist()):
        q, k, v = (states[start:stop].transpose(0, 1) for states in (query, key, value))
        narrow = window is not None and window < stop - start
        if narrow or softcap is not None or sinks is not None:
            result = _by_blocks(q, k, v, scaling, window, softcap, sinks)
        else:
            result = nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=True
            )[0]
        output[start:stop] = result.transpose(0, 1)
    return output


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence [H, T, D] in blocks of rows, for what sdpa lacks or would need a mask of T by T for."""
    num_heads, length, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    reach = length if window is None else window
    rows_in_block = max(1, min(BLOCK_ELEMENTS // (num_heads * min(length, 2 * reach)), reach))
    output = torch.empty_like(query)
    for first in range(0, length, rows_in_block):
        last, lowest = min(first + rows_in_block, length), max(0, first - reach + 1)
        columns = slice(lowest, last)
        rows_KGRD = query[:, first:last].unflatten(0, (key.shape[0], -1))
        scores = attention_scores(
            (rows_KGRD @ key[:, None, columns].transpose(2, 3)).to(dtype).flatten(0, 1),
            torch.arange(first, last, device=query.device),
            torch.arange(lowest, last, device=query.device),
            None,
            scaling,
            softcap,
            window,
        )
        total = log_sum_exp_rows(scores, sinks)
        weights_HRC = (scores - total[..., None]).exp_().to(value.dtype)
        weights_KGRC = weights_HRC.unflatten(0, (key.shape[0], -1))
        output[:, first:last] = (weights_KGRC @ value[:, None, columns]).flatten(0, 1)
    return output


def _flash_package(module: str) -> Function:
    """flash-attn's function from that module, imported when it is called."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int,
        *, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        import importlib

        function = importlib.import_module(module).flash_attn_varlen_func
        options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if sinks is not None:
            options["return_attn_probs"] = True
        result = function(
            query, key, value, offsets, offsets, max_length, max_length,
            softmax_scale=scaling, causal=True, **options,
        )  # fmt: skip
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output if sinks is None else with_sinks(output, result[1], sinks)

    return attend


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int,
    *, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """torch's own flash attention for CUDA (2.10 and later)."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if softcap is not None:
        raise NotImplementedError("it has no soft-capping")
    output, log_sum_exp = varlen_attn(
        query, key, value, offsets, offsets, max_length, max_length, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=key.shape[1] != query.shape[1],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return output if sinks is None else with_sinks(output, log_sum_exp, sinks)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int,
    *, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """flex_attention, compiled; without compilation it would hold all weights."""
    if query.device.type == "cpu":
        raise NotImplementedError("it is used on a GPU only")
    return flex(compiled_flex(), query, key, value, offsets, scaling, window, softcap, sinks)


CANDIDATES: Mapping[str, Function] = {
    "flash-attn-3": _flash_package("flash_attn_interface"),
    "flash-attn": _flash_package("flash_attn"),
    "torch varlen": _torch_varlen,
    "flex": _flex,
}
