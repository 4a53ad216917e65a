"""What a checkpoint says of each response token: everything that any score of `scores.py` reads, in two passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.student import Student
from benchmarks.quality.tokens import Encoded

FloatArray = NDArray[np.float64]
Signals = dict[str, FloatArray]
"""Flat arrays [N] of the response tokens of all examples, one after the other, by `role.signal`; nats."""


@torch.no_grad()
def measure(
    student: Student, examples: Sequence[Encoded], role: str, *, attention: bool, unconditional: bool = True
) -> Signals:
    """The signals of one checkpoint.

    Args:
        student: loaded with eager attention where `attention` is asked for.
        examples: measured one by one, without padding.
        role: the first half of the signals' names, such as `history`.
        attention: measure attention, too: `attention` is the last layer's mass on the prompt in the token's own row,
            mean over heads; `attention_predictor` in the row that predicts the token; `attention_no_sink` without
            the sequence's first token.
        unconditional: measure the loss of the response alone, too.

    Returns:
        `loss`, `entropy`, `log_rank`, `loss_unconditional` (of the response alone; its first token has none and
        gets `loss`, so that the difference is 0), and attention.
    """
    student.model.eval()
    found: dict[str, list[FloatArray]] = {}

    def add(name: str, values: torch.Tensor) -> None:
        found.setdefault(f"{role}.{name}", []).append(values.double().cpu().numpy())

    for example in examples:
        hidden = None
        if attention:
            hidden = _add_attention(student, example, add)
        loss, entropy, rank = _statistics(*student.response_logits([example], hidden=hidden))
        add("loss", loss)
        add("entropy", entropy)
        add("log_rank", rank.log1p())
        if not unconditional:
            continue
        alone = Encoded(example.ids[example.start :], 1, example.kinds[1:], example.classes[1:])
        add("loss_unconditional", torch.cat([loss[:1], _statistics(*student.response_logits([alone]))[0]]))
    return {name: np.concatenate(values) for name, values in found.items()}


@torch.no_grad()
def measure_loss(student: Student, examples: Sequence[Encoded], role: str) -> Signals:
    """The loss alone, as in `measure`."""
    values = [_statistics(*student.response_logits([example]))[0] for example in examples]
    return {f"{role}.loss": torch.cat(values).double().cpu().numpy()}


def measure_layers(student: Student, examples: Sequence[Encoded], role: str) -> Signals:
    """Each layer's prompt attention as `attention@LAYER`, counted from 0.

    Args:
        student: loaded with eager attention.
        examples: measured one by one.
        role: the first half of the signals' names.
    """
    found: dict[str, list[FloatArray]] = {}
    for example in examples:
        for layer, weights in enumerate(student.attend_everywhere(example)):
            mass = weights[:, example.start :, : example.start].float().mean(0).sum(-1)
            found.setdefault(f"{role}.attention@{layer}", []).append(mass.double().cpu().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def _statistics(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, entropy and rank (0: the likeliest), [N] each."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, targets[:, None])[:, 0]
    return -own, -(log_p.exp() * log_p).sum(-1), (log_p > own[:, None]).sum(-1).float()


def _add_attention(student: Student, example: Encoded, add: Any) -> torch.Tensor:
    """Attention of one example; returns its last hidden states [1, T, D], so that they need no second pass."""
    hidden, weights = student.attend(example)
    start = example.start
    mass = weights[:, start - 1 :, :start].float().mean(0)  # [1 + n, prompt]
    add("attention", mass[1:].sum(-1))
    add("attention_predictor", mass[:-1].sum(-1))
    add("attention_no_sink", mass[1:, 1:].sum(-1))
    return hidden
