"""Warnings about a selection that runs but is meaningless, once, at the first batch; or is not the checkpoint's.

Shapes: N response tokens of a batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.in_loop.forward import measure_signals
from sstoken.in_loop.head import rounds
from sstoken.in_loop.histories import evaluating
from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.in_loop.rule import Rule
from sstoken.in_loop.settings import SelfModulation
from sstoken.methods import Top

MOST = 0.5
"""Warn if more than this share of the examples is affected."""
UNRELATED = 0.3
"""Below this correlation, history and current losses hardly come from related models."""
SAME_MODEL = 0.1
"""Up to this mean difference, in nats per token, history and current losses may come from one model, scored in
float32 and trained in half precision."""
MIXES, MIXES_IN_HALF = 0.01, 0.1
"""Warn if a sequence's losses beside others differ by more than this from those alone, in nats per token; the second
in half precision."""
FEWEST_TOKENS = 32
"""Means and correlations over fewer tokens are not reported."""
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def remarks_on_changes(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> Iterator[str]:
    """Warn if a run goes on from `step` with other settings (`SelfModulation.record`) than its checkpoint's.

    A method's own parameters come and go with it; an older checkpoint has no settings.
    """
    changes = [
        f"{name} was {then[name]!r} and is {now[name]!r}"
        for name in now
        if name in then and then[name] != now[name]
    ]
    if changes:
        yield (
            f"training goes on from step {step} with other settings than before: {'; '.join(changes)}; ignore this "
            "if you meant it"
        )


def remarks_on_examples(
    batches: Sequence[ResponseTokens], settings: SelfModulation, rule: Rule, num_steps: int
) -> Iterator[str]:
    """Warn about the batches of the first of `num_steps` optimisation steps, before the model has seen them."""
    if settings.warmup_steps >= num_steps:
        yield (
            f"warmup_steps is {settings.warmup_steps}, and training has {num_steps} steps: nothing is selected; set "
            "warmup_steps below that"
        )
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
            "prompt attention is meaningless; mask the prompt's labels with -100 (TRL: assistant_only_loss=True "
            "for conversations, or prompt and completion columns), or set gamma=1"
        )
    single = lengths.count(1)
    if single > MOST * number and rule.scope == "sample" and isinstance(settings.of.policy, Top):
        yield (
            f"{single} of the first {number} responses have one token, which is always kept: there is nothing to "
            "select; set scope='batch', or train without selection"
        )
        return
    if settings.keeps_all and settings.of.selective:
        yield "rho is 1: every response token is kept, as without selection; set rho below 1"
    elif not rule.keeps_all and all(rule.num_kept(tokens) == tokens.num_tokens for tokens in batches):
        rho = getattr(rule.params, "rho", 1.0)
        yield (
            f"rho={rho:g} keeps every token of the first {number} responses, of up to {max(lengths)} tokens: "
            "ceil(rho n) is n; set a smaller rho, or scope='batch'"
        )


def remarks_on_losses(trainer: Any, losses: Tensor, history: Tensor | None, step: int) -> Iterator[str]:
    """Warn about the losses of the first batch that selects. Waits for the device.

    Args:
        trainer: the in-loop trainer.
        losses: [N] nats, under the model in training.
        history: [N] nats; None: not needed.
        step: finished optimizer steps.
    """
    if not losses.numel():
        return
    current = losses.double().cpu()
    mean = float(current.mean())
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
    if step == 0 and current.numel() >= FEWEST_TOKENS and mean > 1.5 * math.log(vocabulary):
        yield (
            f"the model's loss on the first batch is {mean:.1f} nats per token, more than guessing among "
            f"{vocabulary} tokens ({math.log(vocabulary):.1f}): do these tokens come from another tokenizer?"
        )
    if history is None:
        return
    past = history.double().cpu()
    rel = float((past - current).abs().mean())
    dtype = _MIXED.get(str(trainer.accelerator.mixed_precision), trainer.model.dtype)
    noise = torch.finfo(dtype).eps * max(1.0, mean)
    kind = trainer._selection.history
    if rel <= noise or (step == 0 and kind in ("ema", "snapshot")):
        source = "the noise of dropout or NEFTune" if _noisy(trainer) else "rounding error"
        yield (
            f"history {kind!r} equals the current model: REL is {source} (mean {rel:.1g} nats at step {step}), which "
            "min-max inflates to [0, 1]; set warmup_steps, so that the model moves away first"
        )


def remarks_on_column(trainer: Any, losses: Tensor, history: Tensor) -> Iterator[str]:
    """Warn about a column's history losses [N] that do not fit the model that training starts from.

    `losses` [N] are the model's own at the first batch, before any step. Waits for the device.
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
            f"the correlation of the column's history losses with the model's own is {correlation:z.2f} at the first "
            "batch: they look like those of another model or of other tokens; score this model's base checkpoint on "
            "these tokens"
        )
    elif not _noisy(trainer):  # where training is random, differences are expected
        yield (
            "the column's history losses are not those of the model that training starts from: they differ by "
            f"{apart:.2f} nats per token at the first batch, more than rounding ({SAME_MODEL:g}); score the checkpoint "
            "that training starts from, or ignore this if you meant an earlier one"
        )


def remarks_on_batch(trainer: Any, inputs: Mapping[str, Any], tokens: ResponseTokens) -> Iterator[str]:
    """Warn if one sequence's losses in its batch differ from those alone. Runs two forward passes without gradients.

    Linear attention and convolutions run across the sequences of a packed row, padding on the left shifts absolute
    positions, and experts of limited capacity are shared by all sequences. Training then sees other losses than
    `score`.
    """
    model, head = trainer.model, trainer._head
    answered = [i for i in range(len(tokens.segments)) if tokens.offsets[i] < tokens.offsets[i + 1]]
    if not answered:
        return
    index = max(answered, key=lambda i: (tokens.segments[i][1], -tokens.segments[i][2]))
    row, start, stop = tokens.segments[index]
    alone = {k: inputs[k][row : row + 1, start:stop] for k in ("input_ids", "labels")}
    if alone["input_ids"].numel() == inputs["input_ids"].numel():
        return
    with evaluating(model):
        batched: Tensor = measure_signals(model, head, inputs, tokens)[0]["loss"]
        batched = batched[tokens.offsets[index] : tokens.offsets[index + 1]]
        own_tokens = ResponseTokens.of(tokens.response_mask[row, start:stop][None])
        try:
            single = measure_signals(model, head, alone | {"use_cache": False}, own_tokens)[0]["loss"]
        except Exception:  # a model that needs more than token ids
            return
    apart = float((batched - single).abs().mean())
    rounded = rounds(model.get_input_embeddings().weight)
    if apart > (MIXES_IN_HALF if rounded else MIXES):
        behind = any(r == row and before <= start for r, _, before in tokens.segments)
        where = "behind others in its row" if behind else "padded with others"
        yield (
            f"{type(model).__name__}: a sequence {where} has other losses than alone, by {apart:.2f} nats per token: "
            "the layers mix sequences or count padding as positions; train without packing and padding-free batches, "
            "padded on the right"
        )


def _noisy(trainer: Any) -> bool:
    """Whether training's losses are random. An adapter's dropout does not count: the adapter starts at zero."""
    config = trainer.model.config.get_text_config()
    dropouts = [
        m.p for n, m in trainer.model.named_modules() if isinstance(m, nn.Dropout) and "lora_" not in n
    ]
    dropouts.append(getattr(config, "attention_dropout", 0.0) or 0.0)
    return any(dropouts) or bool(trainer.args.neftune_noise_alpha)
