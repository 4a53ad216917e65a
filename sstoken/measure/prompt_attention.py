"""Prompt attention from queries and keys: the prompt's share of each response token's attention.

Shapes: B batch, H heads, K key-value heads, T positions, D head size, R rows and C columns of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sstoken.measure.precision import without_autocast

BLOCK_ELEMENTS = 1 << 20
"""Limit on the attention weights held at once (4 MB in fp32), unless a single row has more."""

Segment = tuple[int, int, int]
"""One sequence of a padded or packed batch: row, first position, one past the last."""


@without_autocast
def prompt_attention(
    query: Tensor,
    key: Tensor,
    response_mask: Tensor,
    mask: Tensor | None = None,
    segments: Sequence[Segment] | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    log_sum_exp: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Each response token's attention mass on the prompt before it, mean over heads (paper, equation 5).

    The prompt of token i is all positions of its sequence before i that are not response tokens.

    Args:
        query: [B, H, T, D], after rotary embedding.
        key: [B, K, T, D]; K divides H.
        response_mask: [B, T] bool.
        mask: [B or 1, 1 or H, T, T], True (or 0 if additive) where attended; None: causal, within `window`.
        segments: the sequences of the batch; None: each row is one.
        scaling: factor of the attention scores.
        softcap: soft-caps the scores: `softcap * tanh(scores / softcap)`.
        sinks: [H], logits that take part in the softmax but attend to nothing.
        window: how many positions a token attends to, itself included; None: all before it.
        log_sum_exp: [B, H, T], of each row's scores, if known; then only the prompt's columns are computed.
        rows: [B, T] bool, the positions whose attention is summed; None: the response tokens.

    Returns:
        [B, T] in [0, 1], 0 at other positions; fp32 (float64 where the model is).
    """
    num_heads = query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    found = torch.zeros(response_mask.shape, dtype=dtype, device=query.device)
    for b, start, stop in segments or [(b, 0, query.shape[2]) for b in range(query.shape[0])]:
        response = response_mask[b, start:stop]
        wanted = (response if rows is None else rows[b, start:stop]).nonzero()[:, 0]
        if wanted.numel() == 0:
            continue
        response = response[: int(wanted[-1]) + 1]  # no row attends to anything after the last one
        columns = (
            torch.arange(response.numel(), device=query.device)
            if log_sum_exp is None
            else (~response).nonzero()[:, 0]
        )
        prompt_C = (~response[columns]).to(dtype)
        wanted, columns = wanted + start, columns + start
        keys_KDC = key[b][:, columns].to(dtype).transpose(1, 2)
        seen = None if mask is None or mask.ndim != 4 else mask[b % mask.shape[0]][..., columns]
        for rows_R in wanted.split(max(1, BLOCK_ELEMENTS // max(1, num_heads * columns.numel()))):
            scores_KGRC = query[b][:, rows_R].to(dtype).unflatten(0, (key.shape[1], -1)) @ keys_KDC[:, None]
            scores_HRC = attention_scores(
                scores_KGRC.flatten(0, 1),
                rows_R,
                columns,
                None if seen is None else seen[..., rows_R, :],
                scaling,
                softcap,
                window,
            )
            total_HR = (
                log_sum_exp_rows(scores_HRC, sinks)
                if log_sum_exp is None
                else log_sum_exp[b][:, rows_R].to(dtype)
            )
            found[b, rows_R] = ((scores_HRC - total_HR[..., None]).exp_() @ prompt_C).mean(0)
    return found


def attention_scores(
    scores: Tensor,
    rows: Tensor,
    columns: Tensor,
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Turn products [..., H, R, C] of query positions `rows` and key positions `columns` into attention scores."""
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        return scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    behind = rows[:, None] - columns
    if window is not None:
        return scores.masked_fill((behind < 0) | (behind >= window), float("-inf"))
    return scores.masked_fill(behind < 0, float("-inf"))


def log_sum_exp_rows(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exp [..., H, R] of each row of scores [..., H, R, C], sinks included."""
    total = scores.logsumexp(-1)
    return total if sinks is None else torch.logaddexp(total, sinks.to(scores.dtype)[:, None])
