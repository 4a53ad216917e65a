"""The core: from signals that the training step already has to a keep mask and the loss to back-propagate.

Shapes: B rows, T positions, E examples, N response tokens of the batch, example by example.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sstoken.errors import UsageError
from sstoken.in_loop.layout import IGNORED, Layout
from sstoken.measure.prompt_attention import Segment
from sstoken.selection import keep_per_example_tensor, minmax_tensor


class Selected(NamedTuple):
    """What `self_modulated_loss` gives."""

    loss: Tensor
    """Scalar: the mean loss of the kept tokens, 0 where there is none."""
    keep_mask: Tensor
    """[B, T] bool."""


def self_modulated_loss(
    current_loss: Tensor,
    history_loss: Tensor | None,
    attention: Tensor | None,
    response_mask: Tensor,
    *,
    rho: float = 0.6,
    gamma: float = 0.5,
    scope: Literal["sample", "batch"] = "sample",
    segments: Sequence[Segment] | None = None,
    num_kept: int | Tensor | None = None,
) -> Selected:
    """Select tokens by ssToken's score and average the loss of those kept (paper, equations 5 to 8).

    The same as `select` does offline, on the same values exactly. The selection carries no gradient.

    Args:
        current_loss: [B, T] nats, with gradients; index i speaks of token i (`token_loss`).
        history_loss: [B, T] nats; not needed where gamma is 0.
        attention: [B, T] in [0, 1]; not needed where gamma is 1.
        response_mask: [B, T] bool.
        rho: selection ratio, in (0, 1].
        gamma: balance, in [0, 1].
        scope: keep the best `ceil(rho * n)` of each example, or of all of them together.
        segments: the sequences of the batch; None: each row is one.
        num_kept: what the sum is divided by; None: how many are kept here. With gradient accumulation or several
            processes: how many the whole optimisation step keeps.

    Raises:
        UsageError: rho or gamma out of range, or a signal that gamma needs is missing.
    """
    if not 0 <= gamma <= 1:
        raise UsageError(f"gamma is {gamma}; legal is 0 <= gamma <= 1 (the weight of REL)")
    layout = Layout.of(response_mask, segments)
    loss_N = layout.gather(current_loss)
    keep_N = keep_tokens(
        loss_N.detach(),
        None if history_loss is None else layout.gather(history_loss),
        None if attention is None else layout.gather(attention),
        layout,
        rho=rho,
        gamma=gamma,
        scope=scope,
    )
    kept = sum(layout.quotas(rho, scope)) if num_kept is None else num_kept
    return Selected(kept_loss(loss_N, keep_N) / torch.as_tensor(kept).clamp(min=1), layout.scatter(keep_N))


@torch.no_grad()
def keep_tokens(
    current_loss: Tensor | None,
    history_loss: Tensor | None,
    attention: Tensor | None,
    layout: Layout,
    *,
    rho: float,
    gamma: float,
    scope: str = "sample",
) -> Tensor:
    """Which response tokens are kept, [N] bool; all values are [N]. Never waits for the device.

    Raises:
        UsageError: a signal that gamma needs is missing.
    """
    num_tokens = layout.num_tokens
    if rho == 1:
        return torch.ones(num_tokens, dtype=torch.bool, device=layout.positions.device)
    score = torch.zeros((), dtype=torch.float64)
    if gamma > 0:
        rel = _double(_given(history_loss, "history_loss")) - _double(_given(current_loss, "current_loss"))
        score = score + gamma * minmax_tensor(rel, layout.example.to(rel.device), len(layout.segments))
    if gamma < 1:
        score = score + (1 - gamma) * _double(_given(attention, "attention"))
    example = layout.example.to(score.device)
    quotas = layout.quotas(rho, scope)
    if scope == "batch":
        example = torch.zeros_like(example)
    keep = keep_per_example_tensor(score, example, quotas)
    return keep.to(layout.positions.device)


def kept_loss(loss: Tensor, keep: Tensor) -> Tensor:
    """The sum of the kept tokens' losses; both [N]. A dropped token's loss is left out even where it is NaN."""
    return torch.where(keep, loss, 0.0).sum()


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token from a model's logits, as `current_loss` is wanted: index i speaks of token i.

    Args:
        logits: [B, T, V]; position i predicts token i + 1.
        labels: [B, T], -100 where no loss is wanted.

    Returns:
        [B, T] nats, fp32, with gradients; 0 where no loss is wanted and at the first position.
    """
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nn.functional.pad(losses.view(labels.shape[0], -1), (1, 0))


def _given(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise UsageError(f"the signal {name!r} is missing; gamma gives it weight")
    return values


def _double(values: Tensor) -> Tensor:
    """In float64, as offline; on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
