"""Choose the Triton kernel or plain torch by trial: the first that gives right numbers on this machine.

Shapes: B batch, H heads, K key-value heads, T positions, D head size or hidden size, N tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from sstoken.measure.cuda.agreement import Choice, Trial, first_that_agrees
from sstoken.measure.cuda.prompt_attention import packed_prompt_attention
from sstoken.measure.cuda.token_loss import fused_token_losses
from sstoken.measure.precision import without_autocast
from sstoken.measure.prompt_attention import Segment, prompt_attention
from sstoken.measure.token_loss import OutputHead, token_losses


def prompt_attention_by_kernel(
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
) -> Tensor:
    """`prompt_attention` by the kernel, without a `mask`.

    Raises:
        NotImplementedError: there is a mask.
    """
    if mask is not None:
        raise NotImplementedError("the kernel knows causality, sequences and a window, but no mask")
    batch, _, length, _ = query.shape
    if segments is None:
        starts = [b * length for b in range(batch)]
    else:
        starts = [b * length + start for b, start, _ in segments]
    # What stands between two sequences is padding: on the right of the first, which never sees it.
    offsets = [*starts, batch * length]
    max_length = max(stop - start for start, stop in pairwise(offsets))
    mass_N = packed_prompt_attention(
        query.transpose(1, 2).flatten(0, 1), key.transpose(1, 2).flatten(0, 1), response_mask.flatten(),
        torch.tensor(offsets, dtype=torch.int32, device=query.device), max_length,
        scaling=scaling, softcap=softcap, sinks=sinks, window=window,
    )  # fmt: skip
    return mass_N.view(batch, length)


@lru_cache(maxsize=32)
@torch.no_grad()
def choose_prompt_attention(
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
    """Choose "triton" or "torch" for the prompt attention of such a layer without a mask.

    The function takes the arguments of `prompt_attention`, without `log_sum_exp`.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    lengths = [1, 37, 130, 5]
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    segments = [(0, start, stop) for start, stop in pairwise(offsets)]
    states = [random(1, heads, offsets[-1], head_size) for heads in (num_heads, num_kv_heads)]
    response_mask = (torch.rand(1, offsets[-1], generator=generator) < 0.5).to(device)
    how = {
        "scaling": head_size**-0.5,
        "window": 9 if window else None,
        "softcap": softcap,
        "sinks": random(num_heads) if sinks else None,
    }
    trial = ((*states, response_mask, None, segments), how)
    return first_that_agrees({"triton": prompt_attention_by_kernel}, ("torch", prompt_attention), [trial])


def plain_token_losses(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`fused_token_losses` in plain torch."""
    return token_losses(hidden, targets, OutputHead(weight, bias, scale, softcap))


@lru_cache(maxsize=32)
@torch.no_grad()
def choose_token_losses(
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Choice:
    """Choose "triton" or "torch" for the losses of such a head; both take the arguments of `fused_token_losses`."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, vocabulary = 70, 3001

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    hidden, weight = random(num_tokens, hidden_size), random(vocabulary, hidden_size) * hidden_size**-0.5
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator).to(device)
    trial: Trial = ((hidden, targets, weight, random(vocabulary) if bias else None, scale, softcap), {})
    by_tiles = partial(fused_token_losses, tile_elements=num_tokens * 1024)  # several tiles of columns
    choice = first_that_agrees({"triton": by_tiles}, ("torch", plain_token_losses), [trial])
    return replace(choice, call=fused_token_losses) if choice.call is by_tiles else choice


@without_autocast
def token_losses_by_kernel(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """`token_losses` with the Triton kernel if a trial shows it accurate, else without."""
    choice = choose_token_losses(
        hidden.device, hidden.dtype, hidden.shape[1],
        bias=head.bias is not None, scale=head.scale, softcap=head.softcap,
    )  # fmt: skip
    return choice.call(hidden, targets, head.weight, head.bias, head.scale, head.softcap)
