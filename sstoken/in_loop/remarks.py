"""Warnings, given once at the first batch, about a selection that runs but means nothing.

Shapes: N response tokens of a batch.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.in_loop.rule import Rule
from sstoken.in_loop.settings import SelfModulation

MOST = 0.5
"""Warn if more than this share of the examples is concerned."""
UNRELATED = 0.3
"""Below this correlation, history and current losses are hardly those of related models."""
SAME_MODEL = 0.1
"""Up to this mean difference, in nats a token, history and current losses may be those of one model, scored in
float32 and trained in half precision."""
FEWEST_TOKENS = 32
"""A mean or a correlation of fewer tokens is not reported."""


def remarks_on_examples(
    batches: Sequence[ResponseTokens], settings: SelfModulation, rule: Rule
) -> Iterator[str]:
    """Warn about the batches of the first optimisation step, before the model has seen them.

    Args:
        batches: their response tokens.
        settings: the selection's.
        rule: the method at that step.
    """
    lengths, promptless = [], 0
    for tokens in batches:
        mask = tokens.response_mask.cpu()
        for index, (row, start, _) in enumerate(tokens.segments):
            length = tokens.offsets[index + 1] - tokens.offsets[index]
            if length:
                lengths.append(length)
                promptless += bool(mask[row, start + 1])  # the very first token is predicted from nothing
    number = len(lengths)
    if not number:
        yield "no token of the first batches is a response token: nothing is trained; look at the labels"
        return
    if promptless > MOST * number and settings.needs_attention:
        yield (
            f"{promptless} of the first {number} examples have no prompt: all their tokens are trained on, and "
            "attention to the prompt says nothing; mask the prompt's labels with -100 (TRL: assistant_only_loss=True "
            "for conversations, or prompt and completion columns), or take gamma=1"
        )
    single = lengths.count(1)
    if single > MOST * number and rule.scope == "sample" and settings.of.policy.ranks:
        yield (
            f"{single} of the first {number} responses have one token, which is always kept: there is nothing to "
            "select; take scope='batch', or train without selection"
        )
        return
    if settings.keeps_all and settings.of.selective:
        yield "rho is 1: every response token is kept, as without selection; take rho below 1"
    elif not rule.keeps_all and all(rule.num_kept(tokens) == tokens.num_tokens for tokens in batches):
        rho = getattr(rule.params, "rho", 1.0)
        yield (
            f"rho={rho:g} keeps every token of the first {number} responses, of up to {max(lengths)} tokens: "
            "ceil(rho n) is n; take a smaller rho, or scope='batch'"
        )


def remarks_on_losses(
    losses: Tensor,
    history: Tensor | None,
    settings: SelfModulation,
    step: int,
    vocabulary: int,
    dtype: torch.dtype,
    noisy: bool,
) -> Iterator[str]:
    """Warn about the losses of the first batch that selects. Waits for the device.

    Args:
        losses: [N] nats, of the live model.
        history: [N] nats; None: not needed.
        settings: the selection's.
        step: optimizer steps finished.
        vocabulary: number of tokens in the model's vocabulary.
        dtype: the one that the model computes in.
        noisy: whether training's forward pass is random (dropout, NEFTune).
    """
    if not losses.numel():
        return
    current = losses.double().cpu()
    mean = float(current.mean())
    if step == 0 and current.numel() >= FEWEST_TOKENS and mean > 1.5 * math.log(vocabulary):
        yield (
            f"the model's loss on the first batch is {mean:.1f} nats a token, more than guessing among "
            f"{vocabulary} tokens ({math.log(vocabulary):.1f}): are these tokens of another tokenizer?"
        )
    if history is None:
        return
    past = history.double().cpu()
    rel = float((past - current).abs().mean())
    noise = torch.finfo(dtype).eps * max(1.0, mean)
    if rel <= noise or (step == 0 and settings.history in ("ema", "snapshot")):
        yield (
            f"history {settings.history!r} is the model as it stands: REL is "
            f"{'the noise of dropout or NEFTune' if noisy else 'rounding error'} (mean {rel:.1g} nats at step {step}), "
            "which min-max blows up to [0, 1]; give warmup_steps, so that the model moves away first"
        )


def remarks_on_column(losses: Tensor, history: Tensor, noisy: bool) -> Iterator[str]:
    """Warn about history losses that do not fit the model that training starts from. Waits for the device.

    Args:
        losses: [N] nats, of the live model at the first batch, before any step.
        history: [N] nats, from the column.
        noisy: whether training's forward pass is random (dropout, NEFTune), so that a small difference means nothing.
    """
    if losses.numel() < FEWEST_TOKENS:
        return
    past, current = history.double().cpu(), losses.double().cpu()
    correlation = float(torch.corrcoef(torch.stack([past, current]))[0, 1])
    apart = float((past - current).abs().mean())
    if apart <= SAME_MODEL:
        return
    if not correlation >= UNRELATED:
        yield (
            f"the column's history losses and the model's own correlate by {correlation:.2f} at the first batch: "
            "they look like those of another model or of other tokens; score this model's base checkpoint on "
            "these tokens"
        )
    elif not noisy:
        yield (
            "the column's history losses are not those of the model that training starts from: they differ by "
            f"{apart:.2f} nats a token at the first batch, more than rounding ({SAME_MODEL:g}); score the checkpoint "
            "that training starts from, or ignore this where an earlier one is meant"
        )
