"""From the signals of a training step to its keep mask and the loss to back-propagate.

Shapes: B rows, T positions, E examples, N response tokens of the batch, example by example.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.in_loop.rule import Rule
from sstoken.labels import IGNORED_LABEL
from sstoken.measure.prompt_attention import Segment
from sstoken.methods import get_method


class Selected(NamedTuple):
    """The result of `self_modulated_loss`."""

    loss: Tensor
    """Scalar: the mean loss of the kept tokens, 0 if none is kept."""
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
    """Select tokens by ssToken's score and average the loss of the kept ones (paper, equations 5 to 8).

    Keeps exactly the tokens that `select` keeps offline for the same values. No gradient flows through the selection.

    Args:
        current_loss: [B, T] nats, with gradients; index i belongs to token i (`token_loss`).
        history_loss: [B, T] nats; not needed if gamma is 0.
        attention: [B, T] in [0, 1], prompt attention; not needed if gamma is 1.
        response_mask: [B, T] bool.
        rho: share of response tokens to keep, in (0, 1].
        gamma: weight of REL against attention, in [0, 1].
        scope: keep the best `ceil(rho * n)` tokens of each example, or of the whole batch.
        segments: the sequences of the batch; None: each row is one.
        num_kept: divisor of the summed loss; None: the number kept here. With gradient accumulation or several
            processes, pass the number kept in the whole optimisation step.

    Raises:
        UsageError: rho or gamma out of range, or a signal that gamma needs is missing.
    """
    method = get_method("sstoken")
    rule = Rule(method, method.read_params({"rho": rho, "gamma": gamma}), scope)
    tokens = ResponseTokens.of(response_mask, segments)
    loss_N = tokens.gather(current_loss)
    given = {
        "history.loss": history_loss,
        "current.loss": current_loss.detach(),
        "current.attention": attention,
    }
    signals = {name: tokens.gather(values) for name, values in given.items() if values is not None}
    keep_N = rule.decide(signals, tokens).keep
    kept = rule.num_kept(tokens) if num_kept is None else num_kept
    return Selected(kept_loss(loss_N, keep_N) / torch.as_tensor(kept).clamp(min=1), tokens.scatter(keep_N))


def kept_loss(loss: Tensor, keep: Tensor) -> Tensor:
    """Sum the losses [N] of the kept tokens; a dropped token's loss may be NaN."""
    return torch.where(keep, loss, 0.0).sum()


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute each token's loss from a model's logits; index i is token i, not the position that predicts it.

    Args:
        logits: [B, T, V]; position i predicts token i + 1.
        labels: [B, T], -100 for tokens without a loss.

    Returns:
        [B, T] nats, float32, with gradients; 0 for tokens without a loss and at the first position.
    """
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return nn.functional.pad(losses.view(labels.shape[0], -1), (1, 0))
