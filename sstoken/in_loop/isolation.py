"""Checks, on the first batch, that its sequences do not influence each other.

Linear attention and convolutions run across the sequences of a packed row, padding on the left shifts absolute
positions, and experts of limited capacity are shared by all sequences. Training then sees other losses than `score`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sstoken.in_loop.forward import measure_signals
from sstoken.in_loop.head import HeadSignals
from sstoken.in_loop.histories import at_rest
from sstoken.in_loop.response_tokens import ResponseTokens

_TOLERANCE, _TOLERANCE_OF_HALF = 0.01, 0.1
"""Tolerated mean difference, in nats per token."""


def remarks_on_batch(
    model: nn.Module, head: HeadSignals, inputs: Mapping[str, Any], tokens: ResponseTokens, rounded: bool
) -> Iterator[str]:
    """Warn if one sequence's losses in its batch differ from those alone. Runs two forward passes without gradients.

    Args:
        model: a causal language model, not wrapped.
        head: measures that model's losses.
        inputs: the trainer's arguments to the model, including `labels`.
        tokens: the response tokens of the batch.
        rounded: whether the model computes in half precision.
    """
    answered = [i for i in range(len(tokens.segments)) if tokens.offsets[i] < tokens.offsets[i + 1]]
    if not answered:
        return
    index = max(answered, key=lambda i: (tokens.segments[i][1], -tokens.segments[i][2]))
    row, start, stop = tokens.segments[index]
    alone = {k: inputs[k][row : row + 1, start:stop] for k in ("input_ids", "labels")}
    if alone["input_ids"].numel() == inputs["input_ids"].numel():
        return
    with at_rest(model):
        batched: Tensor = measure_signals(model, head, inputs, tokens)[0]["loss"]
        batched = batched[tokens.offsets[index] : tokens.offsets[index + 1]]
        try:
            single = measure_signals(
                model,
                head,
                alone | {"use_cache": False},
                ResponseTokens.of(tokens.response_mask[row, start:stop][None]),
            )[0]["loss"]
        except Exception:  # a model that needs more than token ids
            return
    apart = float((batched - single).abs().mean())
    if apart > (_TOLERANCE_OF_HALF if rounded else _TOLERANCE):
        where = "behind others in its row" if start and _behind(tokens, row, start) else "padded with others"
        yield (
            f"{type(model).__name__}: a sequence {where} has other losses than alone, by {apart:.2f} nats per token: "
            "the layers mix sequences or count padding as positions; train without packing and padding-free batches, "
            "padded on the right"
        )


def _behind(tokens: ResponseTokens, row: int, start: int) -> bool:
    """Whether another sequence precedes position `start` in the row."""
    return any(r == row and stop <= start for r, _, stop in tokens.segments)
