"""Per-token loss on a GPU: the library multiplies by the output embedding, a kernel reads the logits once.

The product of 16-bit states and weights is taken in fp32 (`torch.mm` with `out_dtype`): rounded to 16 bits, a logit of
20 is off by up to 0.06 nats in bf16. The library's product is faster than one written in Triton; what costs time after
it is reading its result again and again.

Shapes: N tokens, D hidden size, V vocabulary, R rows and C columns of a tile.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 24
"""fp32 logits held at once: 64 MB."""
_ROWS = 4096
_BLOCK = 2048


@torch.no_grad()
def fused_token_losses(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    *,
    tile_elements: int = TILE_ELEMENTS,
) -> Tensor:
    """`-log p(target)` of each row, in nats, of logits `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        hidden: [N, D]; row i is the state that predicts `targets[i]`.
        targets: [N] token ids.
        weight: [V, D].
        bias: [V].
        scale: factor of the logits.
        softcap: bound of the logits; None: none.
        tile_elements: fp32 logits held at once.

    Returns:
        [N] fp32.

    Raises:
        ImportError: Triton is not installed.
    """
    triton, kernel = _compiled()
    num_tokens, vocabulary = hidden.shape[0], weight.shape[0]
    highest_N = torch.full((num_tokens,), float("-inf"), dtype=torch.float32, device=hidden.device)
    total_N, target_logit_N = torch.zeros_like(highest_N), torch.zeros_like(highest_N)
    targets = targets.contiguous()
    num_rows = max(1, min(num_tokens, _ROWS, tile_elements))
    num_columns = min(vocabulary, tile_elements // num_rows)
    buffer = torch.empty(num_rows * num_columns, dtype=torch.float32, device=hidden.device)
    for row in range(0, num_tokens, num_rows):
        rows = slice(row, min(row + num_rows, num_tokens))
        for column in range(0, vocabulary, num_columns):
            columns = slice(column, min(column + num_columns, vocabulary))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits_RC = buffer[: shape[0] * shape[1]].view(shape)
            _product(hidden[rows], weight[columns], logits_RC)
            with torch.cuda.device_of(hidden):
                kernel[(shape[0],)](
                    logits_RC, logits_RC if bias is None else bias[columns], targets[rows],
                    highest_N[rows], total_N[rows], target_logit_N[rows],
                    shape[1], column, float(scale), float(softcap or 1.0),
                    HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
                    BLOCK=min(_BLOCK, triton.next_power_of_2(shape[1])),
                )  # fmt: skip
    return highest_N + total_N.log() - target_logit_N


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """`hidden @ weight.T` in fp32 into `out`, unrounded."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().T, out=out)


@cache
def _compiled() -> tuple[Any, Any]:
    """Import Triton and decorate the kernel, here so that this module can be imported without Triton."""
    import triton
    import triton.language as tl

    def fold_row(  # type: ignore[no-untyped-def]
        logits, bias, targets, highest, total, target_logit,
        num_columns, first_column, scale, softcap,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row of a tile into its running maximum, its sum of exponentials below that, its target's logit."""
        row = tl.program_id(0)
        start = logits + row.to(tl.int64) * num_columns
        target = tl.load(targets + row) - first_column
        high, sum_below, found = tl.load(highest + row), tl.load(total + row), tl.load(target_logit + row)
        for block in range(0, num_columns, BLOCK):
            columns = block + tl.arange(0, BLOCK)
            inside = columns < num_columns
            values = tl.load(start + columns, mask=inside, other=0.0)
            if HAS_BIAS:
                values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            values *= scale
            if HAS_SOFTCAP:
                values = softcap * (2.0 * tl.sigmoid(2.0 * values / softcap) - 1.0)  # tanh
            found += tl.sum(tl.where(columns == target, values, 0.0), 0)
            values = tl.where(inside, values, float("-inf"))
            higher = tl.maximum(high, tl.max(values, 0))
            # All logits so far may be -inf, and -inf - -inf is NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            sum_below = sum_below * tl.exp(high - base) + tl.sum(tl.exp(values - base), 0)
            high = higher
        tl.store(highest + row, high)
        tl.store(total + row, sum_below)
        tl.store(target_logit + row, found)

    return triton, triton.jit(fold_row)
