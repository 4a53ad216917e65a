"""Fine-tuning on kept tokens, and what comes of it: losses by class, greedy answers."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.quality.student import Student
from benchmarks.quality.tokens import CLASSES, Encoded
from sstoken.methods import Denominator

Keep = Sequence[NDArray[np.bool_]]
"""Of each example, which of its response tokens are trained on."""
Weights = Sequence[NDArray[np.float64]]
"""Of each example, what the losses of its response tokens are multiplied by."""
WARMUP = 0.1
"""The share of the steps in which the learning rate rises to its peak; then it falls linearly to 0."""


def train(
    student: Student,
    examples: Sequence[Encoded],
    keep: Keep,
    weight: Weights | None = None,
    denominator: Denominator = "kept",
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> tuple[int, int]:
    """Train on the kept tokens of batches that depend on the seed alone.

    The loss is the mean over a batch's kept tokens, or the weighted sum divided by the number of response tokens. A
    batch of which nothing is kept is a step with a gradient of zero, as in the loop: every method takes all steps.

    Args:
        student: trained in place.
        examples: all that may be drawn.
        keep: which of their tokens have a loss.
        weight: what their losses are multiplied by; None: 1. Losses with negative weights are averaged separately.
        denominator: divide the summed loss by the number of kept tokens, or of response tokens.
        num_steps: batches.
        batch_size: examples a batch.
        learning_rate: the peak.
        seed: of the batches' order.
        after_step: called with the number of steps taken, from 1.

    Returns:
        How many kept tokens were trained on, and in how many steps there were none.
    """
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    optimizer, schedule = optimiser_and_schedule(parameters, learning_rate, num_steps)
    student.model.train()
    trained = empty = 0
    for step, chosen in enumerate(batches(len(examples), batch_size, num_steps, seed), start=1):
        logits, targets = student.response_logits([examples[i] for i in chosen], [keep[i] for i in chosen])
        trained += len(targets)
        empty += not len(targets)
        if weight is None and denominator == "kept" and len(targets):
            loss = functional.cross_entropy(logits, targets)
        else:
            weights = np.concatenate(
                [np.ones(keep[i].sum()) if weight is None else weight[i][keep[i]] for i in chosen]
            )
            number = sum(examples[i].num_response for i in chosen) if denominator == "response" else None
            loss = weighted_loss(functional.cross_entropy(logits, targets, reduction="none"), weights, number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after_step(step)
    student.model.eval()
    return trained, empty


def optimiser_and_schedule(
    parameters: Sequence[torch.nn.Parameter], learning_rate: float, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, and a learning rate that rises to its peak and falls linearly."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rising = max(1, round(WARMUP * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (num_steps - step) / max(1, num_steps - rising + 1))
    )
    return optimizer, schedule


def weighted_loss(losses: torch.Tensor, weights: NDArray[np.float64], number: int | None) -> torch.Tensor:
    """The weighted sum of losses [N], divided by `number`; None: by how many have a positive weight.

    Losses to be forgotten (negative weights) are divided by their own number, as `in_loop.rule.Rule` does.
    """
    learned, forgotten = int((weights > 0).sum()), int((weights < 0).sum())
    scaled = np.where(weights < 0, weights * learned / max(1, forgotten), weights)
    factors = torch.from_numpy(scaled).to(losses)
    return (losses * factors).sum() / max(1, learned if number is None else number)


def batches(num_examples: int, batch_size: int, num_steps: int, seed: int) -> list[list[int]]:
    """Indices of each step's examples: shuffled epochs one after the other."""
    rng, order = random.Random(seed), []
    while len(order) < num_steps * batch_size:
        order += rng.sample(range(num_examples), num_examples)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(num_steps)]


@torch.no_grad()
def losses_by_class(
    student: Student, examples: Sequence[Encoded], batch_size: int = 16
) -> list[dict[str, float]]:
    """Of each example: the sum of its losses and the number of tokens, of all and by class."""
    order = np.argsort([len(e.ids) for e in examples], kind="stable")
    found: list[dict[str, float]] = [{} for _ in examples]
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = [examples[i] for i in chosen]
        logits, targets = student.response_logits(batch)
        losses = functional.cross_entropy(logits, targets, reduction="none").double().cpu().numpy()
        for i, own in zip(
            chosen, np.split(losses, np.cumsum([e.num_response for e in batch])[:-1]), strict=True
        ):
            row = {"loss_all": float(own.sum()), "tokens_all": float(own.size)}
            for name in CLASSES:
                of_class = examples[i].classes == name
                row[f"loss_{name}"] = float(own[of_class].sum())
                row[f"tokens_{name}"] = float(of_class.sum())
            found[i] = row
    return found


@torch.no_grad()
def answer_greedily(
    student: Student, tokenizer: Any, prompts: Sequence[str], end_id: int, limit: int, batch_size: int = 128
) -> list[tuple[str, bool, int]]:
    """Of each prompt: the greedy answer, whether it ended within the limit, and its length in tokens."""
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    order = np.argsort([len(i) for i in ids], kind="stable")
    answers: list[tuple[str, bool, int]] = [("", False, 0)] * len(ids)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        width = max(len(ids[i]) for i in chosen)
        left = torch.tensor(
            [[end_id] * (width - len(ids[i])) + ids[i] for i in chosen], device=student.device
        )
        mask = torch.tensor(
            [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=student.device
        )
        out = student.model.generate(
            input_ids=left,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=end_id,
            pad_token_id=end_id,
            use_cache=True,
        )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            ended = end_id in row
            length = row.index(end_id) if ended else len(row)
            answers[i] = (tokenizer.decode(row[:length], skip_special_tokens=True), ended, length)
    return answers
